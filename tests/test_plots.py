"""Pictures of a run: there after it and after an interruption, the same bytes for the same numbers."""

import json
import os
import signal
import xml.etree.ElementTree

import pytest

import train
from support.plots import draw_loss, read_metrics

ROWS = [{"step": step, "loss": 5 / step, "lr": 0.01 / step} for step in range(1, 9)] + [{"step": 4, "val_loss": 2.5}, {"step": 8, "val_loss": 1.5}]


def write(folder, rows, tail: str = "") -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)


def texts(svg: bytes) -> str:
    """What a picture says; its text is drawn as outlines, with the words in comments."""
    parser = xml.etree.ElementTree.XMLParser(target=xml.etree.ElementTree.TreeBuilder(insert_comments=True))
    root = xml.etree.ElementTree.fromstring(svg, parser)
    return " ".join(element.text or "" for element in root.iter() if element.tag is xml.etree.ElementTree.Comment)


def test_a_run_ends_with_pictures_and_names_them(tiny_run):
    svg, png = (tiny_run.folder / "loss.svg").read_bytes(), (tiny_run.folder / "loss.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    best = min(row["val_loss"] for row in tiny_run.val_rows)
    for words in ("train", "validation", f"best {best:.3f}", "learning rate", "step"):
        assert words in texts(svg)
    assert f"curves in {tiny_run.folder / 'loss.svg'}" in tiny_run.out


def test_an_interrupted_run_has_pictures_too(run, tmp_path, monkeypatch):
    step = train.LitCausalLM.training_step

    def stop(self, *args):
        if self.trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args)

    monkeypatch.setattr(train.LitCausalLM, "training_step", stop)
    made = run(tmp_path / "run", "tokenizer.kind=byte", pictures=True)
    assert made.code == 143
    assert {"loss.svg", "loss.png"} <= {path.name for path in made.folder.iterdir()}


def test_the_svg_is_the_same_bytes_for_the_same_metrics(tmp_path):
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
def test_nothing_to_draw_gives_none(tmp_path, rows):
    if rows is not None:
        write(tmp_path, rows)
    assert draw_loss(tmp_path) is None
    assert not list(tmp_path.glob("loss*"))


def test_a_run_without_validation_is_drawn(tmp_path):
    write(tmp_path, [row for row in ROWS if "loss" in row])
    assert draw_loss(tmp_path)
    assert "validation" not in texts((tmp_path / "loss.svg").read_bytes())
