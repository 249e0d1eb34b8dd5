"""The proof of a conversion: text, ids and logits on both sides, ours and those of the program that is to
read the result, or that wrote what was read. Each raises UserError where the two differ; what was found is
returned in words."""

import contextlib
import ctypes
import importlib.util
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import GPTMini
from support.messages import UserError
from tokenizer import Tokenizer

ROWS, LENGTH = 2, 64  # of random ids whose logits are compared
BOUNDS = {
    "f32": 1e-4,
    "f16": 3e-2,
    "q8_0": 2.0,
}  # of the largest difference between logits, times max(1, largest logit / 10)
TABLE_GELU = 1e-2  # llama.cpp takes GELU from a table in half precision
OWN_TOKENS = 500  # of the vocabulary, evenly spread, whose text is encoded again
DECODED = 64  # ids that are decoded at once
READER_WORDS = (
    "gpt-2",
    "qwen2",
    "llama-bpe",
)  # ways to cut words that transformers' reader of GGUF knows by their names
SHOWN = 40  # ids of a list that a message shows
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "I'll take 12345, don't YOU? We've 3.14 and 1,000,000; it's 7:30.",
    " one leading blank",
    "   three leading blanks, two  between, one trailing ",
    "\n\nlines\n  and\r\nline ends\n\n\n",
    "\tfor i in range(10):\n\t\tprint(i)  # code",
    "na\u00efve caf\u00e9 \u00c5ngstr\u00f6m e\u0301 \u017elu\u0165ou\u010dk\u00fd",
    "\u6771\u4eac\u3068\u5927\u962a\u3001\u4e2d\u6587\u548c\ud55c\uad6d\uc5b4",
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440, \u05e9\u05dc\u05d5\u05dd, "
    "\u0645\u0631\u062d\u0628\u0627",
    "\U0001f389 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "control \x00\x07\x1b\x7f\ufeff\u00a0\u2028 characters",
    "x = {'a': [1, 2]} != (b += c) -> <tag/> @#$%^&*~`|\\",
    "a" * 50 + " " * 20 + "=" * 30,
)


@dataclass
class Witness:
    """A tokenizer of another program."""

    program: str
    encode: Callable[
        [str], list[int]
    ]  # with what begins a document, and text that spells a special token staying text
    decode: Callable[[list[int]], str]
    ending: Sequence[int] = ()  # ids that it may put behind a text, and ours does not


# ---- text ----------------------------------------------------------------------------------------


