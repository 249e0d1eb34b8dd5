"""support/text/chat_template.py: the texts around an instruction, and the ids of a conversation, put
together by hand."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign_tokenizers import EVERY, FOREIGN, tokenizer_like
from pydantic import ValidationError

from instruct import Pair, encode_pair
from model import GPTConfig, GPTMini
from support.checkpoint import KEY, read_metadata, saved_template, write_model
from support.config.read import validate_config
from support.exchange.gguf_file import write_gguf
from support.exchange.tokenizer_json import chat_template, tokenizer_config, tokenizer_json
from support.messages import UserError
from support.text.chat_template import TEMPLATES, Template, conversation_ids, prompt_ids
from tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer, Tokenizer, build_tokenizer

BYTE = ByteTokenizer()
EOS = [256]
PLAIN = Template(prompt="Q {instruction} A ", prompt_with_input="Q {instruction} with {input} A ")
AWKWARD = [
    "{input}",
    "{instruction}",
    "{instruction}{input}",
    "{}",
    "{0}",
    "{{x}}",
    r"\1 \g<0> \n",
    "%s %(input)s",
    "$input",
    "a\nb\n",
    " é ∑ ",
]


# ---- one prompt ----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", AWKWARD)
def test_a_text_that_looks_like_a_slot_or_an_escape_stays_as_it_is(text):
    assert PLAIN.fill(text) == "Q " + text + " A "
    assert PLAIN.fill(text, "x") == "Q " + text + " with x A "
    assert PLAIN.fill("i", text) == "Q i with " + text + " A "
    for other in AWKWARD:
        assert PLAIN.fill(text, other) == "Q " + text + " with " + other + " A "


def test_slots_may_stand_in_any_order_and_beside_braces_of_the_template():
    template = Template(
        prompt='{"q": "{instruction}"}',
        prompt_with_input='{"about": "{input}", "q": "{instruction}", "{x}": {}}\\1',
    )
    assert template.fill("why") == '{"q": "why"}'
    assert template.fill("why", "rain") == '{"about": "rain", "q": "why", "{x}": {}}\\1'


def test_an_empty_input_is_none():
    assert PLAIN.fill("i", "") == PLAIN.fill("i") == "Q i A "


SOUND = {"prompt": "{instruction}", "prompt_with_input": "{instruction} {input}"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": "Say something."}, "prompt must hold {instruction}, each once"),
        ({"prompt": "{instruction} and {instruction}"}, "prompt must hold {instruction}, each once"),
        ({"prompt": "{instruction} {input}"}, "prompt must hold {instruction}, each once"),
        ({"prompt": "{Instruction}"}, "prompt must hold {instruction}, each once"),
        ({"prompt": ""}, "prompt must hold {instruction}, each once"),
        (
            {"prompt_with_input": "{instruction}"},
            "prompt_with_input must hold {instruction} and {input}, each once",
        ),
        (
            {"prompt_with_input": "{input}"},
            "prompt_with_input must hold {instruction} and {input}, each once",
        ),
        (
            {"prompt_with_input": "{instruction} {input} {input}"},
            "prompt_with_input must hold {instruction} and {input}, each once",
        ),
        ({"stop": ["User:", ""]}, "an empty text would end every answer at once"),
        ({"stop": "User:"}, "valid list"),
        ({"multi_turn": "yes"}, "valid boolean"),
        ({"system": 5}, "valid string"),
        ({"promt": "x"}, "promt"),
    ],
    ids=str,
)
def test_a_template_that_would_lose_a_text_or_has_an_unknown_key_is_refused(changes, said):
    Template.model_validate(SOUND)
    with pytest.raises(ValidationError) as error:
        Template.model_validate(SOUND | changes)
    assert said in str(error.value)
    with pytest.raises(UserError) as answer:
        config_of(SOUND | changes)
    assert "template" in str(answer.value) and (said in str(answer.value) or "promt" in str(answer.value))


@pytest.mark.parametrize("left_out", ["prompt", "prompt_with_input"])
def test_both_prompts_are_needed(left_out):
    with pytest.raises(UserError, match=rf"template\.{left_out} is required"):
        config_of({name: text for name, text in SOUND.items() if name != left_out})


def config_of(template: object, **data):
    tree = {"data": {"source": "instructions", "path": "rows.json", **data}, "training": {"max_steps": 1}}
    return validate_config(tree if template is None else tree | {"template": template})


def test_a_config_takes_a_template_by_name_or_written_out_and_keeps_it():
    assert config_of("alpaca").template == TEMPLATES["alpaca"]
    assert config_of(None).template == TEMPLATES["chat"], "instructions need one"
    written = config_of(SOUND | {"system": "Be brief.", "stop": ["Q"], "multi_turn": True})
    assert written.template.fill("a", "b") == "a b" and written.template.system == "Be brief."
    for config in (written, config_of("alpaca")):
        assert validate_config(config.to_dict()).template == config.template
    assert validate_config({"data": {"path": "a.txt"}, "training": {"max_steps": 1}}).template is None, (
        "a text has no questions"
    )
    with pytest.raises(UserError, match="template=llama is not one of chat, alpaca"):
        config_of("llama")


# ---- the named ones ------------------------------------------------------------------------------


def test_alpacas_texts_are_those_of_its_authors_and_a_line_end():
    """Their file ends both prompts at the colon. Here a line end follows, as in alpaca-lora."""
    alone = TEMPLATES["alpaca"].fill("Name three primary colors.")
    assert alone == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n"
        "\n"
        "### Instruction:\n"
        "Name three primary colors.\n"
        "\n"
        "### Response:\n"
    )
    with_input = TEMPLATES["alpaca"].fill("Correct the spelling.", "He go to scool.")
    assert with_input == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n"
        "\n"
        "### Instruction:\n"
        "Correct the spelling.\n"
        "\n"
        "### Input:\n"
        "He go to scool.\n"
        "\n"
        "### Response:\n"
    )
    assert (TEMPLATES["alpaca"].system, TEMPLATES["alpaca"].multi_turn) == ("", False)


def test_the_texts_of_chat():
    assert TEMPLATES["chat"].fill("Name a color.") == "### User:\nName a color.\n\n### Assistant:\n"
    assert (
        TEMPLATES["chat"].fill("Translate.", "le chat")
        == "### User:\nTranslate.\n\nle chat\n\n### Assistant:\n"
    )
    assert (TEMPLATES["chat"].system, TEMPLATES["chat"].multi_turn) == ("", True)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_named_templates_stops_are_what_a_model_would_go_on_with(name):
    assert TEMPLATES[name].stop
    assert all(
        stop in TEMPLATES[name].fill("a") and stop in TEMPLATES[name].fill("a", "b")
        for stop in TEMPLATES[name].stop
    )


# ---- ids -----------------------------------------------------------------------------------------


def test_the_ids_of_a_prompt_are_those_of_its_text_behind_the_system_text():
    template = Template(
        system="Be brief. ", prompt="Q {instruction} A ", prompt_with_input="Q {instruction} {input} A "
    )
    assert prompt_ids(template, BYTE, "é?", "x") == list("Be brief. Q é? x A ".encode())
    assert prompt_ids(PLAIN, BYTE, "<|endoftext|>") == list(b"Q <|endoftext|> A "), "no text spells EOS"
    with pytest.raises(UserError, match="'∑'"):
        prompt_ids(PLAIN, CharTokenizer.train(["Q x A "]), "∑")


TALK = Template(
    system="S", prompt="<{instruction}>", prompt_with_input="<{instruction},{input}>", multi_turn=True
)
TURNS = [("one", "1"), ("three", "333"), ("two", "22")]


def test_turns_stand_in_order_each_closed_by_eos_and_the_system_text_once():
    turns = list(TURNS)
    expected = [*b"S", *b"<one>", *b"1", 256, *b"<three>", *b"333", 256, *b"<two>", *b"22", 256, *b"<now>"]
    assert conversation_ids(TALK, BYTE, turns, "now", 999) == expected
    assert conversation_ids(TALK, BYTE, turns, "now", 6) == list(b"S<now>")
    assert turns == TURNS, "what is forgotten here is still the caller's"
    assert conversation_ids(TALK, BYTE, tuple(TURNS[:1]), "now", 999) == [*b"S<one>1", 256, *b"<now>"]


def test_a_single_turn_template_forgets():
    forgetful = TALK.model_copy(update={"multi_turn": False})
    assert conversation_ids(forgetful, BYTE, TURNS, "now", 999) == list(b"S<now>")
    assert conversation_ids(forgetful, BYTE, TURNS, "now", 4) == list(b"now>")


def test_the_oldest_turns_are_forgotten_where_all_do_not_fit():
    whole = conversation_ids(TALK, BYTE, TURNS, "now", 999)
    assert len(whole) == 32
    assert conversation_ids(TALK, BYTE, TURNS, "now", 32) == whole
    two = [*b"S<three>333", 256, *b"<two>22", 256, *b"<now>"]
    assert (
        conversation_ids(TALK, BYTE, TURNS, "now", 31)
        == conversation_ids(TALK, BYTE, TURNS, "now", 25)
        == two
    )
    one = [*b"S<two>22", 256, *b"<now>"]
    assert (
        conversation_ids(TALK, BYTE, TURNS, "now", 24)
        == conversation_ids(TALK, BYTE, TURNS, "now", 14)
        == one
    )
    assert (
        conversation_ids(TALK, BYTE, TURNS, "now", 13)
        == conversation_ids(TALK, BYTE, TURNS, "now", 6)
        == list(b"S<now>")
    )
    assert conversation_ids(TALK, BYTE, TURNS, "now", 5) == list(b"<now>"), (
        "of a question too long by itself, the end"
    )
    assert conversation_ids(TALK, BYTE, TURNS, "now", 2) == list(b"w>")


def test_a_conversation_is_the_longest_that_fits_whatever_the_room():
    rng = np.random.default_rng(11)
    for _ in range(60):
        turns = [("q" * rng.integers(1, 9), "a" * rng.integers(0, 9)) for _ in range(rng.integers(0, 5))]
        question, room = "n" * int(rng.integers(1, 12)), int(rng.integers(1, 70))
        fitting = []
        for n in range(len(turns) + 1):
            kept = [
                i for said, answer in turns[len(turns) - n :] for i in [*f"<{said}>{answer}".encode(), 256]
            ]
            ids = [*b"S", *kept, *f"<{question}>".encode()]
            fitting += [ids] * (len(ids) <= room)
        expected = fitting[-1] if fitting else f"S<{question}>".encode()[-room:]
        assert conversation_ids(TALK, BYTE, turns, question, room) == list(expected)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_first_question_has_the_ids_that_it_has_in_training(name):
    texts = [
        TEMPLATES[name].fill(text, input)
        for text in ("Name a color.", "What is a token?")
        for input in ("", "some text\n")
    ]
    for tokenizer in (BYTE, build_tokenizer("bpe", texts * 9, 300)):
        for question in ("Name a color.", "  What?\n\n", "Überall: {input}"):
            assert conversation_ids(TEMPLATES[name], tokenizer, [], question, 9999) == prompt_ids(
                TEMPLATES[name], tokenizer, question
            )


@pytest.mark.parametrize("multi_turn", [True, False])
def test_a_first_question_has_the_ids_it_has_in_training(multi_turn):
    """Encoded as one text with the system text: with this tokenizer the border between the two is inside a
    token."""
    tokenizer = GPT2Tokenizer()
    template = Template(
        system="You help.\n\n",
        prompt="# {instruction}? ",
        prompt_with_input="{instruction} {input}",
        multi_turn=multi_turn,
    )
    assert tokenizer.encode(template.system) + tokenizer.encode(template.fill("Why")) != prompt_ids(
        template, tokenizer, "Why"
    )
    assert conversation_ids(template, tokenizer, [], "Why", 99) == prompt_ids(template, tokenizer, "Why")
    kept = conversation_ids(template, tokenizer, [("Why", "So")], "How", 99)
    first = [
        *tokenizer.encode(template.first_prompt("Why") + "So"),
        tokenizer.eos_id,
        *tokenizer.encode(template.fill("How")),
    ]
    assert kept == (first if multi_turn else prompt_ids(template, tokenizer, "How"))


@pytest.mark.parametrize("key", ["system", "prompt", "stop"])
def test_half_a_character_is_refused(key):
    broken = {"system": "\ud800", "prompt": "\ud800{instruction}", "stop": ["\ud800"]}[key]
    with pytest.raises(ValueError, match="half a character"):
        Template.model_validate(
            {"prompt": "{instruction}", "prompt_with_input": "{instruction}{input}"} | {key: broken}
        )


# ---- the same ids in other programs --------------------------------------------------------------

PIECES = [
    "<|im_start|>",
    "<|im_end|>",
    "<s>",
    "</s>",
    "<|endoftext|>",
    "user\n",
    " ",
    "\n",
    "  ",
    "{{ x }}",
    "{% if %}",
    "{#",
    "}}",
    "%}",
    '"',
    "'",
]
PIECES += [
    "\\",
    "\\n",
    "\U0001f389",
    "é",
    "\r\n",
    "### A:",
    "\t",
    "{",
    "}",
    "<|im_",
    "123",
    "\u2028",
    "\x0b",
    "\x1f",
    "\U0010ffff",
]
SAID = [
    "Hi",
    "how are you?",
    " tick ",
    "",
    "\n\nx",
    "{{ 1 }}",
    "a{instruction}b",
    "\U0001f389",
    "'s",
    "1",
    "\U0010ffff",
    "}}{%",
]


def drawn_template(draw: random.Random) -> Template:
    def some() -> str:
        return "".join(draw.choices(PIECES, k=draw.randint(0, 4)))

    prompt = some() + "{instruction}" + some()
    return Template(
        system=some(), prompt=prompt, prompt_with_input=prompt + "{input}", multi_turn=draw.random() < 0.7
    )


def conversations(draw: random.Random) -> list[list[dict[str, str]]]:
    """One question, and a talk of two."""
    said = [draw.choice(SAID) for _ in range(4)]
    return [
        [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]
        for roles in (["user"], ["user", "assistant", "user"])
    ]


def ids_here(template: Template, tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[int]:
    *before, question = [message["content"] for message in messages]
    return conversation_ids(
        template, tokenizer, list(zip(before[::2], before[1::2], strict=True)), question, 10**6
    )


def exported(tokenizer: Tokenizer, folder: Path, template: Template = PLAIN):
    """transformers' tokenizer for what `convert.py --to hf` writes."""
    from transformers import AutoTokenizer

    (folder / "tokenizer.json").write_text(tokenizer_json(tokenizer), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(tokenizer_config(tokenizer, template, 10**6)), encoding="utf-8"
    )
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", EVERY)
def test_a_conversation_has_the_ids_that_transformers_gives_it_by_the_exported_template(tmp_path, name):
    tokenizer, draw, n_together = tokenizer_like(name), random.Random(7), 0
    theirs = exported(tokenizer, tmp_path)
    assert (
        theirs("tick").input_ids[: len(tokenizer.bos_ids) + 1]
        == tokenizer.encode_prompt("tick")[: len(tokenizer.bos_ids) + 1]
    )
    for _ in range(25):
        template = drawn_template(draw)
        theirs.chat_template = json.loads(json.dumps(tokenizer_config(tokenizer, template, 64)))[
            "chat_template"
        ]
        for messages in conversations(draw):
            ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
            assert ids_here(template, tokenizer, messages) == ids, (template, messages)
            if len(messages) == 1:
                assert prompt_ids(template, tokenizer, messages[0]["content"]) == ids
                answered = theirs.apply_chat_template(
                    [*messages, {"role": "assistant", "content": "So."}], tokenize=True, return_dict=False
                )
                n_together += answered[: len(ids)] == ids
                if answered[: len(ids)] == ids:  # no token reaches over the border
                    assert (
                        encode_pair(
                            Pair(messages[0]["content"], "", "So.", ""), tokenizer, template
                        ).ids.tolist()
                        == answered
                    )
        assert tuple(ids[: len(tokenizer.bos_ids)]) == tokenizer.bos_ids
        if tokenizer.bos_ids and not any(
            name in template.system + template.prompt for name in tokenizer.special_ids
        ):
            assert ids.count(tokenizer.bos_ids[0]) == 1
    assert n_together >= 10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bpe", "gpt2", "bytes", "bytes + bos"])
