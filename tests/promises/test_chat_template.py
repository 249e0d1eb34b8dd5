"""support/text/chat_template.py: the texts around an instruction, and the ids of a conversation, compared
with texts and ids put together by hand."""

import numpy as np
import pytest
from foreign_tokenizers import FOREIGN, tokenizer_like
from pydantic import ValidationError

from instruct import Pair, encode_pair
from support.config.read import validate_config
from support.messages import UserError
from support.text.chat_template import TEMPLATES, Template, conversation_ids, prompt_ids
from tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer, build_tokenizer

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


def test_slots_may_come_in_any_order_and_next_to_other_braces():
    template = Template(
        prompt='{"q": "{instruction}"}',
        prompt_with_input='{"about": "{input}", "q": "{instruction}", "{x}": {}}\\1',
    )
    assert template.fill("why") == '{"q": "why"}'
    assert template.fill("why", "rain") == '{"about": "rain", "q": "why", "{x}": {}}\\1'


def test_an_empty_input_is_no_input():
    assert PLAIN.fill("i", "") == PLAIN.fill("i") == "Q i A "


VALID = {"prompt": "{instruction}", "prompt_with_input": "{instruction} {input}"}


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
    Template.model_validate(VALID)
    with pytest.raises(ValidationError) as error:
        Template.model_validate(VALID | changes)
    assert said in str(error.value)
    with pytest.raises(UserError) as answer:
        config_of(VALID | changes)
    assert "template" in str(answer.value)
    assert said in str(answer.value) or "promt" in str(answer.value)


@pytest.mark.parametrize("left_out", ["prompt", "prompt_with_input"])
def test_both_prompts_are_needed(left_out):
    with pytest.raises(UserError, match=rf"template\.{left_out} is required"):
        config_of({name: text for name, text in VALID.items() if name != left_out})


def config_of(template: object, **data):
    """A config for fine-tuning with this template."""
    tree = {"data": {"source": "instructions", "path": "rows.json", **data}, "training": {"max_steps": 1}}
    if template is not None:
        tree["template"] = template
    return validate_config(tree)


def test_a_config_takes_and_keeps_a_template_by_name_or_written_out():
    assert config_of("alpaca").template == TEMPLATES["alpaca"]
    assert config_of(None).template == TEMPLATES["chat"], "instructions need a template"
    written = config_of(VALID | {"system": "Be brief.", "stop": ["Q"], "multi_turn": True})
    assert written.template.fill("a", "b") == "a b"
    assert written.template.system == "Be brief."
    for config in (written, config_of("alpaca")):
        assert validate_config(config.to_dict()).template == config.template
    plain_text = validate_config({"data": {"path": "a.txt"}, "training": {"max_steps": 1}})
    assert plain_text.template is None, "a text has no questions"
    with pytest.raises(UserError, match="template=llama is not one of chat, alpaca"):
        config_of("llama")


# ---- the named ones ------------------------------------------------------------------------------


def test_the_texts_of_alpaca_are_those_of_its_authors_plus_a_line_end():
    """Their file ends both prompts with the colon. Here a line end follows, as in alpaca-lora."""
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
    chat = TEMPLATES["chat"]
    assert chat.fill("Name a color.") == "### User:\nName a color.\n\n### Assistant:\n"
    assert chat.fill("Translate.", "le chat") == "### User:\nTranslate.\n\nle chat\n\n### Assistant:\n"
    assert (chat.system, chat.multi_turn) == ("", True)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_stop_texts_of_a_named_template_are_in_its_prompts(name):
    template = TEMPLATES[name]
    assert template.stop
    for stop in template.stop:
        assert stop in template.fill("a")
        assert stop in template.fill("a", "b")


# ---- ids -----------------------------------------------------------------------------------------


def test_the_ids_of_a_prompt_are_those_of_the_system_text_and_the_filled_prompt():
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


def test_turns_come_in_order_each_ended_by_eos_after_one_system_text():
    turns = list(TURNS)
    expected = [*b"S", *b"<one>", *b"1", 256, *b"<three>", *b"333", 256, *b"<two>", *b"22", 256, *b"<now>"]
    assert conversation_ids(TALK, BYTE, turns, "now", 999) == expected
    assert conversation_ids(TALK, BYTE, turns, "now", 6) == list(b"S<now>")
    assert turns == TURNS, "the caller's list is not changed"
    assert conversation_ids(TALK, BYTE, tuple(TURNS[:1]), "now", 999) == [*b"S<one>1", 256, *b"<now>"]


def test_a_single_turn_template_forgets():
    forgetful = TALK.model_copy(update={"multi_turn": False})
    assert conversation_ids(forgetful, BYTE, TURNS, "now", 999) == list(b"S<now>")
    assert conversation_ids(forgetful, BYTE, TURNS, "now", 4) == list(b"now>")


def test_the_oldest_turns_are_forgotten_if_not_all_fit():
    def ids(room: int) -> list[int]:
        return conversation_ids(TALK, BYTE, TURNS, "now", room)

    three_turns = ids(999)
    assert len(three_turns) == 32
    assert ids(32) == three_turns
    two_turns = [*b"S<three>333", 256, *b"<two>22", 256, *b"<now>"]
    assert ids(31) == ids(25) == two_turns
    one_turn = [*b"S<two>22", 256, *b"<now>"]
    assert ids(24) == ids(14) == one_turn
    assert ids(13) == ids(6) == list(b"S<now>")
    assert ids(5) == list(b"<now>"), "of a question that is too long by itself, the end is kept"
    assert ids(2) == list(b"w>")


