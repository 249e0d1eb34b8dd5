"""The type of a key decides what its value is: texts as written, numbers in decimal, JSON as JSON; and what
we write is read back the same."""

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.config.read import load_config, read_config_file, validate_config
from support.config.schema import Config
from support.config.values import key_type, takes_text, typed
from support.files.safe_yaml import dump_yaml, parse_json, parse_yaml
from support.messages import UserError

BASE = {"data": {"path": "x.txt"}, "training": {"max_steps": 5}}
# fmt: off
TEXTS = [
    "runs/exp #3", "notes #2.txt", "*.txt", "@x.txt", "[2024] a.txt", "book: 1.txt", "2024-05-01", "007",
    "on", "yes", "No", "1e3", "1:30", "0x1F", "C:\\Users\\me\\new.txt", "a: b: c", "&anchor", "!tag",
    "%percent", "|", ">", "`tick`", "- item", "-x", "{a: 1}", "{", "]", "a, b", "? key", ":", "two\nlines",
    " blank at both ends ", "tab\there", '"a" and "b"', "'a' and 'b'", '"open', "it's", "é 🎉", "a\u0085b",
    "<<", "=", "#", "true", "~x", ".inf", "1_000", "+5", "3.10", "Answer #1: ", "\\n", "a=b", "null and void",
]
# fmt: on


def given(text: str, key: str = "data.text_field") -> object:
    """What the key holds after `--override KEY=text`."""
    value = load_config(None, [f"{key}={text}"], BASE)
    for name in key.split("."):
        value = getattr(value, name)
    return value


# ---- texts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_taken_as_it_is_typed(text):
    assert given(text) == text


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_in_a_nested_section_is_taken_as_it_is_typed(text):
    rows = {
        "data": {"source": "instructions", "path": "x.json"},
        "training": {"max_steps": 5},
        "template": None,
    }
    overrides = [
        f"data.fields.output={text}",
        f"template.system={text}",
        "template.prompt={instruction}:",
        "template.prompt_with_input=- {instruction} # {input}",
    ]
    config = load_config(None, overrides, rows)
    assert config.data.fields == {"output": text}
    assert config.template.system == text
    assert (config.template.prompt, config.template.prompt_with_input) == (
        "{instruction}:",
        "- {instruction} # {input}",
    )


@pytest.mark.parametrize("text", [*TEXTS, "", "~", "null", "x\x1b[2J", "\ufeff"])
def test_quotes_around_all_of_a_text_are_taken_off(text):
    """Single quotes as in YAML, with '' for ', and double quotes with escapes, of which JSON's are a part."""
    assert given("'" + text.replace("'", "''") + "'") == text
    json_escapes_whole_characters = text.isascii() or len(text.encode("utf-16-le")) == 2 * len(text)
    if json_escapes_whole_characters:
        assert given(json.dumps(text)) == text
    assert given(f" {json.dumps(text, ensure_ascii=False)} ") == text


def test_null_means_no_value_for_an_optional_text():
    base = {"data": {"path": "x.txt", "val_path": "v.txt"}, "training": {"max_steps": 5}}
    for text in ("null", "Null", "NULL", " null ", ""):
        assert load_config(None, [f"data.val_path={text}"], base).data.val_path is None
        with pytest.raises(UserError, match=r"checkpoint\.dir=None: .*put it in quotes"):
            load_config(None, [f"checkpoint.dir={text}"], base)
    assert load_config(None, ["data.val_path='null'"], base).data.val_path == "null"


def test_the_error_for_an_unknown_escape_says_what_to_do():
    with pytest.raises(UserError, match=r"leave the double quotes out, and \\ is itself"):
        given('"C:\\Users\\me"')
    assert given("C:\\Users\\me") == "C:\\Users\\me"
    with pytest.raises(UserError, match="surrogate"):
        given("caf\udce9")


@pytest.mark.parametrize(
    ("key", "text"),
    [("model.norm", "layernorm"), ("hardware.precision", " 32-true "), ("data.errors", "replace")],
)
def test_a_key_with_a_few_allowed_words_takes_one_without_blanks_around_it(key, text):
    assert given(text, key) == text.strip()


@pytest.mark.parametrize(
    ("key", "text", "word"),
    [
        ("hardware.accelerator", "gpu", "cuda"),
        ("hardware.precision", "bf16", "bf16-mixed"),
        ("model.norm", "rms_norm", "rmsnorm"),
    ],
)
def test_the_error_for_a_word_of_other_projects_gives_ours(key, text, word):
    with pytest.raises(UserError, match=f"here that is {word}"):
        given(text, key)


