"""The parts written out: each proof holds, and each can fail; the tokenizer and the optimizer in use."""

import contextlib
import io
import itertools
import json
import random
import re
import tracemalloc
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from conftest import train_tiny

import from_scratch
import optim
from from_scratch import BPE, PROOFS, AdamW, byte_characters, learning_rate, merge_pair, orthogonalize
from support.messages import UserError
from support.files.tokenizer_files import gpt2_files
from tokenizer import EOS_TEXT, GPT2Tokenizer

CORPUS = (from_scratch.REPO / "data" / "tiny_corpus.txt").read_text(encoding="utf-8")


def proven(*parts: str) -> tuple[int, str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = from_scratch.main(list(parts))
    return code, out.getvalue()


@pytest.mark.parametrize("name", PROOFS)
def test_each_part_is_what_pytorch_or_a_library_computes(name):
    torch.manual_seed(1)  # other numbers than those of the command
    proofs = list(PROOFS[name]())
    assert proofs and all(proof.holds for proof in proofs), proofs


def test_the_command_prints_a_row_for_each_part_and_takes_beginnings_of_names():
    code, said = proven("linear", "ro", "SOFT")
    assert code == 0 and said.endswith("all agree\n")
    assert re.findall(r"^(\w+)  ", said, re.M) == ["part", "Linear", "softmax", "RoPE"]
    with pytest.raises(UserError, match="no part begins with nothing; there are Linear, Embedding"):
        proven("nothing")


def wrong(name: str, change: Callable) -> tuple:
    """The part and a wrong version of it, made of the right one."""
    return pytest.param(name, change, id=name)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        wrong(
            "softmax", lambda right: lambda x, dim=-1: x.exp() / x.exp().sum(dim=dim, keepdim=True)
        ),  # overflows
        wrong("cross_entropy", lambda right: lambda logits, targets: -softmax_then_log(logits, targets)),
        wrong("silu", lambda right: lambda x: torch.relu(x)),
        wrong("rope_halves", lambda right: lambda x, theta=10000.0: right(x, theta=1000.0)),
        wrong("to_neighbours", lambda right: lambda x: x),
        wrong(
            "attention", lambda right: lambda q, k, v, mask=None: right(q * q.shape[-1] ** 0.5, k, v, mask)
        ),
        wrong("orthogonalize", lambda right: lambda G: right(G, steps=1)),
        wrong("clip_gradients", lambda right: lambda parameters, limit: right(parameters, limit * 2)),
        wrong("learning_rate", lambda right: lambda step, *rest: right(step + 1, *rest)),
        wrong(
            "sampling_probabilities",
            lambda right: lambda logits, temperature=1.0, top_k=None, top_p=1.0: right(logits, temperature),
        ),
        wrong("last_place", lambda right: lambda pattern, text, start, end: end // 2),
    ],
)
def test_a_part_that_is_wrong_is_noticed(monkeypatch, name, change):
    monkeypatch.setattr(from_scratch, name, change(getattr(from_scratch, name)))
    code, said = proven()
    assert code == 1 and "DIFFERENT" in said and said.endswith(" differ\n")


def softmax_then_log(logits, targets):
    return logits.softmax(dim=-1).gather(-1, targets[:, None]).log().mean()


@pytest.mark.parametrize(
    ("right", "change"),
    [
        ("v / (1 - b2**t)", "v"),  # no bias correction
        ("w.mul_(1 - lr * group[\"weight_decay\"])", "g = g + group[\"weight_decay\"] * w"),  # decay through the gradient, as in Adam
        ("centered.pow(2).mean(dim=-1, keepdim=True)", "x.var(dim=-1, keepdim=True)"),  # divided by D - 1
        (".tril()", ".triu()"),  # the mask turned around
        ("return y if self.bias is None else y + self.bias", "return y"),
    ],
)  # fmt: skip
def test_a_changed_line_is_noticed(right, change):
    source = (from_scratch.REPO / "from_scratch.py").read_text(encoding="utf-8")
    assert source.count(right) == 1
    changed = {"__name__": "changed", "__file__": from_scratch.__file__}
    exec(compile(source.replace(right, change), "changed", "exec"), changed)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert changed["main"](["Linear", "LayerNorm", "Multi", "AdamW"]) == 1


