"""Rank checkpoints by how they answer cases (prompts with what should follow), or by their validation loss.
docs/EVALUATION.md explains the scores.

python3 evaluate_checkpoints.py --checkpoints checkpoints --cases cases/tiny_corpus.yaml
python3 evaluate_checkpoints.py --checkpoints checkpoints --tokenizer gpt2 --cases cases/wiki_basics.yaml
python3 evaluate_checkpoints.py --checkpoints 'runs/*/*.ckpt' --cases cases/ --val --output-dir results/all
python3 evaluate_checkpoints.py --checkpoints checkpoints --val    # by the loss alone
python3 evaluate_checkpoints.py --checkpoints checkpoints --lm-eval lambada_openai --lm-eval-limit 200
"""

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterable
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


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The checked flags of the command line. Raises UserError."""
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
        help="also score the validation text, as eval_val.py does; without --cases it decides the rank",
    )
    parser.add_argument(
        "--config",
        type=file_path,
        metavar="FILE",
        help="with --val: score all on the validation text of this config, instead of each on its own",
    )
    add_harness_flags(parser)
    parser.add_argument(
        "--output-dir",
        type=file_path,
        metavar="DIR",
        help="write evaluation_results.csv, cases.csv, report.html, scores.svg, scores.png and lm_eval.csv "
        "to this folder",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object per checkpoint instead of the table"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=42,
        help="seed for redrawing the cases, which gives the 95%% interval (bootstrap, docs/EVALUATION.md; "
        "default 42); the scores themselves use no random numbers",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or mps")
    args = parser.parse_args(argv)
    if not args.cases and not args.val and not args.lm_eval:
        parser.error("give --cases, --val, --lm-eval, or several of them")
    check_flags(args)
    return args


def add_harness_flags(parser: argparse.ArgumentParser) -> None:
    """The flags for tasks of the EleutherAI harness (lm-eval), a program with thousands of known tests."""
    parser.add_argument(
        "--lm-eval",
        nargs="+",
        metavar="TASK",
        help="tasks of the EleutherAI harness (pip install lm-eval), besides the cases or instead of them",
    )
    parser.add_argument(
        "--lm-eval-tasks",
        type=file_path,
        metavar="DIR",
        help="with --lm-eval: a folder of your own task files; they can name code, which is then run",
    )
    parser.add_argument(
        "--lm-eval-limit",
        type=int,
        metavar="N",
        help="with --lm-eval: only the first N examples of each task",
    )


def check_flags(args: argparse.Namespace) -> None:
    """Raise UserError for flags that do not go together, or have a value out of range."""
    if args.lm_eval and find_spec("lm_eval") is None:
        raise UserError("--lm-eval needs the EleutherAI harness, which is not installed; pip install lm-eval")
    if args.config and not args.val:
        raise UserError("--config names the validation text, so it goes with --val")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed {args.seed} must be at least 0 and below 2**63")
    if not args.lm_eval and (args.lm_eval_tasks or args.lm_eval_limit is not None):
        raise UserError("--lm-eval-tasks and --lm-eval-limit go with --lm-eval TASK")
    if args.lm_eval_limit is not None and args.lm_eval_limit < 1:
        raise UserError(f"--lm-eval-limit {args.lm_eval_limit} must be at least 1")


if __name__ == "__main__":
    guarded(parse_args)  # --help and wrong flags are answered before the slow imports below
    from evaluate_checkpoints import main

    sys.exit(guarded(main))

from model import GPTMini
from support.checkpoint import load_model, saved_template
from support.config.schema import Config
from support.device import resolve_device, resolve_precision
from support.evaluation.case_files import Case, read_cases
from support.evaluation.lm_eval_adapter import find_tasks, run_tasks
from support.evaluation.ranking import chance_of, rank
from support.evaluation.result_files import checkpoint_row, write_csv, write_results
from support.evaluation.results import CheckpointResult, Evaluation
from support.evaluation.score_model import score_cases
from support.evaluation.validation import Validation, documents_of, scoring_config, validate
from support.find_checkpoints import find_checkpoints, other_names
from support.run.folder import run_record
from support.text.hub import HubError
from tokenizer import Tokenizer

CATEGORIES_IN_TABLE = 10  # if there are more, only the files of --output-dir show them

# ---- on cases and on the validation text ---------------------------------------------------------


def evaluate(args: argparse.Namespace, paths: list[Path], device: str) -> Evaluation:
    """Score every checkpoint on the cases, and with --val on the validation text, then rank them. Raises
    UserError."""
    cases = read_cases(args.cases) if args.cases else []
    texts_read: dict[str, Any] = {}  # see `validate_checkpoint`
    checkpoints = each_checkpoint(
        progress(paths, "checkpoints"),
        n_paths=len(paths),
        job=lambda path: evaluate_checkpoint(path, cases, args.val, args.config, device, texts_read),
    )
    warn_of_tokenizers(checkpoints, args.tokenizer)
    return Evaluation(
        cases=cases,
        checkpoints=rank(checkpoints, cases, args.seed),
        chance=chance_of(cases),
        seed=args.seed,
        command=args.command,
        versions=run_record()["versions"],
        date=f"{datetime.now():%Y-%m-%d %H:%M}",
    )


def each_checkpoint(paths: Iterable[Path], n_paths: int, job: Callable[[Path], Any]) -> list[Any]:
    """What `job` returns for each path. A checkpoint for which it raises UserError (one that is damaged, or
    whose context is too short) is left out with a warning. Raises UserError if none remains, or if there is
    only one path. `n_paths` is their number; `paths` may be a progress bar, which has no length."""
    found = []
    for path in paths:
        try:
            found.append(job(path))
        except UserError as error:
            if n_paths == 1:
                raise
            warn(f"{path} is left out: {error}")
    if not found:
        raise UserError("none of the checkpoints could be evaluated")
    return found


def evaluate_checkpoint(
    path: Path,
    cases: list[Case],
    with_val: bool,
    config_path: str | None,
    device: str,
    texts_read: dict[str, Any],
) -> CheckpointResult:
    """One checkpoint's results, not yet ranked. `config_path` is --config: whose validation text to take, or
    None for the checkpoint's own. `texts_read` holds the texts that earlier calls have read.

    Raises UserError if the checkpoint cannot be opened, or if what a case asks for does not fit into its
    context.
    """
    model, tokenizer, metadata = load_model(path, device)
    validation = None
    if with_val:
        config = scoring_config(model, metadata, str(path), config_path)
        validation = validate_checkpoint(model, tokenizer, config, device, texts_read)
    return CheckpointResult(
        file=str(path),
        names=other_names(path),
        run=str(path.parent),
        step=metadata["metrics"]["step"],
        tokens=metadata["metrics"]["tokens"],
        n_params=model.n_params(),
        tokenizer=f"{tokenizer.kind} {tokenizer.vocab_size}",
        results=score_cases(model, tokenizer, cases, saved_template(metadata, path)),
        val_loss=validation.loss if validation else None,
        bits_per_byte=validation.bits_per_byte if validation else None,
    )


def validate_checkpoint(
    model: GPTMini, tokenizer: Tokenizer, config: Config, device: str, texts_read: dict[str, Any]
) -> Validation:
    """How well a model predicts the validation text of `config`, as in eval_val.py. `texts_read` keeps the
    documents of each config, so that checkpoints of one config read them once."""
    key = json.dumps([config.data.model_dump(), config.seed])  # the seed draws which documents are held out
    if key not in texts_read:
        try:
            texts_read[key] = documents_of(config, data=None)
        except HubError as error:
            raise HubError(
                error.why,
                "leave --val out, or score a text on this machine: --val --config config_smoke.yaml",
            ) from None
        if len(texts_read) == 2:  # at the second text, so that the warning comes once
            warn(
                "the checkpoints validate on different texts, so their val_loss does not compare; give them "
                "all one text with --config"
            )
    precision = resolve_precision(config.hardware.precision, device)
    return validate(model, tokenizer, texts_read[key], config, precision=precision)


def warn_of_tokenizers(checkpoints: list[CheckpointResult], asked: str) -> None:
    """Two warnings: a checkpoint has another tokenizer than --tokenizer says; or its tokenizer does not know
    some characters of the cases."""
    for name in sorted({checkpoint.tokenizer for checkpoint in checkpoints}):
        kind, vocab_size = name.split()
        warn_of_other_tokenizer(asked, kind, int(vocab_size))
    one_of_each = {checkpoint.tokenizer: checkpoint for checkpoint in checkpoints}
    for checkpoint in one_of_each.values():  # one for each tokenizer: others would give the same warning
        # The logarithm of probability zero is minus infinity.
        n_impossible = sum(-math.inf in result.logprobs for result in checkpoint.results)
        if n_impossible:
            warn(
                f"{n_impossible} of {len(checkpoint.results)} cases have characters that the tokenizer "
                f"{checkpoint.tokenizer} does not know, so it gives them probability zero"
            )


# ---- on tasks of the harness ---------------------------------------------------------------------


def evaluate_tasks(
    args: argparse.Namespace, paths: list[Path], device: str, index: Any
) -> list[dict[str, Any]]:
    """The rows of lm_eval.csv: for every checkpoint, a row for each metric of each task of --lm-eval.
    `index` comes from `find_tasks`. Raises UserError."""

    def task_rows(path: Path) -> list[dict[str, Any]]:
        model, tokenizer, metadata = load_model(path, device)
        about = {"file": str(path), "names": " ".join(other_names(path)), "step": metadata["metrics"]["step"]}
        rows = run_tasks(model, tokenizer, args.lm_eval, index, args.lm_eval_limit)
        return [about | row for row in rows]

    rows_by_checkpoint = each_checkpoint(paths, n_paths=len(paths), job=task_rows)
    return [row for rows in rows_by_checkpoint for row in rows]


# ---- what is printed -----------------------------------------------------------------------------


def rank_label(checkpoint: CheckpointResult) -> str:
    """The rank, and what to know about it: `2`; `2=` if others share the rank; `2~` if the cases cannot tell
    the checkpoint from the first; `2=~` if both are so."""
    label = str(checkpoint.rank)
    if checkpoint.tied:
        label += "="
    if checkpoint.same_as_first and checkpoint.rank > 1:
        label += "~"
    return label


def file_label(file: str, names: str) -> str:
    """The file with its other names: `runs/a/step-00000100.ckpt (best last)`."""
    label = printable(file)
    if names:
        label += f" ({names})"
    return label


def new_table(columns: Iterable[str]) -> Any:
    """An empty table with these columns. File names are aligned left, numbers right; no cell is shortened."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in columns:
        side = "left" if name == "file" else "right"
        table.add_column(printable(name), justify=side, no_wrap=True, overflow="ignore")
    return table