@pytest.mark.parametrize(
    ("text", "value"),
    [("[a #b, c]", None), ("['a #b', 007]", ["a #b", "007"]), ("[on, 2024-05-01]", ["on", "2024-05-01"])],
)
def test_a_list_of_texts_is_yaml_with_its_items_as_written(text, value):
    if value is None:
        with pytest.raises(UserError, match="--override training"):
            given(text, "training.sample_prompts")
    else:
        assert given(text, "training.sample_prompts") == value


def test_the_error_for_a_text_instead_of_a_list_gives_a_flag_that_works():
    import shlex

    for text in ("Once upon a time", 'it\'s "so"', "C:\\new", "a, b", "x"):
        with pytest.raises(UserError) as caught:
            given(text, "training.sample_prompts")
        flag, override = shlex.split(re.search(r"write (--override .*)", str(caught.value))[1])
        assert flag == "--override"
        assert load_config(None, [override], BASE).training.sample_prompts == [text]


WRITTEN = [
    "2024-05-01",
    "007",
    "on",
    "No",
    "1e3",
    "1:30",
    "0x1F",
    "3.10",
    ".5",
    "1_000",
    "true",
    "12:30:45",
    "+5",
    ".inf",
    "2024-05-01T10:00:00Z",
]


@pytest.mark.parametrize("text", WRITTEN)
def test_text_that_yaml_would_convert_stays_text_in_a_file(tmp_path, text):
    (tmp_path / "c.yaml").write_text(
        f"data: {{path: {text}, text_field: {text}}}\ncheckpoint: {{dir: {text}}}\n"
        f"training: {{max_steps: 1, sample_every: 1, sample_prompts: [{text}]}}"
    )
    config = load_config(tmp_path / "c.yaml")
    assert {
        config.data.path,
        config.data.text_field,
        config.checkpoint.dir,
        *config.training.sample_prompts,
    } == {text}


# ---- numbers and switches ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [("010", 10), ("0123", 123), ("1_000", 1000), ("+5", 5), (" 7 ", 7), ("008", 8), ("99999999", 99999999)],
)
def test_whole_numbers_are_decimal(tmp_path, text, value):
    assert given(text, "training.max_steps") == value
    (tmp_path / "c.yaml").write_text(f"data: {{path: x}}\ntraining: {{max_steps: {text}}}\nseed: {text}")
    config = load_config(tmp_path / "c.yaml")
    assert (config.training.max_steps, config.seed) == (value, value)


@pytest.mark.parametrize(
    "text",
    [
        "1:30",
        "0x1F",
        "0o17",
        "0b11",
        "1e3",
        "1.0",
        "1,000",
        "1__0",
        "_1",
        "1_",
        "\uff11\uff12",
        "1 # one",
        "'7'",
        "10k",
        "--5",
        "2024-05-01",
    ],
)
def test_what_is_not_a_whole_decimal_number_is_refused(text):
    with pytest.raises(UserError, match=r"training\.max_steps="):
        given(text, "training.max_steps")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        (".5", 0.5),
        ("5.", 5.0),
        ("+5", 5.0),
        ("010", 10.0),
        ("1E-2", 0.01),
        ("0.1", 0.1),
        ("1_0.0", 10.0),
        ("00.5", 0.5),
        (".5e1", 5.0),
    ],
)
def test_numbers_are_decimal(tmp_path, text, value):
    assert given(text, "training.lr") == value
    (tmp_path / "c.yaml").write_text(f"data: {{path: x}}\ntraining: {{max_steps: 1, lr: {text}}}")
    assert load_config(tmp_path / "c.yaml").training.lr == value


@pytest.mark.parametrize(
    "text",
    [
        "inf",
        "nan",
        ".inf",
        "-.inf",
        ".NaN",
        "infinity",
        "1e999",
        "1:30",
        "0x1p3",
        "1,5",
        "3e",
        "e3",
        "1e5.5",
        ".",
        "+",
        "1/2",
        "5%",
    ],
)
def test_what_is_not_a_finite_number_is_refused(text):
    with pytest.raises(UserError, match=r"training\.lr="):
        given(text, "training.lr")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("True", True),
        ("yes", True),
        ("ON", True),
        ("false", False),
        ("no", False),
        ("Off", False),
    ],
)
def test_a_switch_takes_true_yes_on_and_their_opposites_in_any_case(text, value):
    assert given(text, "data.shuffle") is given(text, "training.compile") is value