def test_ours_in_use_agree_with_the_lessons():
    """What optim.py computes for whole batches, and for all schedules, is what is written out here for one."""
    G = torch.randn(12, 20)
    torch.testing.assert_close(orthogonalize(G), optim.newton_schulz(G[None])[0])
    for warmup, total in ((10, 100), (0, 7), (4, 4)):
        for step in range(total + 30):
            ours = learning_rate(step, 3e-3, 3e-4, warmup, total)
            assert ours == pytest.approx(3e-3 * optim.lr_factor(step, "cosine", warmup, total, 0.1))


# ---- byte-pair encoding --------------------------------------------------------------------------


def naive_merges(words: Counter, n: int) -> list[tuple[int, int]]:
    """Count all pairs of all words anew for each merge."""
    order = {byte: id for id, byte in enumerate(from_scratch.byte_order())}
    rows, merges = [([order[byte] for byte in word.encode()], times) for word, times in words.items()], []
    for step in range(n):
        counts = Counter()
        for ids, times in rows:
            for pair in itertools.pairwise(ids):
                counts[pair] += times
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        rows = [(merge_pair(ids, best, 256 + step), times) for ids, times in rows]
    return merges


@pytest.mark.parametrize("seed", range(4))
def test_training_finds_the_merges_of_a_naive_count(seed):
    """On words of few letters, in which pairs overlap (aaaa) and come and go."""
    draw = random.Random(seed)
    text = " ".join("".join(draw.choices("aab", k=draw.randint(1, 9))) for _ in range(300))
    bpe = BPE.train([text], 257 + 60)
    assert bpe.merges == naive_merges(Counter(bpe.words.findall(text)), 60)
    assert bpe.decode(bpe.encode(text)) == text


def test_special_tokens_are_one_token_and_merge_with_nothing():
    bpe = BPE.train([f"one{EOS_TEXT}one two<|x|>two " * 20], 300, ["<|x|>", EOS_TEXT, "<|x|>y"])
    ids = bpe.encode(f"one{EOS_TEXT} two<|x|>y<|x|>")
    assert [id for id in ids if id >= bpe.vocab_size - 3] == [
        bpe.specials[EOS_TEXT],
        bpe.specials["<|x|>y"],
        bpe.specials["<|x|>"],
    ]
    assert bpe.decode(ids) == f"one{EOS_TEXT} two<|x|>y<|x|>"
    assert not any(b"<|" in token for token in bpe.bytes_of[256:])
    with pytest.raises(UserError, match="special token 'a b' has blanks"):
        BPE([], ["a b"])


def test_lines_are_encoded_as_the_whole_text_is():
    data = gpt2_files()
    bpe = BPE.from_files(data / "encoder.json", data / "vocab.bpe")
    assert list(bpe.encode_iterable(CORPUS.splitlines(keepends=True))) == GPT2Tokenizer().backend.encode(
        CORPUS, allowed_special="all"
    )
    text = " \n\n\n  x\n\n \ty  \n" * 3 + EOS_TEXT + "\n\n" + "z" * 50
    for lines in (text.splitlines(keepends=True), list(text), [text]):
        assert list(bpe.encode_iterable(lines)) == bpe.encode(text)


def test_lines_are_not_gathered():
    """The first ids are there before the tenth line is read, of a source without end."""
    bpe, read = BPE.train([CORPUS], 400), []

    def endless():
        while True:
            read.append(1)
            yield "attention is a weighted sum\n"

    stream = bpe.encode_iterable(endless())
    for _ in range(5000):
        next(stream)
    n_tokens = len(bpe.encode("attention is a weighted sum\n"))
    assert len(read) < 5000 / n_tokens + 3


