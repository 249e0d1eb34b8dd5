"""The tokenizer of a Hugging Face model folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.exchange.tokenizer_json import gpt2_merges
from support.files.tokenizer_files import gpt2_files
from support.messages import UserError, printable
from tokenizer import EOS_TEXT, FileTokenizer, GPT2Tokenizer, Tokenizer

# Files of tokenizers that are not read here; an error names those that are there.
OTHER_TOKENIZERS = ("tokenizer.model", "spiece.model", "vocab.txt", "vocab.json", "merges.txt", "tekken.json")


def read_tokenizer(folder: Path, hf: dict[str, Any], say: Callable[[str], None]) -> Tokenizer:
    """The folder's own tokenizer, as GPT2Tokenizer if it is OpenAI's. A GPT-2 folder without one gets
    OpenAI's if its embedding has that many rows. Raises UserError for other folders without a tokenizer."""
    own = own_tokenizer(folder, hf["model_type"])
    if own is not None:
        return GPT2Tokenizer() if is_published_gpt2(own) else own
    others = [name for name in OTHER_TOKENIZERS if (folder / name).exists()]
    if hf["model_type"] == "gpt2" and hf.get("vocab_size") == GPT2Tokenizer.vocab_size and not others:
        say(
            f"tokenizer: {folder} has none, so OpenAI's of GPT-2 is taken; the embedding has a row for each "
            f"of its {GPT2Tokenizer.vocab_size:,} tokens"
        )
        return GPT2Tokenizer()
    there = f" (only {', '.join(others)})" if others else ""
    raise UserError(
        f"{folder} has no tokenizer.json{there}, and without its tokenizer the model's ids mean nothing; "
        "save one there with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    )


def own_tokenizer(folder: Path, kind: str) -> FileTokenizer | None:
    """The tokenizer in the folder; None if there is none that we read. Raises UserError for a damaged one."""
    has_tokenizer_json = (folder / "tokenizer.json").exists()
    # Only GPT-2's class is known to cut words as we do with these two files.
    has_merges = kind == "gpt2" and (folder / "vocab.json").exists() and (folder / "merges.txt").exists()
    if not has_tokenizer_json and not has_merges:
        return None
    try:
        return FileTokenizer.from_file(folder)
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the `tokenizers` library may panic, which is not an Exception
        what = printable(" ".join(str(error).split())[:200])
        raise UserError(f"{folder / 'tokenizer.json'} is damaged: {what}; download it again") from None


def is_published_gpt2(tokenizer: FileTokenizer) -> bool:
    """Whether a tokenizer is OpenAI's: the same tokens under the same ids, the same merges, and words cut by
    the same rules."""
    if tokenizer.vocab_size != GPT2Tokenizer.vocab_size or gpt2_files() is None:
        return False
    tree = json.loads(tokenizer.backend.to_str())
    splitter, decoder = tree["pre_tokenizer"] or {}, tree["decoder"] or {}
    same_rules = (
        tree["normalizer"] is None
        and splitter.get("type") == "ByteLevel"
        and splitter.get("add_prefix_space") is False
        and splitter.get("use_regex", True) is True
        and decoder.get("type") == "ByteLevel"
    )
    if not same_rules:
        return False
    vocabulary, merges = gpt2_merges()
    own_merges = [
        tuple(merge.split()) if isinstance(merge, str) else tuple(merge)
        for merge in tree["model"].get("merges", [])
    ]
    return (
        tokenizer.backend.get_vocab(with_added_tokens=True) == vocabulary
        and own_merges == merges
        and [token["content"] for token in tree["added_tokens"]] == [EOS_TEXT]
        and not tokenizer.bos_ids
    )
