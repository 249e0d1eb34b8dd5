"""eval_val.py: the loss that training logged, for any batch size, and comparable across tokenizers."""

import json
import math
import shlex
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import REPO
from foreign_tokenizers import tokenizer_like
from runs import BYTE

import eval_val
import finetune
from data import load_corpus
from instruct import Pair
from support.checkpoint import load_model
from support.config.read import load_config, validate_config
from support.evaluation.validation import text_blocks, validate
from support.messages import UserError


@pytest.fixture
def score(capsys):
    def call(*argv: object) -> dict:
        capsys.readouterr()
        assert eval_val.main([str(word) for word in (*argv, "--json", "--device", "cpu")]) == 0
        return json.loads(capsys.readouterr().out)

    return call


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("data.document_mask=true",),
        ("data.stride=16",),
        ("training.seq_len=24",),
        ("hardware.precision=bf16-mixed",),
    ],
    ids=["plain", "document mask", "stride", "short blocks", "bf16"],
)
def test_the_loss_is_what_training_logged_at_that_step(run, tmp_path, score, words):
    made = run(tmp_path / "run", "training.max_steps=8", "model.dropout=0.1", *words)
    for name, row in zip(("step-0000004", "step-0000008"), made.val_rows, strict=True):
        found = score("--ckpt", made.folder / f"{name}.ckpt")
        assert found["loss"] == pytest.approx(row["val_loss"], rel=1e-5)
        assert found["perplexity"] == pytest.approx(row["perplexity"], rel=1e-4)
        assert (found["step"], found["logged_val_loss"]) == (row["step"], row["val_loss"])


def test_the_whole_set_is_scored_if_training_validated_on_a_part(run, tmp_path, score, tiny_run):
    """Both runs have the same weights, because validation has no part in training."""
    part = run(tmp_path / "run", "training.val_batches=1")
    found = score("--ckpt", part.folder / "final.ckpt")
    whole = score("--ckpt", tiny_run.folder / "final.ckpt")
    assert found["loss"] == whole["loss"]
    assert found["logged_val_loss"] != pytest.approx(whole["loss"], rel=1e-5)


def test_the_loss_does_not_depend_on_the_batch(score, tiny_run):
    found = [score("--ckpt", tiny_run.folder / "final.ckpt", "--batch-size", n) for n in (1, 3, 1000)]
    assert found[1]["loss"] == pytest.approx(found[0]["loss"], rel=1e-6)
    assert found[2]["loss"] == pytest.approx(found[0]["loss"], rel=1e-6)
    assert {row["n_tokens"] for row in found} == {found[0]["n_tokens"]}


