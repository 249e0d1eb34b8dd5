"""`train.py --check`, the pre-training checklist, and `--show-step`; also the estimates of memory and time. Writes nothing."""

import contextlib
import itertools
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from data import Batch, make_dataloaders
from model import GPTConfig, GPTMini, KVCache
from optim import build_optimizer, lr_factor, parameter_groups
from support.base import net_on_meta, shape_net
from support.cli import UserError, end_with_parent, printable_lines
from support.compiling import compare_gradients, try_compiler
from support.config import Config
from support.continuation import text_after
from support.disk import why_no_lock
from support.hardware import device_label, memory_total
from support.loss import CHUNK_ROWS, CHUNKED_FROM_VOCAB, IGNORE
from support.run import Plan, plan_run, refuse_unfinished, refuse_unwritable

PROBE_FLOPS = 5e10  # of a probe: about a second on a CPU
LARGE = 30_000_000  # parameters from which the probes use a small copy of the model
PROBE_TEXT = "Attention is\n\ttokens, 1234 + numbers"


def estimate_activations(model_config: GPTConfig, config: Config, precision: str, device: str = "cpu", seq_len: int | None = None) -> tuple[int, int]:
    """(bytes that one micro-batch keeps for the backward pass, bytes of activations and their gradients alive at once at most).

    `seq_len` is that of the data's longest row, where no row is as long as the config allows. The first number counts what our
    blocks and the head save, as `torch.autograd.graph.saved_tensors_hooks` sees it.
    """
    word = 2 if precision == "bf16-true" else 4
    matmul = 4 if precision == "32-true" else 2  # what autocast keeps for matrix products
    seq_len = seq_len or config.seq_len
    c, tokens = model_config, config.training.micro_batch_size * seq_len
    attention, kv = c.n_heads * c.head_dim, c.n_heads * c.head_dim if c.n_kv_heads < c.n_heads else c.n_kv_heads * c.head_dim
    mlp = c.d_ff * (4 if c.mlp == "swiglu" else 2)
    block = tokens * (4 * c.d_model * word + (2 * c.d_model + 3 * attention + 2 * kv + mlp) * matmul)
    stream = tokens * c.d_model * word
    if c.vocab_size >= CHUNKED_FROM_VOCAB:
        kept = stream + c.vocab_size * c.d_model * 4  # gradients are computed in the forward pass
        head = min(tokens, CHUNK_ROWS) * c.vocab_size * (4 + matmul) + c.vocab_size * c.d_model * 4
    else:
        kept = tokens * c.vocab_size * 4
        head = 3 * kept
    if device == "mps" or (c.dropout and device == "cpu"):  # attention weights are kept; with dropout their mask and product, too
        block += tokens * seq_len * c.n_heads * (12 if c.dropout else 4)
    if c.gradient_checkpointing:
        return (c.n_layers + 1) * stream + kept, (c.n_layers + 1) * stream + max(block, head)
    return c.n_layers * block + stream + kept, c.n_layers * block + stream + head


def estimate_memory(model_config: GPTConfig, config: Config, precision: str, device: str = "cpu", seq_len: int | None = None) -> dict[str, int]:
    """Bytes of one process for parameters, gradients, optimizer state and the activations of one micro-batch, and their
    total. The first three are exact; activations are the most that is alive at once."""
    net = net_on_meta(model_config, config)
    n_params, n_trained = net.n_params(), count_trained(net)
    word = 2 if precision == "bf16-true" else 4
    hidden = sum(p.numel() for group in parameter_groups(net, config.training) if group["muon"] for p in group["params"])
    parts = {
        "parameters": n_params * word,
        "gradients": n_trained * word,
        "optimizer": (2 * n_trained - hidden) * word,
        "activations": estimate_activations(model_config, config, precision, device, seq_len)[1],
    }
    return parts | {"total": sum(parts.values())}


def memory_of(plan: Plan) -> dict[str, int]:
    """`estimate_memory` for the rows that the plan's data really has."""
    return estimate_memory(plan.model_config, plan.config, plan.precision, plan.device, max(plan.row_lengths))


def typical_length(plan: Plan) -> int:
    """Tokens of a training row on average, padded to the longest of its micro-batch."""
    lengths, rows = plan.row_lengths, plan.config.training.micro_batch_size
    return round(np.random.default_rng(0).choice(lengths, (400, rows)).max(axis=1).mean()) if len(lengths) > 1 else lengths[0]


