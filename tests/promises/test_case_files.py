"""Case files: what is read, and the messages about mistakes."""

import json
from pathlib import Path

import pytest
from conftest import REPO

from support.evaluation.case_files import Case, read_case_file, read_cases
from support.messages import UserError
from support.text.documents import read_documents
from tokenizer import build_tokenizer

OURS = sorted((REPO / "cases").glob("*.yaml"))


def write(folder: Path, text: str, name: str = "some.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_case_file(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_every_field_is_read(tmp_path):
    path = write(
        tmp_path,
        """
name: some
description: what they are
cases:
  - {id: one, prompt: The sky is, target: " blue", category: colours, weight: 2}
  - prompt: ""
    choices: [It is., It are.]
    target: It is.
  - {prompt: A, contains: B, regex: "B|C", max_new_tokens: 5}
  - {prompt: A, contains: [B, C]}
""",
    )
    one, two, three, four = read_case_file(path)
    assert one == Case(
        id="one", file=str(path), prompt="The sky is", target=" blue", category="colours", weight=2.0
    )
    assert (two.id, two.category, two.weight, two.choices, two.continued) == (
        "some-2",
        "other",
        1.0,
        ["It is.", "It are."],
        False,
    )
    assert (three.contains, three.regex, three.max_new_tokens, three.continued) == (["B"], "B|C", 5, True)
    assert four.contains == ["B", "C"]


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("{target: x}", "case 1: prompt is required"),
        ("{prompt: x}", "nothing to score; give a target, contains or regex"),
        ("{prompt: x, traget: y}", "unknown key traget; did you mean target?"),
        ("{prompt: x, zzzz: y}", "unknown key zzzz; see docs/EVALUATION.md"),
        ("{prompt: x, target: [1945]}", "target=[1945]: input should be a valid string"),
        (
            "{prompt: x, choices: [null, yes], target: yes}",
            "choices.0=None: input should be a valid string; put it in quotes",
        ),
        ('{prompt: x, target: ""}', "target=''"),
        ("{prompt: x, target: a, choices: [b, c]}", "target 'a' must be one of the choices ['b', 'c']"),
        ("{prompt: x, choices: [b, c]}", "target None must be one of the choices"),
        ("{prompt: x, target: b, choices: [b]}", "choices=['b']"),
        ("{prompt: x, target: b, choices: [b, c, b]}", "a choice is given twice"),
        ('{id: odd, prompt: x, regex: "(a"}', "case 1 (odd): '(a' is not a regular expression"),
        ("{prompt: x, target: b, weight: 0}", "weight=0.0: input should be greater than 0"),
        ("{prompt: x, target: b, weight: heavy}", "weight='heavy'"),
        ("{prompt: x, target: b, max_new_tokens: 0}", "max_new_tokens=0"),
        ("just text", "case 1: 'just text' is not a mapping"),
        ("[a, b]", "case 1: ['a', 'b'] is not a mapping"),
    ],
)
def test_a_mistake_in_a_case_is_named_with_the_file_and_the_case(tmp_path, case, said):
    assert said in refusal(write(tmp_path, f"cases:\n  - {case}\n"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("- {prompt: a, target: b}", "is not a mapping of keys; it has a list `cases`"),
        ("name: x", "cases is required"),
        ("cases: []", "cases=[]"),
        ("cases: {prompt: a}", "cases={'prompt': 'a'}"),
        ("case:\n  - {prompt: a, target: b}", "unknown key case; did you mean cases?"),
        (
            "cases:\n  - {id: a, prompt: a, target: b}\n  - {id: a, prompt: c, target: d}",
            "case 2 (a): another case has the id a",
        ),
        ("cases:\n  - {prompt: a, target: b\n", "fix the YAML there"),
        ("cases:\n  - {prompt: !!python/object/apply:os.getcwd [], target: b}", "fix the YAML there"),
    ],
)
def test_a_mistake_in_a_file_is_named(tmp_path, text, said):
    assert said in refusal(write(tmp_path, text))


def test_all_mistakes_are_reported_at_once_but_at_most_ten(tmp_path):
    message = refusal(write(tmp_path, "cases:\n" + "  - {prompt: a}\n" * 3))
    assert len(message.splitlines()) == 3
    message = refusal(write(tmp_path, "cases:\n" + "  - {prompt: a}\n" * 300))
    assert len(message.splitlines()) == 11
    assert "and 290 more" in message


def test_paths_that_hold_no_cases_are_refused(tmp_path):
    for path, said in (
        (tmp_path, r"no \.yaml or \.json file there"),
        (tmp_path / "nothing.yaml", "does not exist; try --cases cases/wiki_basics.yaml"),
    ):
        with pytest.raises(UserError, match=said):
            read_cases([str(path)])
    (tmp_path / "bytes.yaml").write_bytes(b"cases: \xff")
    assert "is not text (byte 7)" in refusal(tmp_path / "bytes.yaml")


