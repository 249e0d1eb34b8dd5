"""The lessons: each proof holds, and each can fail; the training loop, the tokenizer and AdamW at work."""

import contextlib
import io
import itertools
import json
import random
import re
import tracemalloc
from collections import Counter

import pytest
import torch
from conftest import train_tiny
from test_mutations import changed_copy

import from_scratch
import optim
from data import load_corpus, make_dataloaders, pack_corpus
from from_scratch import (
    BPE,
    PROOFS,
    AdamW,
    attention,
    byte_characters,
    clip_gradients,
    learning_rate,
    merge_pair,
    orthogonalize,
    rope_halves,
    sampling_probabilities,
    training_loop,
)
from support.checkpoint import load_model
from support.config.read import load_config
from support.files.tokenizer_files import gpt2_files
from support.messages import UserError
from tokenizer import EOS_TEXT, GPT2Tokenizer

CORPUS = (from_scratch.REPO / "data" / "tiny_corpus.txt").read_text(encoding="utf-8")


def proven(*parts: str) -> tuple[int, str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = from_scratch.main(list(parts))
    return code, out.getvalue()


@pytest.mark.parametrize("name", PROOFS)
def test_each_part_is_what_pytorch_or_a_library_computes(name):
    torch.manual_seed(1)  # other random numbers than the command's
    proofs = list(PROOFS[name]())
    assert proofs and all(proof.holds for proof in proofs), proofs


def test_the_command_prints_a_row_for_each_part_and_takes_beginnings_of_names():
    code, said = proven("linear", "ro", "SOFT")
    assert code == 0 and said.endswith("all agree\n")
    assert re.findall(r"^(\w+)  ", said, re.MULTILINE) == ["part", "Linear", "softmax", "RoPE"]
    with pytest.raises(UserError, match="no part begins with nothing; there are Linear, Embedding"):
        proven("nothing")


def wrong_softmax(x, dim=-1):
    """Overflows: the largest x is not taken out."""
    return x.exp() / x.exp().sum(dim=dim, keepdim=True)


def wrong_cross_entropy(logits, targets):
    """Softmax first and then its logarithm, which is log(0) for an unlikely token."""
    return -logits.softmax(dim=-1).gather(-1, targets[:, None]).log().mean()


def wrong_attention(q, k, v, mask=None):
    """Without the division by sqrt(hd)."""
    return attention(q * q.shape[-1] ** 0.5, k, v, mask)


def wrong_sampling_probabilities(logits, temperature=1.0, top_k=None, top_p=1.0):
    """Without top_k and top_p."""
    return sampling_probabilities(logits, temperature)


WRONG = {  # name in from_scratch.py: (the part whose proof fails, what stands in its place)
    "softmax": ("softmax", wrong_softmax),
    "cross_entropy": ("cross_entropy", wrong_cross_entropy),
    "silu": ("silu", torch.relu),
    "rope_halves": ("RoPE", lambda x: rope_halves(x, theta=1000.0)),
    "to_neighbours": ("RoPE", lambda x: x),
    "attention": ("attention", wrong_attention),
    "orthogonalize": ("orthogonalize", lambda G: orthogonalize(G, steps=1)),
    "clip_gradients": ("clip", lambda parameters, limit: clip_gradients(parameters, limit * 2)),
    "learning_rate": ("learning", lambda step, *rest: learning_rate(step + 1, *rest)),
    "sampling_probabilities": ("sampling", wrong_sampling_probabilities),
    "last_place": ("BPE", lambda pattern, text, start, end: end // 2),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_part_that_is_wrong_is_noticed(monkeypatch, name):
    part, wrong = WRONG[name]
    monkeypatch.setattr(from_scratch, name, wrong)
    code, said = proven(part)
    assert code == 1 and "DIFFERENT" in said and said.endswith(" differ\n")


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        pytest.param("v / (1 - b2**t)", "v", id="no bias correction"),
        pytest.param(
            'w.mul_(1 - lr * group["weight_decay"])',
            'g = g + group["weight_decay"] * w',
            id="decay through the gradient, as in Adam",
        ),
        pytest.param(
            "centered.pow(2).mean(dim=-1, keepdim=True)", "x.var(dim=-1, keepdim=True)", id="divided by D - 1"
        ),
        pytest.param(".tril()", ".triu()", id="the mask turned around"),
        pytest.param("return y if self.bias is None else y + self.bias", "return y", id="no bias"),
        pytest.param("(scored.sum() / n_targets)", "(1 / len(micro_batches))", id="mean of means"),
        pytest.param(
            "        optimizer.zero_grad()\n        log.append", "        log.append", id="no zero_grad"
        ),
    ],
)
def test_a_changed_line_is_noticed(tmp_path, monkeypatch, right, wrong):
    changed = changed_copy(tmp_path, "from_scratch.py", right, wrong)
    monkeypatch.setattr(changed, "REPO", from_scratch.REPO)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert changed.main(["Linear", "LayerNorm", "Multi", "AdamW", "training"]) == 1


def test_ours_in_use_agree_with_the_lessons():
    """optim.py computes for whole batches and all schedules what from_scratch.py writes out for one."""
    G = torch.randn(12, 20)
    torch.testing.assert_close(orthogonalize(G), optim.newton_schulz(G[None])[0])
    for warmup, total in ((10, 100), (0, 7), (4, 4)):
        for step in range(total + 30):
            ours = learning_rate(step, 3e-3, 3e-4, warmup, total)
            assert ours == pytest.approx(3e-3 * optim.lr_factor(step, "cosine", warmup, total, 0.1))


# ---- the training loop ---------------------------------------------------------------------------


def test_the_training_loop_gives_the_losses_and_weights_of_train_py(tmp_path):
    """The same config, first weights and micro-batches. The clip bites in every step."""
    words = (
        "training.max_steps=5",
        "training.optimizer=adamw",
        "training.schedule=cosine",
        "training.schedule_steps=5",
        "training.lr=0.003",
        "training.min_lr=0.0003",
        "training.weight_decay=0.3",
        "training.grad_clip=0.1",
        "training.val_every=100",
        "tokenizer.kind=byte",
    )
    trained = train_tiny(tmp_path / "trained", *words)
    start = train_tiny(tmp_path / "start", *words, "training.max_steps=0", "training.warmup_steps=0")
    net, tokenizer, _ = load_model(start.folder / "final.ckpt")
    config = load_config(trained.folder / "run_config.yaml")
    packed = pack_corpus(load_corpus(config), tokenizer, config)
    loader, _ = make_dataloaders(config, packed, tokenizer, 5)
    steps = [step.micro_batches for step in loader]
    assert [len(micro_batches) for micro_batches in steps] == [2] * 5
    log = training_loop(
        net.train(), steps, n_steps=5, peak=0.003, floor=0.0003, warmup=2, weight_decay=0.3, clip=0.1
    )
    for key, digits in (("step", 0), ("loss", 1e-5), ("lr", 1e-9), ("grad_norm", 1e-4)):
        theirs = [row[key] for row in trained.train_rows]
        assert [row[key] for row in log] == pytest.approx(theirs, rel=digits), key
    assert min(row["grad_norm"] for row in log) > 0.2
    theirs = trained.checkpoint()["state_dict"]
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, theirs[f"net.{name}"], rtol=0, atol=2e-5)


