"""What a step trains on, with the text in memory: every token once, and the same steps for any number of
workers, any number of ranks and after a resume."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import BYTE, SEQ_LEN, batches_of, flat, same, same_steps

from data import (
    IndexedSteps,
    PackedLMDataset,
    StepSampler,
    StepShape,
    ValBatches,
    document_segments,
    load_corpus,
    make_dataloaders,
    pack_corpus,
    tokenize,
    tokenizer_documents,
)
from support.config.read import validate_config
from support.config.schema import Config
from support.messages import UserError
from tokenizer import ByteTokenizer, CharTokenizer, build_tokenizer


def positions(n: int) -> np.ndarray:
    """The ids 0 to n - 1, so that a label tells which token of the text it is."""
    return np.arange(n)


# ---- tokens --------------------------------------------------------------------------------------


def test_eos_follows_every_document_and_is_nowhere_else():
    EOS = BYTE.eos_id
    row = tokenize(["ab", "c", "<|endoftext|>"], BYTE).tolist()
    assert row == [*b"ab", EOS, *b"c", EOS, *b"<|endoftext|>", EOS]


def test_a_warning_counts_validation_documents_that_are_also_trained_on(tmp_path, capsys):
    texts = [f"text number {i} is told here\n<|endoftext|>\n" for i in range(9)]
    (tmp_path / "all.txt").write_text("".join(texts))
    (tmp_path / "other.txt").write_text("".join(texts[:2]) + "another text\n<|endoftext|>\n")
    tree = {
        "data": {"path": str(tmp_path / "all.txt"), "val_path": str(tmp_path / "other.txt")},
        "training": {"max_steps": 1},
    }
    load_corpus(validate_config(tree))
    assert "2 of 3 validation documents are trained on too" in capsys.readouterr().err
    (tmp_path / "other.txt").write_text("another text")
    load_corpus(validate_config(tree))
    assert "trained on too" not in capsys.readouterr().err


def test_tokenizing_many_documents_equals_tokenizing_one_by_one():
    """The documents fill more than one batch of the tokenizer."""
    documents = [f"document {i}" * (i % 3 + 1) for i in range(2500)]
    tokenizer = build_tokenizer("bpe", documents, 300)
    expected = [i for d in documents for i in [*tokenizer.encode(d), tokenizer.eos_id]]
    assert tokenize(iter(documents), tokenizer).tolist() == expected


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(257, np.uint16), (2**16, np.uint16), (2**16 + 1, np.uint32)]
)
def test_a_token_takes_two_bytes_if_the_vocabulary_is_small_enough(vocab_size, dtype):
    class Wide(ByteTokenizer):
        eos_id = vocab_size - 1

    Wide.vocab_size = vocab_size
    row = tokenize(["a"], Wide())
    assert row.dtype == dtype
    assert row.tolist() == [97, vocab_size - 1], "the largest id fits"


# ---- blocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [*range(8, 31), 100, 127])
def test_each_token_is_predicted_exactly_once_in_an_epoch(n):
    """Except the first, which has nothing before it, and the tail, which is counted."""
    blocks = PackedLMDataset(positions(n), SEQ_LEN)
    labels = flat([blocks[i] for i in range(len(blocks))])
    assert labels == list(range(1, n - blocks.n_dropped))
    assert 0 <= blocks.n_dropped < SEQ_LEN


@pytest.mark.parametrize("n", range(8))
def test_a_text_shorter_than_a_block_gives_no_block(n):
    blocks = PackedLMDataset(positions(n), SEQ_LEN)
    assert (len(blocks), blocks.n_dropped) == (0, n)


@pytest.mark.parametrize("pad_last", [False, True])
def test_labels_are_the_input_shifted_by_one(pad_last):
    batch = PackedLMDataset(positions(95), SEQ_LEN, stride=3, pad_last=pad_last).batch([0, 4, 9, 28])
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].shape == batch["labels"].shape == (4, SEQ_LEN)
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert torch.equal(batch["labels"], batch["input_ids"] + 1)


@pytest.mark.parametrize("stride", range(1, 8))
@pytest.mark.parametrize("n", [8, 9, 20, 33, 50])
def test_blocks_start_every_stride_tokens_and_overlap_by_the_rest(n, stride):
    blocks = PackedLMDataset(positions(n), SEQ_LEN, stride)
    starts = [start for start in range(0, n, stride) if start + SEQ_LEN + 1 <= n]
    assert [blocks[i]["input_ids"].tolist() for i in range(len(blocks))] == [
        list(range(s, s + SEQ_LEN)) for s in starts
    ]
    assert blocks.n_dropped == n - (starts[-1] + SEQ_LEN + 1)


@pytest.mark.parametrize("stride", [7, 3])
@pytest.mark.parametrize("n", [2, 3, 7, 8, 9, 14, 15, 16, 50])
def test_padding_keeps_the_last_tokens_and_has_no_labels(n, stride):
    """Validation counts every token: the last block is padded, and the padding has no labels."""
    blocks = PackedLMDataset(positions(n), SEQ_LEN, stride, pad_last=True)
    labels = torch.stack([blocks[i]["labels"] for i in range(len(blocks))])
    real = labels[labels != -100]
    assert set(real.tolist()) == set(range(1, n))
    assert stride < SEQ_LEN or len(real) == n - 1, "without overlap, each token once"
    assert blocks.n_dropped == 0
    for row, ids in zip(labels, (blocks[i]["input_ids"] for i in range(len(blocks))), strict=True):
        assert (row != -100).any(), "no block is only padding"
        assert ((row == -100) | (row == ids + 1)).all()


@pytest.mark.parametrize("n", [0, 1])
def test_no_block_is_made_if_there_is_nothing_to_predict(n):
    assert len(PackedLMDataset(positions(n), SEQ_LEN, pad_last=True)) == 0


def test_a_batch_is_its_blocks_stacked():
    blocks = PackedLMDataset(positions(100), SEQ_LEN, segment_end_id=30)
    batch = blocks.batch([5, 2, 2])
    for name, tensor in batch.items():
        assert torch.equal(tensor, torch.stack([blocks[i][name] for i in (5, 2, 2)]))


# ---- document mask -------------------------------------------------------------------------------


def test_a_segment_ends_with_its_eos():
    """Worked out by hand: an EOS belongs to the document it closes, E E holds an empty document, and a
    block may begin with an EOS."""
    a, b, E = 97, 98, 256
    rows = np.array([[a, E, b, b, E, a, a], [a, a, a, a, a, a, E], [E, E, a, E, E, E, b]])
    assert document_segments(rows, E).tolist() == [[0, 0, 1, 1, 1, 2, 2], [0] * 7, [0, 1, 2, 2, 3, 4, 5]]


@pytest.mark.parametrize("document_mask", [True, False])
def test_segments_come_with_the_batch_when_asked_for(tmp_path, document_mask):
    config, packed = (
        text_config(tmp_path, document_mask=document_mask),
        text_data(tmp_path, document_mask=document_mask),
    )
    train, val = make_dataloaders(config, packed, BYTE, 2)
    for batch in [*next(iter(train)).micro_batches, next(iter(val))]:
        assert ("segments" in batch) == document_mask
        if document_mask:
            assert batch["segments"].shape == batch["input_ids"].shape
            for ids, segments in zip(batch["input_ids"].tolist(), batch["segments"].tolist(), strict=True):
                assert segments == [ids[:t].count(BYTE.eos_id) for t in range(len(ids))]


# ---- steps ---------------------------------------------------------------------------------------

SHAPE = StepShape(micro_batch_size=2, grad_accum_steps=3)


def indexed(
    shape: StepShape = SHAPE,
    n_tokens: int = 7 * 25 + 1,
    seed: int = 42,
    shuffle: bool = True,
    n_steps: int = 20,
) -> IndexedSteps:
    """25 blocks of 7, so a step of 6 blocks never divides an epoch."""
    return IndexedSteps(PackedLMDataset(positions(n_tokens), SEQ_LEN), shape, seed, shuffle, n_steps)


def blocks_of(batches: Iterable[dict]) -> list[int]:
    """The numbers of the blocks in these micro-batches, in order."""
    return [i // SEQ_LEN for batch in batches for i in batch["input_ids"][:, 0].tolist()]


def test_every_epoch_visits_every_block_once_in_another_order():
    steps = indexed(n_steps=25)
    visited = blocks_of(batches_of([steps[i] for i in range(25)]))
    epochs = [visited[i : i + 25] for i in range(0, 150, 25)]
    assert all(sorted(epoch) == list(range(25)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 6
    assert epochs[0] != sorted(epochs[0])


def test_without_shuffling_the_blocks_come_in_order():
    steps = indexed(shuffle=False)
    assert blocks_of(batches_of([steps[i] for i in range(20)])) == [k % 25 for k in range(120)]


def test_another_seed_gives_another_order():
    orders = {tuple(blocks_of(batches_of([indexed(seed=seed)[i] for i in range(4)]))) for seed in range(10)}
    assert len(orders) == 10


def test_a_step_does_not_depend_on_the_order_in_which_steps_are_read():
    in_order = [indexed()[i] for i in range(20)]
    steps = indexed()
    for i in (19, 3, 3, 11, 0, 19, 4):
        assert same_steps([steps[i]], [in_order[i]])


@pytest.mark.parametrize("start", [0, 1, 7, 19, 20])
def test_the_sampler_begins_at_the_start_step_and_its_length_is_the_whole_run(start):
    """Lightning restores its own count of steps, so a sampler as long as the remaining steps would end the
    run early."""
    sampler = StepSampler(start, 20)
    assert (list(sampler), len(sampler)) == (list(range(start, 20)), 20)


@pytest.mark.parametrize(("world", "accum"), [(2, 1), (2, 3), (3, 2)])
def test_processes_together_see_what_one_process_accumulates(world, accum):
    """Micro-batch m of rank r is micro-batch m * world + r of the single process, and has the same number,
    on which dropout depends."""
    alone = indexed(StepShape(2, accum * world))
    ranks = [indexed(StepShape(2, accum, rank, world)) for rank in range(world)]
    for step in range(20):
        together = [ranks[rank][step].micro_batches[micro] for micro in range(accum) for rank in range(world)]
        assert same(together, alone[step].micro_batches)
        numbers = [
            ranks[rank].shape.micro_index(step, micro) for micro in range(accum) for rank in range(world)
        ]
        assert numbers == [alone.shape.micro_index(step, micro) for micro in range(accum * world)]
    assert StepShape(2, accum, 0, world).blocks == alone.shape.blocks


def test_no_two_micro_batches_of_a_run_share_a_number():
    numbers = [
        StepShape(2, 3, rank, 4).micro_index(step, micro)
        for step in range(10)
        for micro in range(3)
        for rank in range(4)
    ]
    assert sorted(numbers) == list(range(120))


# ---- loaders of text in memory -------------------------------------------------------------------


def text_config(
    folder: Path, workers: int = 0, max_seq_len: int = SEQ_LEN, val_batches: int | None = None, **data
) -> Config:
    path = folder / "corpus.txt"
    if not path.exists():
        path.write_text("\n<|endoftext|>\n".join(f"document {i} " + "xyz" * (i % 5) for i in range(20)))
    return validate_config(
        {
            "tokenizer": {"kind": "byte"},
            "model": {"max_seq_len": max_seq_len, "d_model": 8, "n_heads": 2},
            "data": {"path": str(path), **data},
            "training": {
                "max_steps": 20,
                "micro_batch_size": 3,
                "grad_accum_steps": 2,
                "val_batches": val_batches,
            },
            "hardware": {"num_workers": workers},
        }
    )


def text_data(folder: Path, **data):
    config = text_config(folder, **data)
    return pack_corpus(load_corpus(config), BYTE, config)


def test_any_number_of_workers_gives_the_same_steps(tmp_path):
    packed = text_data(tmp_path)
    alone = list(make_dataloaders(text_config(tmp_path), packed, BYTE, 20)[0])
    assert len(alone) == 20
    assert all(len(step.micro_batches) == 2 for step in alone)
    assert all(batch["input_ids"].shape == (3, SEQ_LEN) for batch in batches_of(alone))
    for workers in (1, 2):
        train, _ = make_dataloaders(text_config(tmp_path, workers=workers), packed, BYTE, 20)
        assert same_steps(list(train), alone)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_that_starts_later_continues_the_run(tmp_path, workers):
    """Across the end of an epoch too: 20 steps of 6 blocks are more than two epochs."""
    packed = text_data(tmp_path)
    assert len(packed.train) < 60
    alone = list(make_dataloaders(text_config(tmp_path), packed, BYTE, 20)[0])
    for start in (1, 8, 19) if not workers else (8,):
        train, _ = make_dataloaders(
            text_config(tmp_path, workers=workers), packed, BYTE, 20, start_step=start
        )
        assert same_steps(list(train), alone[start:])


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_and_workers_together_see_every_block_of_an_epoch_once(tmp_path, world, workers):
    """The number of blocks is not a multiple of the ranks or of their steps; all ranks still have the same
    number of steps."""
    packed = text_data(tmp_path)
    packed.train = PackedLMDataset(positions(7 * 25 + 1), SEQ_LEN)
    config = text_config(tmp_path, workers=workers)
    ranks = [
        list(make_dataloaders(config, packed, BYTE, 9, rank=rank, world=world)[0]) for rank in range(world)
    ]
    assert [len(steps) for steps in ranks] == [9] * world
    seen = blocks_of(
        ranks[rank][step].micro_batches[micro]
        for step in range(9)
        for micro in range(2)
        for rank in range(world)
    )
    for start in range(0, len(seen) - 25, 25):
        assert sorted(seen[start : start + 25]) == list(range(25))


def test_making_loaders_leaves_the_global_random_state_alone(tmp_path):
    """Dropout draws from it, seeded by the step. If a loader drew from it too, a run would depend on its
    workers."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train, val = make_dataloaders(text_config(tmp_path), text_data(tmp_path), BYTE, 3)
    list(train), list(val)
    assert torch.equal(torch.rand(3), expected)


