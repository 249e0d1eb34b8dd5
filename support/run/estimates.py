"""Estimates before a run starts: memory, and time a step."""

import time

import numpy as np
import torch

from model import GPTConfig, GPTMini
from optim import build_optimizer, parameter_groups
from support.chunked_loss import CHUNK_ROWS, CHUNKED_FROM_VOCAB
from support.config.schema import Config
from support.run.plan import Plan
from support.run.starting_weights import net_on_meta

PROBE_FLOPS = 5e10  # of a probe: about a second on a CPU


def estimate_activations(
    model_config: GPTConfig, config: Config, precision: str, device: str = "cpu", seq_len: int | None = None
) -> tuple[int, int]:
    """(bytes that one micro-batch keeps for the backward pass, bytes of activations and their gradients alive
    at once at most).

    `seq_len` is that of the data's longest row, where no row is as long as the config allows. The first
    number counts what our blocks and the head save, as `torch.autograd.graph.saved_tensors_hooks` sees it.
    """
    word = 2 if precision == "bf16-true" else 4
    matmul = 4 if precision == "32-true" else 2  # what autocast keeps for matrix products
    seq_len = seq_len or config.seq_len
    c, tokens = model_config, config.training.micro_batch_size * seq_len
    attention, kv = (
        c.n_heads * c.head_dim,
        c.n_heads * c.head_dim if c.n_kv_heads < c.n_heads else c.n_kv_heads * c.head_dim,
    )
    mlp = c.d_ff * (4 if c.mlp == "swiglu" else 2)
    block = tokens * (4 * c.d_model * word + (2 * c.d_model + 3 * attention + 2 * kv + mlp) * matmul)
    stream = tokens * c.d_model * word
    if c.vocab_size >= CHUNKED_FROM_VOCAB:
        kept = stream + c.vocab_size * c.d_model * 4  # gradients are computed in the forward pass
        head = min(tokens, CHUNK_ROWS) * c.vocab_size * (4 + matmul) + c.vocab_size * c.d_model * 4
    else:
        kept = tokens * c.vocab_size * 4
        head = 3 * kept
    if device == "mps" or (
        c.dropout and device == "cpu"
    ):  # attention weights are kept; with dropout their mask and product, too
        block += tokens * seq_len * c.n_heads * (12 if c.dropout else 4)
    if c.gradient_checkpointing:
        return (c.n_layers + 1) * stream + kept, (c.n_layers + 1) * stream + max(block, head)
    return c.n_layers * block + stream + kept, c.n_layers * block + stream + head


def estimate_memory(
    model_config: GPTConfig, config: Config, precision: str, device: str = "cpu", seq_len: int | None = None
) -> dict[str, int]:
    """Bytes of one process for parameters, gradients, optimizer state and the activations of one
    micro-batch, and their total. The first three are exact; activations are the most that is alive at
    once."""
    net = net_on_meta(model_config, config)
    n_params, n_trained = net.n_params(), count_trained(net)
    word = 2 if precision == "bf16-true" else 4
    hidden = sum(
        p.numel()
        for group in parameter_groups(net, config.training)
        if group["muon"]
        for p in group["params"]
    )
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
    return (
        round(np.random.default_rng(0).choice(lengths, (400, rows)).max(axis=1).mean())
        if len(lengths) > 1
        else lengths[0]
    )


def count_trained(net: GPTMini) -> int:
    """Numbers that training moves: not those that are frozen."""
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


def estimate_step_time(plan: Plan, probe: GPTMini) -> tuple[float, float]:
    """(seconds of one optimizer step, floating-point operations per second), from a measured one.

    `probe` is the model, or a small copy of it; it is given a micro-batch, or so much of one as takes about a
    second, and forward and backward are scaled to the step by their operations, the optimizer's part by the
    parameters.
    """
    training, typical = plan.config.training, typical_length(plan)
    length = min(typical, probe.config.max_seq_len)
    flops_per_row = probe.flops_per_token(length) * length
    rows = int(max(1, min(training.micro_batch_size, PROBE_FLOPS / flops_per_row)))
    ids, optimizer = (
        torch.randint(probe.config.vocab_size, (rows, length), device=plan.device),
        build_optimizer(probe, training),
    )
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
