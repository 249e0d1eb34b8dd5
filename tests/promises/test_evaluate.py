"""evaluate_checkpoints.py: tables, files and messages, and ranks that follow the training."""

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO

import evaluate_checkpoints
from support.checkpoint import load_model
from support.cli import guarded
from support.evaluation.case_files import read_cases
from support.evaluation.likelihoods import log_likelihoods
from support.messages import UserError
from support.text.chat_template import TEMPLATES, prompt_ids

CORPUS_CASES = str(REPO / "cases" / "tiny_corpus.yaml")


@pytest.fixture
def evaluate(capsys):
    """(rows as --json gives them, what was said to stderr)"""

    def call(*argv: object) -> tuple[list[dict], str]:
        capsys.readouterr()
        assert evaluate_checkpoints.main([str(word) for word in (*argv, "--json", "--device", "cpu")]) == 0
        said = capsys.readouterr()
        return [json.loads(line) for line in said.out.splitlines()], said.err

    return call


def write_cases(path: Path, cases: list[dict]) -> Path:
    path.write_text(json.dumps({"cases": cases}), encoding="utf-8")
    return path


def test_a_folder_is_ranked_with_each_file_once_and_the_same_each_time(evaluate, tiny_run):
    rows, err = evaluate("--checkpoints", tiny_run.folder, "--cases", CORPUS_CASES)
    assert sorted(row["step"] for row in rows) == [4, 8, 12]
    assert {row["rank"] for row in rows} <= {1, 2, 3}
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    assert all(row["low"] <= row["score"] <= row["high"] for row in rows)
    assert "last" in next(row["names"] for row in rows if row["step"] == 12)
    assert err == ""
    assert evaluate("--checkpoints", f"{tiny_run.folder}/step-*.ckpt", "--cases", CORPUS_CASES)[0] == rows


def test_validation_losses_are_those_of_the_training(evaluate, tiny_run):
    rows, _ = evaluate("--checkpoints", tiny_run.folder, "--cases", CORPUS_CASES, "--val")
    logged = {row["step"]: row["val_loss"] for row in tiny_run.val_rows}
    assert {row["step"]: row["val_loss"] for row in rows} == pytest.approx(logged, rel=1e-5)
    assert all(row["bits_per_byte"] > 0 for row in rows)