def test_the_stride_of_the_config_makes_training_blocks_overlap_but_not_validation(tmp_path):
    plain, overlapping = text_data(tmp_path), text_data(tmp_path, stride=3)
    assert len(overlapping.train) > 2 * len(plain.train)
    assert len(overlapping.val) == len(plain.val)
    predicted = flat([overlapping.val[i] for i in range(len(overlapping.val))])
    assert len([i for i in predicted if i != -100]) == len(overlapping.val.tokens) - 1


def test_training_and_validation_share_no_document(tmp_path):
    packed = text_data(tmp_path, val_fraction=0.3)
    train, val = (
        BYTE.decode(part.tokens.tolist()).split("<|endoftext|>")[:-1] for part in (packed.train, packed.val)
    )
    assert not set(train) & set(val)
    assert len(set(train)) + len(set(val)) == 20
    assert (packed.n_train_docs, packed.n_val_docs) == (len(train), len(val))


def test_the_description_names_the_sizes(tmp_path):
    packed = text_data(tmp_path)
    train, val = packed.describe()
    assert (
        f"{packed.n_train_docs} documents, {len(packed.train.tokens)} tokens, {len(packed.train)} blocks of 7"
        in train
    )
    assert (
        f"({packed.train.n_dropped} tokens after the last full block are left out)" in train
        or packed.train.n_dropped == 0
    )
    assert (
        f"{packed.n_val_docs} documents, {len(packed.val.tokens)} tokens, {len(packed.val)} blocks of 7"
        in val
    )


