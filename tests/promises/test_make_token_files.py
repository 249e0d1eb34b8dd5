"""support/text/make_token_files.py and join_shards.py: which part of a text is held out depends on the seed
alone, and no text is lost."""

import numpy as np
import pytest

import tokenizer as tokenizer_module
from support.text.encode_corpus import document_pieces, encode_pieces
from support.text.join_shards import choose_held_out, divide_shards
from support.text.make_token_files import Source, cut_shards
from support.text.validation_split import random_of_documents
from tokenizer import EOS_TEXT, ByteTokenizer

BYTE = ByteTokenizer()


def test_each_document_draws_a_number_of_its_own_wherever_the_drawing_starts():
    assert len(np.unique(random_of_documents(0, 100_000, 7))) == 100_000
    from_the_start = random_of_documents(0, 20_000, 7)
    assert np.array_equal(random_of_documents(5000, 9000, 7), from_the_start[5000:14_000])


DOCUMENT_LENGTHS = {
    "a book and two notes": [6000, 150, 150],
    "two books and notes": [3000, 100, 2600, *[60] * 20],
    "six chapters": [1000, 1100, 900, 1200, 800, 1000],
    "many notes": [*range(80, 120), 500],
}


def document_of(char: str) -> int:
    """The number of the document that this character is from, in the test below."""
    return (ord(char) - 0x4E00) // 251


@pytest.mark.parametrize("name", DOCUMENT_LENGTHS)
def test_about_nine_tenths_are_trained_on_whatever_the_seed_and_the_shards(tmp_path, name, monkeypatch):
    """With shards that are far shorter than a document, and with one shard for all. No text is on both sides,
    and none is lost."""
    monkeypatch.setattr(tokenizer_module, "PIECE_CHARS", 23)
    texts = []
    for number, length in enumerate(DOCUMENT_LENGTHS[name]):  # each document has 250 characters of its own
        texts.append("".join(chr(0x4E00 + 251 * number + i % 250) for i in range(length)))
    n_tokens = sum(len(text.encode()) + 1 for text in texts)
    for seed in range(10):
        found = set()
        for shard_chars in (50, 100_000):
            for old in tmp_path.glob("*.npy"):
                old.unlink()
            for n, (pieces, begins) in enumerate(cut_shards(document_pieces(texts, BYTE), BYTE, shard_chars)):
                np.save(tmp_path / f"train-{n:06}.npy", encode_pieces(pieces, BYTE, begins))
            held_out = choose_held_out(
                tmp_path,
                n_documents=len(texts),
                n_tokens=n_tokens,
                fraction=0.1,
                seed=seed,
                eos_id=BYTE.eos_id,
            )
            divided = divide_shards(tmp_path, held_out, seed, BYTE)
            train, val = map(np.concatenate, zip(*divided, strict=True))
            found.add((train.tobytes(), val.tobytes()))
        assert len(found) == 1, "the size of shards changes nothing"
        assert 0.8 <= len(train) / (len(train) + len(val)) <= 0.95
        train_texts, val_texts = (BYTE.decode(row.tolist()).split(EOS_TEXT)[:-1] for row in (train, val))
        assert "\ufffd" not in "".join(train_texts + val_texts), "no character is cut"
        first_parts = {document_of(text[0]): text for text in train_texts}
        for text in val_texts:
            number = document_of(text[0])
            assert first_parts.pop(number, "") + text == texts[number]
        assert all(text == texts[number] for number, text in first_parts.items())


def test_ids_beyond_16_bits_are_written_with_32(tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text("some text to read")
    source = Source([tmp_path / "t.txt"])
    monkeypatch.setattr(ByteTokenizer, "vocab_size", 2**16 + 1)
    ((pieces, begins),) = cut_shards(source.parts(), BYTE, 1000)
    assert encode_pieces(pieces, BYTE, begins).dtype == np.uint32