def test_a_text_of_ever_new_words_does_not_fill_the_memory(monkeypatch):
    """The cache of words is bounded, in words and in characters, and what it forgets is encoded again to
    the same ids."""
    monkeypatch.setattr(from_scratch, "CACHED_WORDS", 300)
    bpe, dice = BPE.train([CORPUS], 400), random.Random(3)
    lines = [
        " ".join(["".join(dice.choices("etaoin", k=9)), "x" * dice.choice((3, 99)), "attention"]) + "\n"
        for _ in range(3000)
    ]
    tracemalloc.start()
    most = 0
    for _ in bpe.encode_iterable(iter(lines)):
        most = max(most, len(bpe.cache))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 250 < most <= 300 and max(map(len, bpe.cache)) <= from_scratch.CACHED_LENGTH
    assert peak < 300_000, "3,000 different words and their ids take more"
    text = "".join(lines[:500])
    ids = bpe.encode(text)
    monkeypatch.setattr(from_scratch, "CACHED_LENGTH", -1)  # nothing is remembered
    forgetful = BPE(bpe.merges, [EOS_TEXT])
    assert forgetful.encode(text) == ids and not forgetful.cache


def test_bytes_that_are_no_text_become_the_replacement_character():
    bpe = BPE([])
    ids = [bpe.id_of_byte[byte] for byte in b"a\xff\xe6\x9db"]
    assert bpe.decode(ids) == b"a\xff\xe6\x9db".decode("utf-8", errors="replace") == "a\ufffd\ufffdb"


def test_files_are_read_and_wrong_ones_refused(tmp_path):
    bpe, chars = BPE.train([CORPUS], 400), byte_characters()
    written = ["".join(chars[byte] for byte in token) for token in bpe.bytes_of]
    vocab = {text: id for id, text in enumerate([*written, EOS_TEXT])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(f"{written[a]} {written[b]}\n" for a, b in bpe.merges)
    )
    again = BPE.from_files(tmp_path / "vocab.json", tmp_path / "merges.txt")
    assert again.encode(CORPUS) == bpe.encode(CORPUS) and again.vocab_size == bpe.vocab_size == 400
    for broken in (
        "[]",
        "{",
        json.dumps({**vocab, written[300]: 301}),
        json.dumps({**vocab, EOS_TEXT: 5}),
        json.dumps({"\u6771": 0}),
    ):
        (tmp_path / "broken.json").write_text(broken)
        with pytest.raises(UserError, match="do not belong together"):
            BPE.from_files(tmp_path / "broken.json", tmp_path / "merges.txt")
    (tmp_path / "merges.txt").write_text("a b c\n")
    with pytest.raises(UserError, match="do not belong together"):
        BPE.from_files(tmp_path / "vocab.json", tmp_path / "merges.txt")


def test_training_touches_only_the_words_that_hold_a_pair(monkeypatch):
    """A naive trainer rewrites every word for every merge; this one a small share of that."""
    rewritten = 0

    def counted(*args):
        nonlocal rewritten
        rewritten += 1
        return merge_pair(*args)

    monkeypatch.setattr(from_scratch, "merge_pair", counted)
    bpe = BPE.train([CORPUS], 800)
    n_words = len(set(bpe.words.findall(CORPUS)))
    assert len(bpe.merges) > 500 and rewritten < 0.03 * n_words * len(bpe.merges)


# ---- AdamW in training ---------------------------------------------------------------------------


def test_training_with_the_adamw_written_out_gives_the_curve_of_pytorchs(tmp_path):
    runs = {}
    for optimizer in ("adamw", "adamw_from_scratch"):
        runs[optimizer] = train_tiny(tmp_path / optimizer, f"training.optimizer={optimizer}")
        assert runs[optimizer].code == 0, runs[optimizer].err
    ours, theirs = (runs[name].rows for name in ("adamw_from_scratch", "adamw"))
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for key in a.keys() & {"loss", "val_loss", "grad_norm"}:
            assert a[key] == pytest.approx(b[key], rel=1e-4), (a, b)


def test_a_run_with_it_resumes_exactly(tmp_path):
    ours = ("training.optimizer=adamw_from_scratch", "training.schedule_steps=12")
    whole = train_tiny(tmp_path / "whole", *ours)
    train_tiny(tmp_path / "parts", *ours, "training.max_steps=8")
    resumed = train_tiny(tmp_path / "parts", *ours, "--resume")
    assert resumed.sha256 == whole.sha256


def test_closure_and_missing_gradients():
    used, unused = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW([used, unused], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = used.pow(2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert unused.tolist() == [1.0] * 3 and unused not in optimizer.state and (used < 1).all()
