"""Instructions in, training rows out: a pair of question and answer -> ids -> input_ids and labels.

    ids        ### User : \\n Name a color . \\n\\n ### Assistant : \\n   Red . EOS
    input_ids  ### User : \\n Name a color . \\n\\n ### Assistant : \\n   Red .        all but the last
    labels      -    -  -  -   -    -   -   -   -       -     -   Red   .   EOS      the next; - is not scored

The model is trained to answer the prompt, not to write it (`mask_prompt`). EOS is trained like a word: a
model that has not learned it would never stop. Pairs have unequal lengths, so they are padded on the right,
where no earlier position sees the padding, or packed into blocks in which attention stays inside each pair.

Reading the files is in support/text/instruction_files.py, the layout of a prompt in
support/text/chat_template.py.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from data import Batch, PackedData
from support.chunked_loss import IGNORE
from support.config.schema import ROW_FIELDS, Config
from support.messages import UserError, warn
from support.text.chat_template import Template, first_prompt_parts
from support.text.instruction_files import ROW_EXAMPLE, read_files, read_hub
from support.text.mid_document import ids_after
from support.text.read_text import memory_for_text
from support.text.rows import row_text
from support.text.validation_split import split_rows, warn_of_share
from tokenizer import Tokenizer

FIELDS_HINT = "data.fields says what they are called, e.g. {instruction: prompt, output: response}"


# ---- pairs ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A row of an instruction file: what is asked, a text that it is about (or ""), and the answer."""

    instruction: str
    input: str
    output: str
    where: str  # for messages: "rows.json, row 3"

    def n_chars(self) -> int:
        """Its length in characters: how much text it is."""
        return len(self.instruction) + len(self.input) + len(self.output)


def pairs_of(rows: Iterable[tuple[dict, str]], fields: dict[str, str], source: str) -> list[Pair]:
    """The pairs in (row, where it is) of a file or dataset. `fields` says what its rows call instruction,
    input and output; `source` is its name, for messages. A row without an instruction or an output (null or
    blank) teaches nothing: it is left out, and counted in a warning.

    Raises UserError if a field is missing or does not hold a text, if no pair remains, or if no row has the
    input that `fields` names.
    """
    names = {name: fields.get(name, name) for name in ROW_FIELDS}
    pairs, left_out = [], []
    has_input = False
    for row, where in rows:
        pair = pair_of(row, where, names)
        has_input = has_input or row.get(names["input"]) is not None
        if pair.instruction.strip() and pair.output.strip():
            pairs.append(pair)
        else:
            left_out.append(where)
    if not pairs:
        raise UserError(f"{source} holds no instruction with an output; give rows like {ROW_EXAMPLE}")
    # A missing input counts as empty, so a misspelled name for it would go unnoticed without this check.
    if "input" in fields and not has_input:
        raise UserError(
            f"no row of {source} has {names['input']!r}, which data.fields names as input; correct it, or "
            "leave it out"
        )
    if left_out:
        rows_are = "row" if len(left_out) == 1 else "rows"
        warn(
            f"{len(left_out):,} {rows_are} without instruction or output left out, the first at {left_out[0]}"
        )
    return pairs


def pair_of(row: dict, where: str, names: dict[str, str]) -> Pair:
    """A row as a pair. A field that is null is an empty text; so is a missing input, which many rows do not
    need. `names` says what the row calls each field: {"instruction": "prompt", ...}. Raises UserError if
    another field is missing, or if one holds something else than text."""
    texts = {}
    for name, field in names.items():
        is_null = field in row and row[field] is None
        is_missing_input = name == "input" and field not in row
        if is_null or is_missing_input:
            texts[name] = ""
        else:
            texts[name] = row_text(row, field, where, hint=FIELDS_HINT, example=ROW_EXAMPLE)
    return Pair(**texts, where=where)


