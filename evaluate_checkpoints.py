"""Rank checkpoints by how they answer cases (prompts with what should follow), or by their validation loss.
docs/EVALUATION.md explains the scores.

python3 evaluate_checkpoints.py --checkpoints checkpoints --cases cases/tiny_corpus.yaml
python3 evaluate_checkpoints.py --checkpoints 'checkpoints/*.ckpt' --tokenizer gpt2 --cases cases/wiki_basics.yaml
python3 evaluate_checkpoints.py --checkpoints 'runs/*/*.ckpt' --cases cases/ --val --output-dir results/baseline
python3 evaluate_checkpoints.py --checkpoints checkpoints --val --output-dir results/losses    # by the loss alone
python3 evaluate_checkpoints.py --checkpoints checkpoints/best.ckpt --lm-eval lambada_openai --lm-eval-limit 200    # pip install lm-eval
"""

import argparse
import csv
import io
import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from support.cli import (
    add_tokenizer_flag,
    file_path,
    guarded,
    make_parser,
    print_wide,
    progress,
    warn_of_other_tokenizer,
)
from support.messages import UserError, printable, warn


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--checkpoints",
        nargs="+",
        required=True,
        type=file_path,
        metavar="PATH",
        help="files, folders (searched at any depth) or quoted globs",
    )
    parser.add_argument(
        "--cases", nargs="+", type=file_path, metavar="PATH", help="case files, or folders of them"
    )
    add_tokenizer_flag(parser)
    parser.add_argument(
        "--val",
        action="store_true",
        help="also the loss on the validation text, as by eval_val.py; without --cases it decides the rank",
    )
    parser.add_argument(
        "--config",
        type=file_path,
        metavar="FILE",
        help="with --val: the validation text of this config for all, instead of each one's own",
    )
    parser.add_argument(
        "--lm-eval",
        nargs="+",
        metavar="TASK",
        help="tasks of the EleutherAI harness, beside the cases or instead of them",
    )
    parser.add_argument(
        "--lm-eval-tasks",
        type=file_path,
        metavar="DIR",
        help="with --lm-eval: a folder of task files of your own; they can name code, which is run",
    )
    parser.add_argument(
        "--lm-eval-limit",
        type=int,
        metavar="N",
        help="with --lm-eval: only the first N examples of each task",
    )
    parser.add_argument(
        "--output-dir",
        type=file_path,
        metavar="DIR",
        help="write evaluation_results.csv, cases.csv, report.html, scores.svg, scores.png and lm_eval.csv "
        "there",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object a checkpoint instead of the table"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=42,
        help="seed of the bootstrap (default 42); the scores themselves draw nothing",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or mps")
    args = parser.parse_args(argv)
    if not args.cases and not args.val and not args.lm_eval:
        parser.error("give --cases, --val, --lm-eval, or several of them")
    if args.lm_eval and find_spec("lm_eval") is None:
        raise UserError("--lm-eval needs the EleutherAI harness, which is not installed; pip install lm-eval")
    return args


if __name__ == "__main__":
    guarded(parse_args, sys.argv[1:])  # --help and wrong flags answer before torch is imported

import numpy as np

from model import GPTMini
from support.checkpoint import load_model, saved_template
from support.config.schema import Config
from support.device import resolve_device, resolve_precision
from support.evaluation.case_files import Case, read_cases
from support.evaluation.likelihoods import continuations, encode, log_likelihoods
from support.evaluation.lm_eval_adapter import find_tasks, run_tasks
from support.evaluation.results import CaseResult, CheckpointResult, Evaluation
from support.evaluation.validation import Validation, documents_of, scoring_config, validate
from support.files.atomic import atomic_write
from support.find_checkpoints import find_checkpoints, other_names
from support.run.folder import run_record
from support.text.chat_template import DEFAULT_TEMPLATE, TEMPLATES, Template, first_prompt_parts
from support.text.hub import HubError
from tokenizer import Tokenizer

RESAMPLES = 2000  # of the bootstrap
COLUMNS = 10  # categories that the terminal's table shows; beyond, they are in the files of --output-dir

# ---- one model on all cases ----------------------------------------------------------------------


def options_of(case: Case) -> list[str]:
    """The texts whose likelihood counts."""
    return case.choices or ([case.target] if case.target is not None else [])


def case_ids(
    case: Case, tokenizer: Tokenizer, layout: Template
) -> tuple[list[int] | None, list[list[int] | None]]:
    """(ids of the prompt, ids of each option after it); None for a text that the tokenizer has no
    characters for."""
    parts: list[str | int] = [case.prompt]
    try:
        if case.instruction:
            parts = first_prompt_parts(layout, tokenizer, case.prompt, case.input)
            prompt = tokenizer.encode_parts(parts)
        else:
            prompt = (
                tokenizer.encode_prompt(case.prompt)
                if case.prompt
                else [*tokenizer.bos_ids] or [tokenizer.eos_id]
            )
    except UserError:
        return None, [encode(tokenizer, option) for option in options_of(case)]
    return prompt, [encode(tokenizer, option, after=parts) for option in options_of(case)]


def score_cases(
    model: GPTMini, tokenizer: Tokenizer, cases: list[Case], template: Template | None = None
) -> list[CaseResult]:
    """Every case's result, all of them in a few batches. A prompt starts where a text starts only if it is
    empty: behind an EOS. An instruction is laid out by `template`; for a model that has none, by the one
    named chat. A text the tokenizer has no characters for has probability zero."""
    layout = template or TEMPLATES[DEFAULT_TEMPLATE]
    encoded = [case_ids(case, tokenizer, layout) for case in cases]
    prompts, followings = [prompt for prompt, _ in encoded], [options for _, options in encoded]
    readable = [
        (n, k)
        for n, ids in enumerate(followings)
        for k, option in enumerate(ids)
        if option is not None and prompts[n] is not None
    ]
    found = dict(
        zip(
            readable,
            log_likelihoods(model, [(prompts[n], followings[n][k]) for n, k in readable]),
            strict=True,
        )
    )
    written = [n for n, case in enumerate(cases) if case.continued and prompts[n] is not None]
    texts = continuations(
        model, tokenizer, [prompts[n] for n in written], [cases[n].max_new_tokens for n in written]
    )
    text_of = dict(zip(written, texts, strict=True))
    return [
        judge(
            case,
            [found.get((n, k), (-math.inf, False)) for k in range(len(followings[n]))],
            followings[n],
            text_of.get(n),
        )
        for n, case in enumerate(cases)
    ]


def judge(
    case: Case, likelihoods: list[tuple[float, bool]], ids: list[list[int] | None], text: str | None
) -> CaseResult:
    """The score of one case, from 0 to 1: the mean of its parts.

    choices: 1 if the target is the likeliest of them, of several equally likely ones its share. target alone:
    its probability per byte, exp(log-probability / bytes), which compares across tokenizers. contains, regex:
    1 or 0.
    """
    logprobs, parts, right, chosen = [value for value, _ in likelihoods], {}, case.right, None
    if case.choices:
        best = max(logprobs)
        if best > -math.inf:
            chosen = logprobs.index(best)
        parts["choices"] = 1 / logprobs.count(best) if logprobs[right] == best > -math.inf else 0.0
    elif case.target is not None:
        parts["target"] = math.exp(logprobs[0] / len(case.target.encode()))
    if case.contains:
        parts["contains"] = float(all(piece in (text or "") for piece in case.contains))
    if case.regex is not None:
        parts["regex"] = float(text is not None and re.search(case.regex, text) is not None)
    return CaseResult(
        score=sum(parts.values()) / len(parts),
        parts=parts,
        continuation=text,
        logprobs=logprobs,
        n_tokens=len(ids[right] or []) if ids else 0,
        n_bytes=len(case.target.encode()) if case.target is not None else 0,
        greedy_match=likelihoods[right][1] if likelihoods else None,
        chosen=chosen,
    )


def evaluate_checkpoint(
    path: Path, cases: list[Case], args: argparse.Namespace, device: str, texts: dict[str, list]
) -> CheckpointResult:
    """One checkpoint's results. Raises UserError if it cannot be opened or is too small for a case."""
    model, tokenizer, metadata = load_model(path, device)
    metrics, found = metadata["metrics"], None
    if args.val:
        found = validation(
            model, tokenizer, scoring_config(model, metadata, str(path), args.config), device, texts
        )
    return CheckpointResult(
        file=str(path),
        names=other_names(path),
        run=str(path.parent),
        step=metrics["step"],
        tokens=metrics["tokens"],
        n_params=model.n_params(),
        tokenizer=f"{tokenizer.kind} {tokenizer.vocab_size}",
        results=score_cases(model, tokenizer, cases, saved_template(metadata, path)),
        val_loss=found.loss if found else None,
        bits_per_byte=found.bits_per_byte if found else None,
    )


def validation(
    model: GPTMini, tokenizer: Tokenizer, config: Config, device: str, texts: dict[str, list]
) -> Validation:
    """As by eval_val.py; `texts` keeps the documents, so that checkpoints of one config read them once."""
    key = json.dumps([config.data.model_dump(), config.seed])
    if key not in texts:
        try:
            texts[key] = documents_of(config, None)
        except HubError as error:
            raise HubError(
                error.why,
                "leave --val out, or score a text on this machine: --val --config config_smoke.yaml",
            ) from None
        if len(texts) == 2:
            warn(
                "the checkpoints validate on different texts, so their val_loss does not compare; give one "
                "text to all by --config"
            )
    return validate(
        model, tokenizer, texts[key], config, precision=resolve_precision(config.hardware.precision, device)
    )


# ---- all of them, ranked -------------------------------------------------------------------------


def rank(checkpoints: list[CheckpointResult], cases: list[Case], seed: int) -> list[CheckpointResult]:
    """With scores, 95% intervals and ranks, the best first; without cases, with ranks alone.

    The bootstrap (Efron, 1979) draws as many cases again, with replacement, RESAMPLES times: how much would
    the score vary with other cases of this kind? All checkpoints see the same draws, so differences are
    paired: one that beats the first in more than 2.5% of them cannot be told from it.
    """
    if not cases:
        return rank_by_loss(checkpoints)
    weights = np.array([case.weight for case in cases])  # (cases,)
    scores = np.array(
        [[result.score for result in checkpoint.results] for checkpoint in checkpoints]
    )  # (checkpoints, cases)
    draws = (
        np.random.default_rng(seed).multinomial(len(cases), np.full(len(cases), 1 / len(cases)), RESAMPLES)
        * weights
    )  # (draws, cases)
    drawn = draws @ scores.T / draws.sum(axis=1, keepdims=True)  # (draws, checkpoints)
    means = np.round(scores @ weights / weights.sum(), 6)
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    behind = np.percentile(drawn[:, [means.argmax()]] - drawn, 2.5, axis=0)
    ranked, categories = [], categories_of(cases)
    for i, checkpoint in enumerate(checkpoints):
        place = {
            "rank": 1 + int((means > means[i]).sum()),
            "tied": int((means == means[i]).sum()) > 1,
            "same_as_first": bool(behind[i] <= 0),
        }
        by_category = {
            name: float(np.average(scores[i][where], weights=weights[where]))
            for name, where in categories.items()
        }
        ranked.append(
            replace(
                checkpoint,
                score=float(means[i]),
                low=float(low[i]),
                high=float(high[i]),
                categories=by_category,
                **place,
            )
        )
    return sorted(ranked, key=lambda c: (c.rank, c.file))


def rank_by_loss(checkpoints: list[CheckpointResult]) -> list[CheckpointResult]:
    """With ranks, the lowest loss first. It is taken in bits per byte, so that models of different
    tokenizers compare."""
    bits = [round(c.bits_per_byte, 6) if math.isfinite(c.bits_per_byte) else math.inf for c in checkpoints]
    ranked = [
        replace(c, rank=1 + sum(other < own for other in bits), tied=bits.count(own) > 1)
        for c, own in zip(checkpoints, bits, strict=True)
    ]
    return sorted(ranked, key=lambda c: (c.rank, c.file))


def categories_of(cases: list[Case]) -> dict[str, list[int]]:
    """Which cases belong to each category."""
    return {
        name: [n for n, case in enumerate(cases) if case.category == name]
        for name in dict.fromkeys(case.category for case in cases)
    }


def chance_of(cases: list[Case]) -> dict[str, float | None]:
    """For each category what guessing wins, where it has choices at all: 1 of 4 choices is 0.25, a target
    alone nothing."""
    levels = {}
    for name, where in categories_of(cases).items():
        guessed = [(1 / len(cases[n].choices) if cases[n].choices else 0.0) for n in where]
        levels[name] = (
            float(np.average(guessed, weights=[cases[n].weight for n in where])) if any(guessed) else None
        )
    return levels


def each_checkpoint(paths: Iterable[Path], n: int, score: Callable[[Path], Any]) -> list[Any]:
    """What `score` finds for each of the `n` paths. One that is damaged or too small is left out with a
    warning. Raises UserError if none remains."""
    found = []
    for path in paths:
        try:
            found.append(score(path))
        except UserError as error:
            if n == 1:
                raise
            warn(f"{path} is left out: {error}")
    if not found:
        raise UserError("none of the checkpoints could be evaluated")
    return found


def evaluate(args: argparse.Namespace, paths: list[Path], device: str) -> Evaluation:
    """Score every checkpoint on the cases, and with --val on the validation text. Raises UserError."""
    cases = read_cases(args.cases) if args.cases else []
    texts: dict[str, list] = {}
    checkpoints = each_checkpoint(
        progress(paths, "checkpoints"),
        len(paths),
        lambda path: evaluate_checkpoint(path, cases, args, device, texts),
    )
    for name in sorted({checkpoint.tokenizer for checkpoint in checkpoints}):
        kind, vocab_size = name.split()
        warn_of_other_tokenizer(args.tokenizer, kind, int(vocab_size))
    for name, n in {
        c.tokenizer: sum(-math.inf in result.logprobs for result in c.results) for c in checkpoints
    }.items():
        if n:
            warn(
                f"{n} of {len(cases)} cases have characters that the tokenizer {name} does not know; to it "
                "they are impossible"
            )
    return Evaluation(
        cases=cases,
        checkpoints=rank(checkpoints, cases, args.seed),
        chance=chance_of(cases),
        seed=args.seed,
        command=args.command,
        versions=run_record()["versions"],
        date=f"{datetime.now():%Y-%m-%d %H:%M}",
    )


def evaluate_tasks(
    args: argparse.Namespace, paths: list[Path], device: str, index: Any
) -> list[dict[str, Any]]:
    """Rows of lm_eval.csv: every checkpoint on the tasks of --lm-eval, which `find_tasks` found in
    `index`. Raises UserError."""

    def score(path: Path) -> list[dict[str, Any]]:
        model, tokenizer, metadata = load_model(path, device)
        of_checkpoint = {
            "file": str(path),
            "names": " ".join(other_names(path)),
            "step": metadata["metrics"]["step"],
        }
        return [
            of_checkpoint | row
            for row in run_tasks(model, tokenizer, args.lm_eval, index, args.lm_eval_limit)
        ]

    return [row for rows in each_checkpoint(paths, len(paths), score) for row in rows]


# ---- what is shown and written -------------------------------------------------------------------


def place(checkpoint: CheckpointResult) -> str:
    """`2`, `2=` where others share the rank, `2~` where the cases cannot tell it from the first."""
    return (
        f"{checkpoint.rank}"
        + "=" * checkpoint.tied
        + "~" * bool(checkpoint.same_as_first and checkpoint.rank > 1)
    )


def print_table(evaluation: Evaluation) -> None:
    from rich.table import Table

    n, with_val = len(evaluation.cases), evaluation.checkpoints[0].val_loss is not None
    names = list(evaluation.chance) if len(evaluation.chance) <= COLUMNS else []
    table = Table(box=None, header_style="bold", pad_edge=False)
    scored, validated = ["score", "95% interval"] if n else [], ["val loss", "bits/byte"] if with_val else []
    for name in ("rank", "file", "step", *scored, *validated, *names):
        table.add_column(
            printable(name), justify="left" if name == "file" else "right", no_wrap=True, overflow="ignore"
        )
    for c in evaluation.checkpoints:
        file = printable(c.file) + (f" ({' '.join(c.names)})" if c.names else "")
        losses = [f"{c.val_loss:.4f}", f"{c.bits_per_byte:.4f}"] if with_val else []
        score = [f"{c.score:.4f}", f"{c.low:.3f} to {c.high:.3f}"] if n else []
        table.add_row(
            place(c), file, str(c.step), *score, *losses, *[f"{c.categories[name]:.3f}" for name in names]
        )
    if any(evaluation.chance[name] is not None for name in names):
        levels = [
            "" if evaluation.chance[name] is None else f"{evaluation.chance[name]:.3f}" for name in names
        ]
        table.add_row("", "guessing", "", "", "", *[""] * (2 * with_val), *levels, style="dim")
    print_wide(table)
    if any(c.tied for c in evaluation.checkpoints):
        print("= the same score" if n else "= the same loss")
    if any(c.same_as_first and c.rank > 1 for c in evaluation.checkpoints):
        print(f"~ these {n} cases cannot tell it from the first (paired bootstrap, 95%)")
    if len(names) < len(evaluation.chance):
        print(
            f"{len(evaluation.chance)} categories are too many for this table; --output-dir writes them to "
            "files"
        )


def print_tasks(rows: list[dict[str, Any]]) -> None:
    """A line for each checkpoint, a column for each metric."""
    from rich.table import Table

    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        file = printable(row["file"]) + (f" ({row['names']})" if row["names"] else "")
        column = " ".join([row["task"], row["metric"], row["filter"]]).removesuffix(" none")
        error = "" if row["stderr"] is None else f" ±{row['stderr']:.4f}"
        cells.setdefault(file, {"step": str(row["step"])})[column] = f"{row['value']:.4f}{error}"
    names = list(dict.fromkeys(name for columns in cells.values() for name in columns))
    table = Table("file", box=None, header_style="bold", pad_edge=False)
    for name in names:
        table.add_column(printable(name), justify="right", no_wrap=True)
    for file, columns in cells.items():
        table.add_row(file, *[columns.get(name, "") for name in names])
    print_wide(table)


def checkpoint_row(c: CheckpointResult) -> dict[str, Any]:
    """A row of evaluation_results.csv, and the object of --json."""
    row = {name: getattr(c, name) for name in ("rank", "tied", "file")} | {"names": " ".join(c.names)}
    row |= {
        name: getattr(c, name)
        for name in ("step", "tokens", "n_params", "tokenizer", "score", "low", "high", "same_as_first")
    }
    return (
        row
        | {"val_loss": c.val_loss, "bits_per_byte": c.bits_per_byte}
        | {f"score_{name}": value for name, value in c.categories.items()}
    )


def case_row(c: CheckpointResult, case: Case, result: CaseResult) -> dict[str, Any]:
    """A row of cases.csv. Log-probabilities are natural logarithms, those of the target; without one they
    stay empty."""
    row = {
        "checkpoint": c.file,
        "step": c.step,
        "cases": case.file,
        "id": case.id,
        "category": case.category,
        "weight": case.weight,
    }
    row |= {"score": result.score} | {
        f"score_{part}": result.parts.get(part) for part in ("choices", "target", "contains", "regex")
    }
    logprob = result.logprobs[case.right] if result.logprobs else None
    row |= {"logprob": logprob, "logprob_per_token": None, "logprob_per_byte": None}
    if logprob is not None and result.n_tokens:
        row |= {"logprob_per_token": logprob / result.n_tokens, "logprob_per_byte": logprob / result.n_bytes}
    chosen = case.choices[result.chosen] if case.choices and result.chosen is not None else None
    return row | {
        "greedy_match": result.greedy_match,
        "chosen": chosen,
        "prompt": case.prompt,
        "target": case.target,
        "output": result.continuation,
    }


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode("utf-8", "replace"))