def count_trained(net: GPTMini) -> int:
    """Numbers that training moves: not those that are frozen."""
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


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
    """Change the last token: how far do the logits of earlier positions move? Anything but 0 means the model sees the future."""
    length = min(length, model.config.max_seq_len)
    ids = torch.arange(length, device=device)[None] % model.config.vocab_size
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % model.config.vocab_size
    return (model(ids)[:, :-1] - model(changed)[:, :-1]).abs().max().item()


@torch.no_grad()
def cache_probe(model: GPTMini, device: str, length: int = 48) -> float:
    """The largest difference between logits computed at once, and through the cache in two pieces and single tokens."""
    length = min(length, model.config.max_seq_len)
    ids = torch.arange(1, length + 1, device=device)[None] % model.config.vocab_size
    cache = KVCache(model.config, 1, device, model.embed_tokens.weight.dtype)
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


def batches_of_step(plan: Plan, start_step: int, **training: int) -> list[Batch]:
    """The micro-batches of one step, 0, 1, ...; `training` changes keys of that section."""
    config = plan.config.model_copy(
        update={"hardware": plan.config.hardware.model_copy(update={"num_workers": 0}), "training": plan.config.training.model_copy(update=training)}
    )
    train, _ = make_dataloaders(config, plan.data, plan.tokenizer, max(plan.n_steps, start_step + 1), start_step)
    steps = iter(train)
    for _ in range(start_step if plan.data.streaming else 0):
        next(steps)
    return next(steps)


def show_step(plan: Plan, step: int) -> str:
    """The text of every row that step 1, 2, ... trains on. Raises UserError for a step the run does not have."""
    if not 1 <= step <= plan.n_steps:
        raise UserError(f"--show-step {step}: this run has steps 1 to {plan.n_steps}")
    lines = []
    for micro, batch in enumerate(batches_of_step(plan, step - 1), 1):
        for row, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True), 1):
            used = int((labels != IGNORE).nonzero().max()) + 1  # behind it stands padding
            lines += [f"--- step {step}, micro-batch {micro}, row {row} ---", plan.tokenizer.decode(ids[: used + 1].tolist())]
    return "\n".join(lines)