def split_pairs(config: Config) -> tuple[list[Pair], list[Pair]]:
    """(training pairs, validation pairs) that the config names. Validation has a file or a split of its own;
    without one, a part of the rows is held out for it. Raises UserError."""
    data = config.data
    if data.path:
        pairs = pairs_of_files(data.path, "data.path", config)
    else:
        pairs = pairs_of_split(data.split, config)
    # val_docs and train_docs limit how many are used; a limit that is not set is None, and [:None] is all.
    if data.val_path:
        val = pairs_of_files(data.val_path, "data.val_path", config)[: data.val_docs]
    elif data.val_split:
        val = pairs_of_split(data.val_split, config)[: data.val_docs]
    else:
        pairs, val = hold_out_pairs(pairs, config)
    return pairs[: data.train_docs], val


def pairs_of_files(path: str, key: str, config: Config) -> list[Pair]:
    """The pairs in local files; `key` is the config key that named `path`, for messages."""
    return pairs_of(read_files(path, key, config.data.errors), config.data.fields, path)


def pairs_of_split(split: str, config: Config) -> list[Pair]:
    """The pairs in one split (a named part, such as "train") of the dataset that the config names."""
    return pairs_of(read_hub(config.data, split), config.data.fields, config.data.dataset)


def hold_out_pairs(pairs: list[Pair], config: Config) -> tuple[list[Pair], list[Pair]]:
    """(training pairs, validation pairs). `val_docs` rows are held out for validation, or the share
    `val_fraction` of all; `seed` draws which. Raises UserError if no row is left to train on."""
    data = config.data
    n_val = data.val_docs or max(1, round(data.val_fraction * len(pairs)))
    if n_val >= len(pairs):
        raise UserError(
            f"{len(pairs)} instructions, of which {n_val} are for validation, leave none to train on; "
            "give more, or lower data.val_docs"
        )
    train, val = split_rows(
        pairs,
        sizes=[pair.n_chars() for pair in pairs],
        order=np.random.default_rng(config.seed).permutation(len(pairs)),
        n_held=n_val,
    )
    # Rows are counted, but they differ in length: a few long ones may be most of the text.
    warn_of_share(
        held=sum(pair.n_chars() for pair in val),
        total=sum(pair.n_chars() for pair in pairs),
        fraction=n_val / len(pairs),
        unit="characters",
        advice="give data.val_path rows of its own",
    )
    return train, val


