"""support/text/mid_document.py: a text that follows another has the ids that it has there, and ids the text."""

import random

import pytest
from foreign_tokenizers import EVERY, tokenizer_like

from support.text.mid_document import TextStream, ids_after, text_after

PIECES = [
    "tick",
    " tock",
    " ",
    "  ",
    "\n",
    "\n\n",
    "s",
    "'s",
    "12",
    "345",
    ".",
    "é",
    "\U0001f389\U0001f389",
    "{x}",
    "</s>",
    "<s>",
    "a",
    "\t",
    ":",
]


def texts(seed: int, n: int = 60) -> list[tuple[str, str]]:
    draw = random.Random(seed)
    return [tuple("".join(draw.choices(PIECES, k=draw.randint(1, 5))) for _ in range(2)) for _ in range(n)]


@pytest.mark.parametrize("name", EVERY)
def test_ids_after_others_are_those_of_both_texts_together_where_these_begin_with_the_others(name):
    tokenizer, together = tokenizer_like(name), 0
    for before, text in texts(1):
        known, both, found = (
            tokenizer.encode(before),
            tokenizer.encode(before + text),
            ids_after(tokenizer, [before], text),
        )
        if both[: len(known)] == known:
            assert known + found == both
            together += 1
        assert tokenizer.decode(known + found) == tokenizer.decode(known) + text, (
            "no space comes or goes, whatever the border"
        )
    assert together >= 20


@pytest.mark.parametrize("name", ["llama", "space first", "space always", "llama + bos"])
def test_a_word_inside_a_text_gets_no_space_of_its_own(name):
    """`tick` and `s` are two tokens or one; neither way there is a space between."""
    tokenizer = tokenizer_like(name)
    assert tokenizer.decode([*tokenizer.encode("ti"), *tokenizer.encode("ck")]) == "ti ck", (
        "what encoding apart would give"
    )
    assert tokenizer.encode("tick")[:-1] != tokenizer.encode("ti"), (
        "the border must be inside a token for this to mean anything"
    )
    assert tokenizer.decode([*tokenizer.encode("ti"), *ids_after(tokenizer, ["ti"], "ck")]) == "tick"
    assert ids_after(tokenizer, [], "tick") == tokenizer.encode("tick"), "nothing before: it is the start"


@pytest.mark.parametrize("name", EVERY)
def test_the_text_of_ids_after_others_is_the_rest_of_the_whole_text(name):
    tokenizer, draw = tokenizer_like(name), random.Random(2)
    for before, text in texts(3):
        ids = [*tokenizer.bos_ids, *tokenizer.encode(before + text + "\U0001f389 tick tock" * 8)]
        whole = tokenizer.decode(ids[len(tokenizer.bos_ids) :])
        cut = draw.randrange(len(tokenizer.bos_ids), len(ids))
        shown = tokenizer.decode(ids[len(tokenizer.bos_ids) : cut])
        if whole.startswith(shown):  # not within a character
            assert text_after(tokenizer, ids[:cut], ids[cut:]) == whole[len(shown) :]
            stream = TextStream(tokenizer, ids[:cut])
            assert "".join(map(stream.push, ids[cut:])) + stream.flush() == whole[len(shown) :]


@pytest.mark.parametrize("name", EVERY)
def test_a_text_after_eos_or_bos_is_at_its_start(name):
    tokenizer = tokenizer_like(name)
    ids = tokenizer.encode("tick tock")
    for before in (
        [tokenizer.eos_id],
        [*tokenizer.bos_ids],
        [*tokenizer.encode("a b"), tokenizer.eos_id, *tokenizer.bos_ids],
    ):
        assert text_after(tokenizer, before, ids) == tokenizer.decode(ids)


def test_the_window_does_not_begin_within_a_character():
    """Bytes of this tokenizer that do not begin with a whole character spoil all bytes after them."""
    tokenizer = tokenizer_like("llama")
    before = tokenizer.encode("tick " + "\U0001f389" * 9)
    for n in range(4):
        assert (
            text_after(tokenizer, before, tokenizer.encode("\U0001f680" + "a" * n)[1:])
            == "\U0001f680" + "a" * n
        )
