"""From logits to tokens: the filters that decide which tokens may be drawn, the draw, and the loop around.

A new filter is three edits here (its key in `SamplingConfig`, its function, its line in `filter_logits`), and
a flag in infer.py.

Shapes: B batch, T tokens of the prompt, S tokens so far, V vocab_size.
"""

from collections.abc import Iterator

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Generator, Tensor, nn

from support.decoding.fast import fast_decoder

NEVER = float("-inf")  # the logit of a token that cannot be drawn: exp(-inf) = 0


class SamplingConfig(BaseModel):
    """How the next token is drawn. `filter_logits` applies the controls in a fixed order."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: float = Field(
        1.0,
        ge=0,
        allow_inf_nan=False,
        description="Divides the logits: below 1 safer, above 1 wilder, 0: always the likeliest token.",
    )
    top_k: int | None = Field(None, ge=1, description="Draw among the k likeliest tokens only.")
    top_p: float = Field(
        1.0, gt=0, le=1, description="Draw among the fewest tokens that together hold this probability."
    )
    repetition_penalty: float = Field(
        1.0, ge=0.01, le=100, description="Above 1: tokens already in the text become less likely."
    )


# ---- filters: logits (B, V) in, logits (B, V) out ------------------------------------------------


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the tokens in `seen` (B, S) less likely: a positive logit is divided by the penalty, a negative
    one multiplied by it (Keskar et al., "CTRL", 2019). A token counts once, however often it was seen.

    A penalty above 1 must lower every score: 3 / 2 is below 3, and -3 * 2 is below -3.
    """
    score = logits.gather(1, seen)  # (B, S): the logit of each token of the text
    score = torch.where(score > 0, score / penalty, score * penalty)
    return logits.scatter(1, seen, score)  # write each back; a token seen twice gets the same value twice


def divide_by_temperature(logits: Tensor, temperature: float) -> Tensor:
    """A temperature below 1 widens the gaps between logits, one above 1 narrows them."""
    # Subtracting the largest changes no probability, and makes every logit at most 0. So a tiny temperature
    # can give -inf (never drawn), but not +inf, which would break the softmax.
    below_largest = logits - logits.amax(dim=-1, keepdim=True)
    # 1e-30: a smaller number could become 0 in float32, and 0 / 0 is not a number.
    return below_largest / max(temperature, 1e-30)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Only the k likeliest tokens stay, and every token that ties with the k-th."""
    k = min(k, logits.shape[-1])
    kth_largest = logits.topk(k, dim=-1).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < kth_largest, NEVER)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Go from the likeliest token down and stop as soon as the kept ones add up to p or more. A sure model
    keeps one token, an unsure one many. (Holtzman et al., "The Curious Case of Neural Text Degeneration",
    2019.)"""
    ordered, ids = logits.sort(dim=-1, descending=True)  # ids[b, 0] is the likeliest token of row b
    probs = ordered.softmax(dim=-1)
    # The probability of all likelier tokens. It is 0 for the first token, which therefore always stays.
    before = probs.cumsum(dim=-1) - probs
    ordered = ordered.masked_fill(before >= p, NEVER)
    return logits.scatter(1, ids, ordered)  # column i goes back to column ids[i]


def filter_logits(logits: Tensor, sampling: SamplingConfig, seen: Tensor) -> Tensor:
    """Logits (B, V) after all filters; `seen` (B, S) are the tokens so far. Temperature comes before top-p,
    because top-p adds up the probabilities that the temperature makes."""
    logits = logits.float()  # the model may give bf16, too coarse for small differences
    if sampling.repetition_penalty != 1.0:
        logits = penalize_repetition(logits, seen, sampling.repetition_penalty)
    if sampling.temperature > 0:  # 0 means: take the largest (sample_next), so nothing to divide
        logits = divide_by_temperature(logits, sampling.temperature)
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1.0:
        logits = keep_top_p(logits, sampling.top_p)
    return logits


# ---- tokens --------------------------------------------------------------------------------------


def sample_next(
    logits: Tensor, sampling: SamplingConfig, seen: Tensor, generator: Generator | None = None
) -> Tensor:
    """One token for each row, (B,), from logits (B, V) and the tokens so far, `seen` (B, S)."""
    logits = filter_logits(logits, sampling, seen)
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(1)


class PlainDecoder:
    """Logits for the next token, from the model's own forward pass. The cache holds what earlier tokens
    computed, see KVCache in model.py.

    When the text is longer than `max_seq_len`, the model gets only the last `max_seq_len` tokens, numbered
    again from 0. Each new token changes the number of all the others, but the cached keys were computed for
    the old numbers. So the cache is no longer used: each new token needs a pass over `max_seq_len` tokens.
    """

    def __init__(self, model: nn.Module, batch_size: int):
        self.model = model
        self.cache = model.new_cache(batch_size)

    def next_logits(self, ids: Tensor) -> Tensor:
        """Logits (B, V) after the text so far, `ids` (B, S), which is longer with each call."""
        window = self.model.config.max_seq_len
        if ids.shape[1] <= window:
            # Only the tokens that the cache does not hold: first the prompt, then one token each time.
            x = self.model.hidden_states(ids[:, self.cache.length :], cache=self.cache)
        else:
            x = self.model.hidden_states(ids[:, -window:])
        return self.model.lm_head(x[:, -1])  # (B, V), from the last position


@torch.no_grad()
def generate_tokens(
    model: nn.Module,
    input_ids: Tensor,
    max_new_tokens: int,
    sampling: SamplingConfig | None = None,
    eos_id: int | None = None,
    generator: Generator | None = None,
) -> Iterator[Tensor]:
    """Yield the next token of every row, (B,), up to `max_new_tokens` times, after the prompts (B, T).

    A row that has reached `eos_id` gets only `eos_id` from then on; when all rows have, the loop ends. The
    model is a `GPTMini` in eval mode.
    """
    sampling = sampling or SamplingConfig()
    ids = input_ids  # (B, S), one longer after each token
    # The same logits as those of the PlainDecoder, sooner. To see the plain way at work, leave this out.
    decoder = fast_decoder(PlainDecoder(model, len(ids)), ids.shape[1], max_new_tokens)
    finished = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)  # (B,)
    for _ in range(max_new_tokens):
        logits = decoder.next_logits(ids)  # (B, V)
        token = sample_next(logits, sampling, ids, generator)  # (B,)
        if eos_id is not None:
            token = token.masked_fill(finished, eos_id)
            finished = finished | (token == eos_id)
        yield token
        if eos_id is not None and finished.all():
            return
        ids = torch.cat([ids, token[:, None]], dim=1)
