"""What a step trains on, from a stream: the same as from memory, and the same steps for any number of
workers, any number of ranks and after a resume. Datasets of the datasets library, streamed or in memory."""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from batches import BYTE, SEQ_LEN, batches_of, flat, same, same_steps

import data as data_module
from data import (
    PackedLMDataset,
    Step,
    StepShape,
    StreamingPackedLMDataset,
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