@pytest.mark.parametrize("seq_len", [40, 400])
def test_the_error_for_too_little_text_proposes_a_seq_len_that_works(tmp_path, seq_len):
    (tmp_path / "corpus.txt").write_text("only thirty characters of text")
    config = text_config(tmp_path, max_seq_len=seq_len)
    corpus = load_corpus(config)
    with pytest.raises(UserError) as caught:
        pack_corpus(corpus, BYTE, config)
    assert "has 28 tokens" in str(caught.value), "27 characters to train on, and EOS"
    assert f"seq_len + 1 = {seq_len + 1}" in str(caught.value)
    advised = int(str(caught.value).rpartition("training.seq_len=")[2])
    assert len(pack_corpus(corpus, BYTE, text_config(tmp_path, max_seq_len=advised)).train) > 0


def test_text_of_exactly_one_block_is_enough(tmp_path):
    (tmp_path / "corpus.txt").write_text("0123456789")
    config = text_config(tmp_path, max_seq_len=9, val_path=str(tmp_path / "corpus.txt"))
    assert len(pack_corpus(load_corpus(config), BYTE, config).train) == 1


def test_the_fingerprint_tells_one_text_from_another(tmp_path):
    one, again, other = text_data(tmp_path), text_data(tmp_path), text_data(tmp_path, val_fraction=0.5)
    assert one.fingerprint == again.fingerprint != other.fingerprint


