"""How documents are divided into those to train on and those for validation."""

from pathlib import Path

import numpy as np
import pytest

from data import load_corpus
from support.config.read import validate_config
from support.config.schema import DataConfig
from support.text.documents import text_documents
from support.text.validation_split import split_documents, warn_of_share

STORIES = [f"document {i} " + "x" * (37 * i % 101) for i in range(60)]


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 42])
def test_validation_is_whole_documents_that_hold_about_the_fraction(fraction, seed):
    train, val = split_documents(STORIES, fraction, seed)
    assert sorted(train + val) == sorted(STORIES), "nothing is lost, nothing is in both"
    assert train == [d for d in STORIES if d in set(train)], "training keeps its order"
    size, wanted = sum(map(len, val)), fraction * sum(map(len, STORIES))
    assert wanted <= size < wanted + max(map(len, STORIES)), "within one document of the share asked for"


def test_the_cut_depends_only_on_the_seed():
    assert split_documents(STORIES, 0.2, 3) == split_documents(list(STORIES), 0.2, 3)
    assert len({tuple(split_documents(STORIES, 0.2, seed)[1]) for seed in range(20)}) == 20


def test_validation_documents_are_not_neighbours():
    """Documents of a file are often sorted; validation must not be one end of it."""
    _, val = split_documents(STORIES, 0.2, 0)
    numbers = sorted(STORIES.index(d) for d in val)
    assert numbers[-1] - numbers[0] > 2 * len(numbers)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.99])
def test_something_is_left_on_both_sides_of_the_cut(fraction):
    for documents_ in (["a ship", "a shore"], ["short", "long" * 100], ["long" * 100, "short"]):
        for seed in range(10):
            train, val = split_documents(documents_, fraction, seed)
            assert "".join(train) and "".join(val)
            assert sorted("".join(train + val)) == sorted("".join(documents_)), (
                "nothing is lost, nothing is in both"
            )


def book(n: int, letter: str = "b") -> str:
    """A long document in which every stretch of ten characters occurs once."""
    return "".join(f"{letter}{i:09}" for i in range(n // 10))


CORPORA = {
    "a book and two notes": [book(60_000), book(150, "n"), book(150, "m")],
    "two books": [book(30_000), book(20_000, "c")],
    "a book and many notes": [*(book(200, chr(0x4E00 + i)) for i in range(300)), book(40_000)],
    "six chapters": [book(9_000 + 300 * i, chr(97 + i)) for i in range(6)],
    "twelve chapters": [book(9_000 + 300 * i, chr(97 + i)) for i in range(12)],
    "letters, two of them long": [
        *(book(100 + 10 * i, chr(0x4E00 + i)) for i in range(40)),
        book(2_500),
        book(2_000, "c"),
    ],
}


@pytest.mark.parametrize("name", CORPORA)
def test_about_nine_tenths_are_trained_on_with_any_seed(name, capsys):
    """Before, documents were drawn until validation held its share, so half of the seeds held out the
    whole book and trained only on the notes."""
    documents_, total = CORPORA[name], sum(map(len, CORPORA[name]))
    for seed in range(30):
        train, val = split_documents(documents_, 0.1, seed)
        assert 0.8 <= sum(map(len, train)) / total <= 0.95, seed
        assert sum(map(len, train + val)) == total
        stretches = [
            {text[i : i + 10] for text in part for i in range(0, len(text), 10)} for part in (train, val)
        ]
        assert len(stretches[0] & stretches[1]) == 0, "no text is on both sides"
    assert capsys.readouterr().err == ""


def drawn_until_full(documents_: list[str], fraction: float, seed: int) -> list[str]:
    """Validation as it was drawn before large documents were cut."""
    held, wanted = [], fraction * sum(map(len, documents_))
    for i in np.random.default_rng(seed).permutation(len(documents_)):
        if sum(len(documents_[j]) for j in held) >= wanted:
            break
        held.append(i)
    return [documents_[i] for i in sorted(held)]


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.3])
def test_many_similar_documents_are_split_as_before(fraction):
    """Published losses were measured on these."""
    corpus = text_documents("data/tiny_corpus.txt", DataConfig(path="data/tiny_corpus.txt"))
    for documents_ in (corpus, STORIES, [f"{i} " + "word " * (i * i * 7 % 31 + 20) for i in range(1000)]):
        for seed in (0, 7, 42):
            assert split_documents(documents_, fraction, seed)[1] == drawn_until_full(
                documents_, fraction, seed
            )


def test_the_warning_for_a_share_that_cannot_be_met_names_both_sizes(capsys):
    warn_of_share(100, 1000, 0.1, "characters", "give more")
    assert capsys.readouterr().err == ""
    for held in (20, 400):
        warn_of_share(held, 1000, 0.1, "characters", "give more")
        said = (
            f"validation holds {held} characters and training {1000 - held}, but 0.1 of the text should "
            "be held out; give more"
        )
        assert said in capsys.readouterr().err


def test_a_single_document_is_cut_at_its_end():
    text = "".join(chr(0x4E00 + i) for i in range(1000))
    assert split_documents([text], 0.1, 42) == ([text[:900]], [text[900:]])


def corpus_of(folder: Path, **data):
    return load_corpus(
        validate_config({"data": data, "training": {"max_steps": 1}, "checkpoint": {"dir": str(folder)}})
    )


def test_a_separate_validation_text_is_used_whole(tmp_path):
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\ntwo")
    (tmp_path / "v.txt").write_text("three")
    corpus = corpus_of(tmp_path, path=str(tmp_path / "a.txt"), val_path=str(tmp_path / "v.txt"))
    assert (corpus.train, corpus.val) == (["one", "two"], ["three"])


def test_the_corpus_is_cut_by_the_seed_of_the_config(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n<|endoftext|>\n".join(STORIES))
    corpus = corpus_of(tmp_path, path=str(path), val_fraction=0.2)
    assert (corpus.train, corpus.val) == split_documents(STORIES, 0.2, 42)
