"""A checkpoint under the EleutherAI harness, https://github.com/EleutherAI/lm-evaluation-harness: its tasks,
our likelihoods.

The package lm_eval is optional and takes seconds to import, so functions import it, and nothing else here
needs it.
"""

import contextlib
import difflib
import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model import GPTMini
from support.evaluation.likelihoods import continuations, log_likelihoods
from support.messages import UserError
from tokenizer import Tokenizer

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

MAX_GEN_TOKS = 256  # the harness's own default, where a task names none
BOOTSTRAP = 1000  # resamples for the error of a perplexity; those of means have a formula. The harness's 100,000 take minutes


def adapter(model: GPTMini, tokenizer: Tokenizer) -> "LM":
    """The model as the harness calls it.

    How a text is cut into context and continuation is left to the harness (`TemplateLM.loglikelihood`): it
    encodes both together. Texts begin with BOS where the tokenizer has one, and an empty context is BOS, else
    EOS. So the numbers are those that the harness gives for the same model by transformers, and compare with
    those of other models.
    """
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class Adapter(TemplateLM):
        eot_token_id = tokenizer.eos_id
        prefix_token_id = [*tokenizer.bos_ids, tokenizer.eos_id][0]

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options) -> list[int]:
            return (
                tokenizer.encode(string) if add_special_tokens is False else tokenizer.encode_prompt(string)
            )

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            """Apart where together they end in one token, which would leave no continuation to score."""
            pair = super()._encode_pair(context, continuation)
            return (
                pair if pair[1] else (tokenizer.encode_prompt(context), tokenizer.encode_inside(continuation))
            )

        def _loglikelihood_tokens(
            self, requests: list[tuple[Any, list[int], list[int]]], **options
        ) -> list[tuple[float, bool]]:
            return log_likelihoods(model, [(context, following) for _, context, following in requests])

        def loglikelihood_rolling(self, requests: list[Any], **options) -> list[float]:
            """Of whole texts, each read from an EOS (or BOS) on, in windows in which every token is
            predicted once: BOS, too, where the tokenizer has one, as the harness does it for other models."""
            window, totals = model.config.max_seq_len, []
            for request in requests:
                windows = get_rolling_token_windows(
                    tokenizer.encode_prompt(request.args[0]), self.prefix_token_id, window, context_len=1
                )
                found = log_likelihoods(model, [make_disjoint_window(pair) for pair in windows])
                totals.append(sum(value for value, _ in found))
            return totals

        def generate_until(self, requests: list[Any], **options) -> list[str]:
            """The likeliest continuations, each up to the first of the texts that its task gives as `until`."""
            prompts, wishes = zip(*(request.args for request in requests), strict=True)
            if any(wish.get("do_sample") and wish.get("temperature", 1) > 0 for wish in wishes):
                raise UserError(
                    "a task of --lm-eval wants sampled text (do_sample: true), and ours is greedy; take "
                    "another task"
                )
            ids = [tokenizer.encode_prompt(prompt) or [tokenizer.eos_id] for prompt in prompts]
            texts = continuations(
                model, tokenizer, ids, [wish.get("max_gen_toks", MAX_GEN_TOKS) for wish in wishes]
            )
            return [
                until_first(text, wish.get("until") or []) for text, wish in zip(texts, wishes, strict=True)
            ]

    return Adapter()


def until_first(text: str, ends: str | list[str]) -> str:
    """`text` up to where the first of `ends` stands in it."""
    for end in [ends] if isinstance(ends, str) else ends:
        text = text.split(end)[0] if end else text
    return text


def find_tasks(names: list[str], folder: str | None) -> "TaskManager":
    """The harness's index of tasks, in which all of `names` were found and could be loaded with their data.
    Raises UserError.

    Its own 14,000 tasks take 6 seconds to index, so they are left out where `folder` has all that is asked
    for.
    """
    from lm_eval.tasks import TaskManager

    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"--lm-eval-tasks {folder} is no folder; give one with task files (.yaml)")
    with muffled():
        manager = TaskManager(include_path=folder, include_defaults=False)
        if not set(names) <= set(manager.all_subtasks):
            manager = TaskManager(include_path=folder)
    for name in names:
        if name not in manager.task_index:
            near = ", ".join(difflib.get_close_matches(name, manager.all_tasks, n=3))
            instead = f"did you mean {near}?" if near else "lm-eval ls tasks lists them"
            raise UserError(f"--lm-eval {name}: the harness has no such task; {instead}")
        try:
            with muffled():
                tasks = manager.load([name])["tasks"].values()
        except Exception as error:  # whatever the task's own code and its data raise
            reason = (str(error).splitlines() or [""])[0]
            raise UserError(
                f"--lm-eval {name}: {type(error).__name__}: {reason}; its data must be on this machine, or "
                "a network in reach"
            ) from error
        if any(getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False) for task in tasks):
            raise UserError(
                f"--lm-eval {name} shows pictures, or runs code that the model writes, and we do neither; "
                "take another task"
            )
    return manager


def run_tasks(
    model: GPTMini, tokenizer: Tokenizer, names: list[str], manager: "TaskManager", limit: int | None
) -> list[dict[str, Any]]:
    """One row for each task's (and group's) metric. Seeds are the harness's own, so that few-shot examples
    are those of others."""
    from lm_eval import simple_evaluate

    with muffled():
        found = simple_evaluate(
            adapter(model, tokenizer),
            tasks=names,
            task_manager=manager,
            limit=limit,
            bootstrap_iters=BOOTSTRAP,
            log_samples=False,
        )
    rows = []
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")  # as in "acc,none" and "acc_stderr,none"
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            row = {
                "task": task,
                "metric": metric,
                "filter": kind,
                "value": float(value),
                "stderr": error if isinstance(error, float) else None,
            }
            rows.append(
                row
                | {
                    "higher_is_better": found["higher_is_better"].get(task, {}).get(metric),
                    "n": values.get("sample_len"),
                }
            )
    return rows


@contextlib.contextmanager
def muffled() -> Iterator[None]:
    """On a terminal the harness's bars are seen; elsewhere nothing. What it prints never reaches our
    standard output."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    stderr = sys.stderr if sys.stderr.isatty() else io.StringIO()
    with contextlib.redirect_stdout(stderr), contextlib.redirect_stderr(stderr):
        yield
