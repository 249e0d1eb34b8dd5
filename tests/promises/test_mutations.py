"""Change one thing, see what breaks: each mutation edits the source of a file in memory, and the named check
must fail.

The checks are those of the other tests, so a row here proves that the named test would notice the mistake.
The text to replace must occur exactly once: a lesson whose line has moved on fails instead of passing for
nothing.

To try one by hand, make the edit of a row in LESSONS in the file, and run tests/core/test_model.py or
tests/core/test_data.py.
"""

from collections.abc import Callable
from pathlib import Path
from types import FunctionType, ModuleType

import pytest
import test_data
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

import data
import model
import support.text.encode_corpus

REAL = {"model": model, "data": data, "encoding": support.text.encode_corpus}


def in_test_data(name: str, *args: object) -> Callable[[ModuleType], None]:
    """A test of test_data.py as a check: it runs with every name it imports from data.py taken from the
    module given."""

    def check(m: ModuleType) -> None:
        test = getattr(test_data, name)
        taken = [
            key
            for key, value in test.__globals__.items()
            if not key.startswith("_") and key in vars(data) and value is vars(data)[key]
        ]
        names = {key: getattr(m, key) for key in taken if hasattr(m, key)}
        FunctionType(test.__code__, {**test.__globals__, **names})(*args)

    return check


def mutant(name: str, old: str, new: str) -> ModuleType:
    """The module `name` as it would be with `old` replaced by `new` in its source; the file stays as it is."""
    source = Path(REAL[name].__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1, (
        f"{name}.py holds {old!r} {source.count(old)} times; bring this lesson up to date"
    )
    module = ModuleType(f"mutant_of_{name}")
    exec(compile(source.replace(old, new), f"mutant of {name}.py", "exec"), module.__dict__)
    return module


# (lesson, file, text, its replacement, the check that must fail)
LESSONS: list[tuple[str, str, str, str, Callable]] = [
    (
        "no causal mask",
        "model",
        "is_causal=mask is None and q.shape[2] > 1",
        "is_causal=False",
        check_causality,
    ),
    (
        "a causal mask that lets one future token through",
        "model",
        ".tril(n_keys - n_queries)",
        ".tril(n_keys - n_queries + 1)",
        check_segments_isolate,
    ),
    (
        "a mask aligned to the top left",
        "model",
        ".tril(n_keys - n_queries)",
        ".tril()",
        lambda m: check_cached_equals_uncached(m, (4, 3)),
    ),
    (
        "repeat for repeat_interleave",
        "model",
        "k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)",
        "k.repeat(1, group, 1, 1), v.repeat(1, group, 1, 1)",
        check_gqa_equals_naive_attention,
    ),
    ("rotary positions left out", "model", "if rope is not None:", "if False:", check_order_matters),
    (
        "rotary angles with the wrong sign",
        "model",
        "torch.cat([-sin, sin], dim=-1)",
        "torch.cat([sin, -sin], dim=-1)",
        check_rope_is_complex_rotation,
    ),
    (
        "rotary sines without a sign",
        "model",
        "torch.cat([-sin, sin], dim=-1)",
        "torch.cat([sin, sin], dim=-1)",
        check_rope_depends_on_distance_only,
    ),
    (
        "only the queries are rotated",
        "model",
        "q, k = apply_rope(q, *rope), apply_rope(k, *rope)",
        "q = apply_rope(q, *rope)",
        check_order_matters,
    ),
    (
        "positions that start anew behind the cache",
        "model",
        "torch.arange(past, past + T, device=device)",
        "torch.arange(T, device=device)",
        check_cached_equals_uncached,
    ),
    (
        "a cache that never grows",
        "model",
        "cache.length += T",
        "pass",
        lambda m: check_cached_equals_uncached(m, (4, 3)),
    ),
    (
        "values stored at the wrong place of the cache",
        "model",
        "self.values[layer][:, :, self.length : end] = v",
        "self.values[layer][:, :, : k.shape[2]] = v",
        check_cached_equals_uncached,
    ),
    (
        "residual projections of full size",
        "model",
        "std /= (2 * self.config.n_layers) ** 0.5",
        "pass",
        check_initial_std,
    ),
    (
        "attention across documents",
        "model",
        "return same & causal_mask(",
        "return causal_mask(",
        check_segments_isolate,
    ),
    (
        "no EOS between documents",
        "encoding",
        "[tokenizer.eos_id] if ends else []",
        "[]",
        in_test_data("test_eos_stands_behind_every_document_and_nowhere_else"),
    ),
    (
        "labels that are not shifted",
        "data",
        "rows[:, 1:], IGNORE)",
        "rows[:, :-1], IGNORE)",
        in_test_data("test_labels_are_the_input_shifted_by_one", False),
    ),
    (
        "blocks that do not overlap by one",
        "data",
        "stride or seq_len, mask_eos",
        "stride or seq_len + 1, mask_eos",
        in_test_data("test_each_token_is_predicted_exactly_once_in_an_epoch", 30),
    ),
]


@pytest.mark.parametrize(
    ("name", "old", "new", "check"), [pytest.param(*row, id=lesson) for lesson, *row in LESSONS]
)
def test_the_mutation_breaks_the_named_check(name, old, new, check):
    broken = mutant(name, old, new)
    check(REAL[name])
    with pytest.raises(AssertionError):
        check(broken)


def test_an_edit_that_changes_nothing_breaks_nothing():
    """The machinery itself: a copy of the source passes every check, so a failure above is the mutation's
    doing."""
    for name in REAL:
        copy = mutant(name, REAL[name].__doc__, REAL[name].__doc__)
        for _, file, _, _, check in LESSONS:
            if file == name:
                check(copy)


def test_a_lesson_whose_line_is_gone_fails():
    with pytest.raises(AssertionError, match="bring this lesson up to date"):
        mutant("model", "no such line", "")