def test_without_cases_the_validation_loss_decides_the_rank(evaluate, tiny_run, tmp_path):
    """In the table, in --json, and in files: no scores, and no cases.csv of an earlier evaluation."""
    (tmp_path / "cases.csv").write_text("of an earlier evaluation")
    rows, _ = evaluate("--checkpoints", tiny_run.folder, "--val", "--output-dir", tmp_path)
    logged = sorted((row["val_loss"], row["step"]) for row in tiny_run.val_rows)
    assert [(row["val_loss"], row["step"]) for row in rows] == [
        (pytest.approx(loss, rel=1e-5), step) for loss, step in logged
    ]
    assert [row["rank"] for row in rows] == [1, 2, 3]
    assert all(row[name] is None for row in rows for name in ("score", "low", "high", "same_as_first"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "evaluation_results.csv",
        "report.html",
        "scores.png",
        "scores.svg",
    ]
    with open(tmp_path / "evaluation_results.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["val_loss"]) for row in table] == [row["val_loss"] for row in rows] and {
        row["score"] for row in table
    } == {""}
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "by their validation loss" in page and "Loss over step" in page
    assert "bootstrap" not in page and "Score" not in page and "<script>" not in page
    assert all(f"{row['val_loss']:.4f}" in page for row in rows)


def test_an_untrained_checkpoint_is_compared_whatever_its_warmup(evaluate, run, tmp_path):
    """A run of 0 steps writes a schedule of 1 step, shorter than the warmup of its config, and its
    validation text can still be read."""
    run(
        tmp_path / "untrained",
        "training.max_steps=0",
        "training.schedule_steps=null",
        "training.warmup_steps=5",
    )
    [row], err = evaluate("--checkpoints", tmp_path, "--val")
    assert row["step"] == 0 and row["val_loss"] == pytest.approx(math.log(400), abs=0.2) and err == ""


def test_the_table_without_cases_shows_losses_alone(tiny_run, capsys):
    assert evaluate_checkpoints.main(["--checkpoints", str(tiny_run.folder), "--val", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["rank", "file", "step", "val", "loss", "bits/byte"] and len(lines) == 4
    assert [line.split()[0] for line in lines[1:]] == ["1", "2", "3"]


def test_result_files_agree_with_the_printed_results(evaluate, tiny_run, tmp_path):
    rows, _ = evaluate(
        "--checkpoints",
        tiny_run.folder,
        "--cases",
        CORPUS_CASES,
        "--output-dir",
        tmp_path / "results" / "baseline",
    )
    folder, cases = tmp_path / "results" / "baseline", read_cases([CORPUS_CASES])
    assert sorted(path.name for path in folder.iterdir()) == [
        "cases.csv",
        "evaluation_results.csv",
        "report.html",
        "scores.png",
        "scores.svg",
    ]
    with open(folder / "evaluation_results.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["file"], float(row["score"])) for row in table] == [
        (row["file"], row["score"]) for row in rows
    ]
    with open(folder / "cases.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(rows) * len(cases)
    best = [row for row in table if row["checkpoint"] == rows[0]["file"]]
    weighted = sum(float(row["score"]) * float(row["weight"]) for row in best) / sum(
        float(row["weight"]) for row in best
    )
    assert weighted == pytest.approx(rows[0]["score"], abs=1e-6)
    for row in best:
        if row["score_target"]:
            assert math.exp(float(row["logprob_per_byte"])) == pytest.approx(float(row["score_target"]))
            assert float(row["logprob_per_byte"]) == pytest.approx(
                float(row["logprob"]) / len(row["target"].encode())
            )
    assert {row["id"]: row["chosen"] == row["target"] for row in best if row["score_choices"]} == {
        row["id"]: row["score_choices"] == "1.0" for row in best if row["score_choices"]
    }
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert all(case.id in page for case in cases)


def test_the_table_shows_ranks_intervals_and_guessing(tiny_run, tmp_path, capsys):
    cases = write_cases(
        tmp_path / "c.yaml", [{"prompt": "", "choices": ["is", "are"], "target": "is", "category": "[bold]"}]
    )
    assert (
        evaluate_checkpoints.main(
            ["--checkpoints", str(tiny_run.folder), "--cases", str(cases), "--device", "cpu"]
        )
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["rank", "file", "step", "score", "95%", "interval", "[bold]"]
    assert "guessing" in lines[4] and lines[4].split()[-1] == "0.500"
    assert lines[5] == "= the same score", "one case that is won or lost cannot tell three apart"


def test_damaged_checkpoints_are_left_out_with_a_warning(evaluate, tiny_run, tmp_path):
    shutil.copyfile(tiny_run.folder / "final.ckpt", tmp_path / "whole.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "whole.ckpt").read_bytes()[:-500])
    rows, err = evaluate("--checkpoints", tmp_path, "--cases", CORPUS_CASES)
    assert [Path(row["file"]).name for row in rows] == ["whole.ckpt"]
    assert "cut.ckpt is left out" in err
    (tmp_path / "whole.ckpt").write_bytes(b"")
    with pytest.raises(UserError, match="none of the checkpoints"):
        evaluate("--checkpoints", tmp_path, "--cases", CORPUS_CASES)


def test_different_tokenizers_compare_and_unknown_characters_are_reported(evaluate, run, tmp_path):
    short = ("training.max_steps=1", "training.warmup_steps=0")
    for kind in ("byte", "char"):
        run(tmp_path / kind, *short, f"tokenizer.kind={kind}")
    cases = write_cases(
        tmp_path / "c.yaml",
        [
            {"prompt": "λ", "target": " a"},
            {"prompt": "The", "target": " loss"},
            {"prompt": "A", "contains": "λ"},
        ],
    )
    rows, err = evaluate("--checkpoints", tmp_path, "--cases", cases, "--tokenizer", "byte")
    assert {row["tokenizer"].split()[0] for row in rows} == {"byte", "char"}
    assert "--tokenizer byte is not what this model was trained with; using the checkpoint's own (char" in err
    assert "1 of 3 cases have characters that the tokenizer char" in err


def test_a_bad_output_folder_is_noticed_before_the_work(tiny_run, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(evaluate_checkpoints, "evaluate", None)
    with pytest.raises(SystemExit) as end:
        guarded(
            evaluate_checkpoints.main,
            [
                "--checkpoints",
                str(tiny_run.folder),
                "--cases",
                CORPUS_CASES,
                "--output-dir",
                str(tmp_path / "file"),
            ],
        )
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'file'}: File exists\n"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--checkpoints", "nowhere", "--cases", CORPUS_CASES], "nowhere: no checkpoint"),
        (["--checkpoints", "{run}", "--cases", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["--checkpoints", "{run}", "--cases", CORPUS_CASES, "--config", "config.yaml"], "goes with --val"),
        (["--checkpoints", "{run}", "--cases", CORPUS_CASES, "--seed", "-1"], "--seed -1"),
        (["--checkpoints", "nowhere", "--val"], "nowhere: no checkpoint"),
        (["--checkpoints", "{run}", "--cases", CORPUS_CASES, "--device", "tpu"], "device 'tpu'"),
    ],
)
def test_mistakes_are_answered(tiny_run, argv, said):
    with pytest.raises(UserError, match=said.replace(".", r"\.")):
        evaluate_checkpoints.main([word.format(run=tiny_run.folder) for word in argv])


def test_the_command_reads_files_of_instructions(evaluate, tiny_run, tmp_path):
    file = tmp_path / "c.json"
    file.write_text(
        json.dumps(
            {
                "instructions": True,
                "cases": [{"prompt": "Name it.", "input": "a", "choices": ["one", "two"], "target": "two"}],
            }
        )
    )
    [row], _ = evaluate("--checkpoints", tiny_run.folder / "final.ckpt", "--cases", file)
    model, tokenizer, _ = load_model(tiny_run.folder / "final.ckpt")
    prompt = prompt_ids(TEMPLATES["chat"], tokenizer, "Name it.", "a")
    (one, _), (two, _) = log_likelihoods(model, [(prompt, tokenizer.encode(text)) for text in ("one", "two")])
    assert row["score"] == float(two > one)


# ---- does the rank follow the training? ----------------------------------------------------------


def next_word_cases(path: Path, shuffled: bool) -> Path:
    """200 places in the bundled corpus: which of four words comes next? With `shuffled`, a random one is
    declared right."""
    dice = np.random.default_rng(7)
    sentences = [
        line.split()
        for line in (REPO / "data" / "tiny_corpus.txt").read_text(encoding="utf-8").splitlines()
        if len(line.split()) > 10
    ]
    words = sorted({f" {word}" for sentence in sentences for word in sentence})
    cases = []
    for _ in range(200):
        sentence = sentences[dice.integers(len(sentences))]
        place = dice.integers(5, len(sentence))
        target = f" {sentence[place]}"
        choices = [
            target,
            *dice.choice([word for word in words if word != target], 3, replace=False).tolist(),
        ]
        dice.shuffle(choices)
        right = str(dice.choice(choices)) if shuffled else target
        cases.append(
            {
                "prompt": " ".join(sentence[max(0, place - 8) : place]),
                "choices": choices,
                "target": right,
                "max_new_tokens": 1,
            }
        )
    return write_cases(path, cases)


def spearman(one: list[float], other: list[float]) -> float:
    """The correlation of ranks (no ties are expected)."""
    return float(np.corrcoef(np.argsort(np.argsort(one)), np.argsort(np.argsort(other)))[0, 1])


@pytest.mark.slow
def test_the_rank_follows_the_training_but_not_with_shuffled_targets(evaluate, run, tmp_path):
    words = (
        "model.d_model=64",
        "tokenizer.vocab_size=512",
        "data.stride=8",
        "training.micro_batch_size=16",
        "training.grad_accum_steps=1",
    )
    steps = ("training.schedule_steps=120", "training.val_every=120", "checkpoint.save_every=20")
    true, shuffled = (
        next_word_cases(tmp_path / f"{name}.json", name == "shuffled") for name in ("true", "shuffled")
    )
    gained: dict[str, list[float]] = {"true": [], "shuffled": []}
    for seed in (1, 2, 3):
        for name, n in (("trained", 120), ("untrained", 0)):
            run(tmp_path / str(seed) / name, *words, *steps, f"training.max_steps={n}", f"seed={seed}")
        rows, _ = evaluate("--checkpoints", tmp_path / str(seed), "--cases", true)
        assert sorted(row["step"] for row in rows) == [0, 20, 40, 60, 80, 100, 120]
        assert rows[-1]["step"] == 0, "the untrained one is last"
        assert spearman([row["step"] for row in rows], [row["score"] for row in rows]) >= 0.8
        for name, cases in (("true", true), ("shuffled", shuffled)):
            scores = {
                row["step"]: row["score"]
                for row in evaluate("--checkpoints", tmp_path / str(seed), "--cases", cases)[0]
            }
            gained[name].append(scores[120] - scores[0])
        assert all(0.15 < score < 0.35 for score in scores.values()), "with shuffled targets all guess"
    assert np.mean(gained["true"]) > 0.1
    assert abs(np.mean(gained["shuffled"])) < np.mean(gained["true"]) / 3