def test_a_folder_means_all_its_files_and_a_file_named_twice_counts_once(tmp_path):
    for name in ("b.yaml", "a.yml", "c.json"):
        write(tmp_path, '{"cases": [{"prompt": "x", "target": "y"}]}', name)
    write(tmp_path, "not read", "notes.txt")
    assert [case.id for case in read_cases([str(tmp_path), str(tmp_path / "b.yaml")])] == [
        "a-1",
        "b-1",
        "c-1",
    ]


WRITTEN = (
    "1945",
    "007",
    "0x1F",
    "1:30",
    "2024-05-01",
    "on",
    "No",
    "true",
    "3e-4",
    ".5",
    "1_000",
    "1.50",
    "+5",
    ".inf",
    "2024-05-01T10:00:00Z",
)


@pytest.mark.parametrize("text", WRITTEN)
def test_a_text_without_quotes_is_the_text_as_written(tmp_path, text):
    """Another text would be scored, and nobody would notice."""
    path = write(
        tmp_path,
        f"cases:\n  - {{id: {text}, prompt: {text}, target: {text}, contains: {text}, category: {text}}}\n",
    )
    case = read_case_file(path)[0]
    assert (case.id, case.prompt, case.target, case.contains, case.category) == (
        text,
        text,
        text,
        [text],
        text,
    )
    choices = read_case_file(
        write(
            tmp_path, f"cases: [{{prompt: x, choices: [{text}, other], contains: [{text}], target: {text}}}]"
        )
    )[0]
    assert (choices.choices, choices.contains, choices.target) == ([text, "other"], [text], text)


def test_numbers_and_switches_are_read_as_people_write_them(tmp_path):
    case = read_case_file(
        write(
            tmp_path,
            "instructions: yes\ncases: [{prompt: a, target: b, weight: 010, max_new_tokens: 012, "
            "instruction: off}]",
        )
    )[0]
    assert (case.weight, case.max_new_tokens, case.instruction) == (10.0, 12, False)


def test_a_json_file_of_cases_is_read_as_json(tmp_path):
    """Texts that YAML reads otherwise: a tab as indentation, a character in two halves, a next line within
    a text."""
    cases = [
        {"prompt": "one\u0085two", "target": "\U0001f389"},
        {"prompt": "1e3", "target": "on", "weight": 2},
    ]
    for name, options in (("a.json", {"indent": "\t"}), ("b.JSON", {"ensure_ascii": False})):
        read = read_case_file(write(tmp_path, json.dumps({"cases": cases}, **options), name))
        assert [(case.prompt, case.target) for case in read] == [
            (case["prompt"], case["target"]) for case in cases
        ]
    said = refusal(write(tmp_path, '{"cases": [{"prompt": "a", "target": 1945}]}', "c.json"))
    assert "target=1945: input should be a valid string; put it in quotes" in said


def test_three_thousand_cases_fit_into_a_file(tmp_path):
    path = write(
        tmp_path,
        "cases:\n"
        + "".join(f'  - {{id: c{i}, prompt: "p{i}", target: " t", category: k}}\n' for i in range(3000)),
    )
    assert len(read_case_file(path)) == 3000


# ---- instructions --------------------------------------------------------------------------------


def test_a_file_with_windows_line_ends_gives_the_same_texts(tmp_path):
    cases = [
        {
            "prompt": "\ufeffone\r\ntwo",
            "target": "\r\nthree",
            "choices": ["\r\nthree", " four"],
            "contains": ["a\r\nb"],
        }
    ]
    path = tmp_path / "windows.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"cases": cases}, indent=1).replace("\n", "\r\n").encode())
    [case] = read_case_file(path)
    assert (case.prompt, case.target, case.choices, case.contains) == (
        "one\ntwo",
        "\nthree",
        ["\nthree", " four"],
        ["a\nb"],
    )
    written = tmp_path / "windows.yaml"
    written.write_bytes(
        "\ufeffcases:\r\n  - prompt: |\r\n      one\r\n      two\r\n    contains: x\r\n".encode()
    )
    assert read_case_file(written)[0].prompt == "one\ntwo\n"


def test_a_file_of_instructions_can_have_inputs_and_plain_prompts(tmp_path):
    path = write(
        tmp_path,
        """
instructions: true
cases:
  - {prompt: Translate., input: le chat, target: The cat.}
  - {prompt: Name a color., choices: [Red., Rad.], target: Red.}
  - {prompt: The sky is, target: " blue", instruction: false}
  - {prompt: "", choices: [It is., It are.], target: It is., instruction: false}
""",
    )
    translate, name, sky, grammar = read_case_file(path)
    assert translate == Case(
        id="some-1", file=str(path), prompt="Translate.", input="le chat", instruction=True, target="The cat."
    )
    assert (name.instruction, name.input, name.choices) == (True, "", ["Red.", "Rad."])
    assert (sky.instruction, sky.prompt) == (False, "The sky is")
    assert (grammar.instruction, grammar.continued) == (False, False)


@pytest.mark.parametrize("head", ["", "instructions: false\n"])
def test_prompts_are_instructions_only_if_the_file_or_case_says_so(tmp_path, head):
    path = write(
        tmp_path,
        head
        + "cases:\n  - {prompt: a, target: b}\n  - {prompt: a, input: c, target: b, instruction: true}\n",
    )
    assert [(case.instruction, case.input) for case in read_case_file(path)] == [(False, ""), (True, "c")]