# ---- rows to train on ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A pair as ids: prompt, response, EOS (the token that ends a text). The first `n_prompt` ids are the
    prompt."""

    ids: np.ndarray
    n_prompt: int

    def __len__(self) -> int:
        """How many positions of a row it takes: one less than its ids, for the last id is only a label."""
        return len(self.ids) - 1

    def labels(self, mask_prompt: bool) -> np.ndarray:
        """For each position the id that follows. With `mask_prompt` it is IGNORE (-100, not scored) where
        that id belongs to the prompt."""
        labels = self.ids[1:].copy()
        if mask_prompt:
            # One less than n_prompt: from its last position, the prompt predicts the response's first token.
            n_masked = max(0, self.n_prompt - 1)
            labels[:n_masked] = IGNORE
        return labels


def encode_pair(pair: Pair, tokenizer: Tokenizer, template: Template) -> Example:
    """The ids of prompt, response and EOS. The response is encoded as it reads after the prompt: some
    tokenizers give a word other ids at the beginning of a text. Raises UserError, which names the row, for
    characters that the tokenizer does not know."""
    try:
        parts = first_prompt_parts(template, tokenizer, pair.instruction, pair.input)
        prompt = tokenizer.encode_parts(parts)
        response = ids_after(tokenizer, parts, pair.output)
    except UserError as error:
        raise UserError(f"{pair.where}: {error}") from None
    ids = np.array([*prompt, *response, tokenizer.eos_id], np.int64)
    return Example(ids, n_prompt=len(prompt))


class InstructPairDataset(Dataset):
    """Instruction pairs as rows to train on. Item i is one pair, or with `packing` a block of `seq_len`
    positions that is filled with several pairs.

    A pair longer than `seq_len` positions loses the start of its prompt (`n_cut` counts such pairs). It is
    left out (`n_dropped`) if its response alone is too long, or in any case with `too_long="drop"`. An answer
    is never cut: without its beginning it would teach the model to begin in the middle, and without its EOS,
    never to stop. Raises UserError if no pair remains.
    """

    def __init__(
        self,
        pairs: list[Pair],
        tokenizer: Tokenizer,
        template: Template,
        seq_len: int,
        *,
        packing: bool = False,
        mask_prompt: bool = True,
        too_long: str = "cut",
    ):
        self.seq_len = seq_len
        self.packing = packing
        self.mask_prompt = mask_prompt
        self.pad_id = tokenizer.eos_id  # any id would do: padding is not scored
        self.examples: list[Example] = []
        self.n_cut = 0
        self.n_dropped = 0
        self.n_bytes = 0  # UTF-8 bytes of the kept responses, for bits per byte
        for pair in pairs:
            example = self._fitted(encode_pair(pair, tokenizer, template), too_long)
            if example is not None:
                self.examples.append(example)
                self.n_bytes += len(pair.output.encode())
        if not self.examples:
            raise UserError(
                f"none of {len(pairs)} instructions fits training.seq_len={seq_len}; raise it, or give "
                "shorter ones"
            )
        self.blocks = self._blocks(self.examples, packing)

    def _fitted(self, example: Example, too_long: str) -> Example | None:
        """The example, with as much cut from the start of its prompt as is needed to fit; None if it is left
        out. Counts both kinds."""
        surplus = len(example) - self.seq_len
        if surplus <= 0:
            return example
        if too_long == "drop" or surplus >= example.n_prompt:  # a prompt keeps at least one token
            self.n_dropped += 1
            return None
        self.n_cut += 1
        return Example(example.ids[surplus:], example.n_prompt - surplus)

    def _blocks(self, examples: list[Example], packing: bool) -> list[list[Example]]:
        """The pairs of each block: one, or with `packing` as many as fit. They keep the order of the rows,
        and none is cut: a pair that no longer fits begins the next block."""
        blocks: list[list[Example]] = []
        room = 0  # free positions in the last block
        for example in examples:
            if not packing or len(example) > room:
                blocks.append([])
                room = self.seq_len
            blocks[-1].append(example)
            room -= len(example)
        return blocks

    def __len__(self) -> int:
        """The number of rows to train on."""
        return len(self.blocks)

    def __getitem__(self, i: int) -> Batch:
        """Row i alone: the tensors of `batch`, without their first dimension."""
        return {name: tensor[0] for name, tensor in self.batch([i]).items()}

    def batch(self, indices: Iterable[int]) -> Batch:
        """The rows with these numbers: input_ids and labels, (B, T). T is the length of the longest row; with
        packing it is `seq_len`, and segments, (B, T), say which pair of its row a position belongs to.
        Attention stays inside a segment. The rest of a row is padding: EOS that is not scored, in a segment
        of its own."""
        return self.batch_of([self.blocks[i] for i in indices], self.packing)

    def batch_of(self, blocks: list[list[Example]], packing: bool) -> Batch:
        """These blocks as a batch, one a row; see `batch`."""
        width = self.seq_len if packing else max(len(block[0]) for block in blocks)
        ids = np.full((len(blocks), width), self.pad_id, np.int64)
        labels = np.full_like(ids, IGNORE)
        segments = np.empty_like(ids)
        for row, block in enumerate(blocks):
            start = 0  # where the next pair of this row begins
            for number, example in enumerate(block):
                place = slice(start, start + len(example))
                ids[row, place] = example.ids[:-1]
                labels[row, place] = example.labels(self.mask_prompt)
                segments[row, place] = number
                start = place.stop
            segments[row, start:] = len(block)  # padding: one more than the last pair's number
        arrays = {"input_ids": ids, "labels": labels}
        if packing:
            arrays["segments"] = segments
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def example_batch(self, n: int, packing: bool) -> Batch:
        """The first `n` pairs as one batch, packed or not: to show what packing does."""
        return self.batch_of(self._blocks(self.examples[:n], packing), packing)

    def fingerprint(self) -> str:
        """sha256 of all ids and of where the responses begin. A run that is resumed compares it, to notice
        that its training data is another."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(example.ids.tobytes() + example.n_prompt.to_bytes(8, "little"))
        return digest.hexdigest()

    def describe(self, n_rows: int) -> str:
        """Sizes, on one line; `n_rows` is how many pairs there were before any was dropped."""
        n_tokens = sum(len(example.ids) for example in self.examples)
        n_scored = sum(int((example.labels(self.mask_prompt) != IGNORE).sum()) for example in self.examples)
        text = f"{n_rows:,} instructions, {n_tokens:,} tokens, {n_scored:,} of them scored"
        if self.packing:
            text += f", packed into {len(self):,} blocks of {self.seq_len}"
        else:
            text += f", rows of up to {max(map(len, self.examples))}"
        counts = []
        if self.n_cut:
            counts.append(f"{self.n_cut:,} cut at the start of their prompt")
        if self.n_dropped:
            counts.append(f"{self.n_dropped:,} dropped")
        if counts:
            text += f" ({' and '.join(counts)}: longer than {self.seq_len})"
        return text


