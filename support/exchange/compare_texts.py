"""How a converted tokenizer is checked: it and that of another program must read the same texts as the same
ids, and write all ids as the same text. A difference is a UserError; a success is returned in words."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.messages import UserError
from tokenizer import Tokenizer

VOCABULARY_SAMPLES = 500  # tokens, evenly spread over the vocabulary, whose text is encoded again
IDS_PER_DECODING = 64  # ids that are decoded together
IDS_IN_MESSAGE = 40
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
class OtherTokenizer:
    """A tokenizer of another program."""

    program: str  # its name in messages
    encode: Callable[[str], list[int]]  # with BOS; a text that spells a special token stays text
    decode: Callable[[list[int]], str]
    may_append: Sequence[int] = ()  # ids that it may put after a text, and ours does not


def texts_to_compare(tokenizer: Tokenizer) -> list[str]:
    """TEXTS, the text of the special tokens, and the text of tokens from all over the vocabulary, alone and
    joined; without those that have characters the tokenizer lacks."""
    special = [tokenizer.decode([id]) for id in (tokenizer.eos_id, *tokenizer.bos_ids)]
    step = max(1, tokenizer.vocab_size // VOCABULARY_SAMPLES)
    samples = [tokenizer.decode([id]) for id in range(0, tokenizer.vocab_size, step)]
    joined = ["".join(samples[: 2 * IDS_PER_DECODING]), " ".join(samples[-IDS_PER_DECODING:])]
    texts = dict.fromkeys([*TEXTS, *special, f"before{special[0]} after", *samples, *joined])
    return [text for text in texts if text and can_encode(tokenizer, text)]


def can_encode(tokenizer: Tokenizer, text: str) -> bool:
    """Whether the tokenizer has all characters of the text; one of kind `char` may lack some."""
    try:
        return bool(tokenizer.encode(text))
    except UserError:
        return False


def first_difference(tokenizer: Tokenizer, other: OtherTokenizer) -> str | None:
    """The first text or ids that the two tokenizers read or write differently, in words, or None."""
    texts = texts_to_compare(tokenizer)
    for text in texts:
        ours, theirs = tokenizer.encode_prompt(text), other.encode(text)
        appended = theirs[len(ours) :]
        if theirs[: len(ours)] != ours or not set(appended) <= set(other.may_append):
            return (
                f"{other.program} reads {text[:100]!r} as {shorten_ids(theirs)}, and this project as "
                f"{shorten_ids(ours)}"
            )
    all_ids = list(range(tokenizer.vocab_size))
    starts = range(0, len(all_ids), IDS_PER_DECODING)
    lists = [all_ids[start : start + IDS_PER_DECODING] for start in starts]
    lists += [tokenizer.encode(text) for text in texts]
    for ids in lists:
        if other.decode(ids) != tokenizer.decode(ids):
            # Name the one id that differs, or all if they differ only together.
            ids = next(([id] for id in ids if other.decode([id]) != tokenizer.decode([id])), ids)
            return (
                f"{other.program} writes the ids {shorten_ids(ids)} as {other.decode(ids)[:100]!r}, and this "
                f"project as {tokenizer.decode(ids)[:100]!r}"
            )
    return None


def shorten_ids(ids: Sequence[int]) -> str:
    """The list as a message shows it: `[5, 7, 2]`, or the beginning of a long one, `[5, 7, ...]`."""
    if len(ids) <= IDS_IN_MESSAGE:
        return str(list(ids))
    return f"[{', '.join(str(id) for id in ids[:IDS_IN_MESSAGE])}, ...]"


def check_texts(tokenizer: Tokenizer, other: OtherTokenizer) -> str:
    """What was compared, in words. Raises UserError if anything differs."""
    difference = first_difference(tokenizer, other)
    if difference:
        raise wrong_tokenizer(difference)
    return success(tokenizer, other.program)


def wrong_tokenizer(difference: str) -> UserError:
    return UserError(f"{difference}; the tokenizer was not converted correctly, and nothing has been kept")


def success(tokenizer: Tokenizer, program: str) -> str:
    n_texts = len(texts_to_compare(tokenizer))
    return f"verified: {n_texts:,} texts and all {tokenizer.vocab_size:,} ids read the same in {program}"


# ---- transformers --------------------------------------------------------------------------------


def load_transformers() -> tuple[Any, str] | None:
    """(the package without its warnings and progress bars, its name with the version); None if it is not
    installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers, f"transformers {transformers.__version__}"


def first_line(error: Exception) -> str:
    """The error's message on one line and not too long, or its class if it has none."""
    return " ".join(str(error).split())[:150] or type(error).__name__


def from_transformers(theirs: Any, program: str) -> OtherTokenizer:
    """A tokenizer that transformers has opened."""
    return OtherTokenizer(
        program,
        encode=lambda text: theirs(text, split_special_tokens=True).input_ids,
        decode=lambda ids: theirs.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False),
        may_append=theirs.all_special_ids,
    )


def check_exported_text(tokenizer: Tokenizer, folder: Path) -> str:
    """Compare our tokenizer with the one that transformers opens from the files we wrote. Returns the result
    in words; raises UserError if they differ."""
    loaded = load_transformers()
    if loaded is None:
        return "TEXT NOT VERIFIED: transformers is not installed"
    transformers, program = loaded
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # anything that it finds wrong with our files
        raise UserError(
            f"{program} cannot open the tokenizer that was written ({first_line(error)}); "
            "nothing has been kept"
        ) from None
    if theirs.eos_token_id != tokenizer.eos_id:
        raise wrong_tokenizer(
            f"{program} takes id {theirs.eos_token_id} for the end of a document, and this project "
            f"{tokenizer.eos_id}"
        )
    return check_texts(tokenizer, from_transformers(theirs, program))


def check_imported_text(tokenizer: Tokenizer, folder: Path) -> str:
    """Compare the tokenizer that we read from a folder with the one that transformers opens. Returns the
    result in words; raises UserError if they differ.

    A tokenizer class of transformers may build something else than tokenizer.json describes (it may go by the
    model_type alone, say). The file is what counts; that the class differs is a warning.
    """
    loaded = load_transformers()
    if loaded is None:
        return "TEXT NOT VERIFIED: transformers is not installed"
    has_file = (folder / "tokenizer.json").exists()
    if not has_file and not (folder / "vocab.json").exists():
        return "TEXT NOT VERIFIED: the folder has no tokenizer to compare with"
    transformers, program = loaded
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        problem = first_difference(tokenizer, from_transformers(theirs, program))
    except Exception as error:  # a missing class or package, or a folder without a tokenizer
        problem = f"{program} cannot open its tokenizer ({first_line(error)})"
        if not has_file:
            return f"TEXT NOT VERIFIED: {problem}"
    if problem is None:
        return success(tokenizer, program)
    if not has_file:
        raise wrong_tokenizer(problem)
    eos_text = tokenizer.decode([tokenizer.eos_id])
    file = str(folder / "tokenizer.json")
    plain = transformers.PreTrainedTokenizerFast(tokenizer_file=file, eos_token=eos_text)
    result = check_texts(tokenizer, from_transformers(plain, "its tokenizer.json"))
    return f"{result}\nwarning: {problem}; the file is followed"
