"""GGUF files: llama.cpp and transformers read our logits, tokens and words from them."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from converting import HOSTILE, SHAPES, call, random_model, save_checkpoint, train_bpe, with_bos
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from sampling import SamplingConfig
from support.exchange.gguf_file import WORD_PATTERNS
from support.messages import UserError
from tokenizer import EOS_TEXT, BPETokenizer, ByteTokenizer, CharTokenizer, FileTokenizer


@pytest.fixture
def saved(tmp_path) -> Callable[..., Path]:
    """saved(name, model, tokenizer): the path of a checkpoint without a run."""
    return functools.partial(save_checkpoint, tmp_path)


@pytest.fixture
def trained_bpe() -> BPETokenizer:
    return train_bpe()


@pytest.mark.parametrize(
    "switches",
    [SHAPES[name] for name in ("llama", "llama, untied", "qwen3", "gpt2")],
    ids=["llama", "untied", "qwen3", "gpt2"],
)
@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
def test_llama_cpp_gives_our_logits_tokens_and_text(saved, tmp_path, trained_bpe, switches, dtype):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    pytest.importorskip("gguf", reason="gguf is not installed")
    model = random_model(vocab_size=trained_bpe.vocab_size, max_seq_len=256, **switches)
    said = call(
        "--ckpt",
        saved("ours", model, trained_bpe),
        "--to",
        "gguf",
        "--dtype",
        dtype,
        "--output",
        tmp_path / "m.gguf",
    )
    assert (
        f"from llama.cpp ({dtype})" in said
        and said.startswith("verified: largest")
        and "texts and all" in said
    )
    llama = llama_cpp.Llama(
        str(tmp_path / "m.gguf"), n_ctx=256, verbose=False, flash_attn=False, type_k=0, type_v=0
    )
    for text in HOSTILE:
        assert llama.tokenize(text.encode(), add_bos=False) == trained_bpe.encode(text), text
    if dtype == "f32":
        prompt, written = trained_bpe.encode("attention is"), []
        for token in llama.generate(prompt, temp=0, top_k=1, repeat_penalty=1.0):
            written.append(token)
            if len(written) == 64:
                break
        ours = model.generate(torch.tensor([prompt]), 64, SamplingConfig(temperature=0))[0].tolist()[
            len(prompt) :
        ]
        assert written == ours
    llama.close()


@pytest.mark.parametrize("kind", ["llama", "llama, untied", "qwen3", "gpt2"])
def test_transformers_reads_the_gguf_and_gives_our_logits_and_tokens(saved, tmp_path, trained_bpe, kind):
    """A second reader. It assumes that GPT-2's context and MLP, and the width of Qwen3's heads,
    are those of the published models."""
    import transformers

    pytest.importorskip("gguf", reason="gguf is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    as_published = {"qwen3": {"head_dim": 128}, "gpt2": {"d_ff": 128, "max_seq_len": 1024}}
    model = random_model(vocab_size=trained_bpe.vocab_size, **(SHAPES[kind] | as_published.get(kind, {})))
    call("--ckpt", saved("ours", model, trained_bpe), "--to", "gguf", "--output", tmp_path / "m.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    ).eval()
    ids = torch.randint(trained_bpe.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=ids).logits, model(ids), rtol=1e-4, atol=1e-4)
    if int(transformers.__version__.split(".")[0]) < 5:  # it takes the words of every tokenizer for Llama's
        return
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert [tokenizer(text).input_ids for text in HOSTILE] == [trained_bpe.encode(text) for text in HOSTILE]


def split_like(name: str) -> FileTokenizer:
    """A byte-level BPE that cuts text into words as the tokenizers of SmolLM, Qwen and Llama 3 do."""
    backend = Backend(models.BPE())
    patterns = {called: pattern for pattern, called in WORD_PATTERNS.items()}
    if name == "smollm":
        steps = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    else:
        steps = [
            pre_tokenizers.Split(Regex(patterns[name]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[EOS_TEXT],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(
        [" ".join(HOSTILE) * 3, "attention is a weighted sum of 1234 values.\n\n DON'T! " * 50], trainer
    )
    return FileTokenizer(backend.to_str(), EOS_TEXT)


@pytest.mark.parametrize("name", ["smollm", "qwen2", "llama-bpe", "with bos"])
def test_llama_cpp_cuts_text_into_words_as_the_published_tokenizers_do(saved, tmp_path, trained_bpe, name):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    pytest.importorskip("gguf", reason="gguf is not installed")
    tokenizer = with_bos(trained_bpe) if name == "with bos" else split_like(name)
    path = saved("ours", random_model(vocab_size=tokenizer.vocab_size, max_seq_len=256), tokenizer)
    assert call("--ckpt", path, "--to", "gguf", "--output", tmp_path / "m.gguf").startswith("verified")
    llama = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=256, vocab_only=True, verbose=False)
    for text in HOSTILE:
        assert llama.tokenize(text.encode(), add_bos=True) == tokenizer.encode_prompt(text), text
    llama.close()


def test_a_wrong_gguf_is_noticed_and_leaves_nothing(saved, tmp_path, trained_bpe, monkeypatch):
    """Rows of q and k in the wrong order, also in q8_0, where the largest difference is allowed."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    pytest.importorskip("gguf", reason="gguf is not installed")
    path = saved("ours", random_model(vocab_size=trained_bpe.vocab_size, max_seq_len=256), trained_bpe)
    monkeypatch.setattr("support.exchange.gguf_file.interleave", lambda rows, n_heads: rows)
    for dtype in ("f32", "f16", "q8_0"):
        with pytest.raises(UserError, match="the conversion is wrong"):
            call("--ckpt", path, "--to", "gguf", "--dtype", dtype, "--output", tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["ours.ckpt"]


def test_gguf_refuses_what_it_cannot_hold(saved, tmp_path, trained_bpe):
    pytest.importorskip("gguf", reason="gguf is not installed")
    for tokenizer in (ByteTokenizer(), CharTokenizer.train(["abc"])):
        path = saved("ours", random_model(vocab_size=tokenizer.vocab_size), tokenizer)
        with pytest.raises(UserError, match=f"kind {tokenizer.kind} does not fit into GGUF"):
            call("--ckpt", path, "--to", "gguf", "--output", tmp_path / "m.gguf")
    path = saved("odd", random_model(vocab_size=trained_bpe.vocab_size, d_ff=40), trained_bpe)
    with pytest.raises(UserError, match="q8_0 keeps 32 numbers to a scale"):
        call("--ckpt", path, "--to", "gguf", "--dtype", "q8_0", "--output", tmp_path / "m.gguf")
    assert not list(tmp_path.glob("m.gguf*"))


@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
def test_a_model_trained_in_bfloat16_becomes_gguf(saved, tmp_path, trained_bpe, dtype):
    pytest.importorskip("gguf", reason="gguf is not installed")
    path = saved("ours", random_model(vocab_size=trained_bpe.vocab_size).bfloat16(), trained_bpe)
    assert call("--ckpt", path, "--to", "gguf", "--dtype", dtype, "--output", tmp_path / "m.gguf").startswith(
        "verified: largest difference"
    )