# ---- byte-pair encoding --------------------------------------------------------------------------


def naive_merges(words: Counter, n: int) -> list[tuple[int, int]]:
    """The first n merges, all pairs of all words counted again for each."""
    order = {byte: id for id, byte in enumerate(from_scratch.byte_order())}
    rows = [([order[byte] for byte in word.encode()], times) for word, times in words.items()]
    merges = []
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
    with pytest.raises(UserError, match="special token 'a b' is empty or has blanks"):
        BPE([], ["a b"])


def test_lines_are_encoded_as_the_whole_text_is():
    data = gpt2_files()
    bpe = BPE.from_files(data / "encoder.json", data / "vocab.bpe")
    expected = GPT2Tokenizer().backend.encode(CORPUS, allowed_special="all")
    assert list(bpe.encode_iterable(CORPUS.splitlines(keepends=True))) == expected
    text = " \n\n\n  x\n\n \ty  \n" * 3 + EOS_TEXT + "\n\n" + "z" * 50
    for lines in (text.splitlines(keepends=True), list(text), [text]):
        assert list(bpe.encode_iterable(lines)) == bpe.encode(text)


def test_ids_come_while_lines_are_still_being_read():
    """The source of lines never ends, so a reader that collected them first would never return."""
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
    """The cache of words is limited, in words and in characters, and a word that it has dropped is encoded
    to the same ids again."""
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


def test_bytes_that_are_not_text_become_the_replacement_character():
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
    """A naive trainer rewrites every word for every merge; this one rewrites a small share of them."""
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


def test_a_run_with_the_adamw_written_out_gives_the_losses_of_pytorch_s(tmp_path):
    runs = {}
    for optimizer in ("adamw", "adamw_from_scratch"):
        runs[optimizer] = train_tiny(tmp_path / optimizer, f"training.optimizer={optimizer}")
        assert runs[optimizer].code == 0, runs[optimizer].err
    ours, theirs = (runs[name].rows for name in ("adamw_from_scratch", "adamw"))
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for key in a.keys() & {"loss", "val_loss", "grad_norm"}:
            assert a[key] == pytest.approx(b[key], rel=1e-4), (a, b)


def test_a_run_with_the_adamw_written_out_resumes_exactly(tmp_path):
    ours = ("training.optimizer=adamw_from_scratch", "training.schedule_steps=12")
    whole = train_tiny(tmp_path / "whole", *ours)
    train_tiny(tmp_path / "parts", *ours, "training.max_steps=8")
    resumed = train_tiny(tmp_path / "parts", *ours, "--resume")
    assert resumed.sha256 == whole.sha256


def test_adamw_takes_a_closure_and_leaves_a_weight_without_gradient_alone():
    used, unused = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW([used, unused], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = used.pow(2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert unused.tolist() == [1.0] * 3 and unused not in optimizer.state and (used < 1).all()
