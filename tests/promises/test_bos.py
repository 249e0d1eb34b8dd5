"""A tokenizer with BOS puts it where a text begins: prompts, documents, instructions, streams."""

import itertools
import json

import pytest
import torch
from converting import call, random_model, train_bpe, with_bos

import infer
from data import StepShape, StreamingPackedLMDataset, tokenize
from support.checkpoint import load_model, write_model
from support.messages import UserError
from support.text.chat_template import TEMPLATES, conversation_ids
from tokenizer import BPETokenizer


@pytest.fixture
def trained_bpe() -> BPETokenizer:
    return train_bpe()


def test_a_tokenizer_with_bos_puts_it_before_every_text(tmp_path, trained_bpe):
    """Prompts, documents in training, whole or streamed in pieces, instructions: the ids of transformers'
    own tokenizer."""
    import transformers

    tokenizer = with_bos(trained_bpe)
    model = random_model(vocab_size=tokenizer.vocab_size)
    write_model(tmp_path / "ours.ckpt", model, tokenizer, {})
    call("--ckpt", tmp_path / "ours.ckpt", "--to", "hf", "--output", tmp_path / "hf")
    call("--from", tmp_path / "hf", "--output", tmp_path / "back.ckpt")
    back = load_model(tmp_path / "back.ckpt")[1]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    bos, text = tokenizer.vocab_size - 1, "attention is"
    assert theirs(text).input_ids == infer.prompt_to_ids(back, text) == [bos, *trained_bpe.encode(text)]
    assert (theirs.bos_token_id, theirs.eos_token_id) == (bos, trained_bpe.eos_id)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["bos_token_id"] == bos
    assert bos not in back.encode("<s>") and trained_bpe.bos_ids == ()

    documents = ["attention is a sum. " * 5000, "x", ""]  # the first is encoded in several pieces
    assert len(list(back.pieces(documents[0]))) > 1
    expected = [id for document in documents for id in [bos, *back.encode(document), back.eos_id]]
    assert tokenize(documents, back).tolist() == expected
    assert conversation_ids(TEMPLATES["chat"], back, [], "How?", 1000)[0] == bos
    with pytest.raises(UserError, match="the prompt is empty"):
        infer.prompt_to_ids(back, "")


class Documents:
    """What StreamingPackedLMDataset reads: documents, with a position."""

    def __init__(self, texts: list[str]):
        self.texts = texts

    def seek(self, position: int | None) -> None:
        self.read = position or 0

    def position(self) -> int:
        return self.read

    def take(self, n: int, n_chars: int) -> list[str]:
        self.read += n
        return self.texts[self.read - n : self.read]


def test_streamed_documents_begin_with_bos(trained_bpe):
    """A stream resumed in the middle of a long document gets no BOS there."""
    tokenizer, documents = with_bos(trained_bpe), ["values", "attention is a sum. " * 5000, "of"]

    def stream(state: str | None = None):
        return iter(
            StreamingPackedLMDataset(
                Documents(documents),
                tokenizer,
                seq_len=64,
                stride=64,
                shape=StepShape(4, 1),
                seed=0,
                shuffle=False,
                state=state,
            )
        )

    expected = tokenize(documents, tokenizer).tolist()
    steps = list(itertools.islice(stream(), len(expected) // 256))
    assert (
        torch.cat([step.micro_batches[0]["input_ids"].flatten() for step in steps]).tolist()
        == expected[: len(steps) * 256]
    )
    n = len(steps) * 3 // 4  # the long document is read in two pieces, and this is in the second
    assert json.loads(steps[n].stream_state)["piece"] == 1
    again = list(itertools.islice(stream(steps[n].stream_state), len(steps) - n - 1))
    assert all(
        torch.equal(one.micro_batches[0]["input_ids"], other.micro_batches[0]["input_ids"])
        for one, other in zip(again, steps[n + 1 :], strict=True)
    )
