"""The proof of a conversion: our logits beside those of the program that is to read the result, or that wrote what was read."""

import contextlib
import importlib.util
import io
from pathlib import Path

import torch
from torch import Tensor

from model import GPTMini
from support.cli import UserError
from tokenizer import Tokenizer

ROWS, LENGTH = 2, 64  # of random ids whose logits are compared
BOUNDS = {"f32": 1e-4, "f16": 3e-2, "q8_0": 2.0}  # of the largest difference between logits, times max(1, largest logit / 10)
TABLE_GELU = 1e-2  # llama.cpp takes GELU from a table in half precision
PROBE_TEXT = "I'll take 12345, don't YOU?\n\n  na\u00efve \u6771\u4eac \U0001f389\tx = {1:2}"


def random_ids(vocab_size: int, rows: int, length: int) -> Tensor:
    """(rows, length), the same each time."""
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def probe(model: GPTMini, rows: int = ROWS) -> Tensor:
    """Our logits for random ids, (rows, tokens, V)."""
    return model(random_ids(model.config.vocab_size, rows, min(LENGTH, model.config.max_seq_len)))


def compare(ours: Tensor, theirs: Tensor, program: str, allowed: float) -> str:
    """What was found, in words. Raises UserError above `allowed` times max(1, largest logit / 10)."""
    largest = min(ours.abs().max().item(), theirs.abs().max().item())
    difference, bound = (ours - theirs).abs().max().item(), allowed * max(1.0, largest / 10)
    found = f"largest difference of {ours.numel():,} logits from {program}: {difference:.1e} (allowed {bound:.1e})"
    if not difference <= bound:
        raise UserError(f"{found}; the conversion is wrong, and nothing has been kept. Please report it with the model's config")
    return f"verified: {found}"


@torch.no_grad()
def verify(ours: Tensor, folder: Path) -> str:
    """Compare the logits of `probe` with those of transformers for the model in `folder`, in float32; what was found, in words.

    They are given, not computed here, so that our model can be gone from memory before transformers loads its own.
    """
    if importlib.util.find_spec("transformers") is None:
        return "NOT VERIFIED: transformers is not installed, so nothing could be compared with it"
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    program = f"transformers {transformers.__version__}"
    try:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
    except ValueError as error:  # an older PyTorch, by which it opens no .bin
        if list(folder.glob("*.safetensors")):
            raise
        return f"NOT VERIFIED: {program} cannot open it ({' '.join(str(error).split())[:150]})"
    rows, length, vocab_size = ours.shape
    return compare(ours, theirs(input_ids=random_ids(vocab_size, rows, length)).logits[..., :vocab_size], program, BOUNDS["f32"])


def verify_gguf(path: Path, model: GPTMini, tokenizer: Tokenizer, dtype: str) -> str:
    """Open the file by llama.cpp and compare its tokens and logits with ours; what was found, in words. Raises UserError."""
    if importlib.util.find_spec("llama_cpp") is None:
        return "NOT VERIFIED: llama-cpp-python is not installed, so nothing could be compared with it"
    import llama_cpp

    ours = probe(model, rows=1)[0]
    n, vocab_size = ours.shape
    with contextlib.redirect_stderr(io.StringIO()):  # it warns of a context shorter than its smallest
        llama = llama_cpp.Llama(str(path), n_ctx=n, logits_all=True, verbose=False, flash_attn=False, type_k=0, type_v=0)  # 0: f32, as here
    tokens, expected = llama.tokenize(PROBE_TEXT.encode(), add_bos=False, special=False), tokenizer.encode(PROBE_TEXT)
    llama.eval(random_ids(vocab_size, 1, n)[0].tolist())
    theirs = torch.from_numpy(llama.scores[:n].copy())
    llama.close()
    if tokens != expected:
        raise UserError(f"llama.cpp reads {PROBE_TEXT!r} as {tokens}, we as {expected}; the tokenizer is not carried over, and nothing has been kept")
    return compare(ours, theirs, f"llama.cpp ({dtype})", max(BOUNDS[dtype], TABLE_GELU if model.config.mlp == "gelu" else 0.0))
