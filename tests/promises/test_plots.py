"""Pictures of a run and of an evaluation: what they show, and the same bytes for the same numbers."""

import json
import warnings
import xml.etree.ElementTree

import pytest
from synthetic import make_evaluation

from support.evaluation.pictures import draw_scores
from support.plots import draw_loss, read_metrics

ROWS = [{"step": step, "loss": 5 / step, "lr": 0.01 / step} for step in range(1, 9)] + [
    {"step": 4, "val_loss": 2.5},
    {"step": 8, "val_loss": 1.5},
]


def write(folder, rows, tail: str = "") -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)


def texts(svg: bytes) -> str:
    """The words in a picture; text is drawn as outlines, with the words in comments."""
    parser = xml.etree.ElementTree.XMLParser(target=xml.etree.ElementTree.TreeBuilder(insert_comments=True))
    root = xml.etree.ElementTree.fromstring(svg, parser)
    return " ".join(
        element.text or "" for element in root.iter() if element.tag is xml.etree.ElementTree.Comment
    )


def test_a_run_ends_with_pictures_and_names_them(tiny_run):
    svg, png = (tiny_run.folder / "loss.svg").read_bytes(), (tiny_run.folder / "loss.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    best = min(row["val_loss"] for row in tiny_run.val_rows)
    for words in ("train", "validation", f"best {best:.3f}", "learning rate", "step"):
        assert words in texts(svg)
    assert f"curves in {tiny_run.folder / 'loss.svg'}" in tiny_run.out


def test_the_same_metrics_give_the_same_svg_bytes(tmp_path):
    pictures = []
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, ROWS if name != "c" else ROWS[:-1])
        assert draw_loss(tmp_path / name) == tmp_path / name / "loss.svg"
        pictures.append((tmp_path / name / "loss.svg").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


@pytest.mark.parametrize("tail", ['{"step": 9, "lo', '{"step": 9', "\x00\x00"], ids=repr)
def test_a_cut_off_last_line_is_left_out(tmp_path, tail):
    write(tmp_path, ROWS, tail)
    assert read_metrics(tmp_path / "metrics.jsonl") == ROWS
    assert draw_loss(tmp_path) == tmp_path / "loss.svg"


@pytest.mark.parametrize("rows", [None, [], [{"step": 1, "val_loss": 3.0}]], ids=str)
def test_without_training_rows_nothing_is_drawn(tmp_path, rows):
    if rows is not None:
        write(tmp_path, rows)
    assert draw_loss(tmp_path) is None
    assert not list(tmp_path.glob("loss*"))


def test_a_run_without_validation_is_drawn(tmp_path):
    write(tmp_path, [row for row in ROWS if "loss" in row])
    assert draw_loss(tmp_path)
    assert "validation" not in texts((tmp_path / "loss.svg").read_bytes())


# ---- scores of checkpoints -----------------------------------------------------------------------


def test_scores_are_drawn_with_a_line_for_each_run_and_a_panel_for_each_category(tmp_path):
    assert (
        draw_scores(tmp_path / "scores", make_evaluation(runs=("runs/a", "runs/$b$")))
        == tmp_path / "scores.svg"
    )
    words = texts((tmp_path / "scores.svg").read_bytes())
    for word in ("step", "score, with 95% interval", "$b$", "geography", "spelling", "style", "guessing"):
        assert word in words
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_one_run_in_one_category_needs_neither_legend_nor_panels(tmp_path):
    evaluation = make_evaluation(runs=("runs/only",))
    evaluation.chance = {"geography": 0.25}
    words = texts(draw_scores(tmp_path / "scores", evaluation).read_bytes())
    assert "only" not in words and "geography" not in words and "step" in words


@pytest.mark.parametrize("steps", [(None,), (None, 100), (100,)], ids=str)
def test_without_different_steps_the_scores_are_bars(tmp_path, steps):
    words = texts(
        draw_scores(tmp_path / "scores", make_evaluation(steps=steps, runs=("runs/a", "runs/b"))).read_bytes()
    )
    assert "a/step-" in words and "b/step-" in words and "geography" not in words


@pytest.mark.parametrize("steps", [(10, 20), (10,)], ids=["lines", "bars"])
def test_without_cases_the_losses_are_drawn(tmp_path, steps):
    evaluation = make_evaluation(steps=steps, runs=("runs/a", "runs/b"))
    evaluation.cases, evaluation.chance = [], {}
    for n, checkpoint in enumerate(evaluation.checkpoints):
        checkpoint.score = checkpoint.low = checkpoint.high = None
        checkpoint.results, checkpoint.categories, checkpoint.bits_per_byte = [], {}, 2.0 + n / 8
    words = texts(draw_scores(tmp_path / "scores", evaluation).read_bytes())
    assert "bits per byte of the validation text" in words and "score" not in words


def test_the_same_scores_give_the_same_svg_bytes(tmp_path):
    pictures = [
        draw_scores(tmp_path / "scores", make_evaluation(n_cases=n)).read_bytes() for n in (12, 12, 9)
    ]
    assert pictures[0] == pictures[1] != pictures[2]


@pytest.mark.parametrize(
    "name",
    ["_hidden", "$x^2", "<b>--></svg>", "\x1b[2J\x00", "\ud800", "\u65e5\u672c", "n" * 99, ""],
    ids=ascii,
)
@pytest.mark.parametrize("steps", [(1, 2), (1,)], ids=["lines", "bars"])
def test_names_of_any_kind_are_drawn_as_they_are(tmp_path, name, steps):
    """Matplotlib would leave out a legend's _name, read $ as a formula, and warn of letters that its font
    lacks."""
    evaluation = make_evaluation(steps=steps, runs=("b", "a"))
    for checkpoint in evaluation.checkpoints:
        checkpoint.categories[name] = 0.5
        if checkpoint.run == "a":
            checkpoint.run, checkpoint.file = name, f"{name}/x.ckpt"
    evaluation.chance[name] = None
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        words = texts(draw_scores(tmp_path / "scores", evaluation).read_bytes())
    assert not name.startswith(("_", "$")) or name in words
