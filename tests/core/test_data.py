"""What a step trains on: every token once, and the same steps for any number of workers, any number of
ranks and after a resume, from memory or from a stream."""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

import data as data_module
from data import (
    IndexedSteps,
    PackedLMDataset,
    Step,
    StepSampler,
    StepShape,
    StreamingPackedLMDataset,
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
from support.text.documents import DocumentStream
from support.text.sources import load_dataset
from tokenizer import ByteTokenizer, CharTokenizer, build_tokenizer

BYTE = ByteTokenizer()
SEQ_LEN = 7


def positions(n: int) -> np.ndarray:
    """The ids 0 to n - 1, so that a label tells which token of the text it is."""
    return np.arange(n)


def flat(batches: Iterable[dict], name: str = "labels") -> list[int]:
    return torch.cat([batch[name].flatten() for batch in batches]).tolist()


def batches_of(steps: Iterable[Step]) -> list[dict]:
    return [batch for step in steps for batch in step.micro_batches]


def same(one: list[dict], other: list[dict]) -> bool:
    """Whether two lists of micro-batches hold equal tensors."""
    one, other = (
        [{name: tensor.tolist() for name, tensor in batch.items()} for batch in batches]
        for batches in (one, other)
    )
    return one == other


def same_steps(one: list[Step], other: list[Step]) -> bool:
    """Whether the steps have equal micro-batches. Their stream states may differ: one position can be
    written in several ways."""
    return len(one) == len(other) and all(
        same(a.micro_batches, b.micro_batches) for a, b in zip(one, other, strict=True)
    )


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
    data_module.load_corpus(validate_config(tree))
    assert "2 of 3 validation documents are trained on too" in capsys.readouterr().err
    (tmp_path / "other.txt").write_text("another text")
    data_module.load_corpus(validate_config(tree))
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


# ---- streams -------------------------------------------------------------------------------------

N_DOCS, N_VAL = 47, 5
STORIES = [f"<{i}> " + "word " * (i * 7 % 13) for i in range(N_DOCS)]


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """The stories as two .jsonl files and as two .parquet files of several row groups."""
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path_factory.mktemp("library")
    for n, part in enumerate((STORIES[:20], STORIES[20:])):
        (folder / f"{n}.jsonl").write_text(
            "".join(json.dumps({"text": story, "id": i}) + "\n" for i, story in enumerate(part))
        )
        pyarrow.parquet.write_table(
            pyarrow.table({"text": part, "id": list(range(len(part)))}),
            folder / f"{n}.parquet",
            row_group_size=6,
        )
    return folder


@pytest.fixture(autouse=True)
def small_groups(monkeypatch, tmp_path):
    """Groups of 8 documents, so that an epoch has several. The cache of datasets is in the test's folder."""
    import datasets

    monkeypatch.setattr(data_module, "SHUFFLE_GROUP", 8)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def stream_config(library: Path, kind: str = "json", workers: int = 0, accum: int = 2, **data) -> Config:
    if data.get("streaming", True) and "val_split" not in data:
        data.setdefault("val_docs", N_VAL)
    path = str(library / f"*.{'jsonl' if kind == 'json' else kind}")
    return validate_config(
        {
            "tokenizer": {"kind": "byte"},
            "model": {"max_seq_len": SEQ_LEN, "d_model": 8, "n_heads": 2},
            "data": {"source": "hf", "dataset": kind, "path": path, "streaming": True, **data},
            "training": {"max_steps": 1000, "micro_batch_size": 3, "grad_accum_steps": accum},
            "hardware": {"num_workers": workers},
        }
    )


def stream_steps(
    library: Path, n: int, state: str | None = None, rank: int = 0, world: int = 1, **options
) -> list[Step]:
    """The first n steps of a newly opened stream, as in a resumed process."""
    config = stream_config(library, **options)
    packed = pack_corpus(load_corpus(config), BYTE, config)
    train, _ = make_dataloaders(config, packed, BYTE, 1000, rank=rank, world=world, stream_state=state)
    assert isinstance(train.dataset, StreamingPackedLMDataset)
    steps = iter(train)
    return list(itertools.islice(steps, n))


def states(steps: list[Step]) -> list[str]:
    return [step.stream_state for step in steps]


def documents_of(batches: Iterable[dict]) -> list[str]:
    """The whole documents in these micro-batches, in order."""
    ids = flat(batches, "input_ids")
    return BYTE.decode(ids).split("<|endoftext|>")[:-1]


def steps_of_epochs(epochs: float) -> int:
    tokens = sum(len(story) + 1 for story in STORIES[N_VAL:])
    return int(epochs * tokens / (3 * 2 * SEQ_LEN))


@pytest.mark.parametrize("kind", ["json", "parquet"])
@pytest.mark.parametrize("stride", [7, 3])
def test_a_stream_in_order_equals_packing_in_memory(library, kind, stride):
    witness = PackedLMDataset(tokenize(STORIES[N_VAL:], BYTE), SEQ_LEN, stride)
    steps = stream_steps(library, len(witness) // 6, kind=kind, shuffle=False, stride=stride)
    in_memory = [witness.batch(range(first, first + 3)) for first in range(0, 6 * len(steps), 3)]
    assert len(steps) > 10
    assert same(batches_of(steps), in_memory)


def test_a_stream_has_segments_like_text_in_memory(library):
    steps = stream_steps(library, 5, document_mask=True)
    for batch in batches_of(steps):
        assert torch.equal(
            batch["segments"], torch.from_numpy(document_segments(batch["input_ids"].numpy(), BYTE.eos_id))
        )


@pytest.mark.parametrize("shuffle", [True, False])
def test_no_document_is_lost_or_repeated_in_an_epoch_of_a_stream(library, shuffle):
    """The tokens left over from one epoch are packed with the beginning of the next, so nothing is
    dropped."""
    n = N_DOCS - N_VAL
    read = documents_of(batches_of(stream_steps(library, steps_of_epochs(3.2), shuffle=shuffle)))
    epochs = [read[i : i + n] for i in range(0, 3 * n, n)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(STORIES[N_VAL:])
        assert (epoch == STORIES[N_VAL:]) == (not shuffle)
    assert len(set(map(tuple, epochs))) == (3 if shuffle else 1), "each epoch has an order of its own"


def test_a_stream_is_shuffled_by_the_seed_within_its_groups(library):
    read = documents_of(batches_of(stream_steps(library, steps_of_epochs(1))))
    assert read == documents_of(batches_of(stream_steps(library, steps_of_epochs(1))))
    train = STORIES[N_VAL:]
    for start in range(0, len(train) - 8, 8):
        assert sorted(read[start : start + 8]) == sorted(train[start : start + 8])
        assert read[start : start + 8] != train[start : start + 8]
    orders = {
        tuple(train.index(story) - start for story in read[start : start + 8])
        for start in range(0, len(train) - 8, 8)
    }
    assert len(orders) > 1, "each group has an order of its own"


@pytest.mark.parametrize("kind", ["json", "parquet"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_stream_resumes_from_every_step(library, kind, shuffle):
    """Also in the middle of a document, and at the end of a group, of a file and of an epoch."""
    whole = stream_steps(library, steps_of_epochs(2.5), kind=kind, shuffle=shuffle)
    for at in range(0, len(whole) - 1, 1 if kind == "json" else 3):
        resumed = stream_steps(library, 4, states(whole)[at], kind=kind, shuffle=shuffle)
        assert same_steps(resumed[: len(whole) - at - 1], whole[at + 1 : at + 5])


def test_a_stream_resumed_again_and_again_is_still_the_same(library):
    """Two steps at a time over two epochs, each time from the last state."""
    whole = stream_steps(library, steps_of_epochs(2.2))
    pieces, state = [], None
    while len(pieces) < len(whole):
        pieces += stream_steps(library, 2, state)
        state = states(pieces)[-1]
    assert same_steps(pieces[: len(whole)], whole)


def test_the_state_of_a_stream_is_plain_json(library):
    """It is stored in a checkpoint, which may hold only plain types."""
    state = json.loads(states(stream_steps(library, 3))[-1])
    assert isinstance(state["epoch"], int)
    assert state["tokens"] == [int(i) for i in state["tokens"]]


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_a_stream_read_by_a_worker_is_the_same_and_so_is_its_state(library, kind):
    """Also when the config asks for two workers: a second one would read every document twice."""
    whole = stream_steps(library, steps_of_epochs(1.6), kind=kind)
    by_worker = stream_steps(library, len(whole), kind=kind, workers=2)
    assert same_steps(by_worker, whole)
    at = steps_of_epochs(0.9)
    assert same_steps(
        stream_steps(library, len(whole) - at - 1, states(whole)[at], kind=kind, workers=1), whole[at + 1 :]
    ), "no worker, then one"
    assert same_steps(
        stream_steps(library, len(whole) - at - 1, states(by_worker)[at], kind=kind), whole[at + 1 :]
    ), "workers, then none"


def test_two_ranks_share_the_blocks_of_a_stream(library):
    n = steps_of_epochs(1.2)
    alone = stream_steps(library, n, accum=2)
    ranks = [stream_steps(library, n, accum=1, rank=rank, world=2) for rank in range(2)]
    assert states(ranks[0]) == states(ranks[1]), "any rank may save: all have the same position"
    together = [Step([*one.micro_batches, *other.micro_batches]) for one, other in zip(*ranks, strict=True)]
    assert same_steps(together, alone)
    at = 5
    resumed = stream_steps(library, 5, states(ranks[0])[at], accum=1, rank=1, world=2)
    assert same_steps(resumed, ranks[1][at + 1 : at + 6])


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_and_workers_share_a_stream_of_uneven_files(tmp_path, world, workers):
    """Files of 5, 2, 29 and 11 documents: together the ranks read each document once an epoch, and no rank
    runs out of data before the others."""
    rest = iter(STORIES)
    for n, size in enumerate((5, 2, 29, 11)):
        rows = itertools.islice(rest, size)
        (tmp_path / f"{n}.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in rows))
    n = steps_of_epochs(2.4) // world
    ranks = [stream_steps(tmp_path, n, rank=rank, world=world, workers=workers) for rank in range(world)]
    assert [len(steps) for steps in ranks] == [n] * world
    together = [
        ranks[rank][step].micro_batches[micro]
        for step in range(n)
        for micro in range(2)
        for rank in range(world)
    ]
    read = documents_of(together)
    assert len(read) >= 2 * (N_DOCS - N_VAL)
    for start in (0, N_DOCS - N_VAL):
        assert sorted(read[start : start + N_DOCS - N_VAL]) == sorted(STORIES[N_VAL:])


def test_validation_documents_of_a_stream_are_never_trained_on(library):
    config = stream_config(library)
    packed = pack_corpus(load_corpus(config), BYTE, config)
    assert BYTE.decode(packed.val.tokens.tolist()).split("<|endoftext|>")[:-1] == STORIES[:N_VAL]
    read = documents_of(batches_of(stream_steps(library, steps_of_epochs(2))))
    assert not set(read) & set(STORIES[:N_VAL])


def test_a_limited_stream_repeats_its_documents(library):
    read = documents_of(batches_of(stream_steps(library, 30, train_docs=6, shuffle=False)))
    assert len(read) > 18
    assert read == list(itertools.islice(itertools.cycle(STORIES[N_VAL : N_VAL + 6]), len(read)))


def test_a_limited_stream_resumes_too(library):
    whole = stream_steps(library, 30, train_docs=11)
    for at in range(0, 25, 4):
        assert same_steps(stream_steps(library, 4, states(whole)[at], train_docs=11), whole[at + 1 : at + 5])


def test_training_a_tokenizer_on_a_stream_does_not_move_the_stream(library, monkeypatch):
    monkeypatch.setattr(data_module, "STREAM_TOKENIZER_DOCS", 9)
    config = stream_config(library)
    corpus = load_corpus(config)
    assert list(tokenizer_documents(corpus, "bpe")) == STORIES[N_VAL : N_VAL + 9]
    assert corpus.train.take(2) == STORIES[N_VAL : N_VAL + 2]
    train, _ = make_dataloaders(config, pack_corpus(corpus, BYTE, config), BYTE, 1000)
    assert same_steps(list(itertools.islice(train, 9)), stream_steps(library, 9))


def test_empty_rows_are_skipped_wherever_they_are(tmp_path):
    rows = ["", "val", "", "one", "", "two", ""]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    config = stream_config(tmp_path, val_docs=2, shuffle=False)
    corpus = load_corpus(config)
    assert corpus.val == ["val"]
    assert corpus.train.head(10) == ["one", "two"]


@pytest.mark.parametrize("streaming", [True, False])
def test_a_null_row_is_left_out_and_counted(tmp_path, capsys, streaming):
    """Before, such a row ended the run, and every resume ended at the same row."""
    rows = [{"text": f"story {i}"} for i in range(7)] + [{"text": None}, {"text": "the end"}, {"text": ""}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = load_corpus(stream_config(tmp_path, val_docs=2, streaming=streaming))
    train = corpus.train.take(100) if streaming else corpus.train
    assert sorted(train + corpus.val) == sorted(row["text"] for row in rows if row["text"])
    assert (
        capsys.readouterr().err.splitlines()[-1]
        == "warning: 2 rows without text left out; the first: row 8 has no text"
    )
    if streaming:
        corpus.train.seek(None)
        assert corpus.train.take(100) == train
        assert capsys.readouterr().err == "", "one warning, not one in each epoch"


class Rows:
    """A stream of rows of any types, like a dataset that declares no types."""

    def __init__(self, rows: list[dict]):
        self.rows, self.at = rows, 0

    def __iter__(self):
        while self.at < len(self.rows):
            self.at += 1
            yield self.rows[self.at - 1]

    def state_dict(self) -> dict:
        return {"at": self.at}

    def load_state_dict(self, state: dict) -> None:
        self.at = state["at"]


ODD = [{"text": 5}, {"text": ["a", "b"]}, {"body": "x"}, {"text": "half \ud83d"}, {"text": None}, {}]


def test_a_row_of_another_type_does_not_end_a_stream(capsys):
    """A row that nobody can repair would end every resume, so it is left out, with a warning."""
    rows = [{"text": "one"}, *ODD, {"text": "two"}]
    assert DocumentStream(Rows(rows), "text").take(9) == ["one", "two"]
    said = capsys.readouterr().err.splitlines()
    assert (
        said[0]
        == "warning: 1 row without text left out; the first: row 2 has no text in field 'text' (fields: "
        "text), it holds 5"
    )
    assert said[-1].startswith("warning: 6 rows without text left out; the first: row 2")


def test_a_stream_resumes_exactly_between_rows_without_text():
    rows = [{"text": f"the story of number {i}"} if i % 3 else ODD[i // 3 % len(ODD)] for i in range(1, 40)]

    def steps(n: int, state: str | None = None) -> list:
        stream = DocumentStream(Rows(rows), "text")
        return list(
            itertools.islice(
                StreamingPackedLMDataset(
                    stream, BYTE, seq_len=SEQ_LEN, stride=SEQ_LEN, shape=StepShape(2, 1), seed=42, state=state
                ),
                n,
            )
        )

    whole = steps(60)
    assert json.loads(whole[-1].stream_state)["epoch"] > 0
    for at in range(0, 56, 5):
        assert same_steps(steps(3, whole[at].stream_state), whole[at + 1 : at + 4])


def test_a_stream_whose_first_row_lacks_the_field_is_refused():
    with pytest.raises(
        UserError,
        match=r"row 1 has no text in field 'text' \(fields: text\), it holds 5; remove the row, or set "
        r"data\.text_field",
    ):
        DocumentStream(Rows([{"text": 5}, {"text": "one"}]), "text").take(1)


def test_the_warning_for_a_stream_that_is_mostly_held_out_names_both_sizes(tmp_path, capsys):
    """By default the first 200 rows are for validation, even if few rows follow."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{i:07}..."}) + "\n" for i in range(230)))
    corpus = load_corpus(stream_config(tmp_path, val_docs=None))
    assert (
        "the first 200 rows of the stream are held out for validation (2,000 characters), and 300 "
        "characters are left" in capsys.readouterr().err
    )
    assert corpus.train.take(1) == ["0000200..."], "counting the rows does not move the stream"
    load_corpus(stream_config(tmp_path, val_docs=20))
    assert capsys.readouterr().err == ""


def test_a_document_that_is_most_of_a_dataset_is_trained_on(tmp_path):
    texts = [f"{i:03} short" for i in range(40)]
    texts[7] = "long " * 1000
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for seed in range(20):
        for limit in (None, 5):
            train, val = load_dataset(
                stream_config(tmp_path, streaming=False, val_docs=9, train_docs=limit).data, seed
            )
            assert texts[7] not in val
            assert len(train) == (limit or 31) and (limit or len(val) == 9)
            assert not set(train) & set(val)


@pytest.mark.parametrize("streaming", [True, False])
def test_the_error_for_a_missing_text_field_lists_the_existing_fields(library, streaming):
    with pytest.raises(
        UserError, match=r"row 1 has no text in field 'story' \(fields: text, id\); set data\.text_field"
    ):
        load_corpus(stream_config(library, text_field="story", streaming=streaming))


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("val_docs", [N_DOCS, 1000])
def test_validation_that_leaves_nothing_to_train_on_is_refused(library, streaming, val_docs):
    with pytest.raises(UserError, match="no document is left to train on"):
        load_corpus(stream_config(library, val_docs=val_docs, streaming=streaming))


@pytest.mark.parametrize("path", ["nothing-*.jsonl", ""])
def test_missing_local_files_are_named(tmp_path, path):
    config = stream_config(tmp_path)
    config.data.path = str(tmp_path / path) if path else None
    with pytest.raises(UserError, match=r"data\.path"):
        load_corpus(config)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    ("kind", "content"),
    [("json", b'{"text": "a"}\n{"text": \n'), ("json", b"\xff\xfe\x00"), ("parquet", b"PAR1 not really")],
)
def test_local_files_that_are_damaged_are_refused(tmp_path, kind, content, streaming):
    (tmp_path / f"a.{'jsonl' if kind == 'json' else kind}").write_bytes(content)
    with pytest.raises(UserError):
        load_corpus(stream_config(tmp_path, kind=kind, val_docs=1, streaming=streaming))


def test_a_validation_split_of_local_files_is_refused():
    """Local files have no splits: any name would open the same documents for training and validation."""
    with pytest.raises(UserError, match="val_split"):
        validate_config(
            {
                "data": {"source": "hf", "dataset": "json", "path": "a.jsonl", "val_split": "validation"},
                "training": {"max_steps": 1},
            }
        )


def test_validating_on_the_training_split_is_refused():
    with pytest.raises(UserError, match="val_split"):
        validate_config(
            {"data": {"source": "hf", "dataset": "a/b", "val_split": "train"}, "training": {"max_steps": 1}}
        )


# ---- datasets in memory --------------------------------------------------------------------------


def test_a_dataset_in_memory_gives_whole_documents_to_one_side_only(library):
    config = stream_config(library, streaming=False, val_docs=9)
    train, val = load_dataset(config.data, config.seed)
    assert (len(train), len(val)) == (N_DOCS - 9, 9)
    assert sorted(train + val) == sorted(STORIES)
    assert train == [s for s in STORIES if s in train], "training keeps its order"
    assert val != STORIES[:9], "drawn at random, not the first ones"
    assert val != load_dataset(config.data, config.seed + 1)[1], "another seed draws others"


def test_without_val_docs_a_dataset_in_memory_is_cut_by_fraction(library):
    corpus = load_corpus(stream_config(library, streaming=False, val_fraction=0.3))
    assert sorted(corpus.train + corpus.val) == sorted(STORIES)
    assert 0.3 * sum(map(len, STORIES)) <= sum(map(len, corpus.val))


def test_a_dataset_in_memory_can_be_limited(library):
    train, val = load_dataset(stream_config(library, streaming=False, val_docs=9, train_docs=4).data, 42)
    assert (len(train), len(val)) == (4, 9)
    assert not set(train) & set(val)


def test_each_text_file_read_by_the_datasets_library_is_one_document(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.text").write_text(f"{name}\n\nsecond line\n")
    config = stream_config(tmp_path, kind="text", val_docs=1)
    corpus = load_corpus(config)
    assert [*corpus.val, *corpus.train.head(9)] == [f"{name}\n\nsecond line\n" for name in "abc"]
