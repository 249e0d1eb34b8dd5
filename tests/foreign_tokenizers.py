"""Tokenizers laid out as those of published models, small: what they do at the start of a text is what
tests need of them."""

import functools
import json

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, FileTokenizer, GPT2Tokenizer, Tokenizer

BAR = "\u2581"  # SentencePiece's sign for a space
TEXT = (
    "tick tock. Who are you? ### User: fine, thanks! ### Assistant: the clock says 12345 {x} "
    + "".join(map(chr, range(33, 127)))
) * 20
LLAMA = normalizers.Sequence([normalizers.Prepend(BAR), normalizers.Replace(" ", BAR)])
UNDO_LLAMA = decoders.Sequence(
    [decoders.Replace(BAR, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")


def trained(
    cut: object, normalizer: object, decoder: object, special: tuple[str, ...] = CHAT_TOKENS, **flags: bool
) -> Backend:
    """A BPE of bytes (as characters, or as <0x0A> for what the vocabulary lacks), with <unk>, <s> and </s>
    as ids 0, 1, 2."""
    of_bytes = isinstance(cut, pre_tokenizers.ByteLevel)
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=not of_bytes))
    if cut:
        backend.pre_tokenizer = cut
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(
            prepend_scheme="never"
        )  # for training: words, not the whole text as one
    names = ["<unk>", "<s>", "</s>", *(() if of_bytes else (f"<0x{byte:02X}>" for byte in range(256)))]
    alphabet = pre_tokenizers.ByteLevel.alphabet() if of_bytes else []
    backend.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=520, special_tokens=names, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tree = json.loads(backend.to_str())
    tree["added_tokens"] = tree["added_tokens"][:3]  # the bytes are plain tokens
    tree["pre_tokenizer"] = tree["pre_tokenizer"] if cut else None
    backend = Backend.from_str(json.dumps(tree))
    if normalizer:
        backend.normalizer = normalizer
    backend.decoder = decoder
    backend.add_special_tokens(
        [AddedToken(name, special=True, normalized=False, **flags) for name in special]
    )
    return backend


def with_bos(backend: Backend) -> Backend:
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def backend_like(name: str) -> Backend:
    level, metaspace = pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Metaspace

    def undo(scheme: str) -> decoders.Decoder:
        return decoders.Sequence(
            [decoders.Metaspace(prepend_scheme=scheme), decoders.ByteFallback(), decoders.Fuse()]
        )

    return {
        "llama": lambda: trained(None, LLAMA, UNDO_LLAMA),
        "space first": lambda: trained(metaspace(prepend_scheme="first"), None, undo("first")),
        "space always": lambda: trained(metaspace(prepend_scheme="always"), None, undo("always")),
        "space never": lambda: trained(metaspace(prepend_scheme="never"), None, undo("never")),
        "bytes": lambda: trained(level, None, decoders.ByteLevel()),
        "bytes, space first": lambda: trained(
            pre_tokenizers.ByteLevel(add_prefix_space=True), None, decoders.ByteLevel()
        ),
        "bytes, greedy names": lambda: trained(level, None, decoders.ByteLevel(), lstrip=True, rstrip=True),
    }[name]()


FOREIGN = [
    "llama",
    "space first",
    "space always",
    "space never",
    "bytes",
    "bytes, space first",
    "bytes, greedy names",
]
OURS = ["byte", "char", "bpe", "gpt2"]
EVERY = [*OURS, *FOREIGN, *(f"{name} + bos" for name in FOREIGN), "two bos"]


@functools.cache
def tokenizer_like(name: str) -> Tokenizer:
    """One of EVERY."""
    if name in OURS:
        chars = "".join(map(chr, range(9, 127))) + "\u00e9\u2028\U0001f389\U0010ffff"
        return {
            "byte": ByteTokenizer,
            "char": lambda: CharTokenizer.train([chars]),
            "bpe": lambda: BPETokenizer.train([TEXT], 400),
            "gpt2": GPT2Tokenizer,
        }[name]()
    if name == "two bos":
        backend = backend_like("bytes")
        named = [("<s>", 1), ("</s>", 2), (CHAT_TOKENS[0], backend.token_to_id(CHAT_TOKENS[0]))]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{CHAT_TOKENS[0]} <s> $A </s>", special_tokens=named
        )
        return FileTokenizer(backend.to_str(), "</s>")
    kind, _, bos = name.partition(" + ")
    return FileTokenizer((with_bos if bos else lambda backend: backend)(backend_like(kind)).to_str(), "</s>")
