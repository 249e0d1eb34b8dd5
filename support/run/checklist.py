"""`train.py --check`, the pre-training checklist, and `--show-step`; also the estimates of memory and
time. Writes nothing."""

import contextlib
import itertools
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import torch

from data import Batch
from model import GPTConfig, GPTMini
from optim import build_optimizer, lr_factor
from support.chunked_loss import IGNORE
from support.device import device_label, memory_total
from support.files.atomic import why_no_lock
from support.messages import UserError
from support.run.compiling import compare_gradients, try_compiler
from support.run.estimates import estimate_step_time, memory_of
from support.run.folder import refuse_unfinished, refuse_unwritable
from support.run.plan import Plan, plan_run
from support.run.show import batches_of_step
from support.run.starting_weights import shape_net

LARGE = 30_000_000  # parameters from which the probes use a small copy of the model
PROBE_TEXT = "Attention is\n\ttokens, 1234 + numbers"


def tiny_copy(config: GPTConfig) -> GPTConfig:
    """The same switches and head grouping, small enough for a probe of seconds."""
    groups = min(4, config.n_heads // config.n_kv_heads)
    return config.model_copy(
        update={
            "d_model": 64,
            "n_layers": 2,
            "n_heads": 4,
            "n_kv_heads": 4 // groups if 4 % groups == 0 else 1,
            "head_dim": 16,
            "d_ff": 192,
            "max_seq_len": min(64, config.max_seq_len),
            "dropout": 0.0,
        }
    )


@torch.no_grad()
def leak_probe(model: GPTMini, device: str, length: int = 48) -> float:
    """Change the last token: how far do the logits of earlier positions move? Anything but 0 means the
    model sees the future."""
    length = min(length, model.config.max_seq_len)
    ids = torch.arange(length, device=device)[None] % model.config.vocab_size
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % model.config.vocab_size
    return (model(ids)[:, :-1] - model(changed)[:, :-1]).abs().max().item()


@torch.no_grad()
def cache_probe(model: GPTMini, device: str, length: int = 48) -> float:
    """The largest difference between logits computed at once, and through the cache in two pieces and
    single tokens."""
    length = min(length, model.config.max_seq_len)
    ids = torch.arange(1, length + 1, device=device)[None] % model.config.vocab_size
    cache = model.new_cache(batch_size=1)
    cuts = [0, length // 3, 2 * length // 3, *range(2 * length // 3 + 1, length + 1)]
    pieces = [model(ids[:, a:b], cache=cache) for a, b in itertools.pairwise(cuts)]
    return (torch.cat(pieces, dim=1) - model(ids)).abs().max().item()


def overfit_probe(model: GPTMini, batch: Batch, steps: int = 60) -> tuple[float, float]:
    """(first, last) loss of training on one small batch again and again: a sound model learns it by heart."""
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
    """Print the checklist, a line an item; 0 if all pass, else 1. Under a minute whatever the config, but
    for compiling."""
    failed = 0
    checks: Iterator[tuple[str, Callable[[], str]]] = checklist(args, finetuning)
    for name, check in checks:
        try:
            print(f"ok    {name}: {check()}", flush=True)
        except (UserError, MemoryError, torch.OutOfMemoryError) as error:
            print(f"FAIL  {name}: {error}", flush=True)
            failed += 1
            if name == "config, text and device":
                break  # without them there is nothing to check
    print("everything passed; nothing was written" if not failed else f"{failed} failed; nothing was written")
    return 1 if failed else 0


def checklist(args: Any, finetuning: bool) -> Iterator[tuple[str, Callable[[], str]]]:
    """(name, check) pairs; a check returns what it found, or raises UserError."""
    found: dict[str, Any] = {}

    def plan_it() -> str:
        found["plan"] = plan_run(args, finetuning=finetuning, only_looks=True)
        return (
            f"{args.config or args.resume} is valid; {device_label(found['plan'].device)}, "
            f"{found['plan'].precision}"
        )

    yield "config, text and device", plan_it
    plan: Plan = found["plan"]
    config, model_config = plan.config, plan.model_config
    for line in plan.data.describe():
        yield "text", lambda line=line: line
    yield (
        "blocks",
        lambda: f"seq_len {config.seq_len} of max_seq_len {model_config.max_seq_len}, stride {config.stride}",
    )
    yield "tokenizer", lambda: check_tokenizer(plan)
    with torch.device("meta"):
        n_params = GPTMini(model_config).n_params()
    small = n_params > LARGE
    yield (
        "model",
        lambda: f"{n_params:,} parameters, head of {model_config.vocab_size:,} rows fits the tokenizer",
    )
    torch.manual_seed(config.seed)
    probe = (
        GPTMini(
            tiny_copy(model_config)
            if small
            else model_config.model_copy(update={"dropout": 0.0, "zero_init": False})
        )
        .to(plan.device)
        .eval()
    )
    which = " (on a small copy)" if small else ""
    yield (
        "no leak from the future",
        lambda: bounded(
            leak_probe(probe, plan.device),
            1e-6,
            f"earlier logits move by{{}}{which} when the last token changes",
        ),
    )
    yield (
        "cache",
        lambda: bounded(
            cache_probe(probe, plan.device), 1e-4, f"cached and uncached logits differ by{{}}{which} at most"
        ),
    )
    yield "learns one batch by heart", lambda: check_overfit(plan)
    yield "optimizer", lambda: check_optimizer(plan, probe)
    if config.training.compile:
        yield (
            "compile",
            lambda: check_compile(plan, tiny_copy(model_config) if small else model_config) + which,
        )
    yield "memory", lambda: check_memory(plan)
    yield "time", lambda: check_time(plan, probe)
    yield "checkpoint folder", lambda: check_folder(plan, args)


def bounded(value: float, limit: float, text: str) -> str:
    text = text.format(f" {value:.1e}")
    if not value <= limit:
        raise UserError(
            f"{text}, more than {limit:.0e}; this device or PyTorch version computes attention wrongly: "
            "try --device cpu"
        )
    return text


def check_tokenizer(plan: Plan) -> str:
    tokenizer = plan.tokenizer
    text = plan.data.sample_text
    ids = tokenizer.encode(text)
    if tokenizer.decode(ids) != text:
        raise UserError(
            f"{tokenizer.kind} does not give back the text it was given; its tokenizer.json changes the text"
        )
    if max(ids) >= tokenizer.vocab_size:
        raise UserError(f"token id {max(ids)} is outside the vocabulary of {tokenizer.vocab_size}")
    return (
        f"{tokenizer.kind}, {tokenizer.vocab_size:,} tokens, gives text back unchanged; "
        f"{len(text.encode()) / max(1, len(ids)):.2f} bytes a token"
    )


def small_batch(plan: Plan, length: int) -> Batch:
    """Two rows of the first step, of at most `length` tokens, on the plan's device."""
    [batch] = batches_of_step(plan, 0, micro_batch_size=2, grad_accum_steps=1)
    end = (
        int((batch["labels"] != IGNORE).any(dim=0).nonzero().max()) + 1
    )  # of a row with a long prompt, the end is what is learned
    return {name: tensor[:, max(0, end - length) : end].to(plan.device) for name, tensor in batch.items()}


def check_compile(plan: Plan, model_config: GPTConfig) -> str:
    """One compiled step against one eager one, with the adapters and the frozen parameters of the run,
    without dropout."""
    try_compiler(plan.device)

    def build() -> GPTMini:
        torch.manual_seed(plan.config.seed)
        net = GPTMini(model_config.model_copy(update={"dropout": 0.0, "zero_init": False}))
        with contextlib.suppress(UserError):  # what is frozen may lie in a layer that a small copy lacks
            net = shape_net(net, plan.config)
        return net.to(plan.device, torch.bfloat16 if plan.precision == "bf16-true" else None).train()

    return compare_gradients(build, small_batch(plan, model_config.max_seq_len), plan.precision, plan.device)


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
    last = plan.n_steps - 1
    rates = [
        training.lr
        * lr_factor(
            step,
            training.schedule,
            training.warmup_steps,
            training.schedule_steps,
            training.min_lr / training.lr,
        )
        for step in (0, min(training.warmup_steps, last), last)  # after the warmup no schedule rises
    ]
    return (
        f"{training.optimizer}, {len(groups)} groups; learning rate starts at {rates[0]:.1e}, peaks at "
        f"{max(rates):.1e}, ends at {rates[-1]:.1e} "
        f"({training.schedule})"
    )


def check_memory(plan: Plan) -> str:
    parts, total = memory_of(plan), memory_total(plan.device)
    text = (
        ", ".join(f"{name} {size / 2**20:,.0f} MB" for name, size in parts.items())
        + f"; the machine has {total / 2**20:,.0f} MB"
    )
    if parts["total"] > total:
        raise UserError(
            f"{text}; lower training.micro_batch_size (and raise grad_accum_steps), or set "
            "model.gradient_checkpointing=true"
        )
    return text


def check_time(plan: Plan, probe: GPTMini) -> str:
    per_step, flops_per_sec = estimate_step_time(plan, probe)
    total = int(per_step * plan.n_steps)
    return (
        f"about {per_step:.2g} s a step, {total // 3600}:{total // 60 % 60:02}:{total % 60:02} for "
        f"{plan.n_steps:,} steps "
        f"(from a probe at {flops_per_sec / 1e9:,.0f} GFLOP/s; validation comes on top)"
    )


def check_folder(plan: Plan, args: Any) -> str:
    folder = plan.folder
    if args.resume is None and not args.fresh:
        refuse_unfinished(folder)
    parent = refuse_unwritable(folder)
    free, need = shutil.disk_usage(parent).free, 4 * memory_of(plan)["parameters"] * 3
    text = (
        f"{folder} can be written, {free / 2**20:,.0f} MB free, a few checkpoints need {need / 2**20:,.0f} MB"
    )
    if free < need:
        raise UserError(f"{text}; free some, or lower checkpoint.keep_last")
    if reason := why_no_lock(parent):
        text += f"; its file system has no locks ({reason}), so nothing keeps a second run out of it"
    return text
