"""What is held out for validation: one rule for texts in memory, token files, data sets and rows of
instructions.

Whole documents are drawn until they hold the share asked for, so that validation is of the same kind as
training. One that is much larger than that share is never held out whole: a book beside two notes would leave
only the notes to train on. Its own end is held out instead, as of a corpus of a single document; a row of
instructions, which cannot be cut, is trained on.
"""

from collections.abc import Sequence

from support.messages import warn


def largest_whole(total: int, n: int, fraction: float) -> float:
    """The size from which one of `n` documents is not held out whole. Of a few documents each may hold
    more than the share, and of many similar ones some are three times as long as most: neither is too
    large."""
    return total * min(0.5, max(1.5 * fraction, min(0.05, 3 / max(1, n))))


def most_held(total: int, n: int, fraction: float) -> float:
    """What validation may hold: a document that would bring it beyond is trained on. Half of the share is
    then held at least."""
    return max(largest_whole(total, n, fraction) + total * fraction / 2, total * fraction * 1.5)


def hold_out(sizes: Sequence[int], order: Sequence[int], fraction: float) -> tuple[set[int], set[int]]:
    """(documents held out whole, drawn in this order; documents whose last `fraction` is held out), by
    their numbers."""
    total = sum(sizes)
    large, most = (limit(total, len(sizes), fraction) for limit in (largest_whole, most_held))
    cut, whole = {i for i, size in enumerate(sizes) if size > large}, set()
    wanted = fraction * (total - sum(sizes[i] for i in cut))
    for i in (int(i) for i in order[:-1] if i not in cut):  # at least one is left to train on
        if wanted <= 0 or fraction * total - wanted + sizes[i] > most:
            break
        whole.add(i)
        wanted -= sizes[i]
    return whole, cut


def hold_out_rows(sizes: Sequence[int], order: Sequence[int], n_held: int) -> set[int]:
    """The first `n_held` rows in this order, but for those that are too large to be held out."""
    share = (sum(sizes), len(sizes), n_held / max(1, len(sizes)))
    large, most, held, n_chars = largest_whole(*share), most_held(*share), set(), 0
    for i in map(int, order):
        if len(held) < n_held and sizes[i] <= large and n_chars + sizes[i] <= most:
            held.add(i)
            n_chars += sizes[i]
    return held


def check_share(held: int, total: int, fraction: float, unit: str, advice: str) -> None:
    """Warn where validation holds far more, or far less, than the share that was asked for. A few words
    have no shares."""
    if total >= 1000 and not fraction / 2 <= held / total <= 2 * fraction + 0.05:
        warn(
            f"validation holds {held:,} {unit} and training {total - held:,}, where {fraction:.3g} of the "
            f"text was to be held out; {advice}"
        )
