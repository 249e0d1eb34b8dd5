"""Models, tokenizers and checkpoints for the tests of convert.py."""

import contextlib
import io
from pathlib import Path

import torch
from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Backend

import convert
from model import GPTConfig, GPTMini
from support.checkpoint import write_model
from tokenizer import BPETokenizer, ByteTokenizer, FileTokenizer, Tokenizer

HOSTILE = [
    "hello  world\n\tx 1234 na\u00efve \u6771\u4eac \U0001f389 don't",
    " leading, trailing ",
    "\u200d\ufeff\u0301 combining",
    "a" * 300,
    " " * 40 + "\n\n\n",
    "I'll we've they'd 12345678901234567890",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd \U0001f468\u200d\U0001f469\u200d\U0001f467",
]
SIZES = {
    "vocab_size": 257,
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_ff": 64,
    "max_seq_len": 80,
}
GPT2 = {"norm": "layernorm", "mlp": "gelu", "position": "learned", "bias": True, "n_kv_heads": 4}
SHAPES = {
    "llama": {},
    "llama, untied": {"tie_embeddings": False, "rope_theta": 500.0, "norm_eps": 1e-3},
    "llama, biases, wide heads": {"bias": True, "head_dim": 12},
    "qwen3": {"qk_norm": True},
    "qwen3, untied, wide heads": {"qk_norm": True, "tie_embeddings": False, "head_dim": 20, "norm_eps": 1e-6},
    "gpt2": GPT2,
    "gpt2, untied": GPT2 | {"tie_embeddings": False},
}


def random_model(seed: int = 3, **switches) -> GPTMini:
    """A model with weights so large that logits differ, and with norms and biases that are not at their
    first values."""
    torch.manual_seed(seed)
    model = GPTMini(GPTConfig(**(SIZES | switches)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() == 2 else 0.3))
    return model.eval()


def call(*argv: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert convert.main([str(word) for word in argv]) == 0
    return out.getvalue()


def save_checkpoint(folder: Path, name: str, model: GPTMini, tokenizer: Tokenizer | None = None) -> Path:
    """The path of a new checkpoint, name.ckpt, written without a run."""
    write_model(folder / f"{name}.ckpt", model, tokenizer or ByteTokenizer(), {})
    return folder / f"{name}.ckpt"


def same_weights(one: GPTMini, other: GPTMini) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def train_bpe() -> BPETokenizer:
    return BPETokenizer.train(["".join(HOSTILE) * 3, "attention is a weighted sum of values. " * 50], 400)


def with_bos(tokenizer: BPETokenizer) -> FileTokenizer:
    """The tokenizer with rules that put <s> before each text, like those of Llama and Mistral."""
    backend = Backend.from_str(tokenizer.backend.to_str())
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return FileTokenizer(backend.to_str(), tokenizer.eos_text)
