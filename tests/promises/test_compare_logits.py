"""The checks of a conversion notice a vocabulary, a word splitter or a decoder that are not the model's."""

import contextlib
import importlib.util
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

import convert
from model import GPTConfig, GPTMini
from support.checkpoint import load_model, write_model
from support.exchange.compare_texts import (
    TEXTS,
    VOCABULARY_SAMPLES,
    OtherTokenizer,
    first_difference,
    texts_to_compare,
)
from support.exchange.hf_folder import read_tokenizer
from support.exchange.hf_names import config_json, to_theirs
from support.exchange.tokenizer_json import gpt2_merges, tokenizer_json
from support.files.tokenizer_files import byte_characters
from support.messages import UserError
from tokenizer import (
    EOS_TEXT,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    FileTokenizer,
    GPT2Tokenizer,
    Tokenizer,
)

WORDS = [
    "the cat sat on the mat, 12 cats and 345 mats; " * 30,
    "na\u00efve caf\u00e9s cost 7.50\n\n  in T\u014dky\u014d. " * 20,
]
TWO_LISTS = r"reads ['\"].*['\"] as \[.*\], and this project as \[.*\]"


@pytest.fixture
def saved(tmp_path) -> Callable[[Tokenizer], Path]:
    """A checkpoint of a tiny model for this tokenizer."""

    def save(tokenizer: Tokenizer) -> Path:
        torch.manual_seed(0)
        sizes = {"d_model": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_ff": 32, "max_seq_len": 64}
        write_model(
            tmp_path / "ours.ckpt",
            GPTMini(GPTConfig(vocab_size=tokenizer.vocab_size, **sizes)),
            tokenizer,
            {},
        )
        return tmp_path / "ours.ckpt"

    return save


def call(*argv: object) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert convert.main([str(word) for word in argv]) == 0
    return out.getvalue()


def bpe() -> BPETokenizer:
    return BPETokenizer.train(WORDS, 330)


def swapped(text: str) -> str:
    """The last two tokens of the vocabulary exchanged, which no text with letters alone would show."""
    tree = json.loads(text)
    vocabulary = tree["model"]["vocab"]
    one, other = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    return json.dumps(tree)


def other_words(text: str) -> str:
    backend = Backend.from_str(text)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )
    return backend.to_str()


def first_blank(text: str) -> str:
    backend = Backend.from_str(text)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return backend.to_str()


def normalized(text: str) -> str:
    backend = Backend.from_str(text)
    backend.normalizer = normalizers.NFKC()
    return backend.to_str()


def no_decoder(text: str) -> str:
    backend = Backend.from_str(text)
    backend.decoder = decoders.Fuse()
    return backend.to_str()


def stripping_decoder(text: str) -> str:
    backend = Backend.from_str(text)
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    return backend.to_str()


