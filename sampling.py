"""From logits to the next token: temperature, top-k, top-p, repetition penalty, and the loop that writes a
text."""

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Generator, Tensor


class SamplingConfig(BaseModel):
    """How a token is drawn from logits. Applied in this order: penalty, temperature, top-k, top-p, draw."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: float = Field(
        1.0,
        ge=0,
        allow_inf_nan=False,
        description="Divides the logits: below 1 safer, above 1 wilder, 0 greedy.",
    )
    top_k: int | None = Field(None, ge=1, description="Draw among the k likeliest tokens only.")
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Draw among the fewest tokens that together hold this probability (Holtzman et al., 2019).",
    )
    repetition_penalty: float = Field(
        1.0,
        ge=0.01,
        le=100,
        description="Above 1: tokens already there get less likely (Keskar et al., 2019).",
    )


def filter_logits(logits: Tensor, sampling: SamplingConfig, seen: Tensor) -> Tensor:
    """Logits (B, V) after penalty, temperature, top-k and top-p; what cannot be drawn is -inf. seen: (B,
    S) token ids."""
    logits = logits.float()
    if sampling.repetition_penalty != 1.0:
        score = logits.gather(1, seen)
        score = torch.where(
            score > 0, score / sampling.repetition_penalty, score * sampling.repetition_penalty
        )
        logits = logits.scatter(1, seen, score)
    if sampling.temperature > 0:
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / max(
            sampling.temperature, 1e-30
        )  # the largest stays 0: no overflow
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        kth = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))  # ties with the k-th all stay
    if sampling.top_p < 1.0:
        ordered, index = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(dim=-1)
        before = (
            probs.cumsum(dim=-1) - probs
        )  # probability of all likelier tokens; 0 for the first, so one always stays
        ordered = ordered.masked_fill(before >= sampling.top_p, float("-inf"))
        logits = logits.scatter(1, index, ordered)
    return logits


def sample_next(
    logits: Tensor, sampling: SamplingConfig, seen: Tensor, generator: Generator | None = None
) -> Tensor:
    """One token for each row, (B,), from logits (B, V). Temperature 0 takes the largest."""
    logits = filter_logits(logits, sampling, seen)
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(1)
