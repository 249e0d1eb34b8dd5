"""The cross-entropy of a large vocabulary, in chunks of rows.

With 50,000 tokens in the vocabulary the logits are by far the largest tensor of a training step: 8 x 1024
positions make 1.6 GB in float32, and their gradient takes the same again. The form here never holds more than
`CHUNK_ROWS` rows of them. While the logits of a chunk are in memory, it computes their gradient too, so the
gradient is made in the forward pass. The loss is the same as that of `cross_entropy_sum` in
model.py, which tests/core/test_loss.py checks. You may skip this file on a first reading.

Shapes: N = B * T rows, D d_model, V vocab_size, P = V or the next multiple of 64, C rows of a chunk.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from support.device import matmul_dtype

IGNORE = -100  # the label of a position that is not scored
CHUNK_ROWS = 1024
ALIGN_TO = 64  # columns of the logits, where alignment matters
CHUNKED_FROM_VOCAB = 16384  # for smaller vocabularies the logits are small, and the plain form is faster


def chunked_cross_entropy_sum(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk_rows: int = CHUNK_ROWS
) -> Tensor:
    """Sum of -log p(label) over the labels that are not IGNORE, a float32 number.

    hidden (B, T, D) are the final states, weight (V, D) is the head, labels (B, T) are the tokens to predict.
    """
    return ChunkedCrossEntropy.apply(hidden.flatten(0, 1), weight, labels.flatten(), chunk_rows)


def align_head(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The head (V, D) in this dtype; for a GPU, with rows of zeros up to a multiple of 64: (P, D).

    The matrix units of a GPU want rows of logits that start at aligned addresses. With GPT-2's odd 50,257 a
    step of the 124M model took 104 ms instead of 77 on an H200. The copy is needed anyway, for the dtype. The
    weights, the optimizer and the checkpoints know nothing of the added rows.
    """
    n_extra = -len(weight) % ALIGN_TO
    if n_extra == 0 or (dtype == torch.float32 and not weight.is_cuda):
        return weight.to(dtype)
    return F.pad(weight.to(dtype), (0, 0, 0, n_extra))


def log_softmax_of_vocab(logits: Tensor, vocab_size: int) -> Tensor:
    """log p of each token, in float32, since bf16 is too coarse for a sum over V. Columns from `vocab_size`
    on, those of the rows that `align_head` has added, get no probability. (C, P) to (C, P)."""
    if logits.shape[1] > vocab_size:
        logits[:, vocab_size:] = float("-inf")
    return F.log_softmax(logits, dim=-1, dtype=torch.float32)


class ChunkedCrossEntropy(torch.autograd.Function):
    """The gradient, d loss / d logits, is softmax(logits) - onehot(target) in a scored row, and 0 in the
    others. PyTorch calls `forward` and `backward`; what one leaves for the other is in `ctx`."""

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int) -> Tensor:
        """The loss. The gradients of rows and weight are made here too, and kept for `backward`."""
        dtype = matmul_dtype(rows)
        need_rows, need_weight = ctx.needs_input_grad[:2]
        vocab_size = len(weight)
        head = align_head(weight, dtype)  # (P, D)
        loss = torch.zeros((), device=rows.device, dtype=torch.float32)
        rows_grad = weight_grad = None
        if need_rows:
            rows_grad = torch.empty_like(rows)  # (N, D)
        if need_weight:
            weight_grad = torch.zeros(head.shape, device=weight.device, dtype=torch.float32)  # (P, D)
        for start in range(0, len(rows), chunk_rows):
            chunk = rows[start : start + chunk_rows].to(dtype)  # (C, D)
            target = targets[start : start + chunk_rows]  # (C,)
            scored = (target != IGNORE)[:, None]  # (C, 1)
            label = target.clamp(min=0)[:, None]  # (C, 1): a valid token where nothing is scored, too
            log_probs = log_softmax_of_vocab(chunk @ head.T, vocab_size)  # (C, P)
            of_label = log_probs.gather(1, label)  # (C, 1): in each row, log p(label)
            # Not -=: with it, torch.compile in PyTorch 2.11 makes all gradients zero.
            loss = loss - (of_label * scored).sum()
            if need_rows or need_weight:
                # softmax, in the memory of log_probs; then -1 in the column of each row's label
                grad = log_probs.exp_().to(dtype)  # (C, P)
                grad.scatter_(1, label, (of_label.exp() - 1).to(dtype))
                if need_rows:
                    rows_grad[start : start + chunk_rows] = (grad @ head) * scored
                if need_weight:
                    weight_grad += grad.T @ (chunk * scored)
                del grad
            del log_probs  # before the next chunk needs the same memory again
        if need_weight:
            weight_grad = weight_grad[:vocab_size]  # (V, D)
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