@pytest.mark.parametrize(
    ("head", "case", "said"),
    [
        (
            "",
            "{prompt: a, input: b, target: c}",
            "case 1: input goes with an instruction; set instructions: true for the file",
        ),
        (
            "",
            "{id: x, prompt: a, input: b, target: c, instruction: false}",
            "case 1 (x): input goes with an instruction",
        ),
        (
            "instructions: true",
            "{prompt: a, input: b, target: c, instruction: false}",
            "case 1: input goes with an instruction",
        ),
        ("instructions: true", '{prompt: "", target: c}', "case 1: an instruction cannot be empty"),
        (
            "instructions: true",
            '{prompt: " \\n", input: b, target: c}',
            "case 1: an instruction cannot be empty",
        ),
        ("instructions: true", "{input: b, target: c}", "case 1: prompt is required"),
        ("", '{prompt: "", target: c, instruction: true}', "case 1: an instruction cannot be empty"),
        (
            "instructions: true",
            "{prompt: a, input: {b: 5}, target: c}",
            "case 1: input={'b': 5}: input should be a valid string",
        ),
        (
            "instructions: true",
            '{prompt: a, target: c, instruction: "no"}',
            "case 1: instruction='no': input should be a valid boolean",
        ),
        (
            "instructions: maybe",
            "{prompt: a, target: c}",
            "instructions='maybe': input should be a valid boolean",
        ),
        ("instruction: true", "{prompt: a, target: c}", "unknown key instruction; did you mean instruction"),
        ("instructions: true", "{prompt: a, target: c, inptu: b}", "unknown key inptu; did you mean input?"),
    ],
)
def test_a_mistake_in_an_instruction_is_named_with_the_file_and_the_case(tmp_path, head, case, said):
    assert said in refusal(write(tmp_path, f"{head}\ncases:\n  - {case}\n"))


# ---- our own -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)
def test_our_case_files_are_valid(path):
    cases = read_case_file(path)
    assert len(cases) >= 40
    assert all(case.category != "other" for case in cases)
    assert len({(case.prompt, case.target, str(case.choices), str(case.contains)) for case in cases}) == len(
        cases
    ), "no case is there twice"
    counts = [
        sum(case.choices is not None and case.choices.index(case.target) == place for case in cases)
        for place in range(2)
    ]
    assert min(counts) >= 0.3 * max(counts), "the right choice is not always the first"


def test_our_case_files_are_those_the_readme_promises():
    assert [path.stem for path in OURS] == [
        "grammar",
        "instructions",
        "shakespeare",
        "tiny_corpus",
        "wiki_basics",
    ]
    assert {"geography", "history", "science", "language"} == {
        case.category for case in read_case_file(REPO / "cases" / "wiki_basics.yaml")
    }
    assert all(
        case.prompt == "" and len(case.choices) == 2
        for case in read_case_file(REPO / "cases" / "grammar.yaml")
    )


def test_verbatim_cases_are_in_the_bundled_corpus():
    """The comment above them says so; a case that is in no training text would measure nothing."""
    text = (REPO / "data" / "tiny_corpus.txt").read_text(encoding="utf-8")
    source = (REPO / "cases" / "tiny_corpus.yaml").read_text(encoding="utf-8")
    verbatim = {
        line.split("id:")[1].split("#")[0].strip()
        for line in source.splitlines()
        if "id:" in line and "# verbatim" in line
    }
    cases = [
        case
        for case in read_case_file(REPO / "cases" / "tiny_corpus.yaml")
        if case.id in verbatim and case.target
    ]
    assert len(cases) > 30
    assert [case.id for case in cases if case.prompt + case.target not in text] == []


def test_our_instructions_are_not_among_the_bundled_training_rows():
    """An answer learned by heart would measure nothing."""
    rows = json.loads((REPO / "data" / "tiny_instructions.json").read_text(encoding="utf-8"))
    cases = read_case_file(REPO / "cases" / "instructions.yaml")
    assert all(case.instruction for case in cases)
    asked = {(row["instruction"].strip().lower(), row.get("input", "").strip().lower()) for row in rows}
    assert [
        case.id for case in cases if (case.prompt.strip().lower(), case.input.strip().lower()) in asked
    ] == []


@pytest.mark.parametrize("kind", ["byte", "bpe", "gpt2"])
def test_the_right_choice_is_not_given_away_by_its_length(kind):
    """To an untrained model all tokens are about as likely, so it takes the choice with the fewest; that
    must not pay."""
    tokenizer = build_tokenizer(kind, list(read_documents(REPO / "data" / "tiny_corpus.txt")), 1024)
    for path in OURS:
        cases, won = [case for case in read_case_file(path) if case.choices], 0.0
        for case in cases:
            lengths = {choice: len(tokenizer.encode(choice)) for choice in case.choices}
            shortest = [choice for choice in case.choices if lengths[choice] == min(lengths.values())]
            won += (case.target in shortest) / len(shortest)
        chance = sum(1 / len(case.choices) for case in cases) / len(cases)
        assert abs(won / len(cases) - chance) < 0.1, path.name