def test_the_loss_equals_a_naive_loop(run, tmp_path, score):
    made = run(tmp_path / "run", *BYTE)
    model, tokenizer, metadata = load_model(made.folder / "final.ckpt")
    documents = load_corpus(load_config(None, [], metadata["config"])).val
    row = [i for text in documents for i in [*text.encode(), tokenizer.eos_id]]
    window = model.config.max_seq_len
    losses = []
    for start in range(0, len(row) - 1, window):
        ids = torch.tensor(row[start : start + window + 1])
        logits = model(ids[None, :-1])[0]
        losses += F.cross_entropy(logits, ids[1:], reduction="none").tolist()
    found = score("--ckpt", made.folder / "final.ckpt")
    n_bytes = sum(len(text.encode()) for text in documents)
    assert (found["n_documents"], found["n_tokens"], found["n_bytes"]) == (
        len(documents),
        len(row) - 1,
        n_bytes - 1,
    )
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(sum(losses) / math.log(2) / (n_bytes - 1), rel=1e-6)


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_the_loss_of_an_all_zero_model_is_the_logarithm_of_its_vocabulary(run, tmp_path, score, kind):
    """With all weights zero every token has probability 1 / V: bits per byte follow from counts alone."""
    made = run(tmp_path / "run", "training.max_steps=0", f"tokenizer.kind={kind}")
    checkpoint = made.checkpoint()
    checkpoint["state_dict"] = {
        name: torch.zeros_like(weight) for name, weight in checkpoint["state_dict"].items()
    }
    torch.save(checkpoint, tmp_path / "zero.ckpt")
    found = score("--ckpt", tmp_path / "zero.ckpt")
    vocab_size = checkpoint["tiny_transformer"]["model"]["vocab_size"]
    assert found["loss"] == pytest.approx(math.log(vocab_size), rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(
        found["n_tokens"] * math.log2(vocab_size) / found["n_bytes"], rel=1e-6
    )


@pytest.mark.parametrize(
    ("name", "text", "n_unpredicted"),
    [
        ("byte", "tick tock\n", 1),
        ("byte", "\u00e9tick", 1),  # half of the first character
        ("byte", "\U0001f389", 1),
        ("byte", "", 0),  # the first token is the EOS of an empty document
        ("bytes", "\U0001f389 tick", 1),
        ("llama", "tick tock", 1),  # the letter of ▁t
        ("llama + bos", "tick tock", 0),
        ("llama + bos", "\u00e9", 0),
        ("space first + bos", "  tick", 0),
        ("two bos", "tick", 0),
    ],
)
def test_bytes_are_counted_for_all_predicted_text(name, text, n_unpredicted):
    """BOS is not text. Without BOS, the first token of the text is not predicted."""
    tokenizer = tokenizer_like(name)
    _, n_documents, n_bytes = text_blocks(
        [text, "tock"], tokenizer, validate_config({"data": {"path": "x"}, "training": {"max_steps": 1}}), 32
    )
    assert (n_documents, n_bytes) == (2, len(text.encode()) + 4 - n_unpredicted)


def test_any_text_or_the_validation_text_of_another_config_is_scored(score, tiny_run, tmp_path, capsys):
    ckpt = tiny_run.folder / "final.ckpt"
    text = "It was a dark and stormy night. " * 9
    (tmp_path / "book.txt").write_text(text)
    found = score("--ckpt", ckpt, "--data", tmp_path / "book.txt")
    assert (found["n_documents"], found["n_bytes"] > len(text) - 10) == (1, True)
    other = score(
        "--ckpt", ckpt, "--config", REPO / "config_smoke.yaml", "--override", f"data.path={tmp_path}/book.txt"
    )
    assert other["n_bytes"] < found["n_bytes"], "only a tenth of it is validation text"
    assert (
        eval_val.main(["--ckpt", str(ckpt), "--config", str(REPO / "config_smoke.yaml"), "--device", "cpu"])
        == 0
    )
    said = capsys.readouterr()
    assert "the model reads at most 32 tokens, so the blocks that are scored have 32 tokens" in said.err
    assert "blocks of 32" in said.out


def test_the_printed_report_has_the_size_the_loss_and_the_logged_loss(tiny_run, capsys):
    assert (
        eval_val.main(
            ["--ckpt", str(tiny_run.folder / "best.ckpt"), "--tokenizer", "gpt2", "--device", "cpu"]
        )
        == 0
    )
    said = capsys.readouterr()
    assert "--tokenizer gpt2 is not what this model was trained with" in said.err
    logged = min(row["val_loss"] for row in tiny_run.val_rows)
    lines = said.out.splitlines()
    assert "37,568 parameters, tokenizer bpe 400" in lines[0]
    assert lines[2].startswith(f"val_loss {logged:.4f} nats per token, perplexity ")
    assert lines[3] == f"its newest validation in training gave {logged:.4f}"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["--data", "nowhere.txt"], "--data=nowhere.txt: no .txt or .jsonl file there"),
        (["--data", "{tmp}/empty.txt"], "holds no text"),
        (["--config", "nowhere.yaml"], "config file nowhere.yaml does not exist"),
        (["--override", "data.pth=x"], "unknown key data.pth; did you mean data.path?"),
        (["--device", "tpu"], "device 'tpu' is unknown"),
    ],
)
def test_mistakes_are_refused_with_a_reason(tiny_run, tmp_path, argv, said):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match=said.replace(".", r"\.").replace("?", r"\?")):
        eval_val.main(
            ["--ckpt", str(tiny_run.folder / "final.ckpt"), *(word.format(tmp=tmp_path) for word in argv)]
        )


def test_a_checkpoint_without_a_config_needs_one_to_be_named(tiny_run, tmp_path):
    checkpoint = tiny_run.checkpoint()
    del checkpoint["tiny_transformer"]["config"]
    torch.save(checkpoint, tmp_path / "bare.ckpt")
    with pytest.raises(UserError, match="does not hold the config of its run"):
        eval_val.main(["--ckpt", str(tmp_path / "bare.ckpt")])
    assert (
        eval_val.main(["--ckpt", str(tmp_path / "bare.ckpt"), "--config", str(REPO / "config_smoke.yaml")])
        == 0
    )