READ, WRITTEN = TWO_LISTS, r"writes the ids \[.*\] as ['\"].*['\"], and this project as ['\"].*['\"]"
CHANGES = pytest.mark.parametrize(
    ("change", "said"),
    [
        (swapped, READ),
        (other_words, READ),
        (first_blank, READ),
        (normalized, READ),
        (no_decoder, WRITTEN),
        (stripping_decoder, WRITTEN),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)


@CHANGES
def test_an_exported_tokenizer_that_is_not_ours_fails_and_leaves_nothing(
    saved, tmp_path, monkeypatch, change, said
):
    monkeypatch.setattr(convert, "tokenizer_json", lambda tokenizer: change(tokenizer_json(tokenizer)))
    with pytest.raises(UserError, match=said):
        call("--ckpt", saved(bpe()), "--to", "hf", "--output", tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["ours.ckpt"]


@CHANGES
def test_an_imported_tokenizer_that_is_not_the_one_in_the_folder_fails(
    saved, tmp_path, monkeypatch, change, said
):
    call("--ckpt", saved(bpe()), "--to", "hf", "--output", tmp_path / "hf")
    right = read_tokenizer

    def wrong(folder, hf, say):
        return FileTokenizer(change(right(folder, hf, say).backend.to_str()), EOS_TEXT)

    monkeypatch.setattr("support.exchange.hf_folder.read_tokenizer", wrong)
    with pytest.raises(UserError, match=said):
        call("--from", tmp_path / "hf", "--output", tmp_path / "back.ckpt")
    assert not (tmp_path / "back.ckpt").exists()


@pytest.mark.parametrize("program", ["llama_cpp", "transformers"])
@pytest.mark.parametrize("change", [swapped, "smollm", "qwen2"])
def test_a_gguf_whose_tokenizer_is_not_ours_fails(saved, tmp_path, monkeypatch, program, change):
    pytest.importorskip("gguf", reason="gguf is not installed")
    if program == "llama_cpp":
        pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    hide_llama_cpp(monkeypatch, program)
    path = saved(bpe())
    assert call("--ckpt", path, "--to", "gguf", "--output", tmp_path / "right.gguf").count("verified") == 2
    if change is swapped:
        monkeypatch.setattr(
            "support.exchange.gguf_file.tokenizer_json", lambda tokenizer: swapped(tokenizer_json(tokenizer))
        )
    elif change == "smollm" and program == "transformers":  # it does not know that name, and would not notice
        monkeypatch.setattr("support.exchange.gguf_file.word_splitter_name", lambda tree: change)
        assert "TEXT NOT VERIFIED" in call("--ckpt", path, "--to", "gguf", "--output", tmp_path / "m.gguf")
        return
    else:
        monkeypatch.setattr("support.exchange.gguf_file.word_splitter_name", lambda tree: change)
    with pytest.raises(UserError, match=READ):
        call("--ckpt", path, "--to", "gguf", "--output", tmp_path / "m.gguf")
    assert not list(tmp_path.glob("m.gguf*"))


def hide_llama_cpp(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Let llama_cpp be found only if it is the program to compare with."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "llama_cpp" != program else found(name)
    )


def test_exchanged_tokens_are_noticed_anywhere_in_the_vocabulary():
    """Texts alone would miss a rare token, so every id is decoded too."""
    tokenizer = bpe()
    n = tokenizer.vocab_size
    for one, other in [(0, n - 2), (n - 3, n - 2), (70, 80), (75, 300)]:
        places = list(range(n))
        places[one], places[other] = other, one
        witness = OtherTokenizer(
            "a program",
            encode=tokenizer.encode_prompt,
            decode=lambda ids, places=places: tokenizer.decode([places[id] for id in ids]),
        )
        assert "writes the ids" in first_difference(tokenizer, witness)
    assert (
        first_difference(tokenizer, OtherTokenizer("a program", tokenizer.encode_prompt, tokenizer.decode))
        is None
    )


def test_the_compared_texts_cover_many_scripts_or_the_characters_of_a_char_tokenizer():
    assert len(texts_to_compare(ByteTokenizer())) > len(TEXTS)
    assert (
        len(texts_to_compare(GPT2Tokenizer())) > VOCABULARY_SAMPLES
    )  # its own tokens, spread over the vocabulary
    telling = "".join(TEXTS)
    assert {" ", "\n", "\t", "\x00", "7", "\u00e9", "\u6771", "\U0001f389"} <= set(telling) and TEXTS[
        2
    ].startswith(" ")
    chars = CharTokenizer.train(["\u0436\u0443\u043a"])
    assert not set("".join(texts_to_compare(chars))) - set("\u0436\u0443\u043a")
    wrong = CharTokenizer("\u043a\u0443\u0436")
    assert "reads" in first_difference(chars, OtherTokenizer("a program", wrong.encode_prompt, wrong.decode))


@pytest.mark.parametrize(
    "tokenizer",
    [ByteTokenizer(), CharTokenizer.train(["abc \n"]), GPT2Tokenizer()],
    ids=["byte", "char", "gpt2"],
)
def test_each_kind_of_tokenizer_is_verified_out_and_in(saved, tmp_path, tokenizer):
    said = call("--ckpt", saved(tokenizer), "--to", "hf", "--output", tmp_path / "hf")
    assert f"all {tokenizer.vocab_size:,} ids read the same in transformers" in said
    assert "read the same" in call("--from", tmp_path / "hf", "--output", tmp_path / "back.ckpt")


# ---- whose tokenizer a folder has ----------------------------------------------------------------


SMALL_GPT2 = {
    "vocab_size": 50257,
    "d_model": 8,
    "n_layers": 1,
    "n_heads": 1,
    "n_kv_heads": 1,
    "d_ff": 32,
    "max_seq_len": 16,
    "norm": "layernorm",
    "mlp": "gelu",
    "position": "learned",
    "bias": True,
}


def gpt2_folder(folder: Path, tokenizer: Backend | None) -> Path:
    folder.mkdir(exist_ok=True)
    config = GPTConfig(**SMALL_GPT2)
    (folder / "config.json").write_text(json.dumps(config_json(config, 50256)))
    if tokenizer:
        tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def as_published() -> Backend:
    return Backend.from_str(tokenizer_json(GPT2Tokenizer()))


def of_another_language() -> Backend:
    """As many tokens as OpenAI's, but all under other ids."""
    words = [*byte_characters()[::-1], *(f"word{i}" for i in range(50_000))]
    backend = Backend(models.BPE(vocab={word: id for id, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    backend.add_special_tokens([AddedToken(EOS_TEXT, special=True)])
    return backend


def split_digits() -> Backend:
    return Backend.from_str(other_words(as_published().to_str()))


def one_merge_moved() -> Backend:
    tree = json.loads(as_published().to_str())
    merges = tree["model"]["merges"]
    merges[3], merges[4] = merges[4], merges[3]
    return Backend.from_str(json.dumps(tree))


def two_tokens_swapped() -> Backend:
    return Backend.from_str(swapped(as_published().to_str()))


def test_a_gpt2_folder_without_a_tokenizer_says_that_its_text_is_not_compared(tmp_path):
    folder = gpt2_folder(tmp_path / "hf", None)
    torch.manual_seed(0)
    model = GPTMini(GPTConfig(**SMALL_GPT2))
    save_file(to_theirs(model.config, model.state_dict()), folder / "model.safetensors", {"format": "pt"})
    said = call("--from", folder, "--output", tmp_path / "ours.ckpt")
    assert (
        "has none, so OpenAI's of GPT-2 is taken" in said
        and "TEXT NOT VERIFIED" in said
        and "verified: largest difference" in said
    )


def kind_of(folder: Path) -> str:
    return read_tokenizer(folder, json.loads((folder / "config.json").read_text()), lambda text: None).kind


@pytest.mark.parametrize(
    "make",
    [of_another_language, split_digits, one_merge_moved, two_tokens_swapped],
    ids=lambda make: make.__name__,
)
def test_a_gpt2_folder_keeps_its_own_tokenizer(tmp_path, make):
    own = make()
    folder = gpt2_folder(tmp_path / "hf", own)
    tokenizer = read_tokenizer(folder, json.loads((folder / "config.json").read_text()), print)
    text = "Hello, 1234 worlds: the other theme"
    assert tokenizer.kind == "file" and tokenizer.encode(text) == own.encode(text).ids


def test_openais_tokenizer_is_recognized_in_any_of_its_files(tmp_path):
    assert kind_of(gpt2_folder(tmp_path / "json", as_published())) == "gpt2"
    folder = gpt2_folder(tmp_path / "files", None)
    vocabulary, merges = gpt2_merges()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n")
    assert kind_of(folder) == "gpt2"
    said = []
    folder = gpt2_folder(tmp_path / "none", None)
    assert read_tokenizer(folder, {"model_type": "gpt2", "vocab_size": 50257}, said.append).kind == "gpt2"
    assert "has none, so OpenAI's of GPT-2 is taken" in said[0]


def test_vocab_json_and_merges_txt_of_another_vocabulary_are_read(tmp_path):
    """Older folders have these instead of tokenizer.json; the ids are those of transformers' own reader."""
    import transformers

    folder, own = gpt2_folder(tmp_path / "hf", None), json.loads(bpe().backend.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(own["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, own["merges"])) + "\n")
    tokenizer = read_tokenizer(folder, {"model_type": "gpt2", "vocab_size": 330}, print)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in WORDS:
        assert tokenizer.encode(text) == theirs(text).input_ids
    assert tokenizer.kind == "file" and tokenizer.eos_id == theirs.eos_token_id


@pytest.mark.parametrize(
    ("name", "model_type", "rows"),
    [("vocab.txt", "gpt2", 50257), ("tokenizer.model", "llama", 300), (None, "gpt2", 50304)],
)
def test_no_tokenizer_is_guessed(tmp_path, name, model_type, rows):
    if name:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(
        UserError, match=f"has no tokenizer.json{f' .only {name}.' if name else ''}, and without"
    ):
        read_tokenizer(tmp_path, {"model_type": model_type, "vocab_size": rows}, print)


def test_a_class_that_reads_the_folder_differently_is_named_and_the_file_is_followed(saved, tmp_path):
    """In transformers, tokenizer_config.json can change how GPT-2's class reads tokenizer.json."""
    call("--ckpt", saved(bpe()), "--to", "hf", "--output", tmp_path / "hf")
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True, "eos_token": EOS_TEXT}
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(settings))
    said = call("--from", tmp_path / "hf", "--output", tmp_path / "back.ckpt")
    assert "ids read the same in its tokenizer.json" in said and "; the file is followed" in said
    assert load_model(tmp_path / "back.ckpt")[1].encode(WORDS[0]) == bpe().encode(WORDS[0])
