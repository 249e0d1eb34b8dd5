"""docs/ARCHITECTURE.md follows one batch from the config file to the step of the optimizer. Here that trip is
made.

The page lists the steps of the trip as "1. `file.py`: `symbol`, ...". A short training run is watched: each
symbol must really be called, the steps in the order of the page.
"""

import re
import sys
from pathlib import Path

import pytest
from conftest import REPO

PAGE = (REPO / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
TRIP = PAGE[PAGE.index("## The trip of one batch") : PAGE.index("## The model")]
STEPS = re.findall(r"^\d+\. `([\w/]+\.py)`: ((?:`[\w.]+`(?:, )?)+)", TRIP, re.M)
CALLED_BY_NAME = [(file, symbol) for file, symbols in STEPS for symbol in re.findall(r"`([\w.]+)`", symbols)]


@pytest.fixture(scope="module")
def first_calls(run, tmp_path_factory) -> list[tuple[str, str]]:
    """(file, function) of each function of ours that a short run calls, in the order of their first calls."""
    seen: dict[tuple[str, str], None] = {}

    def watch(frame, event, value) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(REPO)):
            file = Path(frame.f_code.co_filename).relative_to(REPO).as_posix()
            seen.setdefault((file, frame.f_code.co_qualname))

    sys.setprofile(watch)
    try:
        run(tmp_path_factory.mktemp("trip") / "run", "training.max_steps=2")
    finally:
        sys.setprofile(None)
    return list(seen)


def test_the_trip_is_made_in_the_order_of_the_page(first_calls):
    missing = [called for called in CALLED_BY_NAME if called not in first_calls]
    assert missing == [], "the page names functions that a training run does not call"
    order = [first_calls.index(called) for called in CALLED_BY_NAME]
    assert order == sorted(order), "the run calls them in another order"


def test_the_trip_passes_few_files():
    assert len({file for file, _ in STEPS}) <= 10
