"""How likely a model finds given texts, and what it writes by itself, for many prompts at once.

B rows of a batch, T positions, V vocabulary.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from model import GPTMini
from sampling import PlainDecoder, SamplingConfig, generate_tokens
from support.decoding.fast import fast_decoder
from support.messages import UserError
from support.text.mid_document import ids_after, text_after
from tokenizer import Tokenizer

LOGITS_AT_ONCE = 2**25
CONTINUATIONS_AT_ONCE = 128


def encode(
    tokenizer: Tokenizer, text: str, begins: bool = False, after: Sequence[str | int] = ()
) -> list[int] | None:
    """The ids of `text`, which begins a document or follows the text `after`; None if it has characters that
    the tokenizer (kind `char`) lacks."""
    try:
        return tokenizer.encode_prompt(text) if begins else ids_after(tokenizer, after, text)
    except UserError:
        return None


@torch.no_grad()
def log_likelihoods(model: GPTMini, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """For each (context ids, following ids): the log of the probability that the model gives to what follows,
    summed over its tokens, and whether greedy decoding would give just that.

    A context too long for the model loses its beginning. Raises UserError if what follows is too long by
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
        width = len(rows[order[0]]) - 1  # the longest of this batch
        size = max(1, LOGITS_AT_ONCE // model.config.vocab_size // width)
        batch, order = order[:size], order[size:]
        # Zeros fill up the end of shorter rows and are not scored.
        ids = torch.zeros(len(batch), width + 1, dtype=torch.long)  # (B, T + 1)
        scored = torch.zeros(len(batch), width, dtype=torch.bool)  # (B, T)
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
    """What the model writes after each prompt, always taking the likeliest token, up to `lengths[i]` tokens
    or EOS."""
    window, eos_id = model.config.max_seq_len, tokenizer.eos_id
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    in_window = [i for i in by_length if len(prompts[i]) + lengths[i] <= window]
    written: dict[int, list[int]] = {}  # the new ids, by the prompt's number
    for start in range(0, len(in_window), CONTINUATIONS_AT_ONCE):
        batch = in_window[start : start + CONTINUATIONS_AT_ONCE]
        rows = continue_together(model, [prompts[i] for i in batch], [lengths[i] for i in batch], eos_id)
        written.update(zip(batch, rows, strict=True))
    for i in set(by_length) - set(in_window):  # beyond the context, each slides its own window
        ids = torch.tensor([prompts[i]], device=model.embed_tokens.weight.device)
        tokens = generate_tokens(model, ids, lengths[i], SamplingConfig(temperature=0), eos_id)
        written[i] = [token.item() for token in tokens]
    texts = []
    for i, prompt in enumerate(prompts):
        new_ids = written[i]
        if eos_id in new_ids:
            new_ids = new_ids[: new_ids.index(eos_id)]
        texts.append(text_after(tokenizer, prompt, new_ids))
    return texts


def continue_together(
    model: GPTMini, prompts: list[list[int]], lengths: list[int], eos_id: int
) -> list[list[int]]:
    """The likeliest `lengths[i]` tokens after each prompt, in one batch with one cache. The rows advance
    together: while a long prompt is still being read, a shorter one is already being continued."""
    device = model.embed_tokens.weight.device
    ends = [len(prompt) + length for prompt, length in zip(prompts, lengths, strict=True)]
    ids = torch.zeros(len(prompts), max(ends), dtype=torch.long, device=device)  # (B, T)
    given = torch.zeros_like(ids, dtype=torch.bool)  # whether an id is the prompt's
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
        given[row, : len(prompt)] = True
    shortest = min(map(len, prompts))
    decoder = fast_decoder(PlainDecoder(model, len(prompts)), shortest, max(ends) - shortest)
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    last = torch.tensor(ends, device=device)
    for end in range(shortest, max(ends)):
        likeliest = decoder.next_logits(ids[:, :end]).argmax(dim=-1)  # (B,)
        ids[:, end] = torch.where(given[:, end], ids[:, end], likeliest)
        wrote_eos = (ids[:, end] == eos_id) & ~given[:, end]
        finished |= wrote_eos | (last <= end + 1)
        if finished.all():
            break
    return [row[len(prompt) : end] for row, prompt, end in zip(ids.tolist(), prompts, ends, strict=True)]