def prepare(args: Any) -> Plan:
    """The checked plan of the run; `--check` and `--show-step` answer and exit here. Raises UserError."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        end_with_parent()
    if args.check:
        sys.exit(run_checks(args))
    plan = plan_run(args)
    if args.show_step is not None:
        print(show_step(plan, args.show_step))
        sys.exit(0)
    if plan.config.training.compile and not args.only_looks:
        try_compiler(plan.device)
    return plan


def print_header(plan: Plan, net: GPTMini, start_step: int) -> None:
    """What will run, before it runs."""
    c, training, n = plan.model_config, plan.config.training, plan.n_steps
    n_trained = count_trained(net)
    trained = f" of which {n_trained:,} are trained," if n_trained < net.n_params() else ""
    print(
        f"model: {net.n_params():,} parameters,{trained} {c.n_layers} layers, d_model {c.d_model}, {c.n_heads} query and "
        f"{c.n_kv_heads} key/value heads, vocabulary {c.vocab_size:,} ({plan.tokenizer.kind})"
    )
    print("\n".join(plan.data.describe()))
    up_to = "up to " if plan.config.data.source == "instructions" else ""
    per_epoch = "" if plan.data.streaming else f", {len(plan.data.train) / plan.sequences_per_step:,.1f} steps an epoch"
    processes = f" x {plan.world} processes" if plan.world > 1 else ""
    print(
        f"steps: {n:,} of {up_to}{plan.tokens_per_step:,} tokens ({training.micro_batch_size} sequences x {training.grad_accum_steps} "
        f"micro-batches{processes} x {max(plan.row_lengths)}), {up_to}{n * plan.tokens_per_step:,} in all{per_epoch}"
    )
    need = memory_of(plan)["total"]
    has = memory_total(plan.device)
    print(f"device: {device_label(plan.device)}, precision {plan.precision}, about {need / 2**20:,.0f} MB needed of {has / 2**20:,.0f} MB")
    if start_step:
        print(f"resuming {plan.resume_from} behind step {start_step}")
    elif plan.config.base_ckpt:
        print(f"starting from {plan.config.base_ckpt}; at step 0 it is validated as it is")
    else:
        print(f"a uniform guess over {c.vocab_size:,} tokens has loss {math.log(c.vocab_size):.4f} (its logarithm): the first loss should be near it")


def show_mask(plan: Plan, n: int) -> None:
    """Print the first `n` training pairs: what is trained on in colour on a terminal, elsewhere between >>> and <<<.
    Raises UserError where there are no pairs."""
    from rich.console import Console
    from rich.text import Text

    if plan.config.data.source != "instructions":
        raise UserError("--show-mask shows instructions and responses; it needs data.source=instructions")
    console = Console(highlight=False, soft_wrap=True)
    data = plan.data.train
    for number, example in enumerate(data.examples[:n], 1):
        trained = [False, *(example.labels(data.mask_prompt) != IGNORE).tolist()]  # of each id; the first is never a label
        console.print(f"--- example {number}: {len(example.ids)} tokens, {sum(trained)} trained on ---", style="bold")
        text, before = Text(), []
        for is_trained, group in itertools.groupby(zip(example.ids.tolist(), trained, strict=True), key=lambda pair: pair[1]):
            ids = [id for id, _ in group]
            part, before = printable_lines(text_after(plan.tokenizer, before, ids)), ids
            marked = f">>>{part}<<<" if is_trained and not console.is_terminal else part
            text.append(marked, style="bold green" if is_trained else "dim")
        console.print(text)
    print("\n".join(plan.data.describe()))


def run_checks(args: Any) -> int:
    """Print the checklist, a line an item; 0 if all pass, else 1. Under a minute whatever the config, but for compiling."""
    failed = 0
    checks: Iterator[tuple[str, Callable[[], str]]] = checklist(args)
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


def checklist(args: Any) -> Iterator[tuple[str, Callable[[], str]]]:
    """(name, check) pairs; a check returns what it found, or raises UserError."""
    found: dict[str, Any] = {}

    def plan_it() -> str:
        found["plan"] = plan_run(args)
        return f"{args.config or args.resume} is valid; {device_label(found['plan'].device)}, {found['plan'].precision}"

    yield "config, text and device", plan_it
    plan: Plan = found["plan"]
    config, model_config = plan.config, plan.model_config
    for line in plan.data.describe():
        yield "text", lambda line=line: line
    yield "blocks", lambda: f"seq_len {config.seq_len} of max_seq_len {model_config.max_seq_len}, stride {config.stride}"
    yield "tokenizer", lambda: check_tokenizer(plan)
    with torch.device("meta"):
        n_params = GPTMini(model_config).n_params()
    small = n_params > LARGE
    yield "model", lambda: f"{n_params:,} parameters, head of {model_config.vocab_size:,} rows fits the tokenizer"
    torch.manual_seed(config.seed)
    probe = GPTMini(tiny_copy(model_config) if small else model_config.model_copy(update={"dropout": 0.0, "zero_init": False})).to(plan.device).eval()
    which = " (on a small copy)" if small else ""
    yield (
        "no leak from the future",
        lambda: bounded(leak_probe(probe, plan.device), 1e-6, f"earlier logits move by{{}}{which} when the last token changes"),
    )
    yield "cache", lambda: bounded(cache_probe(probe, plan.device), 1e-4, f"cached and uncached logits differ by{{}}{which} at most")
    yield "learns one batch by heart", lambda: check_overfit(plan)
    yield "optimizer", lambda: check_optimizer(plan, probe)
    if config.training.compile:
        yield "compile", lambda: check_compile(plan, tiny_copy(model_config) if small else model_config) + which
    yield "memory", lambda: check_memory(plan)
    yield "time", lambda: check_time(plan, probe)
    yield "checkpoint folder", lambda: check_folder(plan, args)


def bounded(value: float, limit: float, text: str) -> str:
    text = text.format(f" {value:.1e}")
    if not value <= limit:
        raise UserError(f"{text}, more than {limit:.0e}; this device or PyTorch version computes attention wrongly: try --device cpu")
    return text


def check_tokenizer(plan: Plan) -> str:
    tokenizer = plan.tokenizer
    text = plan.data.sample_text
    ids = tokenizer.encode(text)
    if tokenizer.decode(ids) != text:
        raise UserError(f"{tokenizer.kind} does not give back the text it was given; its tokenizer.json changes the text")
    if max(ids) >= tokenizer.vocab_size:
        raise UserError(f"token id {max(ids)} is outside the vocabulary of {tokenizer.vocab_size}")
    return f"{tokenizer.kind}, {tokenizer.vocab_size:,} tokens, gives text back unchanged; {len(text.encode()) / max(1, len(ids)):.2f} bytes a token"


def small_batch(plan: Plan, length: int) -> Batch:
    """Two rows of the first step, of at most `length` tokens, on the plan's device."""
    batch = {name: tensor for name, tensor in batches_of_step(plan, 0, micro_batch_size=2, grad_accum_steps=1)[0].items() if name != "stream_state"}
    end = int((batch["labels"] != IGNORE).any(dim=0).nonzero().max()) + 1  # of a row with a long prompt, the end is what is learned
    return {name: tensor[:, max(0, end - length) : end].to(plan.device) for name, tensor in batch.items()}