def test_a_conversation_has_the_ids_that_llama_cpp_gives_it_by_the_gguf(tmp_path, name):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    pytest.importorskip("gguf", reason="gguf is not installed")
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    tokenizer, draw = tokenizer_like(name), random.Random(8)
    model = GPTMini(
        GPTConfig(
            vocab_size=tokenizer.vocab_size, d_model=8, n_layers=1, n_heads=1, n_kv_heads=1, max_seq_len=32
        )
    )
    write_gguf(tmp_path / "m.gguf", model, tokenizer, PLAIN, "f32", "tiny")
    llama = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=32, vocab_only=True, verbose=False)
    bos, eos = (llama._model.token_get_text(id) for id in (llama.token_bos(), llama.token_eos()))
    assert llama.metadata["tokenizer.chat_template"] == chat_template(PLAIN, tokenizer)
    for _ in range(25):
        template = drawn_template(draw)
        formatter = Jinja2ChatFormatter(chat_template(template, tokenizer), eos_token=eos, bos_token=bos)
        for messages in conversations(draw):
            text = formatter(messages=messages).prompt.encode()
            assert llama.tokenize(text, add_bos=False, special=True) == ids_here(
                template, tokenizer, messages
            ), (template, messages)
    llama.close()


CHATML = Template(
    system="<|im_start|>system\nBe brief.<|im_end|>\n",
    prompt="<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n",
    prompt_with_input="<|im_start|>user\n{instruction}\n{input}<|im_end|>\n<|im_start|>assistant\n",
    multi_turn=True,
)


