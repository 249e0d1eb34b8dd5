"""The report is one valid HTML file, whatever prompts, outputs and names contain."""

import copy
import html.parser
import math
import random
import re

import pytest
from synthetic import make_case, make_evaluation, make_result

from support.evaluation.report import visible, write_report
from support.evaluation.results import CaseResult

VOID = {"meta", "br", "wbr", "input", "img", "link", "hr"}
SCRIPT = "<script>alert(1)</script>"
ATTRIBUTE = "\"' onmouseover=alert(1) x='"
HOSTILE = {
    "script": SCRIPT,
    "attribute": ATTRIBUTE,
    "end of everything": "</pre></td></table></details></style></svg>--><!--<![CDATA[",
    "template": "{{ 7 * 7 }}{% raw %}{# #}",
    "entity": "&lt;b&gt; &amp; &#60;",
    "control characters": "a\x00b\x1b[2J\r\x7f\x85\u2028",
    "lone surrogate": "\ud800 x \udfff",
    "right to left": "\u05e9\u05dc\u05d5\u05dd \u202egnp.exe\u202c",
    "long": "x" * 10_000,
    "blanks": " \n\n \t  ",
    "mathematics": "$x^2$ \\frac _a",
    "nothing": "",
}


class Page(html.parser.HTMLParser):
    """Reads a page: fails if tags are not closed in order; keeps tags, attributes and text."""

    def __init__(self, source: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):  # <path/> in the picture
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> in {self.open[-4:]}, line {self.getpos()[0]}"
        self.open.pop()

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.attributes if key == name]


def report(tmp_path, evaluation) -> tuple[Page, str]:
    path = tmp_path / "report.html"
    write_report(path, evaluation)
    source = path.read_bytes().decode()  # UTF-8, strictly
    return Page(source), source


def squeezed(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def test_every_case_and_checkpoint_is_in_the_report(tmp_path):
    evaluation = make_evaluation(runs=("runs/a", "runs/b"))
    evaluation.checkpoints[0].names = ["best", "last"]
    evaluation.checkpoints[1].tied = evaluation.checkpoints[2].tied = True
    evaluation.checkpoints[2].rank = 2
    page, source = report(tmp_path, evaluation)
    text = squeezed(page.text)
    assert {f"case-{i + 1}" for i in range(12)} <= set(page.all("id"))
    for case in evaluation.cases:
        assert f"{case.id} " in text and case.prompt in text
    for checkpoint in evaluation.checkpoints:
        name = checkpoint.file.removeprefix("runs/")
        assert text.count(name) >= 12 + 1  # in each case, and in the ranking
        assert f"{checkpoint.low:.3f}" in text and f"{checkpoint.score:.2f}" in text
    for words in (
        "6 checkpoints of 2 runs on 12 cases",
        "best",
        "2=",
        "chance 0.25",
        evaluation.command,
        evaluation.date,
        "torch 2.5.1",
        "per token",
    ):
        assert words in text
    assert "≈ first" in text and "val loss" not in page.all("data-label")
    assert (
        source.count('class="chosen') == 4 * 6
    )  # one of four choices in each of four cases, by six checkpoints


def test_the_page_needs_no_other_file(tmp_path):
    page, source = report(tmp_path, make_evaluation())
    assert not set(page.tags) & {"link", "img", "iframe", "object", "embed", "base"}
    assert page.all("src") == [] and all(
        value.startswith("#") for value in page.all("href") + page.all("xlink:href")
    )
    assert "@import" not in source and not re.search(r"url\((?!#)", source)
    assert any("default-src 'none'" in (value or "") for value in page.all("content"))


def test_the_picture_in_the_page_is_scores_svg(tmp_path):
    _, source = report(tmp_path, make_evaluation())
    svg = (tmp_path / "scores.svg").read_text()
    assert svg[svg.index("<svg") :].strip() in source


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_text_of_any_kind_stays_text(tmp_path, text):
    calm, _ = report(tmp_path, make_evaluation(n_cases=4, steps=(1,), runs=("runs/a", "runs/b")))
    evaluation = make_evaluation(n_cases=4, steps=(1,), runs=("runs/a", "runs/b"))
    for field in ("id", "prompt", "category", "file", "regex"):
        setattr(evaluation.cases[2], field, text)
    evaluation.cases[2].contains = [text]
    evaluation.cases[0].target = evaluation.cases[1].target = evaluation.cases[1].choices[0] = text or "x"
    evaluation.chance |= {text: None}
    first = evaluation.checkpoints[0]
    first.file, first.run, first.names, first.tokenizer, first.categories[text] = (
        f"runs/{text}/{text}",
        f"runs/{text}",
        [text],
        text,
        0.5,
    )
    first.results[0].continuation = first.results[2].continuation = text
    evaluation.command = evaluation.date = text
    evaluation.versions = {text: text}
    page, source = report(tmp_path, evaluation)
    assert page.tags.count("script") == calm.tags.count("script") == 1
    assert {key for key, _ in page.attributes} <= {key for key, _ in calm.attributes}, (
        "no text became an attribute"
    )
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u202e\u202c\ud800-\udfff]", source)
    if text in (SCRIPT, ATTRIBUTE, HOSTILE["template"], HOSTILE["entity"]):
        assert text in page.text


