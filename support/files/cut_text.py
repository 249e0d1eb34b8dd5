"""A long text in pieces: where it can be cut so that the ids of the pieces are the ids of the whole text."""

import re
from collections.abc import Callable, Iterator

# Matches a text up to the last character that a blank follows.
WORD_END = re.compile(r".*\S(?=[ \t\n\r])", re.DOTALL)
# The same, or up to where the last line begins, if that is later.
WORD_END_OR_LINE = re.compile(r".*(\S(?=[ \t\n\r])|\n(?=\S))", re.DOTALL)


def last_place(pattern: re.Pattern, text: str, start: int, end: int) -> int | None:
    """Where the last match of this pattern in text[start:end] ends; None where there is none.

    >>> last_place(WORD_END, "one two three", 0, 8)
    7
    """
    found = pattern.match(text, start, end + 1)  # one character more, so that a match can end at `end`
    return found.end() if found else None


def last_places(pattern: re.Pattern, text: str, start: int, end: int) -> Iterator[int]:
    """All such places, the last one first."""
    while (place := last_place(pattern, text, start, end)) is not None:
        yield place
        end = place - 1


def cut_at_word(text: str, start: int, end: int) -> int:
    """Where to cut for GPT-2's pattern: at the last end of a word.

    The pattern splits a text into words before any merge, each with the space before it. Every branch of it
    ends where a blank follows a character, so no token reaches over that place. A stretch without such a
    place (base64, a line of Chinese) is cut at `end`, and may have other ids there than in one piece.
    """
    return last_place(WORD_END, text, start, end) or end


def cut_pieces(text: str, cut: Callable[[str, int, int], int], limit: int) -> Iterator[str]:
    """`text` in pieces, each of which ends where `cut(text, start, start + limit)` says. An empty text is one
    empty piece.

    >>> list(cut_pieces("one two three", cut_at_word, 8))
    ['one two', ' three']
    """
    start = 0
    while len(text) - start > limit:
        end = cut(text, start, start + limit)
        if end >= len(text):
            break
        yield text[start:end]
        start = end
    yield text[start:]
