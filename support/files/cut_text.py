"""Cuts a long text into pieces where that does not change its tokens: the ids of the pieces together are the
ids of the whole text."""

import re
from collections.abc import Callable, Iterator

# Matches a text up to the end of its last word, that is, up to the last character with a blank after it.
WORD_END = re.compile(r".*\S(?=[ \t\n\r])", re.DOTALL)
# The same, or up to the beginning of its last line, if that is later.
WORD_END_OR_LINE = re.compile(r".*(\S(?=[ \t\n\r])|\n(?=\S))", re.DOTALL)


def last_place(pattern: re.Pattern, text: str, start: int, end: int) -> int | None:
    """The place where the last match of this pattern in text[start:end] ends; None if there is none.

    >>> last_place(WORD_END, "one two three", 0, 8)
    7
    """
    found = pattern.match(text, start, end + 1)  # one character more, so that a match can end at `end`
    return found.end() if found else None


def last_places(pattern: re.Pattern, text: str, start: int, end: int) -> Iterator[int]:
    """The ends of all matches of this pattern in text[start:end], the last one first."""
    while (place := last_place(pattern, text, start, end)) is not None:
        yield place
        end = place - 1


def cut_at_word(text: str, start: int, end: int) -> int:
    """The last place in text[start:end] where a text can be cut for GPT-2's tokenizer: the end of a word.

    Before any merge, GPT-2 splits a text with a pattern into words, each with the space before it. A word of
    the pattern never goes on after a character with a blank after it, so no token does either. If there is no
    such place (base64, a line of Chinese), the text is cut at `end`, where ids may differ from the whole's.
    """
    return last_place(WORD_END, text, start, end) or end


def cut_pieces(text: str, cut: Callable[[str, int, int], int], limit: int) -> Iterator[str]:
    """Cut `text` into pieces of at most about `limit` characters. `cut(text, start, start + limit)` returns
    where a piece ends. An empty text is one empty piece.

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
