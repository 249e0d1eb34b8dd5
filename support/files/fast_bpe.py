"""Encodes with tiktoken instead of the `tokenizers` library, where that gives the same ids: several times as
fast.

Both split a text into words with GPT-2's pattern. Then both join neighbours within each word, again and
again, the earliest merge first. They differ in three ways. tiktoken is used only where none of them matters:

    merges       tiktoken has no list of them: it joins any neighbours that together are a token (same_merges)
    characters   which are letters, each library takes from its own version of Unicode (SameCharacters)
    long words   tiktoken can take minutes for one, or fail (has_long_word)
"""

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

from support.files.cut_text import WORD_END, last_place
from support.files.tokenizer_files import byte_characters

if TYPE_CHECKING:
    import numpy as np
    import tiktoken
    from tokenizers import Tokenizer as Backend

# tiktoken is prepared once this many characters were to be encoded. The library would take about as long for
# them as the preparation takes.
FAST_AFTER = 2**17
# Up to 0.12, tiktoken's time grows with the square of a word's length. In all versions, a million blanks are
# too many for its regular expressions.
LONG_WORD = 2**11
MAX_THREADS = 8

# How a tokenizer.json says that a text is split into words with GPT-2's pattern.
SPLIT = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


class FastBPE:
    """Gives the ids of `backend`, a tokenizer of the `tokenizers` library, with tiktoken, if that can."""

    def __init__(self, backend: "Backend"):
        self.backend = backend
        self.n_chars = 0  # how many characters were to be encoded so far

    def pays_off(self, n_chars: int) -> bool:
        """Whether to use tiktoken for the next `n_chars` characters: if the ids are the same, and so much was
        to be encoded that preparing it is worth the time."""
        self.n_chars += n_chars
        return self.n_chars >= FAST_AFTER and self.encoding is not None

    @cached_property
    def encoding(self) -> "tiktoken.Encoding | None":
        """The tokenizer as an encoding of tiktoken; None if that could give other ids."""
        return encoding_of(self.backend)

    @cached_property
    def characters(self) -> "SameCharacters":
        return SameCharacters()

    def encode(self, text: str) -> "np.ndarray | None":
        """The ids of `text`; None if it should be left to the library."""
        if has_long_word(text) or not (text.isascii() or self.characters.are_in(text)):
            return None
        return self.encoding.encode_to_numpy(text, disallowed_special=())


def encode_in_threads(encode: Callable[[str], Sequence[int]], texts: Sequence[str]) -> list[Sequence[int]]:
    """`encode(text)` for each text. Several threads help, because tiktoken works without Python's lock."""
    n_threads = min(os.cpu_count() or 1, MAX_THREADS)
    # This is set in processes that encode at the same time.
    if n_threads == 1 or os.environ.get("TOKENIZERS_PARALLELISM") == "false":
        return [encode(text) for text in texts]
    # A few tasks for each thread: a task for each text would take longer than encoding a short text.
    n = 4 * n_threads
    all_ids: list[Sequence[int]] = [()] * len(texts)
    with ThreadPoolExecutor(n_threads) as pool:
        shares = pool.map(lambda share: [encode(text) for text in share], [texts[i::n] for i in range(n)])
        for i, share in enumerate(shares):
            all_ids[i::n] = share
    return all_ids


# ---- merges --------------------------------------------------------------------------------------


def encoding_of(backend: "Backend") -> "tiktoken.Encoding | None":
    """A tokenizer of the `tokenizers` library as an encoding of tiktoken; None if that could give other
    ids."""
    tree = json.loads(backend.to_str())
    model, added = tree["model"], tree["added_tokens"]
    rules = {key: value for key, value in model.items() if value and key not in ("vocab", "merges")}
    if rules != {"type": "BPE"} or tree["pre_tokenizer"] != SPLIT or tree["normalizer"]:
        return None
    if not all(token["special"] for token in added):  # these can be found in a text
        return None
    special = {token["content"]: token["id"] for token in added}
    if not same_merges(backend, model["vocab"] | special, model["merges"], list(special)):
        return None

    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    byte_of = {char: byte for byte, char in enumerate(byte_characters())}
    ids = {token: id for token, id in model["vocab"].items() if token not in special}
    return tiktoken.Encoding(
        "bpe",
        pat_str=r50k_pat_str,
        mergeable_ranks={bytes(map(byte_of.__getitem__, token)): id for token, id in ids.items()},
        special_tokens={"<|endoftext|>": max(ids.values()) + 1},  # tiktoken needs one; no text becomes it
    )


def same_merges(backend: "Backend", ids: dict[str, int], merges: list[list[str]], special: list[str]) -> bool:
    """Whether tiktoken, which knows only tokens and their ids, joins what the library joins by its merges.

    It does if a later merge has a higher id, and if the library, given the bytes of a token alone, makes that
    token of them. Why: suppose both have joined the same neighbours of a word so far, and tiktoken now joins
    C and D, which together are the token T. No join has gone across the ends of C or D. So the library,
    given the bytes of T alone, comes to C and D as well. From there it makes T, so it joins C and D too.
    """
    made = [left + right for left, right in merges]
    tokens = [*byte_characters(), *special, *made]
    if set(tokens) != ids.keys() or not len(tokens) == len(ids) == len(set(ids.values())):
        return False  # a token that no merge makes, or two of the same
    in_order = all(ids[earlier] < ids[later] for earlier, later in pairwise(made))
    model = backend.model
    return in_order and all(len(model.tokenize(token)) == 1 for token in made)


# ---- characters ----------------------------------------------------------------------------------


class SameCharacters:
    """Knows for which characters both libraries agree whether they are letters, digits, blanks or something
    else. A new version of Unicode adds letters, and does not reach both libraries at the same time."""

    def __init__(self):
        import numpy as np
        import tiktoken
        from tokenizers import Regex, normalizers

        self.same = np.zeros(0x110000, bool)  # for each character, whether it was found to be the same
        every_byte = {bytes([byte]): byte for byte in range(256)}
        self.filters = []  # (tiktoken's, which skips what its pattern does not match; the library's)
        for pattern in (r"\p{L}", r"\p{N}", r"\s"):
            ours = tiktoken.Encoding(pattern, pat_str=pattern, mergeable_ranks=every_byte, special_tokens={})
            self.filters.append((ours, normalizers.Replace(Regex(f"[^{pattern}]"), "")))

    def are_in(self, text: str) -> bool:
        """Whether the libraries agree on all characters of the text."""
        import numpy as np

        try:
            codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
        except UnicodeEncodeError:  # half a surrogate pair: the library says what is wrong
            return False
        same = self.same[codes]
        if same.all():
            return True
        new = np.unique(codes[~same])
        chars, differ = "".join(map(chr, new)), set()
        for ours, theirs in self.filters:
            differ |= set(bytes(ours.encode_ordinary(chars)).decode()) ^ set(theirs.normalize_str(chars))
        self.same[new] = [char not in differ for char in chars]
        return not differ


# ---- long words ----------------------------------------------------------------------------------


def has_long_word(text: str) -> bool:
    """Whether a word of the text, or a run of blanks, may have more than LONG_WORD characters.

    >>> has_long_word("word " * 5000), has_long_word("word" * 5000)
    (False, True)
    """
    start = 0
    while len(text) - start > LONG_WORD:
        place = last_place(WORD_END, text, start, start + LONG_WORD)
        if place is None:
            return True
        start = place
    return False