@pytest.mark.parametrize("text", ["1", "0", "y", "maybe", "null", "", "'true'"])
def test_any_other_value_of_a_switch_is_refused(text):
    with pytest.raises(UserError, match=r"data\.shuffle=.*; write true or false"):
        given(text, "data.shuffle")
    with pytest.raises(UserError, match=r"training\.compile=.*: input should be 'auto', true or false"):
        given(text, "training.compile")


def test_a_switch_with_a_third_word_takes_that_word_and_the_words_of_a_switch(tmp_path):
    assert {given(text, "training.compile") for text in ("auto", " auto ", "'auto'")} == {"auto"}
    for written, value in (("auto", "auto"), ("'auto'", "auto"), ("on", True), ("No", False)):
        path = tmp_path / "config.yaml"
        path.write_text(f"data: {{path: x.txt}}\ntraining: {{max_steps: 5, compile: {written}}}\n")
        assert load_config(path).training.compile == value
        assert type(load_config(path).training.compile) is type(value)


@pytest.mark.parametrize("key", ["training.grad_clip", "model.d_ff", "data.stride", "lora"])
def test_null_means_no_value_for_an_optional_key(key):
    for text in ("null", "~", ""):
        assert load_config(None, [f"{key}={text}"], BASE) is not None


def test_the_flag_and_the_override_agree():
    import train
    from support.config.read import flag_overrides

    for text in ("0123", "1_000", "7"):
        args = train.parse_args(["--seed", text])
        assert load_config(None, flag_overrides(args), BASE).seed == given(text, "seed") == int(text)


