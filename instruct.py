"""Instructions in, training rows out: a pair of question and answer -> ids -> input_ids and labels.

    ids        ### User : \\n Name a color . \\n\\n ### Assistant : \\n   Red . EOS
    input_ids  ### User : \\n Name a color . \\n\\n ### Assistant : \\n   Red .           all but the last
    labels      -    -  -  -   -    -   -   -   -       -     -   Red   .   EOS         the next one; - is not scored

The model is never trained to write the prompt, only to answer it (`mask_prompt`), and EOS is trained like a
word: a model that has not learned it would never stop. Pairs have unequal lengths, so they are padded on the
right, which no position before can see, or packed into blocks, in which attention stays inside each pair.
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
from support.text.documents import memory_for_text, row_text
from support.text.instruction_files import EXAMPLE, read_files, read_hub
from support.text.mid_document import ids_after
from support.text.validation_split import check_share, hold_out_rows
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Pair:
    """A row of an instruction file, and where it stands."""

    instruction: str
    input: str
    output: str
    where: str


def pairs_of(rows: Iterable[tuple[dict, str]], fields: dict[str, str], source: str) -> list[Pair]:
    """Rows to pairs. One without an instruction or an output (null or blank) teaches nothing and is left
    out, with a warning that counts them. Raises UserError for a row that lacks the field or holds
    something else there, or if no pair remains."""
    names = {name: fields.get(name, name) for name in ROW_FIELDS}
    hint = "data.fields says what they are called, e.g. {instruction: prompt, output: response}"
    pairs, empty, with_input = [], [], 0
    for row, where in rows:
        present = [
            name for name in ROW_FIELDS if name != "input" or row.get(names["input"]) is not None
        ]  # that one may be missing
        with_input += "input" in present
        null = [name for name in present if name != "input" and row.get(names[name], "") is None]
        texts = dict.fromkeys(ROW_FIELDS, "") | {
            name: row_text(row, names[name], where, hint, EXAMPLE) for name in present if name not in null
        }
        if texts["instruction"].strip() and texts["output"].strip():
            pairs.append(Pair(**texts, where=where))
        else:
            empty.append(where)
    if not pairs:
        raise UserError(f"{source} holds no instruction with an output; give rows like {EXAMPLE}")
    if "input" in fields and not with_input:
        raise UserError(
            f"no row of {source} has {names['input']!r}, which data.fields names as input; correct it, or "
            "leave it out"
        )
    if empty:
        warn(
            f"{len(empty):,} row{'s' * (len(empty) > 1)} without instruction or output left out, the first "
            f"at {empty[0]}"
        )
    return pairs


def split_pairs(config: Config) -> tuple[list[Pair], list[Pair]]:
    """(training pairs, validation pairs): whole rows, drawn by `seed`, unless validation has a file or
    split of its own."""
    data = config.data
    if data.path:
        pairs = pairs_of(read_files(data.path, "data.path", data.errors), data.fields, data.path)
    else:
        pairs = pairs_of(read_hub(data, data.split), data.fields, data.dataset)
    if data.val_path:
        val = pairs_of(read_files(data.val_path, "data.val_path", data.errors), data.fields, data.val_path)[
            : data.val_docs
        ]
    elif data.val_split:
        val = pairs_of(read_hub(data, data.val_split), data.fields, data.dataset)[: data.val_docs]
    else:
        n_val = data.val_docs or max(1, round(data.val_fraction * len(pairs)))
        if n_val >= len(pairs):
            raise UserError(
                f"{len(pairs)} instructions, of which {n_val} are for validation, leave none to train on; "
                "give more, or lower data.val_docs"
            )
        sizes = [len(pair.instruction) + len(pair.input) + len(pair.output) for pair in pairs]
        drawn = hold_out_rows(sizes, np.random.default_rng(config.seed).permutation(len(pairs)), n_val)
        check_share(
            sum(sizes[i] for i in drawn),
            sum(sizes),
            n_val / len(pairs),
            "characters",
            "give data.val_path rows of its own",
        )
        val = [pair for i, pair in enumerate(pairs) if i in drawn]
        pairs = [pair for i, pair in enumerate(pairs) if i not in drawn]
    return pairs[: data.train_docs], val


# ---- rows to train on ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A pair as ids: prompt, response, EOS. The first `n_prompt` are the prompt."""

    ids: np.ndarray
    n_prompt: int

    def __len__(self) -> int:
        """Positions it takes: the last id is only ever a label."""
        return len(self.ids) - 1

    def labels(self, mask_prompt: bool) -> np.ndarray:
        """For each position the id that follows; -100 where that is still prompt."""
        labels = self.ids[1:].copy()
        if mask_prompt:
            labels[: max(0, self.n_prompt - 1)] = IGNORE
        return labels


