"""The speed of the model: a training step, a prefill (reading a prompt), and decoding (writing token by
token)."""

import copy
import itertools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from data import Step
from model import GPTMini
from optim import build_optimizer, scheduled_factor, set_learning_rate
from sampling import SamplingConfig
from support.benchmark.opponents import MODELS, Opponents, Trainee, Writer, said
from support.benchmark.rounds import Side
from support.benchmark.subject import Subject
from support.chunked_loss import IGNORE
from support.int8 import quantize_int8

N_STEPS_IN_MEMORY = 4  # the steps that are trained on again and again
GREEDY = SamplingConfig(temperature=0)

Builder = Callable[[], Side]  # makes a side when its turn to be built comes


# ---- training ------------------------------------------------------------------------------------


def training_sides(subject: Subject, against: Opponents, compiled: bool) -> list[Builder]:
    """Builders of the sides for a training step: ours first."""
    steps = subject.steps(N_STEPS_IN_MEMORY)
    builders = [lambda: our_training(subject, steps, compiled)]
    for name, path in against.items():
        builders.append(lambda name=name, path=path: their_training(name, path, subject, steps, compiled))
    return builders


def our_training(subject: Subject, steps: list[Step], compiled: bool) -> Side:
    """Our training step: GPTMini, `build_optimizer`, and what `LitCausalLM.training_step` does."""
    net = subject.new_model().train()
    if subject.precision == "bf16-true":
        net = net.to(torch.bfloat16)
    run = our_step(net, itertools.cycle(steps), subject)
    if compiled:
        net.compile()
    return Side(
        "ours",
        run,
        n_params=net.n_params(),
        flops=net.flops_per_token(subject.config.seq_len) * subject.tokens_per_step,
        n_bytes=training_bytes(net),
        units=subject.tokens_per_step,
        note=subject.config.training.optimizer + (", compiled" if compiled else ""),
    )


def our_step(net: GPTMini, steps: Iterable[Step], subject: Subject) -> Callable[[], None]:
    """A function that makes one optimizer step on the next of `steps`, which are those of the run from its
    first. The order of the work, and each number that is taken from the device, are those of
    `LitCausalLM.training_step`."""
    training = subject.config.training
    optimizer = build_optimizer(net, training)
    numbered = enumerate(steps)

    def run() -> None:
        index, step = next(numbered)
        n_targets = sum((batch["labels"] != IGNORE).sum() for batch in step.micro_batches)
        loss_total = torch.zeros((), device=subject.device)
        for batch in step.micro_batches:
            with subject.autocast():
                loss_sum, _ = net(**batch)
            (loss_sum / n_targets).backward()
            loss_total += loss_sum.detach()
        (loss_total / n_targets).item()
        float(torch.nn.utils.clip_grad_norm_(net.parameters(), training.grad_clip or float("inf")))
        set_learning_rate(optimizer, scheduled_factor(index, training))
        optimizer.step()
        optimizer.zero_grad()

    return run


def their_training(name: str, path: str | None, subject: Subject, steps: list[Step], compiled: bool) -> Side:
    """The training step of an opponent, on the same batches, with the same clipping."""
    trainee: Trainee = MODELS[name](subject, path).train(compiled)
    endless = itertools.cycle(steps)

    def run() -> None:
        micro_batches = next(endless).micro_batches
        for batch in micro_batches:
            with subject.autocast():
                loss = trainee.loss(batch)
            (loss / len(micro_batches)).backward()
        clip = subject.config.training.grad_clip
        if clip:
            torch.nn.utils.clip_grad_norm_(trainee.model.parameters(), clip)
        trainee.optimizer.step()
        trainee.optimizer.zero_grad(set_to_none=True)

    flops = 3 * forward_flops(trainee.model, subject, subject.config.seq_len)
    return Side(
        name,
        run,
        n_params=count_params(trainee.model),
        flops=flops * subject.tokens_per_step,
        n_bytes=training_bytes(trainee.model),
        units=subject.tokens_per_step,
        note="compiled" if compiled else "",
    )


# ---- sizes ---------------------------------------------------------------------------------------


def count_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def matrices(model: nn.Module) -> list[Tensor]:
    """The weights that are multiplied by activations, each once; transformers' GPT-2 calls its linear layers
    Conv1D."""
    found = {}
    for module in model.modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            found[id(module.weight)] = module.weight
    return list(found.values())


