"""support/text/mid_document.py: in the middle of a document, text has the ids that it has there, and ids have
the text that they have there."""

import random

import pytest
from foreign_tokenizers import EVERY, tokenizer_like
from test_tokenizer import HOSTILE, one_of_each_kind
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from support.text.mid_document import TextStream, ids_after, text_after
from tokenizer import KINDS, FileTokenizer

PIECES = ["tick", " tock", " ", "  ", "\n", "\n\n", "s", "'s", "12", "345", ".", "é", "\U0001f389\U0001f389"]
PIECES += ["{x}", "</s>", "<s>", "a", "\t", ":"]


def drawn_pairs(seed: int, n: int = 60) -> list[tuple[str, str]]:
    """Pairs of texts, of one to five pieces each."""
    draw = random.Random(seed)

    def drawn_text() -> str:
        return "".join(draw.choices(PIECES, k=draw.randint(1, 5)))

    return [(drawn_text(), drawn_text()) for _ in range(n)]


# ---- text to ids ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_ids_after_others_are_the_rest_of_both_texts_together_if_no_token_reaches_over_the_border(name):
    tokenizer = tokenizer_like(name)
    n_together = 0
    for before, text in drawn_pairs(1):
        known = tokenizer.encode(before)
        both = tokenizer.encode(before + text)
        found = ids_after(tokenizer, [before], text)
        if both[: len(known)] == known:
            assert known + found == both
            n_together += 1
        assert tokenizer.decode(known + found) == tokenizer.decode(known) + text, "no space is added or lost"
    assert n_together >= 20


@pytest.mark.parametrize("name", ["llama", "space first", "space always", "llama + bos"])
def test_a_word_inside_a_text_gets_no_space_of_its_own(name):
    tokenizer = tokenizer_like(name)
    apart = [*tokenizer.encode("ti"), *tokenizer.encode("ck")]
    assert tokenizer.decode(apart) == "ti ck", "encoded apart, the second part begins with a space"
    assert tokenizer.encode("tick")[:-1] != tokenizer.encode("ti"), "a token reaches over the border"
    assert tokenizer.decode([*tokenizer.encode("ti"), *ids_after(tokenizer, ["ti"], "ck")]) == "tick"
    assert ids_after(tokenizer, [], "tick") == tokenizer.encode("tick"), "nothing before: it is the start"


# ---- ids to text ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_the_text_of_ids_after_others_is_the_rest_of_the_whole_text(name):
    tokenizer = tokenizer_like(name)
    draw = random.Random(2)
    n_bos = len(tokenizer.bos_ids)
    for before, text in drawn_pairs(3):
        ids = [*tokenizer.bos_ids, *tokenizer.encode(before + text + "\U0001f389 tick tock" * 8)]
        whole = tokenizer.decode(ids[n_bos:])
        cut = draw.randrange(n_bos, len(ids))
        shown = tokenizer.decode(ids[n_bos:cut])
        if whole.startswith(shown):  # the cut is not inside a character
            rest = whole[len(shown) :]
            assert text_after(tokenizer, ids[:cut], ids[cut:]) == rest
            stream = TextStream(tokenizer, ids[:cut])
            assert "".join(map(stream.push, ids[cut:])) + stream.flush() == rest


@pytest.mark.parametrize("name", EVERY)
def test_a_text_after_eos_or_bos_is_at_its_start(name):
    tokenizer = tokenizer_like(name)
    ids = tokenizer.encode("tick tock")
    bos_ids = list(tokenizer.bos_ids)
    other_document = [*tokenizer.encode("a b"), tokenizer.eos_id]
    for before in ([tokenizer.eos_id], bos_ids, other_document + bos_ids):
        assert text_after(tokenizer, before, ids) == tokenizer.decode(ids)


def test_the_ids_that_are_looked_at_do_not_begin_inside_a_character():
    """With this tokenizer, bytes that do not begin a character spoil all bytes after them."""
    tokenizer = tokenizer_like("llama")
    before = tokenizer.encode("tick " + "\U0001f389" * 9)
    for n in range(4):
        text = "\U0001f680" + "a" * n
        assert text_after(tokenizer, before, tokenizer.encode(text)[1:]) == text


# ---- a stream of ids -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in HOSTILE if name != "long_word"])
@pytest.mark.parametrize("kind", KINDS)
def test_text_stream_never_shows_half_a_character(kind, name):
    tokenizer = one_of_each_kind()[kind]
    ids = [*tokenizer.encode(HOSTILE[name]), tokenizer.eos_id, *tokenizer.encode(HOSTILE[name])]
    stream = TextStream(tokenizer)
    shown = ""
    for i in ids:
        shown += stream.push(i)
        assert tokenizer.decode(ids).startswith(shown)
    assert shown + stream.flush() == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["byte", "bpe", "gpt2", "file"])
def test_text_stream_shows_an_emoji_with_its_last_token(kind):
    tokenizer = one_of_each_kind()[kind]
    ids = tokenizer.encode("\U0001f9ff")
    assert len(ids) > 1, "the emoji must be split for this test to mean anything"
    stream = TextStream(tokenizer)
    assert [stream.push(i) for i in ids] == [""] * (len(ids) - 1) + ["\U0001f9ff"]
    assert stream.flush() == ""


@pytest.mark.parametrize("kind", ["byte", "bpe", "gpt2", "file"])
def test_flush_shows_the_replacement_character_for_an_unfinished_one(kind):
    tokenizer = one_of_each_kind()[kind]
    ids = [*tokenizer.encode("ok"), *tokenizer.encode("\U0001f9ff")[:-1]]
    stream = TextStream(tokenizer)
    assert "".join(stream.push(i) for i in ids) == "ok"
    assert set(stream.flush()) == {"\ufffd"}
    assert stream.flush() == "", "what was flushed is gone"


@pytest.mark.parametrize("kind", ["byte", "bpe", "gpt2", "file"])
def test_broken_bytes_in_the_middle_do_not_swallow_what_follows(kind):
    tokenizer = one_of_each_kind()[kind]
    ids = [*tokenizer.encode("\U0001f9ff")[:1], *tokenizer.encode("hello"), *tokenizer.encode("é")]
    stream = TextStream(tokenizer)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)
    assert "".join(pieces).endswith("helloé")


def test_text_stream_keeps_the_spaces_of_a_decoder_that_strips_the_first_one():
    """SentencePiece style: a word's token holds the space before the word, and decoding drops the space of
    the very first word."""
    vocab = {"</s>": 0, "▁": 1, "a": 2, "b": 3, "▁a": 4, "▁b": 5}
    backend = Backend(models.BPE(vocab=vocab, merges=[("▁", "a"), ("▁", "b")]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["</s>"])
    tokenizer = FileTokenizer(backend.to_str(), "</s>")
    stream = TextStream(tokenizer)
    assert [stream.push(i) for i in tokenizer.encode("a b a")] == ["a", " b", " a"]