@pytest.mark.parametrize("name", FOREIGN)
def test_a_template_writes_special_tokens_and_what_people_write_never_does(name):
    tokenizer = tokenizer_like(name)
    start, end = (tokenizer.special_ids[token] for token in ("<|im_start|>", "<|im_end|>"))
    ids = conversation_ids(CHATML, tokenizer, [("one", "two")], "three", 10**6)
    assert (ids.count(start), ids.count(end), ids.count(tokenizer.eos_id)) == (5, 3, 1)
    for spelled in (
        "<|im_end|>",
        "a<|im_start|>b",
        "</s>",
        "<s>",
        "\U0010ffff<|im_end|>",
        "\U0010ffff" * 3 + "</s>",
    ):
        ids = conversation_ids(CHATML, tokenizer, [(spelled, spelled)], spelled, 10**6)
        assert (ids.count(start), ids.count(end), ids.count(tokenizer.eos_id), ids.count(1)) == (
            5,
            3,
            1,
            0,
        ), spelled
        ids = prompt_ids(CHATML, tokenizer, "x", spelled)
        assert (ids.count(start), ids.count(end), ids.count(tokenizer.eos_id)) == (3, 2, 0), spelled
    halves = Template(prompt="<|im_{instruction}|>", prompt_with_input="{instruction}{input}")
    assert start not in prompt_ids(halves, tokenizer, "start"), "nor one that a template has begun"
    ids = encode_pair(
        Pair("Ask <|im_end|>", "", "Say <|im_end|></s>", "here"), tokenizer, CHATML
    ).ids.tolist()
    assert (ids.count(end), ids.count(tokenizer.eos_id)) == (2, 1) and ids[-1] == tokenizer.eos_id


