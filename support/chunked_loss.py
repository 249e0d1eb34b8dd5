"""The cross-entropy of a large vocabulary, in chunks of rows.

With 50,000 tokens in the vocabulary the logits are by far the largest tensor of a training step: 8 x 1024
positions make 1.6 GB in float32, and their gradient takes the same again. The form here never holds more than
`CHUNK_ROWS` rows of them. While the logits of a chunk are in memory, it computes their gradient too, so the
gradient is made in the forward pass. The loss is the same as that of `cross_entropy_sum` in
model.py, which tests/core/test_loss.py checks. You may skip this file on a first reading.

Shapes: N = B * T rows, D d_model, V vocab_size, C rows of a chunk.
"""

import torch
from torch import Tensor

IGNORE = -100  # the label of a position that is not scored
CHUNK_ROWS = 1024
CHUNKED_FROM_VOCAB = 16384  # for smaller vocabularies the logits are small, and the plain form is faster


def chunked_cross_entropy_sum(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk_rows: int = CHUNK_ROWS
) -> Tensor:
    """Sum of -log p(label) over the labels that are not IGNORE, a float32 number.

    hidden (B, T, D) are the final states, weight (V, D) is the head, labels (B, T) are the tokens to predict.
    """
    return ChunkedCrossEntropy.apply(hidden.flatten(0, 1), weight, labels.flatten(), chunk_rows)


class ChunkedCrossEntropy(torch.autograd.Function):
    """The gradient, d loss / d logits, is softmax(logits) - onehot(target) in a scored row, and 0 in the
    others. PyTorch calls `forward` and `backward`; what one leaves for the other is in `ctx`."""

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int) -> Tensor:
        """The loss. The gradients of rows and weight are made here too, and kept for `backward`."""
        device = rows.device.type
        # In mixed precision (autocast) the matrix products are done in a smaller type, such as bf16.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype
        need_rows, need_weight = ctx.needs_input_grad[:2]
        head = weight.to(dtype)  # (V, D)
        loss = torch.zeros((), device=rows.device, dtype=torch.float32)
        rows_grad = weight_grad = None
        if need_rows:
            rows_grad = torch.empty_like(rows)  # (N, D)
        if need_weight:
            weight_grad = torch.zeros(weight.shape, device=weight.device, dtype=torch.float32)  # (V, D)
        for start in range(0, len(rows), chunk_rows):
            chunk = rows[start : start + chunk_rows].to(dtype)  # (C, D)
            target = targets[start : start + chunk_rows]  # (C,)
            scored = target != IGNORE
            label = target.clamp(min=0)[:, None]  # (C, 1): a valid token where nothing is scored, too
            logits = (chunk @ head.T).float()  # (C, V), float32: bf16 is too coarse for a sum over V
            log_total = logits.logsumexp(dim=-1)  # (C,)
            label_logit = logits.gather(1, label).squeeze(1)  # (C,): in each row, the logit of its label
            # Not +=: with it, torch.compile in PyTorch 2.11 makes all gradients zero.
            loss = loss + ((log_total - label_logit) * scored).sum()
            if need_rows or need_weight:
                grad = logits.sub_(log_total[:, None]).exp_()  # softmax, in the memory of the logits
                # minus onehot: add -1 to each row, in the column of its label
                grad.scatter_add_(1, label, torch.full_like(label, -1, dtype=grad.dtype))
                grad = grad.mul_(scored[:, None]).to(dtype)  # (C, V)
                if need_rows:
                    rows_grad[start : start + chunk_rows] = grad @ head
                if need_weight:
                    weight_grad += grad.T @ chunk
        ctx.save_for_backward(rows_grad, weight_grad)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """The gradients of `rows` and `weight`. They were made in the forward pass; only the factor
        `grad_loss`, the gradient of the loss itself, is still missing."""
        rows_grad, weight_grad = ctx.saved_tensors
        if rows_grad is not None:
            rows_grad = rows_grad * grad_loss
        if weight_grad is not None:
            weight_grad = (weight_grad * grad_loss).to(ctx.weight_dtype)
        return rows_grad, weight_grad, None, None
