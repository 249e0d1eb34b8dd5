"""Runs a checkpoint in the EleutherAI harness, https://github.com/EleutherAI/lm-evaluation-harness: its
tasks, our likelihoods.

The package lm_eval is optional and takes seconds to import, so functions import it, and no other file does.
"""

import contextlib
import difflib
import io
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model import GPTMini
from support.evaluation.likelihoods import continuations, log_likelihoods
from support.messages import UserError
from tokenizer import Tokenizer

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

MAX_GEN_TOKS = 256  # the harness's own default for a task that sets none
# For the error of a perplexity; means have a formula. The harness's own 100,000 take minutes.
BOOTSTRAP_RESAMPLES = 1000


def adapter(model: GPTMini, tokenizer: Tokenizer) -> "LM":
    """The model with the methods that the harness calls.

    The harness itself cuts a text into context and continuation (`TemplateLM.loglikelihood`): it encodes both
    together. Texts begin with BOS if the tokenizer has one, and an empty context is BOS, else EOS. So the
    numbers are those the harness gives for the same model in transformers, and compare with other models.
    """
    from lm_eval.api.model import TemplateLM

    class Adapter(TemplateLM):
        eot_token_id = tokenizer.eos_id
        prefix_token_id = [*tokenizer.bos_ids, tokenizer.eos_id][0]

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options) -> list[int]:
            if add_special_tokens is False:
                return tokenizer.encode(string)
            return tokenizer.encode_prompt(string)

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            """Encoded apart if together they become one token, which would leave nothing to score."""
            pair = super()._encode_pair(context, continuation)
            if pair[1]:
                return pair
            return tokenizer.encode_prompt(context), tokenizer.encode_inside(continuation)

        def _loglikelihood_tokens(
            self, requests: list[tuple[Any, list[int], list[int]]], **options
        ) -> list[tuple[float, bool]]:
            return log_likelihoods(model, [(context, following) for _, context, following in requests])

        def loglikelihood_rolling(self, requests: list[Any], **options) -> list[float]:
            texts = [request.args[0] for request in requests]
            return [text_log_likelihood(model, tokenizer, text, self.prefix_token_id) for text in texts]

        def generate_until(self, requests: list[Any], **options) -> list[str]:
            prompts, settings = zip(*(request.args for request in requests), strict=True)
            return greedy_texts(model, tokenizer, prompts, settings)

    return Adapter()


def text_log_likelihood(model: GPTMini, tokenizer: Tokenizer, text: str, prefix_id: int) -> float:
    """The log-probability of a whole text, read in windows that predict every token once, starting after
    `prefix_id`. BOS is predicted too, if the tokenizer has one, as the harness does for other models."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    ids = tokenizer.encode_prompt(text)
    windows = get_rolling_token_windows(ids, prefix_id, model.config.max_seq_len, context_len=1)
    found = log_likelihoods(model, [make_disjoint_window(pair) for pair in windows])
    return sum(value for value, _ in found)


def greedy_texts(
    model: GPTMini, tokenizer: Tokenizer, prompts: Sequence[str], settings: Sequence[dict[str, Any]]
) -> list[str]:
    """The greedy continuation of each prompt, cut before the first of the texts that its task calls `until`.
    Raises UserError for a task that wants sampling."""
    if any(wanted.get("do_sample") and wanted.get("temperature", 1) > 0 for wanted in settings):
        raise UserError(
            "a task of --lm-eval wants sampled text (do_sample: true), and ours is greedy; take another task"
        )
    ids = [tokenizer.encode_prompt(prompt) or [tokenizer.eos_id] for prompt in prompts]
    lengths = [wanted.get("max_gen_toks", MAX_GEN_TOKS) for wanted in settings]
    texts = continuations(model, tokenizer, ids, lengths)
    return [
        cut_before_first(text, wanted.get("until") or [])
        for text, wanted in zip(texts, settings, strict=True)
    ]


def cut_before_first(text: str, ends: str | list[str]) -> str:
    """The part of `text` before the first place where one of `ends` begins; all of it if none does."""
    for end in [ends] if isinstance(ends, str) else ends:
        text = text.split(end)[0] if end else text
    return text


def find_tasks(names: list[str], folder: str | None) -> "TaskManager":
    """The harness's index of tasks, after checking that all of `names` are in it and can be loaded with
    their data. Raises UserError.

    Its own 14,000 tasks take 6 seconds to index, so they are left out if `folder` has all that is asked for.
    """
    from lm_eval.tasks import TaskManager

    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"--lm-eval-tasks {folder} is not a folder; give one with task files (.yaml)")
    with muffled():
        manager = TaskManager(include_path=folder, include_defaults=False)
        if not set(names) <= set(manager.all_subtasks):
            manager = TaskManager(include_path=folder)
    for name in names:
        check_task(manager, name)
    return manager


def check_task(manager: "TaskManager", name: str) -> None:
    """Raise UserError for a task that does not exist, cannot be loaded, or needs what we do not do."""
    if name not in manager.task_index:
        near = ", ".join(difflib.get_close_matches(name, manager.all_tasks, n=3))
        advice = f"did you mean {near}?" if near else "lm-eval ls tasks lists them"
        raise UserError(f"--lm-eval {name}: the harness has no such task; {advice}")
    try:
        with muffled():
            tasks = manager.load([name])["tasks"].values()
    except Exception as error:  # anything that the task's own code or its data raise
        first_line = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"--lm-eval {name}: {type(error).__name__}: {first_line}; its data must be on this machine, or "
            "this machine must reach the network"
        ) from error
    if any(getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False) for task in tasks):
        raise UserError(
            f"--lm-eval {name} shows pictures, or runs code that the model writes, and we do neither; "
            "take another task"
        )


def run_tasks(
    model: GPTMini, tokenizer: Tokenizer, names: list[str], manager: "TaskManager", limit: int | None
) -> list[dict[str, Any]]:
    """One row for each metric of each task (and group). The seeds are the harness's own, so that few-shot
    examples are the same as everyone's."""
    from lm_eval import simple_evaluate

    with muffled():
        found = simple_evaluate(
            adapter(model, tokenizer),
            tasks=names,
            task_manager=manager,
            limit=limit,
            bootstrap_iters=BOOTSTRAP_RESAMPLES,
            log_samples=False,
        )
    rows = []
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, _, filter_name = key.partition(",")  # as in "acc,none" and "acc_stderr,none"
            if not filter_name or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{filter_name}")
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    "filter": filter_name,
                    "value": float(value),
                    "stderr": error if isinstance(error, float) else None,
                    "higher_is_better": found["higher_is_better"].get(task, {}).get(metric),
                    "n": values.get("sample_len"),
                }
            )
    return rows


@contextlib.contextmanager
def muffled() -> Iterator[None]:
    """On a terminal the harness's progress bars are shown, elsewhere nothing. What it prints never reaches
    our standard output."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    stderr = sys.stderr if sys.stderr.isatty() else io.StringIO()
    with contextlib.redirect_stdout(stderr), contextlib.redirect_stderr(stderr):
        yield
