"""What a model makes of given texts: how likely it finds them, and what it writes by itself, for many prompts
at once.

B rows of a batch, T positions, V vocabulary.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from model import GPTMini
from sampling import SamplingConfig, generate_tokens
from support.messages import UserError
from support.text.mid_document import ids_after, text_after
from tokenizer import Tokenizer

LOGITS = 2**25  # how many are held at once
ROWS = 128  # continuations made at once


def encode(
    tokenizer: Tokenizer, text: str, begins: bool = False, after: Sequence[str | int] = ()
) -> list[int] | None:
    """Ids of `text`, which begins a document, or stands after other text; None if it has characters that
    this tokenizer (kind `char`) does not know."""
    try:
        return tokenizer.encode_prompt(text) if begins else ids_after(tokenizer, after, text)
    except UserError:
        return None


@torch.no_grad()
def log_likelihoods(model: GPTMini, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """For each (context ids, following ids): the log of the probability that the model gives to what follows,
    summed over its tokens, and whether taking the likeliest token each time gives just that.

    A context too long for the model loses its beginning. Raises UserError where what follows is too long by
    itself.
    """
    device, window = model.embed_tokens.weight.device, model.config.max_seq_len
    longest = max((len(following) for _, following in pairs), default=0)
    if longest > window:
        raise UserError(
            f"a target has {longest} tokens, and the model reads {window}; shorten it, or leave this "
            "checkpoint out"
        )
    rows = [(context + following)[-window - 1 :] for context, following in pairs]
    found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
    while order:
        width = len(rows[order[0]]) - 1
        size = max(1, LOGITS // model.config.vocab_size // width)
        batch, order = order[:size], order[size:]
        ids = torch.zeros(
            len(batch), width + 1, dtype=torch.long
        )  # (B, T + 1); what fills up the end is not scored
        scored = torch.zeros(len(batch), width, dtype=torch.bool)
        for b, i in enumerate(batch):
            ids[b, : len(rows[i])] = torch.tensor(rows[i])
            scored[b, len(rows[i]) - 1 - len(pairs[i][1]) : len(rows[i]) - 1] = True
        ids, scored = ids.to(device), scored.to(device)
        logits = model.lm_head(model.hidden_states(ids[:, :-1])[scored]).float()  # (all scored positions, V)
        targets = ids[:, 1:][scored]
        lengths = [len(pairs[i][1]) for i in batch]
        losses = F.cross_entropy(logits, targets, reduction="none").double().split(lengths)
        hits = (logits.argmax(dim=-1) == targets).split(lengths)
        for i, loss, hit in zip(batch, losses, hits, strict=True):
            found[i] = (-loss.sum().item(), bool(hit.all()))
    return found


@torch.no_grad()
def continuations(
    model: GPTMini, tokenizer: Tokenizer, prompts: list[list[int]], lengths: list[int]
) -> list[str]:
    """What the model writes behind each prompt, always taking the likeliest token, up to `lengths[i]`
    tokens or EOS."""
    texts, window, order = (
        [""] * len(prompts),
        model.config.max_seq_len,
        sorted(range(len(prompts)), key=lambda i: len(prompts[i])),
    )
    short = [i for i in order if len(prompts[i]) + lengths[i] <= window]
    rows = {}
    for start in range(0, len(short), ROWS):
        batch = short[start : start + ROWS]
        rows |= zip(
            batch,
            continue_together(
                model, [prompts[i] for i in batch], [lengths[i] for i in batch], tokenizer.eos_id
            ),
            strict=True,
        )
    for i in set(order) - set(short):  # these go beyond the context, which slides for each by itself
        ids = torch.tensor([prompts[i]], device=model.embed_tokens.weight.device)
        greedy = SamplingConfig(temperature=0)
        tokens = generate_tokens(model, ids, lengths[i], greedy, tokenizer.eos_id)
        rows[i] = [token.item() for token in tokens]
    for i, row in rows.items():
        texts[i] = text_after(
            tokenizer, prompts[i], row[: row.index(tokenizer.eos_id)] if tokenizer.eos_id in row else row
        )
    return texts


def continue_together(
    model: GPTMini, prompts: list[list[int]], lengths: list[int], eos_id: int
) -> list[list[int]]:
    """The likeliest `lengths[i]` tokens behind each prompt, of any lengths, in one batch with one cache:
    the rows advance together, and where one prompt is still being read another is continued already."""
    ends = [len(prompt) + length for prompt, length in zip(prompts, lengths, strict=True)]
    ids = torch.zeros(
        len(prompts), max(ends), dtype=torch.long, device=model.embed_tokens.weight.device
    )  # (B, T)
    given, last = torch.zeros_like(ids, dtype=torch.bool), torch.tensor(ends, device=ids.device)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)], given[row, : len(prompt)] = torch.tensor(prompt), True
    cache = model.new_cache(batch_size=len(prompts))
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=ids.device)
    for end in range(min(map(len, prompts)), max(ends)):
        x = model.hidden_states(ids[:, cache.length : end], cache=cache)
        likeliest = model.lm_head(x[:, -1]).argmax(dim=-1)  # (B,)
        ids[:, end] = torch.where(given[:, end], ids[:, end], likeliest)
        finished |= ((ids[:, end] == eos_id) & ~given[:, end]) | (last <= end + 1)
        if finished.all():
            break
    return [row[len(prompt) : end] for row, prompt, end in zip(ids.tolist(), prompts, ends, strict=True)]
