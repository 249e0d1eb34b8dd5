"""An evaluation as one HTML file, report.html, that needs nothing beside itself: no network, no fonts, no
other file.

What it looks like is in report.html.jinja; here the values are made ready to be shown. Prompts, outputs and
file names may hold anything: Jinja2 escapes what HTML would obey (autoescape), and characters that cannot be
seen are written as `\\x1b`.
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

TEXT_BUDGET = (
    700_000  # characters of all continuations together; each may have its share, or what the shortest allows
)
MIN_TEXT, MAX_TEXT = 400, 20_000
MAX_CHOICES = 8  # shown of one case
NOTHING, MINUS, INFINITY = "\u2013", "\u2212", "\u221e"
LETTERS = [*"ABCDEFGHIJKLMNOPQRSTUVWXYZ", *map(str, range(27, 101))]  # what choices are called

# Blanks that a reader would not notice: at the start or end of a line, or several; and tabs and line ends.
BLANKS = re.compile(r"(^ +| +$| {2,}|\t|\n)", re.MULTILINE)


@dataclass
class Choice:
    """One choice of a case as one checkpoint sees it."""

    letter: str
    right: bool
    chosen: bool
    logprob: float
    share: float  # its probability among the choices: they sum to 1


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
    number: int
    case: "Case"
    rows: list[Row]
    choices: list[tuple[str, str]]  # letter and text of those shown
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
        """What the filter above the cases looks for."""
        marks = {
            "missed": any(s < 0.5 for s in self.scores[:1]),
            "differ": bool(self.scores) and max(self.scores) - min(self.scores) >= 0.3,
        }
        return " ".join(mark for mark, holds in marks.items() if holds)


# ---- numbers and texts ---------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> str:
    """0.4128 -> 0.413; nothing, and what is no number -> a dash."""
    return (
        NOTHING
        if value is None or math.isnan(value)
        else f"{value:.{digits}f}".replace("-", MINUS).replace("inf", INFINITY)
    )


def count(value: int | None) -> str:
    """16384000 -> 16.4M"""
    if value is None:
        return NOTHING
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return str(value)


def percent(value: float | None) -> str:
    """A place on a bar from 0 to 1, for CSS."""
    return f"{100 * min(1.0, max(0.0, value)):.3g}%" if value is not None and math.isfinite(value) else "0%"


def visible(text: str, limit: int = MAX_TEXT) -> Markup:
    """The text as HTML that keeps its line ends and shows blanks that matter, cut after `limit` characters.

    `" a\\n"` becomes `<u>·</u>a<u>↵</u>`, then a line end; the marks are <u>, so that the style sheet can
    make them pale.
    """
    shown = []
    for i, piece in enumerate(BLANKS.split(text[:limit])):
        if i % 2:  # what BLANKS found
            shown.append(
                {"\n": Markup("<u>↵</u>\n"), "\t": Markup("<u>→</u>\t")}.get(piece)
                or Markup("<u>{}</u>").format("·" * len(piece))
            )
            continue
        for can_be_seen, characters in groupby(piece, str.isprintable):
            part = "".join(characters)
            shown.append(escape(part) if can_be_seen else Markup("<u>{}</u>").format(printable(part)))
    if len(text) > limit:
        shown.append(Markup("<em>… {} more characters</em>").format(len(text) - limit))
    return Markup("").join(shown)


# ---- what the template shows ---------------------------------------------------------------------


def pick_choices(case: "Case", results: list[CaseResult]) -> list[int]:
    """Which choices of a case are shown: all, or of very many the right one, those that were chosen, and
    the first others."""
    important = {case.right} | {result.chosen for result in results if result.chosen is not None}
    others = [i for i in range(len(case.choices)) if i not in important]
    return sorted([*important, *others[: max(0, MAX_CHOICES - len(important))]])


def view_choices(case: "Case", result: CaseResult, shown: list[int]) -> list[Choice]:
    """The shown choices with their probabilities, as far as the checkpoint gave any."""
    if not result.logprobs:
        return []
    top = max(result.logprobs)
    weights = [math.exp(logprob - top) if math.isfinite(top) else math.nan for logprob in result.logprobs]
    return [
        Choice(
            LETTERS[i],
            case.choices[i] == case.target,
            i == result.chosen,
            result.logprobs[i],
            weights[i] / sum(weights),
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
    case = evaluation.cases[number]
    results = [checkpoint.results[number] for checkpoint in evaluation.checkpoints]
    shown = pick_choices(case, results) if case.choices else []
    rows = [
        Row(
            name,
            checkpoint,
            result,
            view_choices(case, result, shown),
            result.logprobs[case.right] if case.target and result.logprobs else None,
        )
        for name, checkpoint, result in zip(names, evaluation.checkpoints, results, strict=True)
    ]
    letters = [(LETTERS[i], case.choices[i]) for i in shown]
    return CaseView(number, case, rows, letters, wanted_output(case))


def group_cases(evaluation: Evaluation, names: list[str]) -> dict[str, list[CaseView]]:
    """The cases by category, in the order in which the categories first appear."""
    groups: dict[str, list[CaseView]] = {}
    for number, case in enumerate(evaluation.cases):
        groups.setdefault(case.category, []).append(view_case(evaluation, number, names))
    return groups


def inline_picture(path: Path) -> Markup:
    """The <svg> element of an SVG file, without what stands before it in a file of its own."""
    svg = path.read_text(encoding="utf-8")
    return Markup(svg[svg.index("<svg") :])


def write_report(path: Path, evaluation: Evaluation) -> None:
    """report.html at `path`, and beside it the picture that it shows, scores.svg and scores.png."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: (
            value if isinstance(value, Markup) else printable(value)
        ),  # no lone surrogate gets into the file
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, count=count, percent=percent, visible=visible)
    names = evaluation.short_names()
    text_limit = TEXT_BUDGET // max(1, len(evaluation.cases) * len(evaluation.checkpoints))
    page = environment.get_template("report.html.jinja").render(
        evaluation=evaluation,
        names=names,
        runs=set(evaluation.short_runs()),
        files=sorted({case.file for case in evaluation.cases}),
        meanings={key: score.meaning for key, score in CASE_SCORES.items()},
        groups=group_cases(evaluation, names),
        picture=inline_picture(draw_scores(path.with_name("scores"), evaluation)),
        text_limit=min(MAX_TEXT, max(MIN_TEXT, text_limit)),
    )
    with atomic_write(path) as file:
        file.write(page.lstrip().encode())
