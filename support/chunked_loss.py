"""Cross-entropy of the next token, plain for small vocabularies and in chunks of rows for large ones.

With 50,000 tokens in the vocabulary the logits are by far the largest tensor of a training step: 8 x 1024
positions make 1.6 GB in float32, and their gradient as much again. The chunked form never holds more than
`CHUNK_ROWS` rows of them, because it computes their gradient at once, in the forward pass, while they are
there. Readers may skip its autograd: it equals the plain form, and a test says so.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
CHUNK_ROWS = 1024
CHUNKED_FROM_VOCAB = 16384  # below, the logits are small and the plain form is the faster one


def cross_entropy_sum(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of -log p(label) over the labels that are not -100, their number), the sum in float32.

    hidden (B, T, D) are the final states, weight (V, D) the head, labels (B, T) the tokens to predict.
    """
    rows, targets = hidden.flatten(0, 1), labels.flatten()  # (B*T, D), (B*T,)
    n_targets = (targets != IGNORE).sum()
    if weight.shape[0] >= CHUNKED_FROM_VOCAB:
        return ChunkedCrossEntropy.apply(rows, weight, targets), n_targets
    logits = F.linear(rows, weight)  # (B*T, V)
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="sum"), n_targets


class ChunkedCrossEntropy(torch.autograd.Function):
    """The same sum, chunk by chunk. d loss / d logits = softmax(logits) - onehot(target), for scored rows."""

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        device = rows.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype
        need_rows, need_weight = ctx.needs_input_grad[:2]
        head = weight.to(dtype)
        loss = torch.zeros((), device=rows.device, dtype=torch.float32)
        rows_grad = torch.empty_like(rows) if need_rows else None
        weight_grad = (
            torch.zeros(weight.shape, device=weight.device, dtype=torch.float32) if need_weight else None
        )
        for start in range(0, len(rows), CHUNK_ROWS):
            chunk = rows[start : start + CHUNK_ROWS].to(dtype)
            target = targets[start : start + CHUNK_ROWS]
            scored = target != IGNORE
            label = target.clamp(min=0)[:, None]
            logits = (chunk @ head.T).float()  # (chunk, V)
            log_total = logits.logsumexp(dim=-1)
            # Not +=: torch.compile in PyTorch 2.11 makes every gradient zero where the result was changed in
            # place.
            loss = loss + ((log_total - logits.gather(1, label).squeeze(1)) * scored).sum()
            if need_rows or need_weight:
                grad = logits.sub_(log_total[:, None]).exp_()  # softmax, in the logits' own memory
                grad.scatter_add_(1, label, torch.full_like(label, -1, dtype=grad.dtype))
                grad = grad.mul_(scored[:, None]).to(dtype)
                if need_rows:
                    rows_grad[start : start + CHUNK_ROWS] = grad @ head
                if need_weight:
                    weight_grad += grad.T @ chunk
        ctx.save_for_backward(rows_grad, weight_grad)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows_grad, weight_grad = ctx.saved_tensors
        return (
            None if rows_grad is None else rows_grad * grad_loss,
            None if weight_grad is None else (weight_grad * grad_loss).to(ctx.weight_dtype),
            None,
        )
