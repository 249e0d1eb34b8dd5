"""Fine-tune a trained checkpoint: on instructions, so that it answers them, or on more text.

python3 finetune.py --config config_finetune.yaml
python3 finetune.py --config config_finetune.yaml --override data.path=my_instructions.json
python3 finetune.py --config config_finetune.yaml --override base_ckpt=checkpoints/best.ckpt
python3 finetune.py --config config_finetune.yaml --override lora.rank=8   # small adapters, merged at the end
python3 finetune.py --config config_finetune.yaml --show-mask 3          # what is trained on, and what is not
python3 finetune.py --config config_finetune.yaml --resume                 # continue where it stopped
"""

import argparse
import sys
from pathlib import Path

from support.cli import add_run_flags, file_path, guarded, make_parser
from support.messages import UserError


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, those of train.py and two of its own. Raises UserError if they do not go together."""
    parser = make_parser(__doc__)
    add_run_flags(parser)
    parser.add_argument(
        "--show-mask",
        type=int,
        metavar="N",
        help="print N training examples, mark the tokens that are trained on, and exit",
    )
    parser.add_argument(
        "--picture",
        type=file_path,
        metavar="FILE",
        help="with --show-mask: also draw the examples as one batch, padded and packed (.svg and .png)",
    )
    args = parser.parse_args(argv)
    if args.show_mask is not None and args.show_mask < 1:
        raise UserError(f"--show-mask {args.show_mask} must be at least 1")
    if args.picture and args.show_mask is None:
        raise UserError("--picture goes with --show-mask N")
    if args.picture and (Path(args.picture).is_dir() or Path(args.picture).suffix not in (".svg", ".png")):
        raise UserError(f"--picture {args.picture}: name a file ending in .svg; a .png is drawn next to it")
    return args


def plan_or_answer(argv: list[str] | None = None) -> "Plan":
    """Check the flags and plan the run. --check, --show-step and --show-mask only print something: they end
    the program here. Raises UserError."""
    args = parse_args(argv)
    # Here, so that --help and wrong flags are answered before these slow imports.
    from support.run.checklist import run_checks
    from support.run.plan import plan_run
    from support.run.show import draw_examples, show_mask, show_step

    if args.check:
        sys.exit(run_checks(args, finetuning=True))
    only_looks = args.show_step is not None or args.show_mask is not None
    plan = plan_run(args, finetuning=True, only_looks=only_looks)
    if args.show_step is not None:
        print(show_step(plan, args.show_step))
    elif args.show_mask is not None:
        show_mask(plan, args.show_mask)
        if args.picture:
            stem = Path(args.picture).with_suffix("")  # draw_examples adds .svg and .png itself
            print(f"picture: {draw_examples(plan, args.show_mask, stem)}")
    if only_looks:
        sys.exit(0)
    return plan


if __name__ == "__main__":
    # A user's mistake is answered here, before the slow imports below; Lightning's is slower than all others.
    plan = guarded(plan_or_answer, results=False)
    from finetune import LitSFT, run  # this file again, as a module

    sys.exit(guarded(run, plan, LitSFT))

from torch import Tensor

from data import Batch
from instruct import score_responses
from support.checkpoint import KEY
from support.run.plan import Plan
from train import LitCausalLM, run


class LitSFT(LitCausalLM):
    """Supervised fine-tuning: the training step of `train.py`, on rows in which only the response has labels.

    What is new is what is measured: the loss of the base (the model that fine-tuning starts from) before the
    first step, the change since then, and how many answers are right.
    """

    validates_first = True  # before the first step, to measure the base
    base_val_loss: float | None = None  # of the base checkpoint, before the first step

    def validation_sums(self, batch: Batch) -> Tensor:
        """What is added up over the validation set. On instructions: loss and number of targets as in
        train.py, then the numbers of right tokens, of responses, and of responses that are right as a
        whole."""
        if self.config.data.source != "instructions":  # more training on plain text
            return super().validation_sums(batch)
        return score_responses(self.net, batch)

    def metrics_of(self, n_targets: float, sums: list[float]) -> dict[str, float]:
        """The metrics of a validation; `sums` are those that `validation_sums` adds to loss and targets.

        val_loss_change: val_loss minus that of the base. token_accuracy: the share of response tokens, EOS
        included, that the model finds likeliest, given the right tokens before. response_accuracy: the share
        of responses in which this holds for every token.
        """
        if self.base_val_loss is None:  # the first validation, before any step (validates_first)
            self.base_val_loss = self.val_loss
        metrics = {"val_loss_change": self.val_loss - self.base_val_loss}
        if sums:  # only instructions have these
            n_right, n_responses, n_all_right = sums
            metrics["token_accuracy"] = n_right / max(1.0, n_targets)
            metrics["response_accuracy"] = n_all_right / max(1.0, n_responses)
        return metrics

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Keep the loss of the base with the other metrics, for `on_load_checkpoint`."""
        super().on_save_checkpoint(checkpoint)  # fills checkpoint[KEY], this project's part of the file
        checkpoint[KEY]["metrics"]["base_val_loss"] = self.base_val_loss

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """A resumed run still compares with the base, not with the model that it resumed from."""
        super().on_load_checkpoint(checkpoint)
        self.base_val_loss = checkpoint[KEY]["metrics"]["base_val_loss"]


def main(argv: list[str] | None = None) -> int:
    """The whole script as one call: plan, then train. Returns the exit status."""
    return run(plan_or_answer(argv), LitSFT)
