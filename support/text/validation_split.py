"""What is held out for validation: one rule for text in memory, datasets, instructions and token files.

Random whole documents are held out until they make up the share asked for, so that validation text is of the
same kind as training text. A document much larger than that share is never held out whole: of a book and two
notes, only the notes would be left to train on. Only the end of such a document is held out, and the same is
done if there is only one document. A row of a dataset or of instructions cannot be cut, so a large one is
trained on.

    documents that fit in memory     hold_out, and split_documents, which also cuts them
    a given number of rows           hold_out_rows, and split_rows
    documents that do not fit        HoldOutByDraw: the rule of hold_out, without a list of all documents
    one long row of tokens           held_out_end, the place where its end begins
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from support.messages import warn

DOCUMENTS_PER_DRAW = 2**12  # documents whose random numbers come from one generator
DRAW_BINS = 2**16  # documents are counted by random number, in this many equal steps from 0 to 1
Row = TypeVar("Row")


class SizeLimits(NamedTuple):
    """How large one held-out document may be (`one`), and all of them together (`all`), in characters or
    tokens."""

    one: float
    all: float


def size_limits(total: int, n_documents: int, fraction: float) -> SizeLimits:
    """The limits for documents that have `total` characters together, if `fraction` is to be held out.

    If there are only a few documents, each may hold more than the share. If there are many, some are three
    times as long as the average. Both should still count as normal. `all` leaves room for half of the share
    and one more document.
    """
    one = total * min(0.5, max(1.5 * fraction, min(0.05, 3 / max(1, n_documents))))
    return SizeLimits(one=one, all=max(one + total * fraction / 2, total * fraction * 1.5))


def held_out_end(size: int, fraction: float) -> int:
    """Where the last `fraction` of one document begins; at least one character or token comes before it."""
    return min(size, max(1, int(size * (1 - fraction))))


def hold_out(sizes: Sequence[int], order: Sequence[int], fraction: float) -> tuple[set[int], set[int]]:
    """(numbers of the documents held out whole, numbers of the documents whose end is held out). Whole ones
    are taken in `order` until they and the ends make up `fraction` of everything."""
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
    """(training documents, validation documents). `val_fraction` of the characters is held out, chosen at
    random with `seed`."""
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
    """The numbers of the rows to hold out: the first `n_held` in this order, but none that is too large."""
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
    """A random number in [0, 1) for each of `n` documents, whose numbers are first, first + 1, ... It depends
    only on the document's number and the seed, so asking for a few documents at a time gives the same."""
    if n == 0:
        return np.zeros(0)
    groups = range(first // DOCUMENTS_PER_DRAW, (first + n - 1) // DOCUMENTS_PER_DRAW + 1)
    drawn = np.concatenate(
        [np.random.default_rng((seed, group)).random(DOCUMENTS_PER_DRAW) for group in groups]
    )
    start = first - groups.start * DOCUMENTS_PER_DRAW
    return drawn[start : start + n]


class HoldOutByDraw:
    """The rule of `hold_out` for more documents than a list can hold. Each document has a random number, its
    *draw*. Documents with a draw below `limit()` are held out whole; of the documents in `large`, the end is
    held out. This object only adds up, for each small range of draws, the tokens of its documents."""

    def __init__(self, n_tokens: int, n_documents: int, fraction: float):
        self.n_tokens, self.fraction = n_tokens, fraction
        self.limits = size_limits(n_tokens, n_documents, fraction)
        self.large: list[tuple[int, int]] = []  # (start, stop) of each document that is too large, in tokens
        self.tokens_by_draw = np.zeros(DRAW_BINS)
        self.largest_draw = 0.0

    def add(self, sizes: np.ndarray, stops: np.ndarray, draws: np.ndarray) -> None:
        """Count some documents, given for each its size, the place where it stops in the row of all tokens,
        and its random number."""
        is_large = sizes > self.limits.one
        for size, stop in zip(sizes[is_large].tolist(), stops[is_large].tolist(), strict=True):
            self.large.append((stop - size, stop))
        bins = (draws * DRAW_BINS).astype(np.int64)
        small_sizes = np.where(is_large, 0, sizes)
        self.tokens_by_draw += np.bincount(bins, weights=small_sizes, minlength=DRAW_BINS)
        self.largest_draw = max(self.largest_draw, draws.max(initial=0.0))

    def limit(self) -> float:
        """The draw below which a document is held out. The document with the largest draw is always trained
        on, so that one is left."""
        held = np.cumsum(self.tokens_by_draw)  # tokens held out if the limit is the end of each bin
        n_cut = self.n_tokens - held[-1]
        last_bin = int(np.searchsorted(held, self.fraction * (self.n_tokens - n_cut)))  # reaches the share
        n_bins = last_bin + 1
        if self.fraction * n_cut + held[last_bin] > self.limits.all:
            n_bins = last_bin
        return min(n_bins / DRAW_BINS, self.largest_draw)


def warn_of_share(held: int, total: int, fraction: float, unit: str, advice: str) -> None:
    """Warn if validation holds far more, or far less, than the share asked for; but not for a text of a few
    words."""
    if total >= 1000 and not fraction / 2 <= held / total <= 2 * fraction + 0.05:
        warn(
            f"validation holds {held:,} {unit} and training {total - held:,}, but {fraction:.3g} of the text "
            f"should be held out; {advice}"
        )
