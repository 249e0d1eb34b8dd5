"""Change one thing, see what breaks.

Each row of LESSONS is a classic mistake. The test writes a copy of the file with that mistake in it, imports
the copy, and expects the named check to fail. So each row shows that the check would notice the mistake.

To try one yourself, make the edit of a row in the file and run tests/core/test_model.py or
tests/core/test_data.py. (The tests here then say that the row cannot be shown any more. Undo the edit.)
"""

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from test_model import (
    check_cached_equals_uncached,
    check_causality,
    check_gqa_equals_naive_attention,
    check_initial_std,
    check_order_matters,
    check_rope_depends_on_distance_only,
    check_rope_is_complex_rotation,
    check_segments_isolate,
)

from tokenizer import ByteTokenizer

REPO = Path(__file__).resolve().parents[2]
ENCODE_CORPUS = "support/text/encode_corpus.py"

# ---- checks of the data, each on an example worked out by hand -----------------------------------


def check_eos_ends_each_document(encode_corpus: ModuleType) -> None:
    tokenizer = ByteTokenizer()
    pieces = encode_corpus.document_pieces(["ab", "c"], tokenizer)
    ids = encode_corpus.encode_pieces(pieces, tokenizer)
    assert ids.tolist() == [ord("a"), ord("b"), tokenizer.eos_id, ord("c"), tokenizer.eos_id]


def check_labels_are_shifted_by_one(data: ModuleType) -> None:
    """Each token is its own position, so the label of token 4 has to be 5."""
    block = data.PackedLMDataset(np.arange(20), seq_len=6)[1]
    assert block["input_ids"].tolist() == [6, 7, 8, 9, 10, 11]
    assert block["labels"].tolist() == [7, 8, 9, 10, 11, 12]


def check_each_token_is_predicted_once(data: ModuleType) -> None:
    blocks = data.PackedLMDataset(np.arange(19), seq_len=6)
    labels = [label for i in range(len(blocks)) for label in blocks[i]["labels"].tolist()]
    assert labels == list(range(1, 19))


# ---- the mistakes --------------------------------------------------------------------------------

cached_in_two_pieces = functools.partial(check_cached_equals_uncached, pieces=(4, 3))

# (lesson, file, text, what replaces it, the check that must fail)
LESSONS: list[tuple[str, str, str, str, Callable[[ModuleType], None]]] = [
    (
        "no causal mask",
        "model.py",
        "is_causal = mask is None and q.shape[2] > 1",
        "is_causal = False",
        check_causality,
    ),
    (
        "a causal mask that lets one future token through",
        "model.py",
        ".tril(n_past)",
        ".tril(n_past + 1)",
        check_segments_isolate,
    ),
    ("a mask aligned to the top left", "model.py", ".tril(n_past)", ".tril()", cached_in_two_pieces),
    (
        "repeat instead of repeat_interleave",
        "model.py",
        "k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)",
        "k.repeat(1, group, 1, 1), v.repeat(1, group, 1, 1)",
        check_gqa_equals_naive_attention,
    ),
    ("rotary positions left out", "model.py", "if rope is not None:", "if False:", check_order_matters),
    (
        "rotary angles with the wrong sign",
        "model.py",
        "torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)",
        "torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)",
        check_rope_is_complex_rotation,
    ),
    (
        "a rotation without its minus",
        "model.py",
        "a * cos - b * sin",
        "a * cos + b * sin",
        check_rope_depends_on_distance_only,
    ),
    (
        "only the queries are rotated",
        "model.py",
        "q, k = apply_rope(q, *rope), apply_rope(k, *rope)",
        "q = apply_rope(q, *rope)",
        check_order_matters,
    ),
    (
        "positions that start at 0 again after the cache",
        "model.py",
        "torch.arange(past, past + T, device=device)",
        "torch.arange(T, device=device)",
        check_cached_equals_uncached,
    ),
    ("a cache that never grows", "model.py", "cache.length += T", "pass", cached_in_two_pieces),
    (
        "values stored in the wrong place of the cache",
        "model.py",
        "self.values[layer][:, :, self.length : end] = v",
        "self.values[layer][:, :, : k.shape[2]] = v",
        check_cached_equals_uncached,
    ),
    (
        "residual projections of full size",
        "model.py",
        "std /= (2 * self.config.n_layers) ** 0.5",
        "pass",
        check_initial_std,
    ),
    (
        "attention across documents",
        "model.py",
        "return same & causal_mask(",
        "return causal_mask(",
        check_segments_isolate,
    ),
    (
        "no EOS between documents",
        ENCODE_CORPUS,
        "[tokenizer.eos_id] if ends else []",
        "[]",
        check_eos_ends_each_document,
    ),
    (
        "labels that are not shifted",
        "data.py",
        "rows[:, 1:], IGNORE)",
        "rows[:, :-1], IGNORE)",
        check_labels_are_shifted_by_one,
    ),
    (
        "blocks that do not overlap by one",
        "data.py",
        "self.stride = stride or seq_len",
        "self.stride = stride or seq_len + 1",
        check_each_token_is_predicted_once,
    ),
]


def changed_copy(folder: Path, file: str, old: str, new: str) -> ModuleType:
    """The module in `file`, imported from a copy in which `new` stands in place of `old`. The file itself
    stays as it is."""
    source = (REPO / file).read_text(encoding="utf-8")
    if source.count(old) != 1:
        pytest.fail(
            f"{file} should hold this text once, but holds it {source.count(old)} times:\n    {old}\n"
            f"If you changed that line to see what breaks: run tests/core, then undo it. If the new line is "
            f"there to stay, write it into LESSONS in {Path(__file__).name}.",
            pytrace=False,
        )
    copy = folder / f"changed_{Path(file).name}"
    copy.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(copy.stem, copy)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("file", "old", "new", "check"), [pytest.param(*row, id=lesson) for lesson, *row in LESSONS]
)
def test_the_check_passes_on_the_file_and_fails_on_the_mistake(tmp_path, file, old, new, check):
    unchanged = changed_copy(tmp_path, file, old, old)
    try:
        check(unchanged)
    except AssertionError as error:
        pytest.fail(f"{file} fails this check already, without the mistake: {error}", pytrace=False)
    changed = changed_copy(tmp_path, file, old, new)
    with pytest.raises(AssertionError):
        check(changed)


def test_a_line_that_is_gone_is_named_with_what_to_do(tmp_path):
    with pytest.raises(pytest.fail.Exception) as error:
        changed_copy(tmp_path, "model.py", "no such line", "")
    assert "model.py should hold this text once, but holds it 0 times:\n    no such line\n" in str(
        error.value
    )
    assert "undo it" in str(error.value) and "LESSONS" in str(error.value)
