"""How converted weights are checked: our model and another program must give the same logits for the same
ids. A difference is a UserError; a success is returned in words."""

from pathlib import Path

import torch
from torch import Tensor

from model import GPTMini
from support.exchange.compare_texts import first_line, load_transformers
from support.messages import UserError

ROWS, LENGTH = 2, 64  # of the random ids
# The largest allowed difference between logits, by the type of the weights; it is multiplied by
# max(1, largest logit / 10).
ALLOWED_DIFFERENCE = {"f32": 1e-4, "f16": 3e-2, "q8_0": 2.0}


def random_ids(vocab_size: int, rows: int, length: int) -> Tensor:
    """(rows, length), the same each time."""
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits_to_compare(model: GPTMini, rows: int = ROWS) -> Tensor:
    """Our logits for random ids, (rows, tokens, V). They are computed in float32, as on the other side, and
    the model stays in float32."""
    length = min(LENGTH, model.config.max_seq_len)
    return model.float()(random_ids(model.config.vocab_size, rows, length))


def compare_logits(ours: Tensor, theirs: Tensor, program: str, allowed: float) -> str:
    """What was compared, in words. Raises UserError if the largest difference is above
    `allowed` times max(1, largest logit / 10)."""
    largest = min(ours.abs().max().item(), theirs.abs().max().item())
    difference = (ours - theirs).abs().max().item()
    bound = allowed * max(1.0, largest / 10)
    result = (
        f"largest difference of {ours.numel():,} logits from {program}: {difference:.1e} "
        f"(allowed {bound:.1e})"
    )
    if not difference <= bound:  # also if it is NaN
        raise UserError(
            f"{result}; the conversion is wrong, and nothing has been kept. Please report it with the "
            "model's config"
        )
    return f"verified: {result}"


@torch.no_grad()
def check_logits(ours: Tensor, folder: Path, written_by_us: bool = False) -> str:
    """Compare the logits of `logits_to_compare` with those of transformers for the model in `folder`, in
    float32. Returns the result in words. Raises UserError if they differ, or if transformers cannot open a
    folder that was `written_by_us`.

    The logits are given, not computed here, so that our model can be gone from memory before transformers
    loads its own.
    """
    loaded = load_transformers()
    if loaded is None:
        return "NOT VERIFIED: transformers is not installed, so nothing could be compared with it"
    transformers, program = loaded
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            # Left over in config.json: our reader has checked that the weights are plain floats.
            del config.quantization_config
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            folder, config=config, trust_remote_code=False
        )
    except Exception as error:
        # e.g. it opens no .bin with an older PyTorch, needs another package, or does not know a setting
        if written_by_us:
            raise UserError(
                f"{program} cannot open what was written ({first_line(error)}); nothing has been kept"
            ) from None
        return f"NOT VERIFIED: {program} cannot open it ({first_line(error)})"
    rows, length, vocab_size = ours.shape
    logits = theirs.float().eval()(input_ids=random_ids(vocab_size, rows, length)).logits
    return compare_logits(ours, logits[..., :vocab_size], program, ALLOWED_DIFFERENCE["f32"])
