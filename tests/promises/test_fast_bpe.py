"""support/files/fast_bpe.py: a `bpe` tokenizer encodes with tiktoken, and its ids are those that the library
`tokenizers` gives, which has trained it. That library is the witness everywhere here."""

import itertools
import json
import multiprocessing
import os
import pickle
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from tokenizers import Tokenizer as Backend

import support.files.fast_bpe as fast_bpe
from data import tokenize
from support.exchange.tokenizer_json import tokenizer_json
from support.files.fast_bpe import (
    FAST_AFTER,
    LONG_WORD,
    SameCharacters,
    encode_in_threads,
    encoding_of,
    has_long_word,
)
from support.files.tokenizer_files import byte_characters
from support.messages import UserError
from tokenizer import EOS_TEXT, GPT2_CHARS, BPETokenizer, FileTokenizer, GPT2Tokenizer, tokenizer_from_dict

REPO = Path(__file__).resolve().parents[2]
CORPUS = (REPO / "data" / "tiny_corpus.txt").read_text(encoding="utf-8")

ALPHABETS = ["a", "ab", "aab", "ab ", "01", "a1 ", "'st ", "éa", "日本語", "👩\u200d👧🏽 ", "e\u0301\u0323 "]
ALPHABETS += [
    "\0\x01\x1b\x7f",
    "\x85\u00a0\u2003\u3000 \n",
    "\r\n\t ",
    "!?. ",
    "ⅧⅨ٣٤1",
    "שלא ",
    "\u1680\u180e\u200b\u2028x",
]
WORDS = [
    EOS_TEXT,
    " the",
    "'re",
    "'ll",
    " ",
    "  ",
    "\n\n",
    "aaaa",
    "abab",
    "12345",
    "日本",
    "👩‍👩‍👧",
    "\ufeff",
]