# ---- scoring -------------------------------------------------------------------------------------


@torch.no_grad()
def score_responses(net: torch.nn.Module, batch: Batch) -> Tensor:
    """(5,) float32, the sums of a batch: the loss; the number of targets (response tokens, EOS included);
    how many of them the model finds likeliest; the number of responses; how many of these have only such
    tokens, so that greedy decoding (always taking the likeliest token) would write exactly these responses.

    `batch` is as `InstructPairDataset.batch` makes it: with segments, a row holds several pairs.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    labels = batch["labels"]  # (B, T)
    scored = labels != IGNORE  # (B, T), of which n are true
    targets = labels[scored]  # (n,)
    logits = net(**inputs)[scored].float()  # (n, V)
    # A number for each pair of the batch: row * T + segment. A row has T segments at most, so no two pairs
    # get the same one. The counts below are by this number; those that belong to no pair stay 0.
    segments = batch.get("segments", torch.zeros_like(labels))
    row = torch.arange(len(labels), device=labels.device)[:, None]
    pair = row * labels.shape[1] + segments  # (B, T)
    zeros = torch.zeros(labels.numel(), dtype=torch.long, device=labels.device)
    n_targets = zeros.index_add(0, pair[scored], torch.ones_like(targets))  # of each pair
    n_right = zeros.index_add(0, pair[scored], (logits.argmax(dim=-1) == targets).long())
    is_response = n_targets > 0
    loss = F.cross_entropy(logits, targets, reduction="sum")
    all_right = is_response & (n_right == n_targets)
    sums = [loss, n_targets.sum(), n_right.sum(), is_response.sum(), all_right.sum()]
    return torch.stack(sums).float()


# ---- all together --------------------------------------------------------------------------------


def validation_pairs(
    pairs: list[Pair], tokenizer: Tokenizer, config: Config, seq_len: int
) -> InstructPairDataset:
    """Pairs to validate on. Only responses are scored, also if prompts are trained on (data.mask_prompt is
    false), so that the losses of both kinds of training can be compared."""
    return InstructPairDataset(
        pairs,
        tokenizer,
        config.template,
        seq_len,
        packing=config.data.packing,
        mask_prompt=True,
        too_long=config.data.too_long,
    )


@memory_for_text()
def load_instructions(config: Config, tokenizer: Tokenizer) -> PackedData:
    """The pairs that the config names, ready to train and validate on. Raises UserError."""
    pairs, val_pairs = split_pairs(config)
    train = InstructPairDataset(
        pairs,
        tokenizer,
        config.template,
        config.seq_len,
        packing=config.data.packing,
        mask_prompt=config.data.mask_prompt,
        too_long=config.data.too_long,
    )
    return PackedData(
        train=train,
        val=validation_pairs(val_pairs, tokenizer, config, config.seq_len),
        n_train_docs=len(pairs),
        n_val_docs=len(val_pairs),
        sample_text=config.template.first_prompt(pairs[0].instruction, pairs[0].input) + pairs[0].output,
    )
