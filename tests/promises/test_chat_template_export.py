"""The chat template of an exported model: other programs give a conversation the ids that it has here."""

import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from foreign_tokenizers import EVERY, tokenizer_like
from test_chat_template import BYTE, CHATML, PLAIN, TALK

from instruct import Pair, encode_pair
from model import GPTConfig, GPTMini
from support.checkpoint import KEY, read_metadata, saved_template, write_model
from support.exchange.gguf_file import write_gguf
from support.exchange.tokenizer_json import chat_template, tokenizer_config, tokenizer_json
from support.text.chat_template import TEMPLATES, Template, conversation_ids, prompt_ids
from tokenizer import Tokenizer

# fmt: off
PIECES = [  # of the texts of drawn templates
    "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|endoftext|>", "<|im_",
    "user\n", "### A:", "123", "é", "\U0001f389",
    " ", "  ", "\t", "\n", "\r\n", "\u2028", "\x0b", "\x1f", "\U0010ffff",
    "{{ x }}", "{% if %}", "{#", "}}", "%}", "{", "}", '"', "'", "\\", "\\n",
]
SAID = [  # what users and models say
    "Hi", "how are you?", " tick ", "", "\n\nx", "{{ 1 }}", "a{instruction}b",
    "\U0001f389", "'s", "1", "\U0010ffff", "}}{%",
]
# fmt: on


def drawn_template(draw: random.Random) -> Template:
    """A template whose texts are a few pieces each."""

    def some() -> str:
        return "".join(draw.choices(PIECES, k=draw.randint(0, 4)))

    prompt = some() + "{instruction}" + some()
    return Template(
        system=some(), prompt=prompt, prompt_with_input=prompt + "{input}", multi_turn=draw.random() < 0.7
    )


def conversations(draw: random.Random) -> list[list[dict[str, str]]]:
    """A single question, and a question that follows another and its answer; as messages."""
    said = [draw.choice(SAID) for _ in range(4)]
    return [messages_of(said[:1]), messages_of(said[:3])]


def messages_of(texts: list[str]) -> list[dict[str, str]]:
    """The texts of user and assistant, in turn, as messages."""
    roles = itertools.cycle(["user", "assistant"])
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def ids_here(template: Template, tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[int]:
    """The ids of the conversation up to the next answer, as chat makes them."""
    *before, question = [message["content"] for message in messages]
    turns = list(zip(before[::2], before[1::2], strict=True))
    return conversation_ids(template, tokenizer, turns, question, room=10**6)


def exported(tokenizer: Tokenizer, folder: Path, template: Template = PLAIN):
    """The tokenizer that transformers makes of what `convert.py --to hf` writes."""
    from transformers import AutoTokenizer

    (folder / "tokenizer.json").write_text(tokenizer_json(tokenizer), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(tokenizer_config(tokenizer, template, 10**6)), encoding="utf-8"
    )
    return AutoTokenizer.from_pretrained(folder)


def tiny_model(tokenizer: Tokenizer) -> GPTMini:
    sizes = {"d_model": 8, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "max_seq_len": 32}
    return GPTMini(GPTConfig(vocab_size=tokenizer.vocab_size, **sizes))


@pytest.mark.parametrize("name", EVERY)
def test_a_conversation_has_the_ids_that_transformers_gives_it(tmp_path, name):
    tokenizer = tokenizer_like(name)
    draw = random.Random(7)
    theirs = exported(tokenizer, tmp_path)
    bos_ids = list(tokenizer.bos_ids)
    n_first = len(bos_ids) + 1
    assert theirs("tick").input_ids[:n_first] == tokenizer.encode_prompt("tick")[:n_first]

    n_together = 0
    for _ in range(25):
        template = drawn_template(draw)
        theirs.chat_template = json.loads(json.dumps(tokenizer_config(tokenizer, template, 64)))[
            "chat_template"
        ]
        for messages in conversations(draw):
            ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
            assert ids_here(template, tokenizer, messages) == ids, (template, messages)
            assert ids[: len(bos_ids)] == bos_ids
            if len(messages) > 1:
                continue
            question = messages[0]["content"]
            assert prompt_ids(template, tokenizer, question) == ids
            answered = messages_of([question, "So."])
            with_answer = theirs.apply_chat_template(answered, tokenize=True, return_dict=False)
            if with_answer[: len(ids)] == ids:  # no token reaches over the border between prompt and answer
                pair = encode_pair(Pair(question, "", "So.", ""), tokenizer, template)
                assert pair.ids.tolist() == with_answer
                n_together += 1
        texts = template.system + template.prompt
        if bos_ids and not any(special in texts for special in tokenizer.special_ids):
            assert ids.count(bos_ids[0]) == 1
    assert n_together >= 10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bpe", "gpt2", "bytes", "bytes + bos"])
def test_a_conversation_has_the_ids_that_llama_cpp_gives_it(tmp_path, name):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    pytest.importorskip("gguf", reason="gguf is not installed")
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    tokenizer = tokenizer_like(name)
    draw = random.Random(8)
    write_gguf(tmp_path / "m.gguf", tiny_model(tokenizer), tokenizer, PLAIN, "f32", "tiny")
    llama = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=32, vocab_only=True, verbose=False)
    bos, eos = (llama._model.token_get_text(id) for id in (llama.token_bos(), llama.token_eos()))
    assert llama.metadata["tokenizer.chat_template"] == chat_template(PLAIN, tokenizer)
    for _ in range(25):
        template = drawn_template(draw)
        formatter = Jinja2ChatFormatter(chat_template(template, tokenizer), eos_token=eos, bos_token=bos)
        for messages in conversations(draw):
            text = formatter(messages=messages).prompt.encode()
            ids = llama.tokenize(text, add_bos=False, special=True)
            assert ids == ids_here(template, tokenizer, messages), (template, messages)
    llama.close()


