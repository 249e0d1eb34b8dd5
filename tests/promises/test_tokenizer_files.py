"""Files of tokenizers: a tokenizer.json, or vocab.json with merges.txt, gives the ids that its maker gives;
damaged and foreign files are refused."""

import json
import shutil
from pathlib import Path

import pytest
from test_tokenizer import CORPUS, HOSTILE, foreign_json
from tokenizers import Tokenizer as Backend
from tokenizers import models

from support.files.tokenizer_files import gpt2_files, read_tokenizer_file
from support.messages import UserError
from tokenizer import EOS_TEXT, FileTokenizer, GPT2Tokenizer, Tokenizer, build_tokenizer, tokenizer_from_dict

# ---- tokenizer.json -------------------------------------------------------------------------------


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


def test_an_unknown_eos_is_an_error_that_says_where_to_write_its_name(tmp_path):
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
def test_a_file_that_is_not_a_tokenizer_json_is_refused(tmp_path, content):
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
    """Published files often pad, cut at 512 tokens or put EOS around each text; documents must stay as they
    are."""
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
    plain = Backend.from_str(json.dumps(state))
    assert plain.encode("a<stop>").ids[-1] == 0, "the library alone gives EOS for such text"
    tokenizer = FileTokenizer(json.dumps(state), "<stop>")
    assert tokenizer.eos_id not in tokenizer.encode("a<stop>b")
    assert tokenizer.decode(tokenizer.encode("a<stop>b")) == "a<stop>b"


def test_an_eos_that_a_unigram_model_would_spell_is_refused_or_kept_apart():
    """As in T5's file: EOS is also an ordinary piece of the model, so no setting keeps text from becoming
    it."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((c, -5.0) for c in "ab</s>")]
    backend = Backend(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    backend.add_special_tokens(["</s>"])
    try:
        tokenizer = FileTokenizer(backend.to_str(), "</s>")
    except UserError as error:
        assert "</s>" in str(error)
    else:
        assert tokenizer.eos_id not in tokenizer.encode("a</s>b")


# ---- vocab.json and merges.txt -------------------------------------------------------------------


@pytest.fixture
def gpt2_style(tmp_path) -> Path:
    """A folder with GPT-2's published files, under the names that they have at Hugging Face."""
    data = gpt2_files()
    shutil.copy(data / "encoder.json", tmp_path / "vocab.json")
    shutil.copy(data / "vocab.bpe", tmp_path / "merges.txt")
    return tmp_path


def test_vocab_and_merges_of_gpt2_make_the_gpt2_tokenizer(gpt2_style):
    gpt2 = GPT2Tokenizer()
    made = Tokenizer.from_files(gpt2_style / "vocab.json", gpt2_style / "merges.txt", [EOS_TEXT])
    assert (made.vocab_size, made.eos_id) == (50257, 50256)
    for text in [*HOSTILE.values(), *CORPUS]:
        assert made.encode(text) == gpt2.encode(text)
        assert made.decode(made.encode(text)) == text
    assert tokenizer_from_dict(made.to_dict()).fingerprint() == made.fingerprint()
    assert build_tokenizer("file", [], path=str(gpt2_style)).fingerprint() == made.fingerprint()
    from_folder = read_tokenizer_file(gpt2_style)
    for name in ("vocab.json", "merges.txt"):
        assert read_tokenizer_file(gpt2_style / name) == from_folder


def test_special_tokens_that_a_vocabulary_lacks_come_after_it(gpt2_style):
    made = Tokenizer.from_files(gpt2_style / "vocab.json", gpt2_style / "merges.txt", ["<|end|>", "<|pad|>"])
    assert (made.eos_text, made.eos_id, made.vocab_size) == ("<|end|>", 50257, 50259)
    assert made.special_ids == {"<|end|>": 50257, "<|pad|>": 50258}
    assert 50257 not in made.encode("<|end|>")
    with pytest.raises(UserError, match="special_tokens is empty"):
        Tokenizer.from_files(gpt2_style / "vocab.json", gpt2_style / "merges.txt", [])


@pytest.mark.parametrize("name", ["merges.pkl", "merges.pickle", "vocab.json", "."])
def test_pickles_are_refused_and_the_error_says_why(gpt2_style, name):
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
def test_vocabularies_and_merges_of_another_kind_are_refused(gpt2_style, name, content, said):
    (gpt2_style / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=said):
        FileTokenizer.from_file(gpt2_style)


def test_a_vocabulary_alone_is_refused(gpt2_style):
    (gpt2_style / "merges.txt").unlink()
    with pytest.raises(UserError, match=r"no merges\.txt in its folder"):
        FileTokenizer.from_file(gpt2_style / "vocab.json")