def test_a_char_tokenizer_sees_the_validation_text_and_a_bpe_tokenizer_does_not(tmp_path):
    (tmp_path / "corpus.txt").write_text("abc\n<|endoftext|>\nabd")
    (tmp_path / "val.txt").write_text("xyz")
    corpus = load_corpus(text_config(tmp_path, val_path=str(tmp_path / "val.txt")))
    assert CharTokenizer.train(tokenizer_documents(corpus, "char")).chars == "abcdxyz"
    assert list(tokenizer_documents(corpus, "bpe")) == ["abc", "abd"]


# ---- validation batches --------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("n_tokens", [2, 20, 7 * 10 + 1, 7 * 12 + 1, 7 * 12 + 4, 200])
def test_every_validation_token_counts_once_over_all_ranks(world, n_tokens):
    blocks = PackedLMDataset(positions(n_tokens), SEQ_LEN, pad_last=True)
    ranks = [ValBatches(blocks, 4, rank, world, None) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1, "the same number, or one rank would wait for another"
    labels = [label for rank in ranks for i in range(len(rank)) for label in flat([rank[i]]) if label != -100]
    assert sorted(labels) == list(range(1, n_tokens))
    assert all(rank[i]["input_ids"].numel() for rank in ranks for i in range(len(rank))), "no batch is empty"


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("limit", [1, 2, 5, 100])
def test_a_limited_validation_takes_the_first_batches_for_any_number_of_ranks(world, limit):
    blocks = PackedLMDataset(positions(7 * 26 + 1), SEQ_LEN, pad_last=True)
    ranks = [ValBatches(blocks, 4, rank, world, limit) for rank in range(world)]
    labels = [label for rank in ranks for i in range(len(rank)) for label in flat([rank[i]]) if label != -100]
    assert sorted(labels) == list(range(1, min(limit * 4, 26) * 7 + 1))


def test_the_validation_loader_gives_the_same_batches_each_time(tmp_path):
    _, val = make_dataloaders(text_config(tmp_path), text_data(tmp_path), BYTE, 3)
    assert same(list(val), list(val))
    _, limited = make_dataloaders(text_config(tmp_path, val_batches=1), text_data(tmp_path), BYTE, 3)
    assert same(list(limited), list(val)[:1])