def check_compile(plan: Plan, model_config: GPTConfig) -> str:
    """One compiled step against one eager one, with the adapters and the frozen parameters of the run, without dropout."""
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
        training.lr * lr_factor(step, training.schedule, training.warmup_steps, training.schedule_steps, training.min_lr / training.lr)
        for step in (0, min(training.warmup_steps, last), last)  # after the warmup no schedule rises
    ]
    return (
        f"{training.optimizer}, {len(groups)} groups; learning rate starts at {rates[0]:.1e}, peaks at {max(rates):.1e}, ends at {rates[-1]:.1e} "
        f"({training.schedule})"
    )


def check_memory(plan: Plan) -> str:
    parts, total = memory_of(plan), memory_total(plan.device)
    text = ", ".join(f"{name} {size / 2**20:,.0f} MB" for name, size in parts.items()) + f"; the machine has {total / 2**20:,.0f} MB"
    if parts["total"] > total:
        raise UserError(f"{text}; lower training.micro_batch_size (and raise grad_accum_steps), or set model.gradient_checkpointing=true")
    return text


def estimate_step_time(plan: Plan, probe: GPTMini) -> tuple[float, float]:
    """(seconds of one optimizer step, floating-point operations per second), from a measured one.

    `probe` is the model, or a small copy of it; it is given a micro-batch, or so much of one as takes about a second, and
    forward and backward are scaled to the step by their operations, the optimizer's part by the parameters.
    """
    training, typical = plan.config.training, typical_length(plan)
    length = min(typical, probe.config.max_seq_len)
    flops_per_row = probe.flops_per_token(length) * length
    rows = int(max(1, min(training.micro_batch_size, PROBE_FLOPS / flops_per_row)))
    ids, optimizer = torch.randint(probe.config.vocab_size, (rows, length), device=plan.device), build_optimizer(probe, training)
    probe.train()
    parts = []
    for _ in range(4):  # the first one is colder than the rest
        times = [now(plan.device)]
        probe(ids, ids)[0].backward()
        times.append(now(plan.device))
        optimizer.step()
        optimizer.zero_grad()
        parts.append((times[1] - times[0], now(plan.device) - times[1]))
    forward_backward, update = (min(column) for column in zip(*parts, strict=True))
    with torch.device("meta"):
        model = GPTMini(plan.model_config)
    flops = model.flops_per_token(typical) * plan.sequences_per_step * typical / plan.world
    flops_per_sec = flops_per_row * rows / forward_backward
    return flops / flops_per_sec + update * model.n_params() / probe.n_params(), flops_per_sec


def now(device: str) -> float:
    """The clock, once the device has done what it was asked."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def check_time(plan: Plan, probe: GPTMini) -> str:
    per_step, flops_per_sec = estimate_step_time(plan, probe)
    total = int(per_step * plan.n_steps)
    return (
        f"about {per_step:.2g} s a step, {total // 3600}:{total // 60 % 60:02}:{total % 60:02} for {plan.n_steps:,} steps "
        f"(from a probe at {flops_per_sec / 1e9:,.0f} GFLOP/s; validation comes on top)"
    )


def check_folder(plan: Plan, args: Any) -> str:
    folder = plan.folder
    if args.resume is None and not args.fresh:
        refuse_unfinished(folder)
    parent = refuse_unwritable(folder)
    free, need = shutil.disk_usage(parent).free, 4 * memory_of(plan)["parameters"] * 3
    text = f"{folder} can be written, {free / 2**20:,.0f} MB free, a few checkpoints need {need / 2**20:,.0f} MB"
    if free < need:
        raise UserError(f"{text}; free some, or lower checkpoint.keep_last")
    if reason := why_no_lock(parent):
        text += f"; its file system has no locks ({reason}), so nothing keeps a second run out of it"
    return text
