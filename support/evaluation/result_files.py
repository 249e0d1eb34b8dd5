"""The files of --output-dir: evaluation_results.csv, cases.csv, lm_eval.csv, and the report."""

import csv
import io
from pathlib import Path
from typing import Any

from support.evaluation.case_files import Case
from support.evaluation.case_scores import CASE_SCORES
from support.evaluation.results import CaseResult, CheckpointResult, Evaluation
from support.files.atomic import atomic_write


def checkpoint_row(checkpoint: CheckpointResult) -> dict[str, Any]:
    """A row of evaluation_results.csv, and the object that --json prints."""
    c = checkpoint
    row = {
        "rank": c.rank,
        "tied": c.tied,
        "file": c.file,
        "names": " ".join(c.names),
        "step": c.step,
        "tokens": c.tokens,
        "n_params": c.n_params,
        "tokenizer": c.tokenizer,
        "score": c.score,
        "low": c.low,
        "high": c.high,
        "same_as_first": c.same_as_first,
        "val_loss": c.val_loss,
        "bits_per_byte": c.bits_per_byte,
    }
    for name, score in c.categories.items():
        row[f"score_{name}"] = score
    return row


def case_row(checkpoint: CheckpointResult, case: Case, result: CaseResult) -> dict[str, Any]:
    """A row of cases.csv. The log-probabilities are natural logarithms and belong to the target; they are
    empty for a case without one."""
    row = {
        "checkpoint": checkpoint.file,
        "step": checkpoint.step,
        "cases": case.file,
        "id": case.id,
        "category": case.category,
        "weight": case.weight,
        "score": result.score,
    }
    for name in CASE_SCORES:
        row[f"score_{name}"] = result.parts.get(name)
    logprob = result.logprobs[case.right] if result.logprobs else None
    scored = logprob is not None and result.n_tokens > 0
    chosen = None if result.chosen is None else case.choices[result.chosen]
    return row | {
        "logprob": logprob,
        "logprob_per_token": logprob / result.n_tokens if scored else None,
        "logprob_per_byte": logprob / result.n_bytes if scored else None,
        "greedy_match": result.greedy_match,
        "chosen": chosen,
        "prompt": case.prompt,
        "target": case.target,
        "output": result.continuation,
    }


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """The rows, which all have the same keys, under a line of their names."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode("utf-8", "replace"))


def write_results(evaluation: Evaluation, folder: Path) -> None:
    """The tables, the report and the picture; those of an earlier evaluation are replaced."""
    from support.evaluation.report import write_report

    write_csv(folder / "evaluation_results.csv", [checkpoint_row(c) for c in evaluation.checkpoints])
    rows = [
        case_row(checkpoint, case, result)
        for checkpoint in evaluation.checkpoints
        for case, result in zip(evaluation.cases, checkpoint.results, strict=True)
    ]
    if rows:
        write_csv(folder / "cases.csv", rows)
    else:  # ranked by the loss alone
        (folder / "cases.csv").unlink(missing_ok=True)
    write_report(folder / "report.html", evaluation)  # and scores.svg and scores.png
