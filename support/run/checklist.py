"""`train.py --check`: the checklist before training. It writes nothing.

A *probe* is a short experiment on the model, with random weights: does the future leak into the past, does
the cache give the same logits, can the model learn one batch by heart?
"""

import contextlib
import itertools
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import torch

from data import Batch
from model import GPTConfig, GPTMini
from optim import build_optimizer, scheduled_factor
from support.chunked_loss import IGNORE
from support.device import device_label, memory_total
from support.files.atomic import why_no_lock
from support.messages import UserError
from support.run.compiling import CannotCompile, compare_gradients, try_compiler
from support.run.estimates import estimate_step_time, memory_of
from support.run.folder import refuse_unfinished, refuse_unwritable
from support.run.plan import Plan, plan_run
from support.run.show import batches_of_step
from support.run.starting_weights import shape_net

MAX_PROBE_PARAMETERS = 30_000_000  # a larger model is probed as a small copy of it
CHECK_ERRORS = (UserError, MemoryError, torch.OutOfMemoryError)


def tiny_copy(config: GPTConfig) -> GPTConfig:
    """A small model with the same switches and, as far as possible, the same number of query heads for each
    key head. A probe of it takes seconds."""
    queries_per_key = min(4, config.n_heads // config.n_kv_heads)
    if queries_per_key == 3:  # 4 heads cannot be shared out in threes
        queries_per_key = 4
    sizes = {
        "d_model": 64,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 4 // queries_per_key,
        "head_dim": 16,
        "d_ff": 192,
        "max_seq_len": min(64, config.max_seq_len),
        "dropout": 0.0,
    }
    return config.model_copy(update=sizes)


@torch.no_grad()
def leak_probe(model: GPTMini, device: str, length: int = 48) -> float:
    """How much the logits of the earlier positions change when the last token is replaced. Anything but 0
    means that the model sees the future."""
    length = min(length, model.config.max_seq_len)
    ids = torch.arange(length, device=device)[None] % model.config.vocab_size
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % model.config.vocab_size
    return (model(ids)[:, :-1] - model(changed)[:, :-1]).abs().max().item()


@torch.no_grad()
def cache_probe(model: GPTMini, device: str, length: int = 48) -> float:
    """The largest difference between the logits of one pass over all tokens and the logits computed with the
    cache: two pieces first, then one token at a time."""
    length = min(length, model.config.max_seq_len)
    ids = torch.arange(1, length + 1, device=device)[None] % model.config.vocab_size
    cache = model.new_cache(batch_size=1)
    cuts = [0, length // 3, 2 * length // 3, *range(2 * length // 3 + 1, length + 1)]
    pieces = [model(ids[:, a:b], cache=cache) for a, b in itertools.pairwise(cuts)]
    return (torch.cat(pieces, dim=1) - model(ids)).abs().max().item()


def overfit_probe(model: GPTMini, batch: Batch, steps: int = 60) -> tuple[float, float]:
    """Train on one small batch again and again; returns (first loss, last loss). A sound model learns the
    batch by heart, so its last loss is far lower."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        loss_sum, n_targets = model(**batch)
        loss = loss_sum / n_targets
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses[0], losses[-1]


def run_checks(args: Any, finetuning: bool) -> int:
    """Print the checklist, one line for each item. Returns 0 if all items pass, otherwise 1. Without
    training.compile it takes less than a minute for any config."""
    try:
        plan = plan_run(args, finetuning=finetuning, only_looks=True)
    except CHECK_ERRORS as error:
        print(f"FAIL  config, text and device: {error}", flush=True)
        n_failed = 1  # without a plan there is nothing else to check
    else:
        source = args.config or args.resume
        print(
            f"ok    config, text and device: {source} is valid; {device_label(plan.device)}, {plan.precision}"
        )
        n_failed = sum(not passes(name, check) for name, check in checklist(plan, args))
    result = f"{n_failed} failed" if n_failed else "everything passed"
    print(f"{result}; nothing was written")
    return 1 if n_failed else 0


def passes(name: str, check: Callable[[], str]) -> bool:
    """Run one check, print its line, and return whether it passed."""
    try:
        print(f"ok    {name}: {check()}", flush=True)
        return True
    except CHECK_ERRORS as error:
        print(f"FAIL  {name}: {error}", flush=True)
        return False


def checklist(plan: Plan, args: Any) -> Iterator[tuple[str, Callable[[], str]]]:
    """Pairs (name, check): a check is a function that returns what it found, or raises UserError. It runs
    when its turn comes, so that its line is printed as soon as it is known."""
    model_config = plan.model_config
    for line in plan.data.describe():
        yield "text", lambda line=line: line  # line=line keeps this line, not the last one of the loop
    yield "blocks", lambda: describe_blocks(plan)
    yield "tokenizer", lambda: check_tokenizer(plan)
    with torch.device("meta"):  # weights with a shape but without numbers: no memory is needed
        n_params = GPTMini(model_config).n_params()
    yield (
        "model",
        lambda: f"{n_params:,} parameters, head of {model_config.vocab_size:,} rows fits the tokenizer",
    )
    is_large = n_params > MAX_PROBE_PARAMETERS
    probed_config = tiny_copy(model_config) if is_large else model_config
    note = " (on a small copy)" if is_large else ""
    probe = build_probe(probed_config, plan).eval()
    yield "no leak from the future", lambda: check_leak(probe, plan.device, note)
    yield "cache", lambda: check_cache(probe, plan.device, note)
    yield "learns one batch by heart", lambda: check_overfit(plan)
    yield "optimizer", lambda: check_optimizer(plan, probe)
    yield "compile", lambda: check_compile(plan, probed_config, note)
    yield "memory", lambda: check_memory(plan)
    yield "time", lambda: check_time(plan, probe)
    yield "checkpoint folder", lambda: check_folder(plan, args)


def build_probe(model_config: GPTConfig, plan: Plan) -> GPTMini:
    """The model with random weights, on the plan's device. Dropout and layers that start at zero are switched
    off, since they would hide mistakes."""
    torch.manual_seed(plan.config.seed)
    return GPTMini(model_config.model_copy(update={"dropout": 0.0, "zero_init": False})).to(plan.device)


def describe_blocks(plan: Plan) -> str:
    config = plan.config
    return f"seq_len {config.seq_len} of max_seq_len {plan.model_config.max_seq_len}, stride {config.stride}"


def check_leak(probe: GPTMini, device: str, note: str) -> str:
    moved = leak_probe(probe, device)
    return bounded(moved, 1e-6, f"earlier logits move by {moved:.1e}{note} when the last token changes")


def check_cache(probe: GPTMini, device: str, note: str) -> str:
    difference = cache_probe(probe, device)
    return bounded(difference, 1e-4, f"cached and uncached logits differ by {difference:.1e}{note} at most")


def bounded(value: float, limit: float, text: str) -> str:
    """Returns `text` if the value is within the limit. Raises UserError if it is larger, or not a number."""
    if not value <= limit:  # not the same as value > limit, which is false for a NaN
        raise UserError(
            f"{text}, more than {limit:.0e}; this device or PyTorch version computes attention wrongly: try "
            "--device cpu"
        )
    return text


def check_tokenizer(plan: Plan) -> str:
    """Raises UserError if a piece of the text does not survive encoding and decoding."""
    tokenizer = plan.tokenizer
    text = plan.data.sample_text
    ids = tokenizer.encode(text)
    if tokenizer.decode(ids) != text:
        raise UserError(
            f"{tokenizer.kind} does not give back the text it was given; its tokenizer.json changes the text"
        )
    if max(ids) >= tokenizer.vocab_size:
        raise UserError(f"token id {max(ids)} is outside the vocabulary of {tokenizer.vocab_size}")
    bytes_per_token = len(text.encode()) / max(1, len(ids))
    return (
        f"{tokenizer.kind}, {tokenizer.vocab_size:,} tokens, gives text back unchanged; "
        f"{bytes_per_token:.2f} bytes a token"
    )


def small_batch(plan: Plan, length: int) -> Batch:
    """Two rows of the first step, with at most `length` tokens each, on the plan's device."""
    [batch] = batches_of_step(plan, 0, micro_batch_size=2, grad_accum_steps=1)
    has_label = (batch["labels"] != IGNORE).any(dim=0)
    # Cut off the front, not the end: a row may begin with a long prompt, which is not trained on.
    end = int(has_label.nonzero().max()) + 1
    return {name: tensor[:, max(0, end - length) : end].to(plan.device) for name, tensor in batch.items()}


def check_compile(plan: Plan, model_config: GPTConfig, note: str) -> str:
    """Compare the gradients of a compiled step with those of an ordinary (*eager*) one, if the run is to be
    compiled. The network has the adapters and frozen parameters of the run, but no dropout."""
    if not plan.compiles:
        return f"off ({plan.compile_reason})"

    def build() -> GPTMini:
        net = build_probe(model_config, plan)
        with contextlib.suppress(UserError):  # the config may freeze a layer that the small copy lacks
            net = shape_net(net, plan.config)
        return net.to(torch.bfloat16 if plan.precision == "bf16-true" else None).train()

    batch = small_batch(plan, model_config.max_seq_len)
    try:
        try_compiler(plan.device)
        return compare_gradients(build, batch, plan.precision, plan.device) + note
    except CannotCompile as error:
        if plan.config.training.compile != "auto":
            raise
        return f"off; training.compile=auto {error.reason}"


def check_overfit(plan: Plan) -> str:
    torch.manual_seed(plan.config.seed)
    model = GPTMini(tiny_copy(plan.model_config)).to(plan.device).train()
    first, last = overfit_probe(model, small_batch(plan, model.config.max_seq_len))
    text = f"a small copy of the model goes from loss {first:.2f} to {last:.2f} on one batch"
    if not last < first / 2:
        raise UserError(f"{text}; it should at least halve: look at the text with --show-step 1")
    return text


def check_optimizer(plan: Plan, probe: GPTMini) -> str:
    training = plan.config.training
    groups = build_optimizer(probe, training).param_groups
    if plan.n_steps == 0:
        return f"{training.optimizer}; max_steps is 0, so nothing will be trained"

    def rate(step: int) -> float:
        return training.lr * scheduled_factor(step, training)

    last_step = plan.n_steps - 1
    first, last = rate(0), rate(last_step)
    after_warmup = rate(min(training.warmup_steps, last_step))
    highest = max(first, after_warmup, last)  # no schedule rises after the warmup
    return (
        f"{training.optimizer}, {len(groups)} groups; learning rate starts at {first:.1e}, peaks at "
        f"{highest:.1e}, ends at {last:.1e} ({training.schedule})"
    )


def check_memory(plan: Plan) -> str:
    """Raises UserError if the run needs more memory than the device has."""
    needed = memory_of(plan)
    total = memory_total(plan.device)
    parts = ", ".join(f"{name} {megabytes(size)}" for name, size in needed.items())
    text = f"{parts}; the machine has {megabytes(total)}"
    if needed["total"] > total:
        raise UserError(
            f"{text}; lower training.micro_batch_size (and raise grad_accum_steps), or set "
            "model.gradient_checkpointing=true"
        )
    return text


def megabytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MB"


def check_time(plan: Plan, probe: GPTMini) -> str:
    per_step, flops_per_sec = estimate_step_time(plan, probe)
    total = int(per_step * plan.n_steps)
    hours, minutes, seconds = total // 3600, total // 60 % 60, total % 60
    return (
        f"about {per_step:.2g} s a step, {hours}:{minutes:02}:{seconds:02} for {plan.n_steps:,} steps (from "
        f"a probe at {flops_per_sec / 1e9:,.0f} GFLOP/s; validation not included)"
    )


def check_folder(plan: Plan, args: Any) -> str:
    """Raises UserError if the run may not write to its folder, or if the disk has too little room."""
    folder = plan.folder
    if args.resume is None and not args.fresh:
        refuse_unfinished(folder)
    parent = refuse_unwritable(folder)
    free = shutil.disk_usage(parent).free
    # A checkpoint holds the weights and two numbers a weight for the optimizer; leave room for four of them.
    needed = 4 * memory_of(plan)["parameters"] * 3
    text = f"{folder} can be written, {megabytes(free)} free, a few checkpoints need {megabytes(needed)}"
    if free < needed:
        raise UserError(f"{text}; free some, or lower checkpoint.keep_last")
    if reason := why_no_lock(parent):
        text += f"; its file system has no locks ({reason}), so nothing stops a second run from writing there"
    return text
