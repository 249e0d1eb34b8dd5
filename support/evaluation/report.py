"""An evaluation as one HTML file, report.html, that needs no network, no fonts and no other file.

report.html.jinja lays it out; here the values are made ready to be shown. Prompts, outputs and file names may
contain anything: Jinja2 escapes HTML (autoescape), and invisible characters are written as `\\x1b`.
"""

import math
import re
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from support.evaluation.case_scores import CASE_SCORES
from support.evaluation.pictures import draw_scores
from support.evaluation.results import CaseResult, CheckpointResult, Evaluation
from support.files.atomic import atomic_write
from support.messages import printable

if TYPE_CHECKING:
    from support.evaluation.case_files import Case

# Characters of all continuations together. Each may have its share, within these limits.
ALL_TEXT_LIMIT = 700_000
MIN_TEXT_LIMIT, MAX_TEXT_LIMIT = 400, 20_000
MAX_CHOICES = 8  # shown of one case
DASH, MINUS_SIGN, INFINITY = "\u2013", "\u2212", "\u221e"
CHOICE_LABELS = [*"ABCDEFGHIJKLMNOPQRSTUVWXYZ", *map(str, range(27, 101))]

# Whitespace a reader would not notice: blanks at the start or end of a line, several blanks, tabs, line ends.
HIDDEN_WHITESPACE = re.compile(r"(^ +| +$| {2,}|\t|\n)", re.MULTILINE)


@dataclass
class Choice:
    """One choice of a case as one checkpoint sees it."""

    label: str
    right: bool
    chosen: bool
    logprob: float
    share: float  # its probability among the choices, which sum to 1


@dataclass
class Row:
    """One checkpoint on one case."""

    name: str
    checkpoint: CheckpointResult
    result: CaseResult
    choices: list[Choice]
    target_logprob: float | None


@dataclass
class CaseView:
    """One case with the results of all checkpoints."""

    number: int
    case: "Case"
    rows: list[Row]
    choices: list[tuple[str, str]]  # label and text of those shown
    wanted_output: dict[
        str, list[str]
    ]  # the texts that the output should contain or match, by the case's key

    @property
    def scores(self) -> list[float]:
        return [row.result.score for row in self.rows]

    @property
    def mean(self) -> float:
        return sum(self.scores) / len(self.scores) if self.scores else math.nan

    @property
    def marks(self) -> str:
        """The words that the filter above the cases looks for: `missed`, `differ`, both or none."""
        marks = []
        if self.scores and self.scores[0] < 0.5:
            marks.append("missed")
        if self.scores and max(self.scores) - min(self.scores) >= 0.3:
            marks.append("differ")
        return " ".join(marks)


# ---- numbers and texts ---------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> str:
    """0.4128 -> 0.413; a missing value or NaN -> a dash."""
    if value is None or math.isnan(value):
        return DASH
    return f"{value:.{digits}f}".replace("-", MINUS_SIGN).replace("inf", INFINITY)


def count(value: int | None) -> str:
    """16384000 -> 16.4M"""
    if value is None:
        return DASH
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return str(value)


def percent(value: float | None) -> str:
    """A position on a bar from 0 to 1, for CSS."""
    if value is None or not math.isfinite(value):
        return "0%"
    return f"{100 * min(1.0, max(0.0, value)):.3g}%"


def visible(text: str, limit: int = MAX_TEXT_LIMIT) -> Markup:
    """The text as HTML that keeps its line ends and shows hidden whitespace, cut after `limit` characters.

    `" a\\n"` becomes `<u>·</u>a<u>↵</u>`, then a line end; the marks are <u>, so that the style sheet can
    make them pale.
    """
    parts = []
    for i, part in enumerate(HIDDEN_WHITESPACE.split(text[:limit])):
        is_whitespace = i % 2 == 1  # split puts what the pattern found between the other texts
        parts.append(mark_whitespace(part) if is_whitespace else mark_invisible(part))
    if len(text) > limit:
        parts.append(Markup("<em>… {} more characters</em>").format(len(text) - limit))
    return Markup("").join(parts)


def mark_whitespace(text: str) -> Markup:
    """A line end, a tab, or blanks, as HTML with a mark."""
    if text == "\n":
        return Markup("<u>↵</u>\n")
    if text == "\t":
        return Markup("<u>→</u>\t")
    return Markup("<u>{}</u>").format("·" * len(text))