def forward_flops(model: nn.Module, subject: Subject, seq_len: int) -> float:
    """Operations to read one token in a sequence of `seq_len`: two for each weight of a matrix, and those of
    causal attention, as in `GPTMini.flops_per_token`."""
    c = subject.model_config
    attention = 2 * c.n_layers * seq_len * c.n_heads * c.head_dim
    return 2 * sum(weight.numel() for weight in matrices(model)) + attention


def training_bytes(model: nn.Module) -> float:
    """The bytes of weights that a step reads at least: each matrix forward and backward."""
    return 2 * sum(weight.numel() * weight.element_size() for weight in matrices(model))


def bytes_per_token(model: nn.Module) -> float:
    """The bytes of weights that decoding one token reads: all parameters, but of an embedding table that is
    not the head too, only a row."""
    rows = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    rows -= {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    tensors = {id(p): p for p in model.parameters() if id(p) not in rows}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


# ---- prefill and decoding ------------------------------------------------------------------------


def random_prompt(subject: Subject, length: int) -> Tensor:
    """Random ids, (1, T), without the last one, which is EOS for most tokenizers."""
    generator = torch.Generator().manual_seed(subject.config.seed)
    ids = torch.randint(max(1, subject.model_config.vocab_size - 1), (1, length), generator=generator)
    return ids.to(subject.device)


def our_model(subject: Subject) -> GPTMini:
    """The model of the checkpoint, or a new one, in eval mode, with the weights in the type of the run."""
    model = subject.trained or subject.new_model()
    return model.to(subject.dtype).eval()


def prefill_sides(subject: Subject, against: Opponents, length: int, compiled: bool) -> list[Builder]:
    """Builders of the sides that read a prompt of `length` tokens and choose the first new one."""
    ids = random_prompt(subject, length)

    def side(name: str, writer: Writer, of: nn.Module) -> Side:
        head = subject.model_config.vocab_size * subject.model_config.d_model
        # The head is needed for the last position only.
        flops = forward_flops(of, subject, length) * length - 2 * head * (length - 1)
        return writer_side(name, writer, of, flops=flops, n_bytes=bytes_per_token(of), units=length)

    def ours() -> Side:
        model = our_model(subject)
        return side("ours", Writer(model, lambda: model.generate(ids, 1, GREEDY)), model)

    def theirs(name: str, path: str | None) -> Side:
        writer = MODELS[name](subject, path).prefill(ids, compiled)
        return side(name, writer, writer.model or our_model(subject))

    return [ours, *(lambda name=name, path=path: theirs(name, path) for name, path in against.items())]


def decode_sides(
    subject: Subject, against: Opponents, prompt_length: int, n_new: int, compiled: bool, int8: bool = False
) -> list[Builder]:
    """Builders of the sides that continue a prompt by `n_new` tokens, always the likeliest one. With `int8`,
    ours has int8 weights, and its exact weights are a side too."""
    ids = random_prompt(subject, prompt_length)

    def side(name: str, writer: Writer, of: nn.Module) -> Side:
        flops = forward_flops(of, subject, prompt_length + n_new // 2) * n_new
        return writer_side(name, writer, of, flops=flops, n_bytes=bytes_per_token(of) * n_new, units=n_new)

    def ours(name: str, int8: bool) -> Side:
        exact = our_model(subject)
        model = copy.deepcopy(exact) if int8 else exact
        model.compile_decoding = compiled
        note = ", ".join(filter(None, ["int8" if int8 else "", said(compiled)]))
        made = side(name, Writer(model, lambda: model.generate(ids, n_new, GREEDY), note), exact)
        if int8:
            made.n_bytes = quantize_int8(model).read_after * n_new
        return made

    def theirs(name: str, path: str | None) -> Side:
        writer = MODELS[name](subject, path).decode(ids, n_new, compiled)
        return side(name, writer, writer.model or our_model(subject))

    builders = [lambda: ours("ours", int8)]
    if int8:
        builders.append(lambda: ours("ours, exact", False))
    return builders + [lambda name=name, path=path: theirs(name, path) for name, path in against.items()]


def writer_side(
    name: str, writer: Writer, of: nn.Module, *, flops: float, n_bytes: float, units: float
) -> Side:
    """The side of a writer; `of` is the model whose sizes count."""

    @torch.no_grad()
    def run() -> None:
        writer.run()

    return Side(
        name, run, n_params=count_params(of), flops=flops, n_bytes=n_bytes, units=units, note=writer.note
    )