ALTERNATE = "messages must alternate"


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    ("roles", "said"),
    [
        (["system", "user"], "system message"),
        (["user", "assistant", "system"], "system message"),
        (["tool", "user"], "user or assistant"),
        (["user", "assistant", "developer"], "user or assistant"),
        (["assistant", "user"], ALTERNATE),
        (["user", "user"], ALTERNATE),
        (["user", "assistant", "assistant"], ALTERNATE),
    ],
    ids=str,
)
def test_messages_that_the_template_has_no_place_for_are_refused(tmp_path, name, roles, said):
    theirs = exported(BYTE, tmp_path, TEMPLATES[name])
    with pytest.raises(Exception, match=said):
        theirs.apply_chat_template([{"role": role, "content": "Be brief."} for role in roles], tokenize=False)


@pytest.mark.parametrize("multi_turn", [True, False])
def test_a_conversation_that_ends_with_an_answer_ends_with_eos(tmp_path, multi_turn):
    """Programs that train on messages need that."""
    template = TALK.model_copy(update={"multi_turn": multi_turn})
    theirs = exported(BYTE, tmp_path, template)
    text = theirs.apply_chat_template(messages_of(["a", "b", "c", "d"]), tokenize=False)
    assert text == ("S<a>b<|endoftext|><c>d<|endoftext|>" if multi_turn else "S<c>d<|endoftext|>")


def test_a_checkpoint_of_an_older_version_is_asked_as_it_was_trained(tmp_path, capsys):
    """Its template does not say whether names of special tokens are tokens; they were letters then."""
    tokenizer = tokenizer_like("bytes")
    write_model(tmp_path / "old.ckpt", tiny_model(tokenizer), tokenizer, {})
    checkpoint = torch.load(tmp_path / "old.ckpt", weights_only=True)
    checkpoint[KEY]["template"] = CHATML.model_dump(exclude={"special_tokens"})
    torch.save(checkpoint, tmp_path / "old.ckpt")
    template = saved_template(read_metadata(tmp_path / "old.ckpt"), "old.ckpt")
    as_letters = tokenizer.encode(CHATML.first_prompt("Hi"))
    assert prompt_ids(template, tokenizer, "Hi") == as_letters
    assert prompt_ids(CHATML, tokenizer, "Hi") != as_letters
    chat_template(template, tokenizer)
    assert "<|im_start|>" in capsys.readouterr().err
    chat_template(CHATML, tokenizer)
    assert capsys.readouterr().err == ""
