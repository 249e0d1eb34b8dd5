"""The text sources: which config keys belong to each `data.source`, and which function loads its documents.

To add a source: write a function that returns (training documents, validation documents), add an entry to
SOURCES, and add its name, and the keys it needs, to `DataConfig` in support/config/schema.py.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from support.messages import UserError, warn
from support.text.documents import DocumentStream, text_documents
from support.text.hub import open_dataset, read_rows
from support.text.rows import RowTexts
from support.text.validation_split import split_rows, warn_of_share

DEFAULT_STREAM_VAL_DOCS = 200

# (training documents, validation documents). The second is None if the caller still has to hold some out.
Documents = tuple[list[str] | DocumentStream, list[str] | None]


@dataclass(frozen=True)
class Source:
    """A row of the table: the keys of the config's `data` section that belong to this source, and the
    function that loads its documents, given that section and the seed. A source with load=None gives no
    documents: its data is read elsewhere. The config must give one of the keys in `needs`; `hint` says what
    to write."""

    keys: set[str]
    load: Callable[[Any, int], Documents] | None = None
    needs: tuple[str, ...] = ()
    hint: str = ""


def load_documents(data: Any, seed: int) -> Documents:
    """The documents that the `data` section of a config names. Raises UserError."""
    source = SOURCES.get(data.source)
    if source is None or source.load is None:
        with_documents = ", ".join(name for name, entry in SOURCES.items() if entry.load)
        raise UserError(f"data.source={data.source} gives no documents; those that do: {with_documents}")
    return source.load(data, seed)


def keys_of_other_sources(source: str) -> set[str]:
    """The keys that belong only to other sources, so that a config for this one may not give them."""
    all_keys = set().union(*(entry.keys for entry in SOURCES.values()))
    return all_keys - SOURCES[source].keys


# ---- local text ----------------------------------------------------------------------------------


def load_text(data: Any, seed: int) -> Documents:
    """The documents of local files, in memory. Raises UserError."""
    train = text_documents(data.path, data)
    if not data.val_path:
        return train, None
    val = text_documents(data.val_path, data, "data.val_path")
    n_same = len(set(val) & set(train))
    if n_same:
        warn(
            f"{n_same} of {len(val)} validation documents are trained on too, so val_loss says little; "
            "give data.val_path another text"
        )
    return train, val


# ---- datasets ------------------------------------------------------------------------------------


def load_dataset(data: Any, seed: int) -> Documents:
    """The documents of a Hugging Face dataset, in memory or streamed. Raises UserError."""
    val = None
    if data.val_split:
        val = without_blanks(row_texts(open_split(data, data.val_split), data.text_field, data.val_docs))
    rows = open_split(data, data.split)
    if data.streaming:
        train, val = stream_of(rows, val, data)
        is_empty = not train.head(1)
    elif val is None and data.val_docs:
        train, val = hold_out_docs(rows, data, seed)
        is_empty = not train
    else:
        train = without_blanks(row_texts(rows, data.text_field, data.train_docs))
        is_empty = not train
    if is_empty:
        raise UserError(
            f"data.dataset={data.dataset}: no document is left to train on in split {data.split}; check "
            "data.val_docs and the split"
        )
    if data.streaming and train.skip and not data.train_docs:
        warn_of_short_stream(train, val)
    return train, val


def open_split(data: Any, split: str):
    return open_dataset(data.dataset, data.config, split, data.path, data.revision, data.streaming)


def row_texts(rows: Iterable[dict], text_field: str, limit: int | None = None) -> list[str]:
    """The text of each of the first `limit` rows (None: of all rows); "" for a row without text."""
    texts = RowTexts(text_field, from_dataset=True)
    limited = itertools.islice(read_rows(rows), limit)
    documents = [texts.text_of(row, f"row {number}") for number, row in enumerate(limited, 1)]
    texts.warn_of_rows_without_text()
    return documents


def without_blanks(texts: list[str]) -> list[str]:
    return [text for text in texts if text]


def stream_of(rows, val: list[str] | None, data: Any) -> tuple[DocumentStream, list[str]]:
    """(the stream, validation documents). If `val` is empty, the first rows of the dataset become the
    validation documents, and the stream skips them."""
    n_held_out = 0
    if not val:
        n_held_out = data.val_docs or DEFAULT_STREAM_VAL_DOCS
        val = without_blanks(row_texts(open_split(data, data.split), data.text_field, n_held_out))
    return DocumentStream(rows, data.text_field, skip=n_held_out, limit=data.train_docs), val


def hold_out_docs(rows, data: Any, seed: int) -> tuple[list[str], list[str]]:
    """(training documents, validation documents) of a dataset in memory: `val_docs` random rows are held out,
    and the first `train_docs` of the others are trained on. Rows that are not needed are not read."""
    order = np.random.default_rng(seed).permutation(len(rows))
    others = np.sort(order[data.val_docs :])[: data.train_docs]
    pool = np.sort(np.concatenate([order[: data.val_docs], others]))  # numbers of the rows that are read
    documents = row_texts(rows.select(pool), data.text_field)
    order_in_pool = np.searchsorted(pool, order[np.isin(order, pool)])
    train, val = split_rows(
        documents,
        sizes=[len(text) for text in documents],
        order=order_in_pool,
        n_held=min(data.val_docs, len(documents)),
    )
    train = without_blanks(train)[: data.train_docs]
    val = without_blanks(val)
    if train:
        n_val = sum(map(len, val))
        warn_of_share(
            held=n_val,
            total=n_val + sum(map(len, train)),
            fraction=data.val_docs / len(pool),
            unit="characters",
            advice="set data.val_docs",
        )
    return train, val


def warn_of_short_stream(train: DocumentStream, val: list[str]) -> None:
    """Warn if a stream has little text left after its first rows, which are held out. Only as much of it is
    read as is needed to know that."""
    n_val = sum(map(len, val))
    n_train = sum(map(len, train.head(2**63, 2 * n_val)))
    if n_train < 2 * n_val:
        warn(
            f"the first {train.skip:,} rows of the stream are held out for validation ({n_val:,} "
            f"characters), and {n_train:,} characters are left "
            "to train on; lower data.val_docs, or read the data set into memory with data.streaming=false"
        )


# ---- the table -----------------------------------------------------------------------------------

HUB_KEYS = {
    "path",
    "dataset",
    "config",
    "revision",
    "split",
    "val_split",
    "train_docs",
    "val_docs",
    "val_fraction",
}
SOURCES = {
    "text": Source(
        keys={"path", "val_path", "text_field", "val_fraction", "errors", "stride", "document_mask"},
        load=load_text,
        needs=("path",),
        hint="path: a .txt or .jsonl file, a folder or a glob",
    ),
    "hf": Source(
        keys=HUB_KEYS | {"text_field", "streaming", "stride", "document_mask"},
        load=load_dataset,
        needs=("dataset",),
        hint="dataset: a name on the hub, or json, parquet or text with path",
    ),
    "tokens": Source(
        keys={"path", "val_path", "val_fraction", "dtype", "stride", "document_mask"},
        needs=("path",),
        hint="path: a folder that prepare.py made, or a .npy or .bin file",
    ),
    "instructions": Source(
        keys=HUB_KEYS | {"val_path", "fields", "errors", "packing", "mask_prompt", "too_long"},
        needs=("path", "dataset"),
        hint="path: a .json, .jsonl or .parquet file, or dataset: a name on the hub",
    ),
}