def test_a_conversation_is_the_longest_that_fits_the_room():
    rng = np.random.default_rng(11)
    for _ in range(60):
        turns = [("q" * rng.integers(1, 9), "a" * rng.integers(0, 9)) for _ in range(rng.integers(0, 5))]
        question = "n" * int(rng.integers(1, 12))
        room = int(rng.integers(1, 70))
        expected = list(f"S<{question}>".encode())[-room:]
        for n in range(len(turns) + 1):
            ids = list(b"S")
            for said, answer in turns[len(turns) - n :]:
                ids += [*f"<{said}>{answer}".encode(), 256]
            ids += f"<{question}>".encode()
            if len(ids) <= room:
                expected = ids
        assert conversation_ids(TALK, BYTE, turns, question, room) == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_first_question_has_the_ids_that_it_has_in_training(name):
    template = TEMPLATES[name]
    texts = [template.fill("Name a color."), template.fill("What is a token?", "some text\n")]
    for tokenizer in (BYTE, build_tokenizer("bpe", texts * 9, 300)):
        for question in ("Name a color.", "  What?\n\n", "Überall: {input}"):
            expected = prompt_ids(template, tokenizer, question)
            assert conversation_ids(template, tokenizer, [], question, 9999) == expected


@pytest.mark.parametrize("multi_turn", [True, False])
def test_a_first_question_is_encoded_as_one_text_with_the_system_text(multi_turn):
    """With this tokenizer, a token reaches over the border between the two."""
    tokenizer = GPT2Tokenizer()
    template = Template(
        system="You help.\n\n",
        prompt="# {instruction}? ",
        prompt_with_input="{instruction} {input}",
        multi_turn=multi_turn,
    )
    first = prompt_ids(template, tokenizer, "Why")
    assert tokenizer.encode(template.system) + tokenizer.encode(template.fill("Why")) != first
    assert conversation_ids(template, tokenizer, [], "Why", 99) == first
    kept = conversation_ids(template, tokenizer, [("Why", "So")], "How", 99)
    both = [
        *tokenizer.encode(template.first_prompt("Why") + "So"),
        tokenizer.eos_id,
        *tokenizer.encode(template.fill("How")),
    ]
    assert kept == (both if multi_turn else prompt_ids(template, tokenizer, "How"))


@pytest.mark.parametrize("key", ["system", "prompt", "stop"])
def test_half_a_character_is_refused(key):
    broken = {"system": "\ud800", "prompt": "\ud800{instruction}", "stop": ["\ud800"]}[key]
    with pytest.raises(ValueError, match="half a character"):
        Template.model_validate(VALID | {key: broken})


# ---- special tokens ------------------------------------------------------------------------------

CHATML = Template(
    system="<|im_start|>system\nBe brief.<|im_end|>\n",
    prompt="<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n",
    prompt_with_input="<|im_start|>user\n{instruction}\n{input}<|im_end|>\n<|im_start|>assistant\n",
    multi_turn=True,
)


@pytest.mark.parametrize("name", FOREIGN)
def test_a_template_can_write_special_tokens_and_people_cannot(name):
    tokenizer = tokenizer_like(name)
    start, end = (tokenizer.special_ids[token] for token in ("<|im_start|>", "<|im_end|>"))
    ids = conversation_ids(CHATML, tokenizer, [("one", "two")], "three", 10**6)
    assert (ids.count(start), ids.count(end), ids.count(tokenizer.eos_id)) == (5, 3, 1)
    names = ["<|im_end|>", "a<|im_start|>b", "</s>", "<s>"]
    for spelled in [*names, "\U0010ffff<|im_end|>", "\U0010ffff" * 3 + "</s>"]:
        ids = conversation_ids(CHATML, tokenizer, [(spelled, spelled)], spelled, 10**6)
        assert (ids.count(start), ids.count(end), ids.count(tokenizer.eos_id)) == (5, 3, 1), spelled
        assert ids.count(1) == 0, "not <s> either"
        ids = prompt_ids(CHATML, tokenizer, "x", spelled)
        assert (ids.count(start), ids.count(end), ids.count(tokenizer.eos_id)) == (3, 2, 0), spelled
    halves = Template(prompt="<|im_{instruction}|>", prompt_with_input="{instruction}{input}")
    assert start not in prompt_ids(halves, tokenizer, "start"), "nor a name that the template begins"
    pair = Pair("Ask <|im_end|>", "", "Say <|im_end|></s>", "here")
    ids = encode_pair(pair, tokenizer, CHATML).ids.tolist()
    assert (ids.count(end), ids.count(tokenizer.eos_id)) == (2, 1)
    assert ids[-1] == tokenizer.eos_id


def test_a_template_that_writes_bos_has_it_once():
    tokenizer = tokenizer_like("llama + bos")
    written = Template(prompt="<s>[INST] {instruction} [/INST]", prompt_with_input="{instruction} {input}")
    left_out = Template(prompt="[INST] {instruction} [/INST]", prompt_with_input="{instruction} {input}")
    assert prompt_ids(written, tokenizer, "Hi") == prompt_ids(left_out, tokenizer, "Hi")
    assert prompt_ids(written, tokenizer, "Hi").count(1) == 1