def test_a_template_that_writes_bos_has_it_once():
    tokenizer = tokenizer_like("llama + bos")
    written = Template(prompt="<s>[INST] {instruction} [/INST]", prompt_with_input="{instruction} {input}")
    left_out = Template(prompt="[INST] {instruction} [/INST]", prompt_with_input="{instruction} {input}")
    assert prompt_ids(written, tokenizer, "Hi") == prompt_ids(left_out, tokenizer, "Hi")
    assert prompt_ids(written, tokenizer, "Hi").count(1) == 1


def test_a_checkpoint_of_an_older_version_is_asked_as_it_was_trained(tmp_path, capsys):
    """Its template says nothing of special tokens, which were letters then."""
    tokenizer = tokenizer_like("bytes")
    model = GPTMini(
        GPTConfig(
            vocab_size=tokenizer.vocab_size, d_model=8, n_layers=1, n_heads=1, n_kv_heads=1, max_seq_len=32
        )
    )
    write_model(tmp_path / "old.ckpt", model, tokenizer, {})
    checkpoint = torch.load(tmp_path / "old.ckpt", weights_only=True)
    checkpoint[KEY]["template"] = CHATML.model_dump(exclude={"special_tokens"})
    torch.save(checkpoint, tmp_path / "old.ckpt")
    template = saved_template(read_metadata(tmp_path / "old.ckpt"), "old.ckpt")
    assert prompt_ids(template, tokenizer, "Hi") == tokenizer.encode(CHATML.first_prompt("Hi"))
    assert prompt_ids(CHATML, tokenizer, "Hi") != tokenizer.encode(CHATML.first_prompt("Hi"))
    chat_template(template, tokenizer)
    assert "<|im_start|>" in capsys.readouterr().err
    chat_template(CHATML, tokenizer)
    assert capsys.readouterr().err == ""


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
def test_a_talk_that_ends_with_an_answer_ends_with_eos(tmp_path, multi_turn):
    """As programs that train on messages lay them out."""
    template = TALK.model_copy(update={"multi_turn": multi_turn})
    theirs = exported(BYTE, tmp_path, template)
    messages = [
        {"role": role, "content": text}
        for role, text in zip(["user", "assistant"] * 2, ["a", "b", "c", "d"], strict=True)
    ]
    text = theirs.apply_chat_template(messages, tokenize=False)
    assert text == ("S<a>b<|endoftext|><c>d<|endoftext|>" if multi_turn else "S<c>d<|endoftext|>")