# ---- JSON ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["c.json", "C.JSON"])
@pytest.mark.parametrize(
    "options", [{"indent": "\t"}, {}, {"ensure_ascii": False}, {"separators": (",", ":")}]
)
def test_a_file_that_ends_in_json_is_read_as_json(tmp_path, name, options):
    """Compared with Python's own reader."""
    prompts = ["🎉", "a\u0085b\u2028c", "tab\t", "#", "007", "null", "\ufeff", "\\", "/"]
    tree = {
        "data": {"path": "x: y"},
        "training": {
            "max_steps": 5,
            "lr": 1e-5,
            "sample_every": 1,
            "sample_prompts": prompts,
            "grad_clip": None,
        },
    }
    text = json.dumps(tree, **options)
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_config_file(tmp_path / name) == tree == json.loads(text)
    assert load_config(tmp_path / name).training.sample_prompts == prompts
    (tmp_path / name).write_text("\ufeff" + text, encoding="utf-8")
    assert read_config_file(tmp_path / name) == tree, "Windows programs begin a file with this mark"


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ('{"seed": 1,}', "line 1, column", "comma"),
        ('{\n "seed": 1\n "a": 2}', "line 3, column 2", "expecting ',' delimiter"),
        ('{\n  # no\n "seed": 1}', "line 2, column 3", "no comments"),
        ('{"seed": 1} // x', "line 1, column 13", "no comments"),
        ("{'seed': 1}", "line 1, column 2", "double quotes"),
        ("{seed: 1}", "line 1, column 2", "double quotes"),
        ('{"a": True}', "line 1, column 7", "true, false and null"),
        ('{"a": None}', "line 1, column 7", "true, false and null"),
        ('{"a": 01}', "line 1, column 8", ""),
        ('{"a": .5}', "line 1, column 7", "numbers"),
        ('{"a": "two\nlines"}', "line 1, column 11", r"as \\n"),
        ('{"a": "\\q"}', "line 1, column 8", "escape"),
        ('{"a": 1', "line 1, column 8", ""),
        ('{"a": 1}\n{"b": 2}', "line 2, column 1", "extra data"),
        ('{"a": {"b": 1,\n"b": 2}}', "line 2, column 1", "key 'b' is given twice"),
        ('{"a": 1, "\\u0061": 2}', "line 1, column 10", "key 'a' is given twice"),
        ('{"a": "\\ud800"}', "line 1, column 7", "surrogate"),
        ('{"a": NaN}', "line 1, column 7", "NaN is not a number that"),
        ('{"a": -Infinity}', "line 1, column 7", "-Infinity is not"),
        ('{"a": ' + "9" * 200 + "}", "line 1, column 7", "more than 100 digits"),
        ('{"a": [' + "1, " * 60_000 + "1]}", "line 1, column", "more than 50000 values"),
        ("[" * 200_000, "", "50000 values"),
        ("[" * 40_000 + "]" * 40_000, "", "lists inside lists"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_mistake_in_json_is_named_with_its_place(text, place, words):
    with pytest.raises(UserError, match=rf"^c\.json.*{place}.*{words}") as caught:
        parse_json(text, "c.json")
    assert "YAML" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_the_same_key_in_two_objects_is_not_given_twice():
    text = '{"a": {"b": 1, "c": "b"}, "b": [{"b": 1}, {"b": ["b", "b", {"b": "\\\\\\""}]}]}'
    assert parse_json(text, "x") == json.loads(text)


def test_random_json_is_read_as_pythons_reader_does_or_refused():
    draw = random.Random(5)
    parts = [
        '{"a": ',
        '"b": ',
        "[",
        "]",
        "}",
        ",",
        "1",
        "-0.5e3",
        "true",
        "null",
        '"x"',
        '"\\"',
        '"',
        "\\",
        " ",
        "\n",
        ":",
        "'",
        "NaN",
        '"\\ud83c\\udf89"',
    ]
    for _ in range(5000):
        text = "".join(draw.choice(parts) for _ in range(draw.randrange(1, 9)))
        try:
            value = parse_json(text, "text")
        except UserError as error:
            assert str(error).startswith("text")
        else:
            assert value == json.loads(text)


# ---- round trips ---------------------------------------------------------------------------------


def random_text(draw: random.Random) -> str:
    """Pieces that mean something to YAML, to a terminal or to a reader of Unicode, in any order."""
    pieces = [
        *TEXTS,
        " ",
        "\n",
        "\n\n",
        "\t",
        "'",
        '"',
        "\\",
        ": ",
        " #",
        "-",
        "é",
        "🎉",
        "\x1b",
        "\x07",
        "\x7f",
        "\u0085",
        "\u2028",
        "\ufeff",
        "\xa0",
    ]
    pieces += [
        "null",
        "~",
        "",
        "8e42519",
        "12e03",
        "0o7",
        "---",
        "...",
        "word " * 30,
        chr(draw.randrange(32, 0xD800)),
        chr(draw.randrange(0x10000, 0x10FFFF)),
    ]
    return "".join(draw.choice(pieces) for _ in range(draw.randrange(6)))


def test_a_written_config_is_read_back_the_same_for_any_texts(tmp_path):
    """As in run_config.yaml: by our reader with its types, and by any other reader of YAML."""
    draw = random.Random(3)
    for _ in range(300):
        text, prompts = random_text(draw), [random_text(draw) for _ in range(3)]
        training = {
            "max_steps": 2,
            "lr": 10 ** draw.uniform(-9, 1),
            "sample_every": 1,
            "sample_prompts": prompts,
        }
        config = validate_config(
            {
                "data": {"source": "hf", "dataset": "a", "config": text, "text_field": text},
                "training": training,
            }
        )
        written = dump_yaml(config.to_dict())
        assert typed(parse_yaml(written, "text"), Config) == config.to_dict()
        assert yaml.safe_load(written) == config.to_dict()


def test_a_quoted_random_text_is_read_back_from_an_override():
    draw = random.Random(4)
    for _ in range(300):
        text = random_text(draw)
        assert given("'" + text.replace("'", "''") + "'") == text
        bare = text.strip()
        is_quoted = bare[:1] in ("'", '"') and bare[0] == bare[-1]
        if bare and bare not in ("null", "Null", "NULL") and not is_quoted:
            assert given(text) == text


def test_every_key_has_a_type():
    """The table of types is the schema itself: no key falls through to guessing."""
    from support.foreign.config_keys import OUR_KEYS

    assert [key for key in OUR_KEYS if key_type(Config, key) is Any] == []
    assert takes_text(key_type(Config, "data.fields.anything"))
    assert not takes_text(key_type(Config, "training.lr"))
    assert math.isclose(typed(parse_yaml("3e-4", "x"), float), 3e-4)


def test_reading_the_same_file_twice_gives_the_same_tree(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("data: {path: 007}\ntraining: {max_steps: 010}\n")
    assert (
        read_config_file(tmp_path / "c.yaml")
        == read_config_file(tmp_path / "c.yaml")
        == {"data": {"path": "007"}, "training": {"max_steps": 10}}
    )