def test_a_text_with_characters_the_tokenizer_does_not_know_is_refused(run, tmp_path):
    made = run(tmp_path / "run", "training.max_steps=0", "tokenizer.kind=char")
    (tmp_path / "greek.txt").write_text("λόγος " * 30)
    with pytest.raises(UserError, match="λ"):
        eval_val.main(["--ckpt", str(made.folder / "final.ckpt"), "--data", str(tmp_path / "greek.txt")])


# ---- instructions --------------------------------------------------------------------------------

ROWS = [{"instruction": f"Say {n}.", "input": "", "output": f"{n} and {n}."} for n in range(20)]


@pytest.fixture
def rows(tmp_path) -> Path:
    (tmp_path / "rows.json").write_text(json.dumps(ROWS[:3]))
    (tmp_path / "rows.ndjson").write_text("\n".join(map(json.dumps, ROWS[:3])))
    (tmp_path / "all.json").write_text(json.dumps(ROWS))
    return tmp_path


def fine_tune(folder: Path, *words: str) -> Path:
    overrides = [
        f"checkpoint.dir={folder}",
        "training.warmup_steps=0",
        "training.epochs=2",
        "hardware.accelerator=cpu",
        *words,
    ]
    assert (
        finetune.main(
            ["--config", "configs/finetune_tiny.yaml", *(f"--override={override}" for override in overrides)]
        )
        == 0
    )
    return folder / "final.ckpt"


def test_instructions_are_scored_with_the_same_flag_as_a_text(rows, tiny_run, score, capsys):
    """The loss is that of the given rows, and is not compared with the loss logged on others."""
    ckpt = fine_tune(rows / "sft", f"base_ckpt={tiny_run.folder}/final.ckpt", f"data.path={rows}/all.json")
    model, tokenizer, metadata = load_model(ckpt)
    config = load_config(None, [], metadata["config"])
    by_hand = validate(model, tokenizer, [Pair(**row, where="") for row in ROWS[:3]], config)
    for name in ("rows.json", "rows.ndjson"):
        found = score("--ckpt", ckpt, "--data", rows / name)
        assert (found["loss"], found["n_documents"], found["token_accuracy"]) == (
            by_hand.loss,
            3,
            by_hand.token_accuracy,
        )
        assert (found["set"], found["logged_val_loss"]) == (str(rows / name), None)
    own = score("--ckpt", ckpt)
    assert own["loss"] == pytest.approx(own["logged_val_loss"], rel=1e-5)
    assert own["set"] == "its own validation set"
    capsys.readouterr()
    assert eval_val.main(["--ckpt", str(ckpt), "--override", f"data.val_path={rows}/rows.json"]) == 0
    said = capsys.readouterr().out
    assert (
        "3 instructions of the validation set of its config with the overrides" in said
        and "in training" not in said
    )
    assert score("--ckpt", ckpt, "--data", REPO / "README.md")["token_accuracy"] is None, (
        "a text is still a text"
    )


def test_a_model_not_taught_to_answer_gets_the_command_that_teaches_it(rows, tiny_run, score):
    """The command in the message works as printed, even on three rows."""
    for name in ("rows.json", "rows.ndjson"):
        with pytest.raises(
            UserError, match="holds instructions, and this model has not been taught to answer any"
        ) as caught:
            eval_val.main(["--ckpt", str(tiny_run.folder / "final.ckpt"), "--data", str(rows / name)])
    words = shlex.split(str(caught.value).splitlines()[-1])
    assert words[:4] == ["python3", "finetune.py", "--config", "configs/finetune_tiny.yaml"]
    ckpt = fine_tune(rows / "taught", *words[5::2])
    assert score("--ckpt", ckpt, "--data", rows / "rows.ndjson")["n_documents"] == 3


def test_texts_in_rows_are_texts_for_every_model(rows, tiny_run, score):
    (rows / "texts.jsonl").write_text('{"text": "It was a dark night.", "output": "no answer"}\n' * 3)
    assert score("--ckpt", tiny_run.folder / "final.ckpt", "--data", rows / "texts.jsonl")["n_documents"] == 3
    (rows / "chat.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}]}))
    with pytest.raises(UserError, match="is a conversation"):
        eval_val.main(["--ckpt", str(tiny_run.folder / "final.ckpt"), "--data", str(rows / "chat.jsonl")])