def print_table(evaluation: Evaluation) -> None:
    """Print the ranked checkpoints, one a line; under them what guessing would score in each category, and
    what the marks in the column of ranks mean. Columns that would be empty are left out."""
    checkpoints = evaluation.checkpoints
    chance = evaluation.chance  # {category: the score of guessing; None where nothing can be guessed}
    categories = list(chance) if len(chance) <= CATEGORIES_IN_TABLE else []
    score_columns = ["score", "95% interval"] if evaluation.cases else []
    loss_columns = ["val loss", "bits/byte"] if checkpoints[0].val_loss is not None else []
    table = new_table(["rank", "file", "step", *score_columns, *loss_columns, *categories])
    for c in checkpoints:
        cells = [rank_label(c), file_label(c.file, " ".join(c.names)), str(c.step)]
        if score_columns:
            cells += [f"{c.score:.4f}", f"{c.low:.3f} to {c.high:.3f}"]
        if loss_columns:
            cells += [f"{c.val_loss:.4f}", f"{c.bits_per_byte:.4f}"]
        table.add_row(*cells, *[f"{c.categories[name]:.3f}" for name in categories])
    if any(chance[name] is not None for name in categories):
        empty = [""] * (1 + len(score_columns) + len(loss_columns))
        levels = ["" if chance[name] is None else f"{chance[name]:.3f}" for name in categories]
        table.add_row("", "guessing", *empty, *levels, style="dim")
    print_wide(table)
    if any(c.tied for c in checkpoints):
        print("= the same score" if evaluation.cases else "= the same loss")
    if any(c.same_as_first and c.rank > 1 for c in checkpoints):
        print(f"~ these {len(evaluation.cases)} cases cannot tell it from the first (paired bootstrap, 95%)")
    if len(categories) < len(chance):
        print(f"{len(chance)} categories are too many for this table; --output-dir writes them to files")