def mark_invisible(text: str) -> Markup:
    """The text as HTML, its invisible characters as marked escapes."""
    parts = []
    for can_be_seen, characters in groupby(text, str.isprintable):
        part = "".join(characters)
        parts.append(escape(part) if can_be_seen else Markup("<u>{}</u>").format(printable(part)))
    return Markup("").join(parts)


# ---- what the template shows ---------------------------------------------------------------------


def pick_choices(case: "Case", results: list[CaseResult]) -> list[int]:
    """Which choices of a case are shown: all, or, of more than MAX_CHOICES, the right one, those that were
    chosen, and the first others."""
    important = {case.right} | {result.chosen for result in results if result.chosen is not None}
    others = [i for i in range(len(case.choices)) if i not in important]
    return sorted([*important, *others[: max(0, MAX_CHOICES - len(important))]])


def view_choices(case: "Case", result: CaseResult, shown: list[int]) -> list[Choice]:
    """The shown choices with their probabilities; none if the checkpoint gave no probabilities."""
    if not result.logprobs:
        return []
    top = max(result.logprobs)
    weights = [math.exp(logprob - top) if math.isfinite(top) else math.nan for logprob in result.logprobs]
    return [
        Choice(
            label=CHOICE_LABELS[i],
            right=case.choices[i] == case.target,
            chosen=i == result.chosen,
            logprob=result.logprobs[i],
            share=weights[i] / sum(weights),
        )
        for i in shown
    ]


def wanted_output(case: "Case") -> dict[str, list[str]]:
    """What the case asks of the output: {"contains": ["two", "three"], "regex": ["[0-9]+"]}."""
    wanted = {}
    for key in CASE_SCORES:
        value = getattr(case, key)
        if key in ("choices", "target") or value in (None, []):
            continue
        wanted[key] = value if isinstance(value, list) else [str(value)]
    return wanted


def view_case(evaluation: Evaluation, number: int, names: list[str]) -> CaseView:
    """The case of this number; `names` are those of the checkpoints."""
    case = evaluation.cases[number]
    results = [checkpoint.results[number] for checkpoint in evaluation.checkpoints]
    shown = pick_choices(case, results) if case.choices else []
    rows = []
    for name, checkpoint, result in zip(names, evaluation.checkpoints, results, strict=True):
        target_logprob = result.logprobs[case.right] if case.target and result.logprobs else None
        rows.append(Row(name, checkpoint, result, view_choices(case, result, shown), target_logprob))
    choices = [(CHOICE_LABELS[i], case.choices[i]) for i in shown]
    return CaseView(number, case, rows, choices, wanted_output(case))


def group_cases(evaluation: Evaluation, names: list[str]) -> dict[str, list[CaseView]]:
    """The cases by category, in the order in which the categories first appear."""
    groups: dict[str, list[CaseView]] = {}
    for number, case in enumerate(evaluation.cases):
        groups.setdefault(case.category, []).append(view_case(evaluation, number, names))
    return groups


def inline_picture(path: Path) -> Markup:
    """The <svg> element of an SVG file, without the text before it, which only a separate file needs."""
    svg = path.read_text(encoding="utf-8")
    return Markup(svg[svg.index("<svg") :])


def escape_surrogates(value: object) -> object:
    """The value as text without lone surrogates, which no file can hold; HTML that is ready stays."""
    return value if isinstance(value, Markup) else printable(value)


def write_report(path: Path, evaluation: Evaluation) -> None:
    """Write report.html at `path`, and next to it the picture it shows, scores.svg and scores.png."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=escape_surrogates,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, count=count, percent=percent, visible=visible)
    names = evaluation.short_names()
    n_texts = max(1, len(evaluation.cases) * len(evaluation.checkpoints))
    picture = draw_scores(path.with_name("scores"), evaluation)
    page = environment.get_template("report.html.jinja").render(
        evaluation=evaluation,
        names=names,
        runs=set(evaluation.short_runs()),
        files=sorted({case.file for case in evaluation.cases}),
        meanings={key: score.meaning for key, score in CASE_SCORES.items()},
        groups=group_cases(evaluation, names),
        picture=inline_picture(picture),
        text_limit=min(MAX_TEXT_LIMIT, max(MIN_TEXT_LIMIT, ALL_TEXT_LIMIT // n_texts)),
    )
    with atomic_write(path) as file:
        file.write(page.lstrip().encode())