def write_results(evaluation: Evaluation, folder: Path) -> None:
    """The tables, the report and the picture; what an earlier evaluation left there is replaced."""
    from support.evaluation.report import write_report

    write_csv(folder / "evaluation_results.csv", [checkpoint_row(c) for c in evaluation.checkpoints])
    pairs = [
        (c, case, result)
        for c in evaluation.checkpoints
        for case, result in zip(evaluation.cases, c.results, strict=True)
    ]
    if pairs:
        write_csv(folder / "cases.csv", [case_row(*pair) for pair in pairs])
    else:  # ranked by the loss alone
        (folder / "cases.csv").unlink(missing_ok=True)
    write_report(folder / "report.html", evaluation)  # with scores.svg and scores.png beside it


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    args.command = shlex.join(
        ["python3", "evaluate_checkpoints.py", *(sys.argv[1:] if argv is None else argv)]
    )
    if args.config and not args.val:
        raise UserError("--config names the validation text, so it goes with --val")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed {args.seed} must be at least 0 and below 2**63")
    if not args.lm_eval and (args.lm_eval_tasks or args.lm_eval_limit is not None):
        raise UserError("--lm-eval-tasks and --lm-eval-limit go with --lm-eval TASK")
    if args.lm_eval_limit is not None and args.lm_eval_limit < 1:
        raise UserError(f"--lm-eval-limit {args.lm_eval_limit} must be at least 1")
    paths, device = find_checkpoints(args.checkpoints), resolve_device(args.device)
    index = find_tasks(args.lm_eval, args.lm_eval_tasks) if args.lm_eval else None
    if args.output_dir:  # before the work, so that a bad name costs nothing
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    if args.cases or args.val:
        evaluation = evaluate(args, paths, device)
        if args.json:
            for c in evaluation.checkpoints:
                print(json.dumps(checkpoint_row(c)))
        else:
            print_table(evaluation)
        if args.output_dir:
            write_results(evaluation, Path(args.output_dir))
            print(f"report: {args.output_dir}/report.html", file=sys.stderr if args.json else sys.stdout)
    if args.lm_eval:
        rows = evaluate_tasks(args, paths, device, index)
        if args.json:
            for row in rows:
                print(json.dumps(row))
        else:
            print_tasks(rows)
        if args.output_dir:
            write_csv(Path(args.output_dir) / "lm_eval.csv", rows)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