def encode_pair(pair: Pair, tokenizer: Tokenizer, template: Template) -> Example:
    """Raises UserError, naming the row, for characters that the tokenizer does not know."""
    try:
        parts = first_prompt_parts(template, tokenizer, pair.instruction, pair.input)
        prompt, response = tokenizer.encode_parts(parts), ids_after(tokenizer, parts, pair.output)
    except UserError as error:
        raise UserError(f"{pair.where}: {error}") from None
    return Example(np.array([*prompt, *response, tokenizer.eos_id], np.int64), len(prompt))


class InstructPairDataset(Dataset):
    """Item i is a pair, padded to the longest of its batch, or with `packing` a block of several pairs.

    A pair longer than `seq_len` positions loses the start of its prompt (`n_cut` counts them); one whose
    response alone is too long, or with `too_long="drop"` each such pair, is left out (`n_dropped`): half an
    answer teaches to stop in the middle. Raises UserError if none remains.
    """

    def __init__(
        self,
        pairs: list[Pair],
        tokenizer: Tokenizer,
        template: Template,
        seq_len: int,
        packing: bool = False,
        mask_prompt: bool = True,
        too_long: str = "cut",
    ):
        self.seq_len, self.packing, self.mask_prompt, self.pad_id = (
            seq_len,
            packing,
            mask_prompt,
            tokenizer.eos_id,
        )
        self.examples: list[Example] = []
        self.n_cut = self.n_dropped = self.n_bytes = 0  # bytes of the responses
        for pair in pairs:
            if self._add(encode_pair(pair, tokenizer, template), too_long):
                self.n_bytes += len(pair.output.encode())
        if not self.examples:
            raise UserError(
                f"none of {len(pairs)} instructions fits training.seq_len={seq_len}; raise it, or give "
                "shorter ones"
            )
        self.blocks = self._blocks(self.examples, packing)

    def _add(self, example: Example, too_long: str) -> bool:
        surplus = len(example) - self.seq_len
        if surplus > 0 and (
            too_long == "drop" or surplus >= example.n_prompt
        ):  # a prompt keeps at least one token
            self.n_dropped += 1
            return False
        if surplus > 0:
            self.n_cut += 1
            example = Example(example.ids[surplus:], example.n_prompt - surplus)
        self.examples.append(example)
        return True

    def _blocks(self, examples: list[Example], packing: bool) -> list[list[Example]]:
        """A pair each, or packed: whole pairs in the order of the rows, and one that does not fit any more
        begins the next block."""
        blocks, room = [], 0
        for example in examples:
            if not packing or len(example) > room:
                blocks.append([])
                room = self.seq_len
            blocks[-1].append(example)
            room -= len(example)
        return blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, i: int) -> Batch:
        return {name: tensor[0] for name, tensor in self.batch([i]).items()}

    def batch(self, indices: Iterable[int]) -> Batch:
        """input_ids and labels (B, T), T the longest of the batch; with packing T is `seq_len`, and
        segments (B, T) number the pairs of each row. What fills up a row is EOS, not scored, and a segment
        of its own."""
        return self.batch_of([self.blocks[i] for i in indices], self.packing)

    def batch_of(self, blocks: list[list[Example]], packing: bool) -> Batch:
        width = self.seq_len if packing else max(len(block[0]) for block in blocks)
        ids = np.full((len(blocks), width), self.pad_id, np.int64)
        labels, segments = np.full_like(ids, IGNORE), np.empty_like(ids)
        for row, block in enumerate(blocks):
            start = 0
            for number, example in enumerate(block):
                here = slice(start, start + len(example))
                ids[row, here], labels[row, here], segments[row, here] = (
                    example.ids[:-1],
                    example.labels(self.mask_prompt),
                    number,
                )
                start = here.stop
            segments[row, start:] = len(block)
        batch = {"input_ids": ids, "labels": labels} | ({"segments": segments} if packing else {})
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def example_batch(self, n: int, packing: bool) -> Batch:
        """The first `n` pairs as one batch, packed or not."""
        return self.batch_of(self._blocks(self.examples[:n], packing), packing)

    def fingerprint(self) -> str:
        """sha256 of all ids and of where the responses begin."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(example.ids.tobytes() + example.n_prompt.to_bytes(8, "little"))
        return digest.hexdigest()

    def describe(self, n_rows: int) -> str:
        n_tokens = sum(len(example.ids) for example in self.examples)
        n_trained = sum(int((example.labels(self.mask_prompt) != IGNORE).sum()) for example in self.examples)
        text = f"{n_rows:,} instructions, {n_tokens:,} tokens, {n_trained:,} of them scored"
        text += (
            f", packed into {len(self):,} blocks of {self.seq_len}"
            if self.packing
            else f", rows of up to {max(map(len, self.examples))}"
        )
        counts = [f"{self.n_cut:,} cut at the start of their prompt"] * bool(self.n_cut) + [
            f"{self.n_dropped:,} dropped"
        ] * bool(self.n_dropped)
        return text + (f" ({' and '.join(counts)}: longer than {self.seq_len})" if counts else "")


@torch.no_grad()
def score_responses(net: torch.nn.Module, batch: Batch) -> Tensor:
    """(5,) float32: the summed loss, its number of targets, how many of them the model finds likeliest,
    the number of responses, and how many it gets right from beginning to end, so that greedy decoding
    would write just them."""
    labels = batch["labels"]  # (B, T)
    scored = labels != IGNORE
    targets = labels[scored]  # (n,)
    logits = net(**{name: tensor for name, tensor in batch.items() if name != "labels"})[
        scored
    ].float()  # (n, V)
    segments = batch.get("segments", torch.zeros_like(labels))
    pair = (
        segments + labels.shape[1] * torch.arange(len(labels), device=labels.device)[:, None]
    )  # (B, T), one number for each pair
    nothing = torch.zeros(labels.numel(), dtype=torch.long, device=labels.device)
    n_targets = nothing.index_add(0, pair[scored], torch.ones_like(targets))
    n_right = nothing.index_add(0, pair[scored], (logits.argmax(dim=-1) == targets).long())
    answered = n_targets > 0
    loss = F.cross_entropy(logits, targets, reduction="sum")
    return torch.stack(
        [loss, n_targets.sum(), n_right.sum(), answered.sum(), (answered & (n_right == n_targets)).sum()]
    ).float()


def validation_pairs(
    pairs: list[Pair], tokenizer: Tokenizer, config: Config, seq_len: int
) -> InstructPairDataset:
    """Validation always scores responses alone, so that its loss compares, whatever was trained on."""
    return InstructPairDataset(
        pairs, tokenizer, config.template, seq_len, config.data.packing, True, config.data.too_long
    )


@memory_for_text()
def load_instructions(config: Config, tokenizer: Tokenizer) -> PackedData:
    """The pairs that the config names, ready to train on. Raises UserError."""
    (pairs, val_pairs), data = split_pairs(config), config.data
    train = InstructPairDataset(
        pairs, tokenizer, config.template, config.seq_len, data.packing, data.mask_prompt, data.too_long
    )
    text = config.template.first_prompt(pairs[0].instruction, pairs[0].input) + pairs[0].output
    return PackedData(
        train,
        validation_pairs(val_pairs, tokenizer, config, config.seq_len),
        len(pairs),
        len(val_pairs),
        text,
    )