def telling_texts(tokenizer: Tokenizer) -> list[str]:
    """TEXTS, the text of the special tokens, and what a part of the vocabulary reads as, each by itself
    and in one piece: those that the tokenizer knows all characters of."""
    special = [tokenizer.decode([id]) for id in (tokenizer.eos_id, *tokenizer.bos_ids)]
    own = [
        tokenizer.decode([id])
        for id in range(0, tokenizer.vocab_size, max(1, tokenizer.vocab_size // OWN_TOKENS))
    ]
    texts = dict.fromkeys(
        [
            *TEXTS,
            *special,
            f"before{special[0]} after",
            *own,
            "".join(own[: 2 * DECODED]),
            " ".join(own[-DECODED:]),
        ]
    )
    return [text for text in texts if text and knows(tokenizer, text)]


def knows(tokenizer: Tokenizer, text: str) -> bool:
    try:
        return bool(tokenizer.encode(text))
    except UserError:  # kind `char`: a character that it lacks
        return False


def first_difference(tokenizer: Tokenizer, witness: Witness) -> str | None:
    """The first text or ids that the two sides read or write differently, in words; None if there are none."""
    texts = telling_texts(tokenizer)
    for text in texts:
        theirs, ours = witness.encode(text), tokenizer.encode_prompt(text)
        if theirs[: len(ours)] != ours or not set(theirs[len(ours) :]) <= set(witness.ending):
            return (
                f"{witness.program} reads {text[:100]!r} as {shown(theirs)}, and this project as "
                f"{shown(ours)}"
            )
    starts = range(0, tokenizer.vocab_size, DECODED)
    for ids in [list(range(start, min(start + DECODED, tokenizer.vocab_size))) for start in starts] + [
        tokenizer.encode(text) for text in texts
    ]:
        if witness.decode(ids) != tokenizer.decode(ids):
            ids = next(([id] for id in ids if witness.decode([id]) != tokenizer.decode([id])), ids)
            theirs, ours = witness.decode(ids), tokenizer.decode(ids)
            return (
                f"{witness.program} writes the ids {shown(ids)} as {theirs[:100]!r}, and this project as "
                f"{ours[:100]!r}"
            )
    return None


def shown(ids: Sequence[int]) -> str:
    return str(list(ids)) if len(ids) <= SHOWN else f"{str(list(ids[:SHOWN]))[:-1]}, ...]"


def not_carried_over(difference: str) -> UserError:
    return UserError(f"{difference}; the tokenizer is not carried over, and nothing has been kept")


def text_found(tokenizer: Tokenizer, program: str) -> str:
    return (
        f"verified: {len(telling_texts(tokenizer)):,} texts and all {tokenizer.vocab_size:,} ids read the "
        f"same in {program}"
    )


def quiet_transformers() -> Any:
    """The package, without its warnings and bars."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def of_transformers(theirs: Any, program: str) -> Witness:
    """A tokenizer of transformers."""
    return Witness(
        program,
        encode=lambda text: theirs(text, split_special_tokens=True).input_ids,
        decode=lambda ids: theirs.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False),
        ending=theirs.all_special_ids,
    )


def verify_exported_text(tokenizer: Tokenizer, folder: Path) -> str:
    """Compare our tokenizer with what transformers makes of the files that we wrote."""
    if importlib.util.find_spec("transformers") is None:
        return "TEXT NOT VERIFIED: transformers is not installed"
    transformers = quiet_transformers()
    program = f"transformers {transformers.__version__}"
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever it finds wrong with our files
        raise UserError(
            f"{program} cannot open the tokenizer that was written ({reason(error)}); nothing has been kept"
        ) from None
    if theirs.eos_token_id != tokenizer.eos_id:
        raise not_carried_over(
            f"{program} takes id {theirs.eos_token_id} for the end of a document, and this project "
            f"{tokenizer.eos_id}"
        )
    if found := first_difference(tokenizer, of_transformers(theirs, program)):
        raise not_carried_over(found)
    return text_found(tokenizer, program)


def verify_imported_text(tokenizer: Tokenizer, folder: Path) -> str:
    """Compare the tokenizer that we read with transformers'. Its classes may build another than
    tokenizer.json describes (from the model_type alone, say); the file is what counts, and what the class
    does otherwise is said."""
    if importlib.util.find_spec("transformers") is None:
        return "TEXT NOT VERIFIED: transformers is not installed"
    if not (folder / "tokenizer.json").exists() and not (folder / "vocab.json").exists():
        return "TEXT NOT VERIFIED: the folder has no tokenizer to compare with"
    transformers = quiet_transformers()
    program = f"transformers {transformers.__version__}"
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        found, opened = first_difference(tokenizer, of_transformers(theirs, program)), True
    except (
        Exception
    ) as error:  # a class that is not there, a package that it needs, no tokenizer in the folder
        found, opened = f"{program} cannot open its tokenizer ({reason(error)})", False
    if found is None:
        return text_found(tokenizer, program)
    if not (folder / "tokenizer.json").exists():
        if opened:
            raise not_carried_over(found)
        return f"TEXT NOT VERIFIED: {found}"
    eos = tokenizer.decode([tokenizer.eos_id])
    plain = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token=eos)
    if wrong := first_difference(tokenizer, of_transformers(plain, "its tokenizer.json")):
        raise not_carried_over(wrong)
    return f"{text_found(tokenizer, 'its tokenizer.json')}\nwarning: {found}; the file is followed"


def reason(error: Exception) -> str:
    return " ".join(str(error).split())[:150] or type(error).__name__


# ---- logits --------------------------------------------------------------------------------------


def random_ids(vocab_size: int, rows: int, length: int) -> Tensor:
    """(rows, length), the same each time."""
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def probe(model: GPTMini, rows: int = ROWS) -> Tensor:
    """Our logits for random ids, (rows, tokens, V), in float32, in which the other side computes too; the
    model stays in it."""
    return model.float()(random_ids(model.config.vocab_size, rows, min(LENGTH, model.config.max_seq_len)))


def compare(ours: Tensor, theirs: Tensor, program: str, allowed: float) -> str:
    """What was found, in words. Raises UserError above `allowed` times max(1, largest logit / 10)."""
    largest = min(ours.abs().max().item(), theirs.abs().max().item())
    difference, bound = (ours - theirs).abs().max().item(), allowed * max(1.0, largest / 10)
    found = (
        f"largest difference of {ours.numel():,} logits from {program}: {difference:.1e} (allowed "
        f"{bound:.1e})"
    )
    if not difference <= bound:
        raise UserError(
            f"{found}; the conversion is wrong, and nothing has been kept. Please report it with the "
            "model's config"
        )
    return f"verified: {found}"


@torch.no_grad()
def verify(ours: Tensor, folder: Path, written: bool = False) -> str:
    """Compare the logits of `probe` with those of transformers for the model in `folder`, in float32. One
    that we have `written` it has to open.

    They are given, not computed here, so that our model can be gone from memory before transformers loads its
    own.
    """
    if importlib.util.find_spec("transformers") is None:
        return "NOT VERIFIED: transformers is not installed, so nothing could be compared with it"
    transformers = quiet_transformers()
    program = f"transformers {transformers.__version__}"
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if hasattr(
            config, "quantization_config"
        ):  # left over: our reader has seen that the weights are plain
            del config.quantization_config
        theirs = (
            transformers.AutoModelForCausalLM.from_pretrained(folder, config=config, trust_remote_code=False)
            .float()
            .eval()
        )
    except Exception as error:  # an older PyTorch, by which it opens no .bin; a package that it wants; a setting that it does not know
        if written:
            raise UserError(
                f"{program} cannot open what was written ({reason(error)}); nothing has been kept"
            ) from None
        return f"NOT VERIFIED: {program} cannot open it ({reason(error)})"
    rows, length, vocab_size = ours.shape
    return compare(
        ours,
        theirs(input_ids=random_ids(vocab_size, rows, length)).logits[..., :vocab_size],
        program,
        BOUNDS["f32"],
    )


# ---- gguf ----------------------------------------------------------------------------------------


def verify_gguf(path: Path, model: GPTMini, tokenizer: Tokenizer, dtype: str, words: str) -> str:
    """Compare text and logits with llama.cpp's, or, where it is not installed, with those of transformers'
    reader of GGUF. `words` is what the file calls the way to cut text into words."""
    allowed = max(BOUNDS[dtype], TABLE_GELU if model.config.mlp == "gelu" else 0.0)
    if importlib.util.find_spec("llama_cpp") is not None:
        return verify_by_llama_cpp(path, probe(model, rows=1)[0], tokenizer, f"llama.cpp ({dtype})", allowed)
    if importlib.util.find_spec("transformers") is None:
        return (
            "NOT VERIFIED: neither llama-cpp-python nor transformers is installed, so nothing could be "
            "compared with them"
        )
    return verify_by_gguf_reader(path, model, tokenizer, dtype, words)


def piece(model: Any, id: int) -> bytes:
    """The bytes of one token in llama.cpp (the package's own `detokenize` leaves out those of more than 32)."""
    import llama_cpp

    vocabulary, size = llama_cpp.llama_model_get_vocab(model), 64
    while True:
        buffer = ctypes.create_string_buffer(size)
        n = llama_cpp.llama_token_to_piece(vocabulary, id, buffer, size, 0, True)
        if n >= 0:
            return buffer.raw[:n]
        size = -n


def verify_by_llama_cpp(path: Path, ours: Tensor, tokenizer: Tokenizer, program: str, allowed: float) -> str:
    import llama_cpp

    n, vocab_size = ours.shape
    with contextlib.redirect_stderr(io.StringIO()):  # it warns of a context shorter than its smallest
        llama = llama_cpp.Llama(
            str(path), n_ctx=n, logits_all=True, verbose=False, flash_attn=False, type_k=0, type_v=0
        )  # 0: f32, as here
    try:
        witness = Witness(
            program,
            encode=lambda text: llama.tokenize(text.encode(), add_bos=True, special=False),
            decode=lambda ids: b"".join(piece(llama.model, id) for id in ids).decode(errors="replace"),
        )
        if found := first_difference(tokenizer, witness):
            raise not_carried_over(found)
        llama.eval(random_ids(vocab_size, 1, n)[0].tolist())
        theirs = torch.from_numpy(llama.scores[:n].copy())
    finally:
        llama.close()
    return f"{compare(ours, theirs, program, allowed)}\n{text_found(tokenizer, program)}"


@torch.no_grad()
def verify_by_gguf_reader(path: Path, model: GPTMini, tokenizer: Tokenizer, dtype: str, words: str) -> str:
    """By transformers 5. Of Qwen3 and GPT-2 it takes some sizes to be those of the published models, so
    only Llama's logits are compared."""
    transformers = quiet_transformers()
    program, text = (
        f"transformers {transformers.__version__}",
        "TEXT NOT VERIFIED: llama-cpp-python is not installed",
    )
    try:
        if (
            int(transformers.__version__.split(".")[0]) >= 5 and words in READER_WORDS
        ):  # it takes all others for Llama's, or GPT-2's
            theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            if found := first_difference(tokenizer, of_transformers(theirs, program)):
                raise not_carried_over(found)
            text = text_found(tokenizer, program)
        if model.config.norm == "layernorm" or model.config.qk_norm:
            return f"LOGITS NOT VERIFIED: llama-cpp-python is not installed\n{text}"
        network = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        ).eval()
    except UserError:
        raise
    except Exception as error:  # a package that it wants
        return (
            f"NOT VERIFIED: llama-cpp-python is not installed, and {program} cannot open the file "
            f"({reason(error)})\n{text}"
        )
    ours = probe(model, rows=1)
    logits = network(input_ids=random_ids(ours.shape[-1], 1, ours.shape[1])).logits
    return f"{compare(ours, logits, f'{program} ({dtype})', BOUNDS[dtype])}\n{text}"
