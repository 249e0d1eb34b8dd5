"""Estimates made before a run starts: how much memory it needs, and how long a step takes."""

import time

import numpy as np
import torch

from model import GPTConfig, GPTMini
from optim import build_optimizer, parameter_groups
from support.chunked_loss import CHUNK_ROWS, CHUNKED_FROM_VOCAB
from support.config.schema import Config
from support.device import wait_for
from support.run.plan import Plan
from support.run.starting_weights import net_on_meta

FLOPS_OF_TIMED_PROBE = 5e10  # floating-point operations; about a second on a CPU


def estimate_activations(
    model_config: GPTConfig, config: Config, precision: str, device: str = "cpu", seq_len: int | None = None
) -> tuple[int, int]:
    """(bytes that one micro-batch keeps for the backward pass, the most bytes that activations and their
    gradients take at any moment).

    The activations are what the layers compute. The first number counts those that the blocks and the head
    save for the backward pass; `torch.autograd.graph.saved_tensors_hooks` lists the same. `seq_len` is the
    length of the longest row of the data, if that is shorter than the config allows.
    """
    word = 2 if precision == "bf16-true" else 4  # bytes of a number
    matmul = 4 if precision == "32-true" else 2  # bytes of a number that is kept for a matrix product
    c = model_config
    seq_len = seq_len or config.seq_len
    tokens = config.training.micro_batch_size * seq_len
    attention = c.n_heads * c.head_dim
    kv = attention  # fewer key and value heads are repeated until there are as many as query heads
    mlp = c.d_ff * (4 if c.mlp == "swiglu" else 2)
    # The next lines count tensors: for example, a block saves 4 tensors of d_model numbers a token in `word`
    # bytes each, and 2 more in `matmul` bytes.
    block = tokens * (4 * c.d_model * word + (2 * c.d_model + 3 * attention + 2 * kv + mlp) * matmul)
    stream = tokens * c.d_model * word
    if c.vocab_size >= CHUNKED_FROM_VOCAB:
        kept = stream + c.vocab_size * c.d_model * 4  # this head computes its gradients in the forward pass
        head = min(tokens, CHUNK_ROWS) * c.vocab_size * (4 + matmul) + c.vocab_size * c.d_model * 4
    else:
        kept = tokens * c.vocab_size * 4
        head = 3 * kept
    if device == "mps" or (c.dropout and device == "cpu"):
        # The attention weights are kept; with dropout, also its mask and the masked weights.
        block += tokens * seq_len * c.n_heads * (12 if c.dropout else 4)
    if c.gradient_checkpointing:
        return (c.n_layers + 1) * stream + kept, (c.n_layers + 1) * stream + max(block, head)
    return c.n_layers * block + stream + kept, c.n_layers * block + stream + head


def estimate_memory(
    model_config: GPTConfig, config: Config, precision: str, device: str = "cpu", seq_len: int | None = None
) -> dict[str, int]:
    """How many bytes one process needs: for parameters, gradients, optimizer state and the activations of one
    micro-batch, and in total. The first three are exact. For activations it is the most at any moment."""
    net = net_on_meta(model_config, config)
    n_trained = count_trained(net)
    word = 2 if precision == "bf16-true" else 4
    muon_groups = [group for group in parameter_groups(net, config.training) if group["muon"]]
    n_muon = sum(p.numel() for group in muon_groups for p in group["params"])
    parts = {
        "parameters": net.n_params() * word,
        "gradients": n_trained * word,
        "optimizer": (2 * n_trained - n_muon) * word,  # AdamW keeps two numbers a parameter, Muon one
        "activations": estimate_activations(model_config, config, precision, device, seq_len)[1],
    }
    return parts | {"total": sum(parts.values())}


def memory_of(plan: Plan) -> dict[str, int]:
    """`estimate_memory` for the rows that the data really has, which may be shorter than seq_len."""
    return estimate_memory(plan.model_config, plan.config, plan.precision, plan.device, max(plan.row_lengths))


def typical_length(plan: Plan) -> int:
    """The average length of a training row in tokens, with the padding up to the longest row of its
    micro-batch. If lengths differ, 400 random micro-batches stand for all."""
    lengths = plan.row_lengths
    if len(lengths) == 1:
        return lengths[0]
    micro_batches = np.random.default_rng(0).choice(lengths, (400, plan.config.training.micro_batch_size))
    return round(micro_batches.max(axis=1).mean())


def count_trained(net: GPTMini) -> int:
    """How many of the network's parameters are trained: all that are not frozen."""
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


def estimate_step_time(plan: Plan, probe: GPTMini) -> tuple[float, float]:
    """Time a few small steps; returns (seconds of one real step, floating-point operations per second).

    `probe` is the model, or a small copy of it. It is given one micro-batch, or as many of its rows as take
    about a second. A real step takes longer: forward and backward in proportion to its operations, the
    optimizer in proportion to its parameters.
    """
    training = plan.config.training
    typical = typical_length(plan)
    length = min(typical, probe.config.max_seq_len)
    flops_per_row = probe.flops_per_token(length) * length
    rows = int(max(1, min(training.micro_batch_size, FLOPS_OF_TIMED_PROBE / flops_per_row)))
    ids = torch.randint(probe.config.vocab_size, (rows, length), device=plan.device)
    optimizer = build_optimizer(probe, training)
    probe.train()
    forward_backward = update = float("inf")
    for _ in range(4):  # the fastest counts: the first is slow, since nothing is in the caches yet
        start = time_when_done(plan.device)
        probe(ids, ids)[0].backward()
        middle = time_when_done(plan.device)
        optimizer.step()
        optimizer.zero_grad()
        end = time_when_done(plan.device)
        forward_backward = min(forward_backward, middle - start)
        update = min(update, end - middle)
    with torch.device("meta"):
        model = GPTMini(plan.model_config)
    flops = model.flops_per_token(typical) * plan.sequences_per_step * typical / plan.world
    flops_per_sec = flops_per_row * rows / forward_backward
    return flops / flops_per_sec + update * model.n_params() / probe.n_params(), flops_per_sec


def time_when_done(device: str) -> float:
    """The time in seconds, taken when the device has finished its work."""
    wait_for(device)
    return time.perf_counter()
