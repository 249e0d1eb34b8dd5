"""What a run prints about itself: the header, its last lines, and the output of `--show-step` and
`--show-mask`."""

import itertools
import math
from pathlib import Path

from data import Batch, make_dataloaders
from model import GPTMini
from support.checkpoint import read_metadata, weights_sha256
from support.chunked_loss import IGNORE
from support.device import device_label, memory_total
from support.messages import OptionalPart, UserError, printable_lines
from support.plots import draw_loss, draw_mask
from support.run.estimates import count_trained, memory_of
from support.run.plan import Plan
from support.text.mid_document import text_after


def batches_of_step(plan: Plan, start_step: int, **training: int) -> list[Batch]:
    """The micro-batches of one step; `start_step` counts from 0. Keywords change keys of the config's
    `training` section, such as micro_batch_size=2."""
    sections = {
        "hardware": plan.config.hardware.model_copy(update={"num_workers": 0}),
        "training": plan.config.training.model_copy(update=training),
    }
    config = plan.config.model_copy(update=sections)
    n_steps = max(plan.n_steps, start_step + 1)
    train, _ = make_dataloaders(config, plan.data, plan.tokenizer, n_steps, start_step=start_step)
    steps = iter(train)
    if plan.data.streaming:  # a stream can only be read from its beginning
        for _ in range(start_step):
            next(steps)
    return next(steps).micro_batches


def show_step(plan: Plan, step: int) -> str:
    """The text of every row that a step trains on; `step` counts from 1. Raises UserError if the run has no
    such step."""
    if not 1 <= step <= plan.n_steps:
        raise UserError(f"--show-step {step}: this run has steps 1 to {plan.n_steps}")
    lines = []
    for micro, batch in enumerate(batches_of_step(plan, step - 1), 1):
        for row, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True), 1):
            used = int((labels != IGNORE).nonzero().max()) + 1  # the rest is padding
            lines += [
                f"--- step {step}, micro-batch {micro}, row {row} ---",
                plan.tokenizer.decode(ids[: used + 1].tolist()),
            ]
    return "\n".join(lines)


def print_header(plan: Plan, net: GPTMini, start_step: int) -> None:
    """Print what will be trained, before the first step."""
    c, training = plan.model_config, plan.config.training
    n_params, n_trained = net.n_params(), count_trained(net)
    trained = f" of which {n_trained:,} are trained," if n_trained < n_params else ""
    print(
        f"model: {n_params:,} parameters,{trained} {c.n_layers} layers, d_model {c.d_model}, {c.n_heads} "
        f"query and {c.n_kv_heads} key/value heads, vocabulary {c.vocab_size:,} ({plan.tokenizer.kind})"
    )
    print("\n".join(plan.data.describe()))
    up_to = "up to " if plan.config.data.source == "instructions" else ""
    processes = f" x {plan.world} processes" if plan.world > 1 else ""
    per_epoch = ""
    if not plan.data.streaming:
        per_epoch = f", {len(plan.data.train) / plan.sequences_per_step:,.1f} steps an epoch"
    print(
        f"steps: {plan.n_steps:,} of {up_to}{plan.tokens_per_step:,} tokens ({training.micro_batch_size} "
        f"sequences x {training.grad_accum_steps} micro-batches{processes} x {max(plan.row_lengths)}), "
        f"{up_to}{plan.n_steps * plan.tokens_per_step:,} in all{per_epoch}"
    )
    needed = memory_of(plan)["total"]
    total = memory_total(plan.device)
    tf32 = " with TF32" if plan.config.hardware.tf32 and plan.device == "cuda" else ""
    print(
        f"device: {device_label(plan.device)}, precision {plan.precision}{tf32}, about "
        f"{needed / 2**20:,.0f} MB needed of {total / 2**20:,.0f} MB"
    )
    print(f"compile: {'on' if plan.compiles else 'off'} ({plan.compile_reason})")
    if start_step:
        print(f"resuming {plan.resume_from} after step {start_step}")
    elif plan.config.base_ckpt:
        print(f"starting from {plan.config.base_ckpt}; at step 0 its val_loss is measured")
    else:
        print(
            f"a uniform guess over {c.vocab_size:,} tokens has loss {math.log(c.vocab_size):.4f} (its "
            "logarithm): the first loss should be near it"
        )


def draw_curves(folder: Path) -> Path | None:
    """Draw the curves of a run; returns the path of the picture, or None if there is none. If drawing fails,
    that is only a warning: the run itself has succeeded."""
    with OptionalPart(f"drawing the curves in {folder}"):
        return draw_loss(folder)
    return None


def print_end(plan: Plan) -> None:
    """Draw the curves, and print where the results are."""
    drawn = draw_curves(plan.folder)
    final = plan.folder / "final.ckpt"
    if not final.exists():  # the disk is full; a warning has been printed
        print(f"done, but {final} could not be written; make room, and run the same command with --resume")
        return
    metrics = read_metadata(final)["metrics"]
    best = f", best val_loss {metrics['best_val_loss']:.4f}" if metrics["best_val_loss"] is not None else ""
    curves = f"; curves in {drawn}" if drawn else ""
    print(f"done: {final} at step {metrics['step']}{best}{curves}")
    print(f"weights sha256 {weights_sha256(final)}")


def show_mask(plan: Plan, n: int) -> None:
    """Print the first `n` pairs of instruction and response. The part that is trained on is in colour on a
    terminal, elsewhere between `>>>` and `<<<`. Raises UserError if the data has no instructions."""
    from rich.console import Console
    from rich.text import Text

    if plan.config.data.source != "instructions":
        raise UserError("--show-mask shows instructions and responses; it needs data.source=instructions")
    console = Console(highlight=False, soft_wrap=True)
    data = plan.data.train
    for number, example in enumerate(data.examples[:n], 1):
        labels = example.labels(data.mask_prompt)
        trained = [False, *(labels != IGNORE).tolist()]  # for each id; the first is never a label
        console.print(
            f"--- example {number}: {len(example.ids)} tokens, {sum(trained)} trained on ---", style="bold"
        )
        text = Text()
        ids_before: list[int] = []
        pairs = zip(example.ids.tolist(), trained, strict=True)
        for is_trained, group in itertools.groupby(pairs, key=lambda pair: pair[1]):
            ids = [id for id, _ in group]
            part = printable_lines(text_after(plan.tokenizer, ids_before, ids))
            ids_before = ids
            marked = f">>>{part}<<<" if is_trained and not console.is_terminal else part
            text.append(marked, style="bold green" if is_trained else "dim")
        console.print(text)
    print("\n".join(plan.data.describe()))


def draw_examples(plan: Plan, n: int, stem: Path) -> Path:
    """Draw the first `n` pairs as two batches: one pair a row, and several pairs packed into a row. Returns
    the path of the picture."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    data = plan.data.train
    batches = {"padded": data.example_batch(n, packing=False), "packed": data.example_batch(n, packing=True)}
    return draw_mask(stem, batches, plan.tokenizer.decode)
