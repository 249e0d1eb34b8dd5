"""Small tokenizers built like those of published models. The tests need their behaviour at the start of a
text."""

import functools
import json

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, FileTokenizer, GPT2Tokenizer, Tokenizer

BAR = "\u2581"  # SentencePiece's sign for a space
ASCII = "".join(map(chr, range(33, 127)))
TEXT = "tick tock. Who are you? ### User: fine, thanks! ### Assistant: the clock says 12345 {x} "
TEXT = (TEXT + ASCII) * 20
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")

OURS = ["byte", "char", "bpe", "gpt2"]
FOREIGN = [
    "llama",
    "space first",
    "space always",
    "space never",
    "bytes",
    "bytes, space first",
    "bytes, greedy names",
]
EVERY = [*OURS, *FOREIGN, *(f"{name} + bos" for name in FOREIGN), "two bos"]


@functools.cache
def tokenizer_like(name: str) -> Tokenizer:
    """One of EVERY."""
    if name == "byte":
        return ByteTokenizer()
    if name == "char":
        return CharTokenizer.train(["".join(map(chr, range(9, 127))) + "\u00e9\u2028\U0001f389\U0010ffff"])
    if name == "bpe":
        return BPETokenizer.train([TEXT], 400)
    if name == "gpt2":
        return GPT2Tokenizer()
    if name == "two bos":
        backend = backend_like("bytes")
        special = [("<s>", 1), ("</s>", 2), (CHAT_TOKENS[0], backend.token_to_id(CHAT_TOKENS[0]))]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{CHAT_TOKENS[0]} <s> $A </s>", special_tokens=special
        )
        return FileTokenizer(backend.to_str(), "</s>")
    backend = backend_like(name.removesuffix(" + bos"))
    if name.endswith(" + bos"):
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return FileTokenizer(backend.to_str(), "</s>")


def backend_like(name: str) -> Backend:
    """One of FOREIGN."""
    if name == "llama":
        return llama_like()
    if name.startswith("space "):
        return metaspace_like(name.removeprefix("space "))
    space_first = name == "bytes, space first"
    greedy = name == "bytes, greedy names"
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=space_first)
    return trained(byte_level, None, decoders.ByteLevel(), lstrip=greedy, rstrip=greedy)


def llama_like() -> Backend:
    """Llama 2: the whole text is one word, and a space is put before it."""
    normalizer = normalizers.Sequence([normalizers.Prepend(BAR), normalizers.Replace(" ", BAR)])
    undo = [decoders.Replace(BAR, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return trained(None, normalizer, decoders.Sequence(undo))


def metaspace_like(scheme: str) -> Backend:
    """SentencePiece with a space before the `first` word of a text, before `always` each part, or `never`."""
    undo = [decoders.Metaspace(prepend_scheme=scheme), decoders.ByteFallback(), decoders.Fuse()]
    return trained(pre_tokenizers.Metaspace(prepend_scheme=scheme), None, decoders.Sequence(undo))


def trained(
    pre_tokenizer: object, normalizer: object, decoder: object, lstrip: bool = False, rstrip: bool = False
) -> Backend:
    """A trained BPE with <unk>, <s> and </s> as ids 0, 1, 2 and CHAT_TOKENS as the last ones. Bytes are
    characters of the vocabulary with ByteLevel, else tokens such as <0x0A> for what the vocabulary lacks.
    `lstrip` and `rstrip`: the CHAT_TOKENS take the spaces around them."""
    of_bytes = isinstance(pre_tokenizer, pre_tokenizers.ByteLevel)
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=not of_bytes))
    # Training needs words. A tokenizer without a pre-tokenizer would take the whole text as one.
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.Metaspace(prepend_scheme="never")
    byte_names = [] if of_bytes else [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=520,
        special_tokens=["<unk>", "<s>", "</s>", *byte_names],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if of_bytes else [],
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    tree = json.loads(backend.to_str())
    tree["added_tokens"] = tree["added_tokens"][:3]  # the bytes become plain tokens
    if pre_tokenizer is None:
        tree["pre_tokenizer"] = None
    backend = Backend.from_str(json.dumps(tree))
    if normalizer:
        backend.normalizer = normalizer
    backend.decoder = decoder
    for name in CHAT_TOKENS:
        token = AddedToken(name, special=True, normalized=False, lstrip=lstrip, rstrip=rstrip)
        backend.add_special_tokens([token])
    return backend
