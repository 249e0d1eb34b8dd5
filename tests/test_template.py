"""support/template.py: the texts around an instruction, and the ids of a conversation, put together by hand."""

import numpy as np
import pytest
from pydantic import ValidationError

from support.cli import UserError
from support.config import validate_config
from support.template import TEMPLATES, Template, conversation_ids, prompt_ids
from tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer, build_tokenizer

BYTE = ByteTokenizer()
EOS = [256]
PLAIN = Template(prompt="Q {instruction} A ", prompt_with_input="Q {instruction} with {input} A ")
AWKWARD = ["{input}", "{instruction}", "{instruction}{input}", "{}", "{0}", "{{x}}", r"\1 \g<0> \n", "%s %(input)s", "$input", "a\nb\n", " é ∑ "]


# ---- one prompt ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", AWKWARD)
def test_a_text_that_looks_like_a_slot_or_an_escape_stays_as_it_is(text):
    assert PLAIN.fill(text) == "Q " + text + " A "
    assert PLAIN.fill(text, "x") == "Q " + text + " with x A "
    assert PLAIN.fill("i", text) == "Q i with " + text + " A "
    for other in AWKWARD:
        assert PLAIN.fill(text, other) == "Q " + text + " with " + other + " A "


def test_slots_may_stand_in_any_order_and_beside_braces_of_the_template():
    template = Template(prompt='{"q": "{instruction}"}', prompt_with_input='{"about": "{input}", "q": "{instruction}", "{x}": {}}\\1')
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
        ({"prompt_with_input": "{instruction}"}, "prompt_with_input must hold {instruction} and {input}, each once"),
        ({"prompt_with_input": "{input}"}, "prompt_with_input must hold {instruction} and {input}, each once"),
        ({"prompt_with_input": "{instruction} {input} {input}"}, "prompt_with_input must hold {instruction} and {input}, each once"),
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
    assert validate_config({"data": {"path": "a.txt"}, "training": {"max_steps": 1}}).template is None, "a text has no questions"
    with pytest.raises(UserError, match="template=llama is none of chat, alpaca"):
        config_of("llama")


# ---- the named ones -----------------------------------------------------------------------------------------------


def test_alpacas_texts_are_those_of_its_authors_and_a_line_end():
    """Their file ends both prompts at the colon. Here a line end follows, as in alpaca-lora."""
    alone = TEMPLATES["alpaca"].fill("Name three primary colors.")
    assert alone == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
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
    assert TEMPLATES["chat"].fill("Translate.", "le chat") == "### User:\nTranslate.\n\nle chat\n\n### Assistant:\n"
    assert (TEMPLATES["chat"].system, TEMPLATES["chat"].multi_turn) == ("", True)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_named_templates_stops_are_what_a_model_would_go_on_with(name):
    assert TEMPLATES[name].stop
    assert all(stop in TEMPLATES[name].fill("a") and stop in TEMPLATES[name].fill("a", "b") for stop in TEMPLATES[name].stop)


# ---- ids ----------------------------------------------------------------------------------------------------------


def test_the_ids_of_a_prompt_are_those_of_its_text_behind_the_system_text():
    template = Template(system="Be brief. ", prompt="Q {instruction} A ", prompt_with_input="Q {instruction} {input} A ")
    assert prompt_ids(template, BYTE, "é?", "x") == list("Be brief. Q é? x A ".encode())
    assert prompt_ids(PLAIN, BYTE, "<|endoftext|>") == list(b"Q <|endoftext|> A "), "no text spells EOS"
    with pytest.raises(UserError, match="'∑'"):
        prompt_ids(PLAIN, CharTokenizer.train(["Q x A "]), "∑")


TALK = Template(system="S", prompt="<{instruction}>", prompt_with_input="<{instruction},{input}>", multi_turn=True)
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
    assert conversation_ids(TALK, BYTE, TURNS, "now", 31) == conversation_ids(TALK, BYTE, TURNS, "now", 25) == two
    one = [*b"S<two>22", 256, *b"<now>"]
    assert conversation_ids(TALK, BYTE, TURNS, "now", 24) == conversation_ids(TALK, BYTE, TURNS, "now", 14) == one
    assert conversation_ids(TALK, BYTE, TURNS, "now", 13) == conversation_ids(TALK, BYTE, TURNS, "now", 6) == list(b"S<now>")
    assert conversation_ids(TALK, BYTE, TURNS, "now", 5) == list(b"<now>"), "of a question too long by itself, the end"
    assert conversation_ids(TALK, BYTE, TURNS, "now", 2) == list(b"w>")


def test_a_conversation_is_the_longest_that_fits_whatever_the_room():
    rng = np.random.default_rng(11)
    for _ in range(60):
        turns = [("q" * rng.integers(1, 9), "a" * rng.integers(0, 9)) for _ in range(rng.integers(0, 5))]
        question, room = "n" * int(rng.integers(1, 12)), int(rng.integers(1, 70))
        fitting = []
        for n in range(len(turns) + 1):
            kept = [i for said, answer in turns[len(turns) - n :] for i in [*f"<{said}>{answer}".encode(), 256]]
            ids = [*b"S", *kept, *f"<{question}>".encode()]
            fitting += [ids] * (len(ids) <= room)
        expected = fitting[-1] if fitting else f"S<{question}>".encode()[-room:]
        assert conversation_ids(TALK, BYTE, turns, question, room) == list(expected)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_first_question_has_the_ids_that_it_has_in_training(name):
    texts = [TEMPLATES[name].fill(text, input) for text in ("Name a color.", "What is a token?") for input in ("", "some text\n")]
    for tokenizer in (BYTE, build_tokenizer("bpe", texts * 9, 300)):
        for question in ("Name a color.", "  What?\n\n", "Überall: {input}"):
            assert conversation_ids(TEMPLATES[name], tokenizer, [], question, 9999) == prompt_ids(TEMPLATES[name], tokenizer, question)


@pytest.mark.parametrize("multi_turn", [True, False])
def test_a_first_question_has_the_ids_it_has_in_training(multi_turn):
    """Encoded as one text with the system text: with this tokenizer the border between the two is inside a token."""
    tokenizer = GPT2Tokenizer()
    template = Template(system="You help.\n\n", prompt="# {instruction}? ", prompt_with_input="{instruction} {input}", multi_turn=multi_turn)
    assert tokenizer.encode(template.system) + tokenizer.encode(template.fill("Why")) != prompt_ids(template, tokenizer, "Why")
    assert conversation_ids(template, tokenizer, [], "Why", 99) == prompt_ids(template, tokenizer, "Why")
    kept = conversation_ids(template, tokenizer, [("Why", "So")], "How", 99)
    first = [*tokenizer.encode(template.first("Why") + "So"), tokenizer.eos_id, *tokenizer.encode(template.fill("How"))]
    assert kept == (first if multi_turn else prompt_ids(template, tokenizer, "How"))


@pytest.mark.parametrize("key", ["system", "prompt", "stop"])
def test_half_a_character_is_refused(key):
    broken = {"system": "\ud800", "prompt": "\ud800{instruction}", "stop": ["\ud800"]}[key]
    with pytest.raises(ValueError, match="half a character"):
        Template.model_validate({"prompt": "{instruction}", "prompt_with_input": "{instruction}{input}"} | {key: broken})