def print_tasks(rows: list[dict[str, Any]]) -> None:
    """Print the rows of `evaluate_tasks` as a table: a line for each checkpoint, a column for each metric. A
    cell is the value, with its standard error after ± if the harness gives one."""
    cells: dict[str, dict[str, str]] = {}  # by checkpoint, then by column
    for row in rows:
        # The filter is how the harness takes the answer out of what a model writes; "none" is its default.
        column = " ".join([row["task"], row["metric"], row["filter"]]).removesuffix(" none")
        error = "" if row["stderr"] is None else f" ±{row['stderr']:.4f}"
        file = file_label(row["file"], row["names"])
        if file not in cells:
            cells[file] = {"step": str(row["step"])}
        cells[file][column] = f"{row['value']:.4f}{error}"
    # The columns of all checkpoints, each once, in the order in which they come: a dict keeps it.
    names = list(dict.fromkeys(name for values in cells.values() for name in values))
    table = new_table(["file", *names])
    for file, values in cells.items():
        table.add_row(file, *[values.get(name, "") for name in names])
    print_wide(table)


def print_json(rows: Iterable[dict[str, Any]]) -> None:
    """Print each row as a JSON object on a line of its own."""
    for row in rows:
        print(json.dumps(row))


# ---- the order of work ---------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """The whole script as one call. Returns the exit status; raises UserError."""
    args = parse_args(argv)
    words = sys.argv[1:] if argv is None else argv
    # The report shows how it was made.
    args.command = shlex.join(["python3", "evaluate_checkpoints.py", *words])
    paths = find_checkpoints(args.checkpoints)
    device = resolve_device(args.device)
    index = find_tasks(args.lm_eval, args.lm_eval_tasks) if args.lm_eval else None
    if args.output_dir:  # before the work, so that a bad name costs nothing
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    if args.cases or args.val:
        evaluation = evaluate(args, paths, device)
        if args.json:
            print_json(checkpoint_row(c) for c in evaluation.checkpoints)
        else:
            print_table(evaluation)
        if args.output_dir:
            write_results(evaluation, Path(args.output_dir))
            print(f"report: {args.output_dir}/report.html", file=sys.stderr if args.json else sys.stdout)
    if args.lm_eval:
        rows = evaluate_tasks(args, paths, device, index)
        if args.json:
            print_json(rows)
        else:
            print_tasks(rows)
        if args.output_dir:
            write_csv(Path(args.output_dir) / "lm_eval.csv", rows)
    return 0