def hostile_text(draw: random.Random, n: int) -> str:
    """About n characters: of two small alphabets, runs of one character, any code points, or odd words."""
    kind = draw.random()
    if kind < 0.6:
        return "".join(draw.choices(draw.choice(ALPHABETS) + draw.choice(ALPHABETS), k=n))
    if kind < 0.75:
        return "".join(draw.choice("ab 1\n") * draw.randrange(1, 40) for _ in range(n // 20 + 1))
    if kind < 0.9:
        codes = (draw.randrange(0x110000) for _ in range(n))
        return "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)
    return "".join(draw.choices(WORDS, k=n // 4 + 1))


def library_ids(tokenizer: BPETokenizer, text: str) -> list[int]:
    return tokenizer.backend.encode(text, add_special_tokens=False).ids


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """tiktoken is used from the first character on."""
    monkeypatch.setattr(fast_bpe, "FAST_AFTER", 0)


@pytest.fixture(scope="module")
def trained() -> BPETokenizer:
    return BPETokenizer.train([CORPUS, "日本語のテキスト。" * 20], 700)


@pytest.fixture
def tokenizer(trained) -> BPETokenizer:
    """A fresh one, which has not encoded anything."""
    return tokenizer_from_dict(trained.to_dict())


# ---- merges --------------------------------------------------------------------------------------


def fuzz_trained(seeds: range) -> None:
    for seed in seeds:
        draw = random.Random(seed)
        texts = [hostile_text(draw, draw.randrange(5, 3000)) for _ in range(draw.randrange(1, 6))]
        tokenizer = BPETokenizer.train(texts, 257 + draw.choice([1, 3, 10, 40, 150, 600]))
        assert tokenizer.fast.encoding is not None, seed
        texts = [hostile_text(draw, draw.choice([0, 1, 3, 10, 60, 300, 1500])) for _ in range(12)]
        # Texts of a few tokens: likely to hold what may be joined in two ways.
        texts += [tokenizer.decode(draw.choices(range(1, tokenizer.vocab_size), k=8)) for _ in range(5)]
        for text in texts:
            assert tokenizer.fast.encode(text).tolist() == library_ids(tokenizer, text), (seed, text)


def test_ids_of_random_vocabularies_equal_the_librarys():
    fuzz_trained(range(60))


@pytest.mark.slow
def test_ids_of_thousands_of_random_vocabularies_equal_the_librarys():
    fuzz_trained(range(60, 1500))


def by_hand(merges: list[tuple[str, str]], ids: list[int] | None = None, **changes) -> BPETokenizer:
    """A tokenizer with these merges. Their tokens have ids from 257 on, if `ids` does not say otherwise.
    `changes` are other rules for the model."""
    tree = json.loads(BPETokenizer.train(["x"], 257).backend.to_str())
    made = dict.fromkeys(left + right for left, right in merges)
    vocab = {token: id for id, token in enumerate([EOS_TEXT, *byte_characters(), *made])}
    vocab |= dict(zip(made, ids or (), strict=False))
    tree["model"] |= {"vocab": vocab, "merges": merges, **changes}
    return BPETokenizer(json.dumps(tree), EOS_TEXT)


def texts_of(letters: str, longest: int) -> Iterator[str]:
    for n in range(1, longest + 1):
        yield from map("".join, itertools.product(letters, repeat=n))


def test_merges_that_no_training_makes_are_left_to_the_library_or_give_its_ids(monkeypatch):
    """Random merges, not learned from a text. Where tiktoken is refused, it would indeed give other ids in
    nine of ten cases; in the tenth the texts are too short to show it."""
    allowed, refused, shown = 0, 0, 0
    for seed in range(120):
        draw = random.Random(seed)
        letters = draw.choice(["ab", "abc", "a"])
        tokens, merges = list(letters), []
        for _ in range(draw.choice([2, 4, 8, 20])):
            left, right = draw.choice(tokens), draw.choice(tokens)
            if left + right not in tokens:
                tokens.append(left + right)
                merges.append((left, right))
        tokenizer = by_hand(merges)
        texts = [*texts_of(letters, 6), *("".join(draw.choices(letters, k=600)) for _ in range(5)), *tokens]
        with monkeypatch.context() as patch:
            patch.setattr(fast_bpe, "same_merges", lambda *parts: True)
            forced = encoding_of(tokenizer.backend)
        differs = any(forced.encode_ordinary(text) != library_ids(tokenizer, text) for text in texts)
        if tokenizer.fast.encoding is not None:
            allowed += 1
            assert not differs, seed
        else:
            refused += 1
            shown += differs
    assert allowed > 20
    assert shown > 0.9 * refused > 20


@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [
        # `abc` needs `ab`, and `bc` comes first: the library never makes it, and tiktoken would.
        (lambda: by_hand([("b", "c"), ("a", "b"), ("ab", "c")]), "abc"),
        (lambda: by_hand([("a", "b"), ("c", "d")], ids=[258, 257]), "abcd"),
        (lambda: by_hand([("a", "b"), ("ab", "c"), ("b", "c"), ("a", "bc")]), "abcabc"),
        (lambda: by_hand([("a", "b")], ignore_merges=True), "ab"),
        (lambda: by_hand([("a", "b")], byte_fallback=True), "ab"),
        (lambda: by_hand([("a", "b")], unk_token=EOS_TEXT), "ab"),
    ],
    ids=["no merge reaches it", "order of ids", "made twice", "ignore_merges", "byte_fallback", "unk_token"],
)
def test_rules_that_tiktoken_cannot_follow_are_left_to_the_library(tokenizer, text):
    tokenizer = tokenizer()
    assert tokenizer.fast.encoding is None
    assert tokenizer.encode(text) == library_ids(tokenizer, text)
    assert tokenizer.encode_batch([text, text]) == [library_ids(tokenizer, text)] * 2


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree.update(pre_tokenizer=None),
        lambda tree: tree["pre_tokenizer"].update(add_prefix_space=True),
        lambda tree: tree["pre_tokenizer"].update(use_regex=False),
        lambda tree: tree.update(normalizer={"type": "Lowercase"}),
        lambda tree: tree["added_tokens"].append(tree["added_tokens"][0] | {"id": 300, "content": "ab"}),
        lambda tree: tree["model"]["vocab"].update(unused=300),
    ],
    ids=["no split", "space before", "no pattern", "normalizer", "added token", "token without a merge"],
)
def test_a_checkpoint_with_other_rules_is_left_to_the_library(change):
    tree = json.loads(by_hand([("a", "b")]).backend.to_str())
    change(tree)
    tokenizer = BPETokenizer(json.dumps(tree), EOS_TEXT)
    assert tokenizer.fast.encoding is None
    text = "Ab ab don't " + EOS_TEXT
    assert tokenizer.encode(text) == library_ids(tokenizer, text)


def test_a_tokenizer_json_with_the_same_rules_is_fast_too(trained):
    """Such as `prepare.py tokenizer` writes. More special tokens, under any ids, change nothing: they are
    plain text in a text."""
    tree = json.loads(trained.backend.to_str())
    token = tree["added_tokens"][0]
    tree["added_tokens"] += [token | {"id": 700, "content": "<pad>"}, token | {"id": 701, "content": "</s>"}]
    tokenizer = FileTokenizer(json.dumps(tree), "</s>")
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (701, 702)
    assert tokenizer.fast.encoding is not None
    text = f"{EOS_TEXT} <pad></s> {CORPUS[:3000]}"
    ids = tokenizer.encode(text)
    assert ids == library_ids(tokenizer, text) == library_ids(trained, text)
    assert not {tokenizer.eos_id, 0, 700} & set(ids)


def test_the_published_gpt2_vocabulary_as_a_file_gives_the_same_ids():
    """50,000 merges that this library has not trained."""
    gpt2 = GPT2Tokenizer()
    tokenizer = FileTokenizer(tokenizer_json(gpt2), EOS_TEXT)
    assert tokenizer.fast.encoding is not None
    for text in texts_to_encode():
        assert tokenizer.encode(text) == library_ids(tokenizer, text) == gpt2.encode(text)


# ---- characters ----------------------------------------------------------------------------------


def showing_splits() -> BPETokenizer:
    """A tokenizer whose ids show whether a character is in one word with a letter, a digit, a mark or a blank
    at its side: its tokens are these four together with any other byte, before it and after it."""
    chars = byte_characters()
    neighbours = [chars[ord(char)] for char in "a1! "]
    others = [char for char in chars if char not in neighbours]
    merges = [(near, other) for near in neighbours for other in others]
    merges += [(other, near) for near in neighbours for other in others]
    return by_hand(merges)


def in_contexts(codes: range) -> str:
    chars = (chr(code) for code in codes if not 0xD800 <= code < 0xE000)
    return "".join(f"{c}a{c}a 1{c}1 !{c}! {c} a{c}{c}a  {c}  {c}'s'{c}s\n" for c in chars)


def compare_code_points(codes: range) -> int:
    """How many of the texts tiktoken has encoded."""
    tokenizer = showing_splits()
    assert tokenizer.fast.encoding is not None
    n_fast = 0
    for first in codes[::256]:
        text = in_contexts(range(first, first + 256))
        n_fast += tokenizer.fast.encode(text) is not None
        assert tokenizer.encode(text) == library_ids(tokenizer, text), hex(first)
    return n_fast


def test_code_points_of_the_usual_scripts_give_the_librarys_ids():
    """Latin to Hangul and the emoji; letters, digits and blanks of all kinds."""
    assert compare_code_points(range(0x3200)) == 50
    assert compare_code_points(range(0x1F300, 0x1FB00)) == 8


@pytest.mark.slow
def test_all_code_points_give_the_librarys_ids():
    """All but those of the planes that Unicode has not begun to use or keeps for private use."""
    compare_code_points(range(0x40000))
    compare_code_points(range(0xE0000, 0xE0200))
    compare_code_points(range(0x10FF00, 0x110000))


def test_the_tokenizer_that_shows_splits_does_show_them():
    """Otherwise the tests above would compare nothing."""
    tokenizer = showing_splits()

    def lengths(text: str) -> list[int]:
        return [len(tokenizer.decode([id])) for id in tokenizer.encode(text)]

    assert lengths("aé1") == [2, 1, 1] != lengths("a²1")  # "²" is a digit, so it goes with the 1


def test_a_text_with_a_character_that_only_one_library_calls_a_letter_is_left_to_the_library(
    tokenizer, monkeypatch
):
    """As when one of them has a newer version of Unicode. Here tiktoken does not know the letter é."""
    every_byte = {bytes([byte]): byte for byte in range(256)}
    older = tiktoken.Encoding("x", pat_str="[^\\P{L}é]", mergeable_ranks=every_byte, special_tokens={})
    characters = tokenizer.fast.characters
    (_, theirs), *others = characters.filters
    monkeypatch.setattr(characters, "filters", [(older, theirs), *others])
    for text, is_fast in [("nää", True), ("café", False), ("naïve", True), ("é", False), ("ä", True)]:
        assert (tokenizer.fast.encode(text) is not None) == is_fast
        assert tokenizer.encode(text) == library_ids(tokenizer, text)
    assert tokenizer.encode_batch(["é a", "ä"])[0] == library_ids(tokenizer, "é a")


def test_almost_all_characters_are_the_same_to_both_libraries():
    """Whatever their versions: the letters of Unicode 14 and before are known to both."""
    import unicodedata

    chars = "".join(map(chr, [*range(0x20, 0xD800), *range(0xE000, 0x20000)]))
    characters = SameCharacters()
    if not characters.are_in(chars):
        differ = [chr(code) for code in map(ord, chars) if not characters.same[code]]
        assert not [char for char in differ if unicodedata.category(char) != "Cn"][:20]


@pytest.mark.parametrize("text", ["a\ud800b", "\udfff", "\ud83d\ude00"], ids=ascii)
def test_half_a_surrogate_pair_is_refused_as_before(tokenizer, text):
    with pytest.raises(UserError, match="cannot encode the text"):
        tokenizer.encode(text)
    with pytest.raises(UserError, match="cannot encode the text"):
        tokenizer.encode_batch(["good", text])


# ---- long words ----------------------------------------------------------------------------------

LONG = ["a", "1", "!", "日", " ", "\n", "\u3000", "ab", "a1", " \n\t"]


@pytest.mark.parametrize("n", [40_000, pytest.param(1_010_000, marks=pytest.mark.slow)])
def test_a_text_without_a_word_end_gives_the_librarys_ids(n):
    """tiktoken can take minutes for a long word, and a panic ends it at more than a million blanks."""
    tokenizer = BPETokenizer.train([CORPUS, *(unit * 300 for unit in LONG)], 800)
    for unit in LONG:
        for text in (unit * (n // len(unit)), unit * (n // len(unit)) + "x"):
            assert has_long_word(text)
            assert tokenizer.encode(text) == library_ids(tokenizer, text)


@pytest.mark.parametrize("n", [LONG_WORD - 1, LONG_WORD, LONG_WORD + 1, LONG_WORD + 2])
def test_words_near_the_limit_give_the_librarys_ids(tokenizer, n):
    for unit in LONG:
        stretch = (unit * n)[:n]
        for text in (stretch, f"word {stretch} word", f"word{stretch}\nword", CORPUS[:5000] + stretch + "x"):
            ids = tokenizer.fast.encode(text)
            assert ids is None or ids.tolist() == library_ids(tokenizer, text)
    assert not has_long_word("word " * n)
    assert has_long_word("word " + "a" * 2 * n + " word")


def test_gpt2_takes_more_blanks_than_tiktoken_can():
    gpt2 = GPT2Tokenizer()
    text = " " * (2 * GPT2_CHARS) + "x"
    assert gpt2.decode(gpt2.encode(text)) == text
    assert gpt2.encode(CORPUS * 8) == gpt2.backend.encode_ordinary(CORPUS * 8)
    assert len(CORPUS) * 8 > GPT2_CHARS


# ---- batches, threads, processes -----------------------------------------------------------------


def texts_to_encode() -> list[str]:
    draw = random.Random(5)
    return ["", CORPUS, "a" * 3000, *(hostile_text(draw, 200) for _ in range(40)), EOS_TEXT, "\0"]


@pytest.mark.parametrize("threads", [True, False])
def test_a_batch_gives_the_ids_of_single_texts_in_their_order(tokenizer, monkeypatch, threads):
    if threads:
        monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: 3)
    texts = texts_to_encode()
    expected = [library_ids(tokenizer, text) for text in texts]
    assert [list(ids) for ids in tokenizer.encode_batch(texts)] == expected
    assert [tokenizer.encode(text) for text in texts] == expected
    assert [list(ids) for ids in tokenizer.encode_batch(tuple(texts[:2]))] == expected[:2]
    assert tokenizer.encode_batch([]) == []
    gpt2 = GPT2Tokenizer()
    assert [list(ids) for ids in gpt2.encode_batch(texts)] == [gpt2.encode(text) for text in texts]


def test_threads_are_used_unless_a_process_encodes_next_to_others(monkeypatch):
    import threading

    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    both_are_here = threading.Barrier(2, timeout=30)
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    assert encode_in_threads(lambda text: [both_are_here.wait(), text][1:], ["a", "b"]) == [["a"], ["b"]]
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert (
        encode_in_threads(lambda text: [threading.active_count()], ["a", "b"])
        == [[threading.active_count()]] * 2
    )


def test_ids_of_single_texts_are_plain_numbers(tokenizer):
    ids = tokenizer.encode("plain numbers, as JSON needs them")
    assert type(ids) is list and {type(id) for id in ids} == {int}


def test_a_short_prompt_does_not_wait_for_tiktoken(trained, monkeypatch):
    monkeypatch.setattr(fast_bpe, "FAST_AFTER", FAST_AFTER)
    tokenizer = tokenizer_from_dict(trained.to_dict())
    tokenizer.encode("a short prompt")
    assert "encoding" not in vars(tokenizer.fast)
    for _ in range(FAST_AFTER // 1000 + 1):
        tokenizer.encode("a" * 1000)
    assert tokenizer.encode("a b") == library_ids(tokenizer, "a b")
    assert "encoding" in vars(tokenizer.fast)


def test_encoding_changes_nothing_that_a_checkpoint_holds(tokenizer):
    before = tokenizer.to_dict(), tokenizer.fingerprint()
    tokenizer.encode_batch([CORPUS, "é日本"])
    assert (tokenizer.to_dict(), tokenizer.fingerprint()) == before
    assert before[0]["json"] == Backend.from_str(before[0]["json"]).to_str()


def test_a_tokenizer_in_use_can_be_sent_to_another_process(tokenizer):
    """As to the worker of a DataLoader: forked, or pickled. Once a pickled copy made EOS of text that spells
    it."""
    texts = texts_to_encode()
    expected = [library_ids(tokenizer, text) for text in texts]
    assert [list(ids) for ids in tokenizer.encode_batch(texts)] == expected
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert [list(ids) for ids in copy.encode_batch(texts)] == expected
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            ids = pool.apply(tokenizer.encode_batch, (texts,))
            assert [list(part) for part in ids] == expected


def test_a_packed_corpus_is_the_librarys(trained, monkeypatch):
    documents = CORPUS.split(EOS_TEXT) + texts_to_encode()
    row = tokenize(documents, tokenizer_from_dict(trained.to_dict()))
    monkeypatch.setattr(fast_bpe.FastBPE, "pays_off", lambda self, n_chars: False)
    assert np.array_equal(row, tokenize(documents, trained))