def test_invisible_characters_are_made_visible():
    assert visible(" a\n\tb  c ") == "<u>·</u>a<u>↵</u>\n<u>→</u>\tb<u>··</u>c<u>·</u>"
    assert visible("\x1b[2J\r<b>") == r"<u>\x1b</u>[2J<u>\r</u>&lt;b&gt;"
    assert visible("\ud800\u202e") == r"<u>\ud800\u202e</u>"
    assert visible("x" * 50, limit=10) == "x" * 10 + "<em>… 40 more characters</em>"
    assert visible("") == ""


def test_one_checkpoint_on_one_case_makes_a_small_report(tmp_path):
    evaluation = make_evaluation(n_cases=1, steps=(None,))
    page, source = report(tmp_path, evaluation)
    text = squeezed(page.text)
    assert (
        "1 checkpoint on 1 case." in text
        and "Against the first" not in text
        and "cannot tell the two" not in text
    )
    assert (
        'id="case-1" data-marks' in source
        and len(re.findall(r"<details [^>]* open>", source)) == source.count("<details") == 2
    )
    assert len(source) < 60_000


def test_missing_values_are_shown_as_a_dash(tmp_path):
    evaluation = make_evaluation(n_cases=3, steps=(None, 5))
    for checkpoint in evaluation.checkpoints:
        checkpoint.tokens = checkpoint.step = None
        checkpoint.categories, checkpoint.score = {}, math.nan
        checkpoint.results = [CaseResult(math.nan, {}, None, [], 0, 0, None, None) for _ in evaluation.cases]
    evaluation.checkpoints[0].val_loss = 2.5
    evaluation.checkpoints[1].bits_per_byte = math.inf
    page, _ = report(tmp_path, evaluation)
    assert "None" not in page.text and "nan" not in squeezed(page.text).split()
    assert "\u2013" in page.text and "2.500" in page.text


@pytest.mark.parametrize("value", [-math.inf, math.nan])
def test_infinite_likelihoods_are_shown_and_nan_is_not(tmp_path, value):
    evaluation = make_evaluation(n_cases=3)
    for checkpoint in evaluation.checkpoints:
        for result in checkpoint.results:
            result.logprobs = [value for _ in result.logprobs]
    page, _ = report(tmp_path, evaluation)
    assert "nan" not in page.text and ("\u2212\u221e" in page.text.rpartition("Cases")[2]) == (
        value == -math.inf
    )


def test_shares_of_choices_sum_to_one_and_the_right_and_the_chosen_ones_are_marked(tmp_path):
    evaluation = make_evaluation(n_cases=2, steps=(1,))
    result = evaluation.checkpoints[0].results[1]
    result.logprobs, result.chosen = (
        [math.log(p) - 700 for p in (0.2, 0.5, 0.1, 0.2)],
        1,
    )  # exp(-700) and less: softmax must not underflow
    _, source = report(tmp_path, evaluation)
    assert re.findall(r"([A-D])</b>\n(\d+)%", source) == [("A", "20"), ("B", "50"), ("C", "10"), ("D", "20")]
    assert re.search(r'class=" right"><b>A<', source) and re.search(r'class="chosen"><b>B<', source)


def test_the_right_and_the_chosen_of_a_hundred_choices_are_shown(tmp_path):
    evaluation = make_evaluation(n_cases=2, steps=(1,))
    case = evaluation.cases[1] = make_case(1, choices=[f" {i}" for i in range(100)], target=" 70")
    result = evaluation.checkpoints[0].results[1] = make_result(case, random.Random(0))
    result.logprobs, result.chosen = [-5.0] * 99 + [-1.0], 99
    page, _ = report(tmp_path, evaluation)
    text = squeezed(page.text)
    assert "71 ·70" in text and "100 ·99" in text and "and 92 more" in text


def test_a_large_report_stays_small_enough(tmp_path, monkeypatch):
    evaluation = make_evaluation(n_cases=150, steps=(1, 2, 3, 4, 5), runs=("runs/a", "runs/b"))
    assert len(report(tmp_path, evaluation)[1].encode()) < 1_500_000
    monkeypatch.setattr(
        "support.evaluation.report.draw_scores", lambda stem, evaluation: stem.with_suffix(".svg")
    )  # drawn above
    for checkpoint in evaluation.checkpoints:
        for result in checkpoint.results:
            result.continuation = "word <b> " * 1_200
    page, source = report(tmp_path, evaluation)
    assert len(source.encode()) < 3_000_000 and "more characters" in page.text


def test_the_same_evaluation_gives_the_same_bytes(tmp_path):
    evaluation = make_evaluation(steps=(1,))
    before = copy.deepcopy(evaluation)
    assert report(tmp_path, evaluation)[1] == report(tmp_path, evaluation)[1]  # and so is the picture in it
    assert evaluation == before, "a report does not change the evaluation"
