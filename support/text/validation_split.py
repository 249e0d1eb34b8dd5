"""What is held out for validation: one rule for text in memory, datasets, instructions and token files.

Whole documents are drawn until they hold the share asked for, so that validation is of the same kind as
training. A document that is much larger than that share is never held out whole: with a book and two notes,
only the notes would be left to train on. The end of such a document is held out instead, as it is of a single
document. A row of a dataset or of instructions cannot be cut, so a large one is trained on.

    documents that fit in memory     hold_out, and split_documents, which also cuts them
    rows, a number of them           hold_out_rows, and split_rows
    documents that do not fit        HoldOutByDraw: the rule of hold_out, without a list of all documents
    one long row of tokens           held_out_end, the place where its end begins
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from support.messages import warn

DOCUMENTS_PER_DRAW = 2**12  # documents whose random numbers come from one generator
DRAW_BINS = 2**16  # random numbers are told apart in steps of 1 / DRAW_BINS
Row = TypeVar("Row")


class SizeLimits(NamedTuple):
    """How large one held-out document may be, and all of them together, in characters or tokens."""

    one: float
    all: float


def size_limits(total: int, n_documents: int, fraction: float) -> SizeLimits:
    """The limits for documents of `total` characters, of which `fraction` is to be held out.

    Among a few documents each may hold more than the share, and among many similar ones some are three times
    as long as most: neither is too large. Together they hold at least half of the share before `all` is
    reached.
    """
    one = total * min(0.5, max(1.5 * fraction, min(0.05, 3 / max(1, n_documents))))
    return SizeLimits(one=one, all=max(one + total * fraction / 2, total * fraction * 1.5))


def held_out_end(size: int, fraction: float) -> int:
    """Where the last `fraction` of one document begins; at least one character or token comes before it."""
    return min(size, max(1, int(size * (1 - fraction))))


def hold_out(sizes: Sequence[int], order: Sequence[int], fraction: float) -> tuple[set[int], set[int]]:
    """(numbers of the documents held out whole, numbers of those whose end is held out). Whole ones are taken
    in `order` until they and the ends hold `fraction` of everything."""
    total = sum(sizes)
    limits = size_limits(total, len(sizes), fraction)
    cut = {number for number, size in enumerate(sizes) if size > limits.one}
    whole = set()
    missing = fraction * (total - sum(sizes[number] for number in cut))
    for number in map(int, order[:-1]):  # at least one document is left to train on
        if number in cut:
            continue
        held = fraction * total - missing
        if missing <= 0 or held + sizes[number] > limits.all:
            break
        whole.add(number)
        missing -= sizes[number]
    return whole, cut


def split_documents(documents: list[str], val_fraction: float, seed: int) -> tuple[list[str], list[str]]:
    """(training documents, validation documents): `val_fraction` of the characters is held out, drawn by
    `seed`."""
    order = np.random.default_rng(seed).permutation(len(documents))
    whole, cut = hold_out([len(document) for document in documents], order, val_fraction)
    train, val = [], []
    for number, document in enumerate(documents):
        if number in whole:
            val.append(document)
        elif number in cut:
            end = held_out_end(len(document), val_fraction)
            train.append(document[:end])
            val.append(document[end:])
        else:
            train.append(document)
    warn_of_share(
        held=sum(map(len, val)),
        total=sum(map(len, documents)),
        fraction=val_fraction,
        unit="characters",
        advice="give data.val_path a text of its own",
    )
    return train, val


def hold_out_rows(sizes: Sequence[int], order: Sequence[int], n_held: int) -> set[int]:
    """Numbers of the first `n_held` rows in this order, leaving out those that are too large."""
    limits = size_limits(sum(sizes), len(sizes), n_held / max(1, len(sizes)))
    held: set[int] = set()
    n_chars = 0
    for number in map(int, order):
        if len(held) == n_held:
            break
        if sizes[number] <= limits.one and n_chars + sizes[number] <= limits.all:
            held.add(number)
            n_chars += sizes[number]
    return held


def split_rows(
    rows: Sequence[Row], sizes: Sequence[int], order: Sequence[int], n_held: int
) -> tuple[list[Row], list[Row]]:
    """(training rows, validation rows), each in the order of `rows`; see `hold_out_rows`."""
    held = hold_out_rows(sizes, order, n_held)
    train = [row for number, row in enumerate(rows) if number not in held]
    val = [row for number, row in enumerate(rows) if number in held]
    return train, val


def random_of_documents(first: int, n: int, seed: int) -> np.ndarray:
    """(n,): a random number in [0, 1) for each of the documents first, first + 1, ...; a document has the
    same one in whatever portions the documents come."""
    if n == 0:
        return np.zeros(0)
    groups = range(first // DOCUMENTS_PER_DRAW, (first + n - 1) // DOCUMENTS_PER_DRAW + 1)
    drawn = np.concatenate(
        [np.random.default_rng((seed, group)).random(DOCUMENTS_PER_DRAW) for group in groups]
    )
    start = first - groups.start * DOCUMENTS_PER_DRAW
    return drawn[start : start + n]


class HoldOutByDraw:
    """`hold_out` for documents too many to list. Each has a random number, and those whose number is below
    `limit()` are held out whole; the end of those in `large` is. What is kept is how many tokens the
    documents of each small range of numbers have."""

    def __init__(self, n_tokens: int, n_documents: int, fraction: float):
        self.n_tokens, self.fraction = n_tokens, fraction
        self.limits = size_limits(n_tokens, n_documents, fraction)
        self.large: list[tuple[int, int]] = []  # (start, stop) of each document that is too large, in tokens
        self.tokens_by_draw = np.zeros(DRAW_BINS)
        self.largest_draw = 0.0

    def add(self, sizes: np.ndarray, stops: np.ndarray, draws: np.ndarray) -> None:
        """Count documents: for each its size, where it stops in the row of all tokens, and its random
        number."""
        is_large = sizes > self.limits.one
        for size, stop in zip(sizes[is_large].tolist(), stops[is_large].tolist(), strict=True):
            self.large.append((stop - size, stop))
        bins = (draws * DRAW_BINS).astype(np.int64)
        small_sizes = np.where(is_large, 0, sizes)
        self.tokens_by_draw += np.bincount(bins, weights=small_sizes, minlength=DRAW_BINS)
        self.largest_draw = max(self.largest_draw, draws.max(initial=0.0))

    def limit(self) -> float:
        """The number below which a document is held out. The document with the largest one is trained on."""
        held = np.cumsum(self.tokens_by_draw)  # by the documents with numbers up to each bin
        n_cut = self.n_tokens - held[-1]
        last_bin = int(np.searchsorted(held, self.fraction * (self.n_tokens - n_cut)))  # reaches the share
        n_bins = last_bin + 1
        if self.fraction * n_cut + held[last_bin] > self.limits.all:
            n_bins = last_bin
        return min(n_bins / DRAW_BINS, self.largest_draw)


def warn_of_share(held: int, total: int, fraction: float, unit: str, advice: str) -> None:
    """Warn where validation holds far more, or far less, than the share asked for. A few words are too little
    text to have shares."""
    if total >= 1000 and not fraction / 2 <= held / total <= 2 * fraction + 0.05:
        warn(
            f"validation holds {held:,} {unit} and training {total - held:,}, but {fraction:.3g} of the text "
            f"should be held out; {advice}"
        )
