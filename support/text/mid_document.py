"""Text and ids away from the start of a document.

A tokenizer may treat the start of a text differently: those of Llama 2 and Mistral put a space before each
text, and take the first space off when they decode. So a part is never encoded or decoded as if it were a
whole text: `ids_after` and `text_after` look at what stands before it.
"""

from collections.abc import Sequence

from tokenizer import Tokenizer

CONTEXT = 16  # ids before a text that are looked at to decode it


def ids_after(tokenizer: Tokenizer, before: Sequence[str | int], text: str) -> list[int]:
    """The ids of `text` after others, given as for `encode_parts`: those of all together less those of
    `before`, where these begin them. Elsewhere a token reaches over the border (`tick` and `s` are one),
    and `text` is encoded apart: what was before it has its ids already, a prompt that was read for
    example."""
    known, all_ids = tokenizer.encode_parts(before), tokenizer.encode_parts([*before, text])
    return all_ids[len(known) :] if all_ids[: len(known)] == known else tokenizer.encode_inside(text)


def text_after(tokenizer: Tokenizer, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text of `ids` where they follow `before`: the text of all less that of `before`."""
    context = context_of(tokenizer, before)
    return tokenizer.decode([*context, *ids])[len(tokenizer.decode(context)) :]


def context_of(tokenizer: Tokenizer, before: Sequence[int]) -> list[int]:
    """The last ids of `before`, at most CONTEXT, that belong to the same document and begin with a whole
    character."""
    context: list[int] = []
    for id in reversed(before[-CONTEXT:]):
        if id == tokenizer.eos_id or id in tokenizer.bos_ids:
            break
        context.insert(0, id)
    while context and tokenizer.decode(context).startswith("\ufffd"):
        context.pop(0)
    return context


class TextStream:
    """Ids in one by one, text out as soon as it is whole: a character split over two tokens is never shown
    half.

    >>> stream = TextStream(ByteTokenizer())
    >>> [stream.push(i) for i in "né".encode()]
    ['n', '', 'é']
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()):
        """`before` are the ids that the first of these follows: a prompt's."""
        self.tokenizer = tokenizer
        self.context = context_of(
            tokenizer, before
        )  # ids already shown, kept because some decoders treat the first token differently
        self.pending: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that this token completes, or an empty string."""
        self.pending.append(token_id)
        text = self._new_text()
        if text.endswith(
            "\ufffd"
        ):  # an unfinished character, or truly broken bytes: wait, or let `flush` show it
            return ""
        self.context, self.pending = self.pending, []
        return text

    def flush(self) -> str:
        """What is left at the end, with U+FFFD for an unfinished character."""
        text = self._new_text()
        self.context, self.pending = [], []
        return text

    def _new_text(self) -> str:
        shown = self.tokenizer.decode(self.context)
        return self.tokenizer.decode(self.context + self.pending)[len(shown) :]
