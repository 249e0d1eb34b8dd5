"""How a GGUF file is checked: its texts and logits, as llama.cpp or the GGUF reader of transformers gives
them, must be ours."""

import contextlib
import ctypes
import importlib.util
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import GPTMini
from support.exchange.compare_logits import ALLOWED_DIFFERENCE, compare_logits, logits_to_compare, random_ids
from support.exchange.compare_texts import (
    OtherTokenizer,
    check_texts,
    first_line,
    from_transformers,
    load_transformers,
)
from support.messages import UserError
from tokenizer import Tokenizer

GELU_TABLE_DIFFERENCE = 1e-2  # llama.cpp looks up GELU in a table in half precision
# The word splitters that transformers' GGUF reader knows by name; it takes others for Llama's or GPT-2's.
SPLITTERS_OF_TRANSFORMERS = ("gpt-2", "qwen2", "llama-bpe")


def check_gguf(path: Path, model: GPTMini, tokenizer: Tokenizer, dtype: str, word_splitter: str) -> str:
    """Compare texts and logits with llama.cpp, or, if it is not installed, with transformers' reader of GGUF.
    `word_splitter` is what the file calls the rule for cutting text into words. Returns the result in words;
    raises UserError if anything differs."""
    if importlib.util.find_spec("llama_cpp") is not None:
        allowed = ALLOWED_DIFFERENCE[dtype]
        if model.config.mlp == "gelu":
            allowed = max(allowed, GELU_TABLE_DIFFERENCE)
        ours = logits_to_compare(model, rows=1)[0]
        return check_with_llama_cpp(path, ours, tokenizer, f"llama.cpp ({dtype})", allowed)
    loaded = load_transformers()
    if loaded is None:
        return (
            "NOT VERIFIED: neither llama-cpp-python nor transformers is installed, so nothing could be "
            "compared with them"
        )
    transformers, program = loaded
    return check_with_transformers(transformers, program, path, model, tokenizer, dtype, word_splitter)


# ---- llama.cpp -----------------------------------------------------------------------------------


def token_bytes(llama_model: Any, id: int) -> bytes:
    """The bytes of one token in llama.cpp (the package's own `detokenize` drops tokens of more than 32)."""
    import llama_cpp

    vocabulary, size = llama_cpp.llama_model_get_vocab(llama_model), 64
    while True:
        buffer = ctypes.create_string_buffer(size)
        n = llama_cpp.llama_token_to_piece(vocabulary, id, buffer, size, 0, True)
        if n >= 0:
            return buffer.raw[:n]
        size = -n  # the buffer was too small


def check_with_llama_cpp(path: Path, ours: Tensor, tokenizer: Tokenizer, program: str, allowed: float) -> str:
    """`ours` are our logits, (tokens, V)."""
    import llama_cpp

    n, vocab_size = ours.shape
    # It warns of a context shorter than its smallest. Type 0 is f32, in which we compute.
    settings = {"n_ctx": n, "logits_all": True, "flash_attn": False, "type_k": 0, "type_v": 0}
    with contextlib.redirect_stderr(io.StringIO()):
        llama = llama_cpp.Llama(str(path), verbose=False, **settings)
    try:
        other = OtherTokenizer(
            program,
            encode=lambda text: llama.tokenize(text.encode(), add_bos=True, special=False),
            decode=lambda ids: b"".join(token_bytes(llama.model, id) for id in ids).decode(errors="replace"),
        )
        text_result = check_texts(tokenizer, other)
        llama.eval(random_ids(vocab_size, 1, n)[0].tolist())
        theirs = torch.from_numpy(llama.scores[:n].copy())
    finally:
        llama.close()
    return f"{compare_logits(ours, theirs, program, allowed)}\n{text_result}"


# ---- transformers --------------------------------------------------------------------------------


@torch.no_grad()
def check_with_transformers(
    transformers: Any,
    program: str,
    path: Path,
    model: GPTMini,
    tokenizer: Tokenizer,
    dtype: str,
    word_splitter: str,
) -> str:
    """Text is compared from transformers 5 on. Logits are compared for Llama only: for Qwen3 and GPT-2 its
    reader assumes some sizes of the published models."""
    text_result = "TEXT NOT VERIFIED: llama-cpp-python is not installed"
    try:
        if word_splitter in SPLITTERS_OF_TRANSFORMERS and int(transformers.__version__.split(".")[0]) >= 5:
            theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            text_result = check_texts(tokenizer, from_transformers(theirs, program))
        if model.config.norm == "layernorm" or model.config.qk_norm:
            return f"LOGITS NOT VERIFIED: llama-cpp-python is not installed\n{text_result}"
        network = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        )
    except UserError:
        raise
    except Exception as error:  # it needs a package, say
        return (
            f"NOT VERIFIED: llama-cpp-python is not installed, and {program} cannot open the file "
            f"({first_line(error)})\n{text_result}"
        )
    ours = logits_to_compare(model, rows=1)
    logits = network.eval()(input_ids=random_ids(ours.shape[-1], 1, ours.shape[1])).logits
    logits_result = compare_logits(ours, logits, f"{program} ({dtype})", ALLOWED_DIFFERENCE[dtype])
    return f"{logits_result}\n{text_result}"
