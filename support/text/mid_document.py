"""Text and ids in the middle of a document.

A part of a document cannot be encoded or decoded as if it were a whole text, for three reasons:

- A tokenizer may treat the start of a text differently. The tokenizers of Llama 2 and Mistral put a space
  before each text, and take the first space away when they decode. So the "s" of "ticks", encoded on its own,
  becomes " s".
- A character can be split over several tokens: "é" is two bytes, so two tokens of kind `byte`. Many
  tokenizers have a token for each byte, for characters that their vocabulary lacks (byte fallback). The first
  half of a character alone decodes to U+FFFD.
- A token can reach over the border between two parts: "tick" and "s" may be one token together.

So the functions here look at the text before the part. `ids_after` turns text into ids, `text_after` turns
ids into text, and `TextStream` turns ids into text one by one, while a model writes.
"""

from collections.abc import Sequence

from tokenizer import Tokenizer

CONTEXT_TOKENS = 16  # how many ids before a part are looked at to decode it
HALF_CHARACTER = "\ufffd"  # what a decoder writes for bytes that are not a whole character


def ids_after(tokenizer: Tokenizer, before: Sequence[str | int], text: str) -> list[int]:
    """The ids of `text` when it follows `before`, a list of parts as `Tokenizer.encode_parts` takes them.

    Both are encoded together, and the ids of `before` are cut off the front. That fails if a token reaches
    over the border: the ids of `before` are fixed already (a model has read them, say). Then `text` is
    encoded on its own, without a space before it.
    """
    known = tokenizer.encode_parts(before)
    together = tokenizer.encode_parts([*before, text])
    if together[: len(known)] == known:
        return together[len(known) :]
    return tokenizer.encode_inside(text)


def text_after(tokenizer: Tokenizer, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text of `ids` when they follow `before`. Both are decoded together, and the text of `before` is cut
    off the front."""
    context = context_of(tokenizer, before)
    return tokenizer.decode([*context, *ids])[len(tokenizer.decode(context)) :]


def context_of(tokenizer: Tokenizer, before: Sequence[int]) -> list[int]:
    """The last ids of `before`, enough of them to decode what follows: at most CONTEXT_TOKENS ids, all from
    the same document, and the first of them begins a character."""
    context = list(before[-CONTEXT_TOKENS:])
    starts = [n for n, id in enumerate(context, 1) if id == tokenizer.eos_id or id in tokenizer.bos_ids]
    if starts:  # a document begins after the last EOS or BOS
        context = context[starts[-1] :]
    while context and tokenizer.decode(context).startswith(HALF_CHARACTER):
        context.pop(0)
    return context


class TextStream:
    """Takes ids one by one, and gives text as soon as it is whole: half a character is never shown.

    >>> from tokenizer import ByteTokenizer
    >>> stream = TextStream(ByteTokenizer())
    >>> [stream.push(i) for i in "né".encode()]
    ['n', '', 'é']
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()):
        """`before` are the ids that come before the first one pushed, such as the ids of a prompt."""
        self.tokenizer = tokenizer
        self.context = context_of(tokenizer, before)  # ids whose text has been shown
        self.pending: list[int] = []  # ids whose text has not been shown

    def push(self, token_id: int) -> str:
        """The text that this token completes, or an empty string."""
        self.pending.append(token_id)
        text = self._new_text()
        if text.endswith(HALF_CHARACTER):  # the rest may follow; if not, `flush` shows U+FFFD
            return ""
        self.context = self.pending
        self.pending = []
        return text

    def flush(self) -> str:
        """The text that is left at the end, with U+FFFD for an unfinished character."""
        text = self._new_text()
        self.context = []
        self.pending = []
        return text

    def _new_text(self) -> str:
        shown = self.tokenizer.decode(self.context)
        return self.tokenizer.decode(self.context + self.pending)[len(shown) :]
