"""Fine-tuning, run as a user runs it: what it starts from, what it measures and what it trains."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import REPO, Run
from loopback_hub import LoopbackHub, dataset_card

import finetune
import train
from infer import Chat
from instruct import Pair, split_pairs
from lora import add_adapters
from model import GPTMini
from sampling import SamplingConfig
from support.checkpoint import KEY, load_model, model_weights, read_checkpoint
from support.config.read import load_config
from support.evaluation.validation import documents_of, scoring_config, validate
from support.messages import UserError
from support.text.chat_template import Template

PLAIN_TEMPLATE = (
    "template={prompt: 'Ask {instruction} Say ', prompt_with_input: 'Ask {instruction} {input} Say '}"
)
LORA = ("lora={rank: 2, alpha: 4}",)
SIX_STEPS = (
    PLAIN_TEMPLATE,
    "data.val_docs=6",
    "training.epochs=null",
    "training.max_steps=6",
    "training.schedule_steps=6",
    "training.warmup_steps=1",
    "training.log_every=1",
    "training.micro_batch_size=3",
    "training.grad_accum_steps=2",
    "training.val_every=3",
    "checkpoint.save_every=3",
    "checkpoint.keep_last=null",
)


def rows(n: int) -> list[dict]:
    """Questions and answers of unequal lengths, half of them with an input."""
    words = ["loss", "head", "step", "data", "the", "of", "is", "text", "and", "word"]
    return [
        {
            "instruction": f"{words[i % 10]} {i}?",
            "input": words[i % 7] if i % 2 else "",
            "output": " ".join([words[i % 10]] * (1 + i % 4)) + ".",
        }
        for i in range(n)
    ]


@pytest.fixture(scope="session")
def instructions(shared_once: Callable[..., Path]) -> Path:
    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / "rows.json").write_text(json.dumps(rows(24)))

    return shared_once("instructions", make) / "rows.json"


@pytest.fixture
def sft(instructions: Path, tiny_run: Run) -> Callable[..., Run]:
    """sft(folder, "training.max_steps=4", "--resume"): fine-tune the shared tiny run in this process."""

    def argv(folder: Path, *words: str) -> list[str]:
        overrides = [
            f"base_ckpt={tiny_run.folder / 'final.ckpt'}",
            f"data.path={instructions}",
            f"checkpoint.dir={folder}",
            *SIX_STEPS,
            *(word for word in words if not word.startswith("--")),
        ]
        flags = [part for word in words if word.startswith("--") for part in word.split("=", 1)]
        return [
            "--config",
            "config_finetune.yaml",
            "--device",
            "cpu",
            *(f"--override={override}" for override in overrides),
            *flags,
        ]

    def run(folder: Path, *words: str) -> Run:
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setattr("support.run.show.draw_loss", lambda folder: None)
            code = finetune.main(argv(folder, *words))
        return Run(folder, code, out.getvalue(), err.getvalue())

    run.argv = argv
    return run


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return model_weights(read_checkpoint(path))


def same_weights(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- what it starts from -------------------------------------------------------------------------


def test_it_starts_from_the_base_and_does_not_change_its_file(sft, tiny_run, tmp_path):
    base = tiny_run.folder / "final.ckpt"
    before = base.read_bytes()
    untrained = sft(
        tmp_path / "zero", "training.max_steps=0", "training.schedule_steps=null", "training.warmup_steps=0"
    )
    assert same_weights(weights_of(untrained.folder / "final.ckpt"), weights_of(base))
    made = sft(tmp_path / "sft")
    assert not same_weights(weights_of(made.folder / "final.ckpt"), weights_of(base))
    ours, theirs = made.checkpoint()[KEY], tiny_run.checkpoint()[KEY]
    assert ours["tokenizer"] == theirs["tokenizer"]
    assert ours["model"] == theirs["model"] | {"dropout": ours["model"]["dropout"]}
    assert Template.model_validate(ours["template"]).fill("a", "b") == "Ask a b Say "
    assert base.read_bytes() == before


def test_a_base_in_bf16_is_trained_in_float32(sft, tiny_run, tmp_path):
    checkpoint = tiny_run.checkpoint()
    checkpoint["state_dict"] = {name: weight.bfloat16() for name, weight in checkpoint["state_dict"].items()}
    torch.save(checkpoint, tmp_path / "base.ckpt")
    made = sft(tmp_path / "sft", f"base_ckpt={tmp_path / 'base.ckpt'}")
    assert {weight.dtype for weight in weights_of(made.folder / "final.ckpt").values()} == {torch.float32}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.d_model=64", r"model.d_model=64, and .*final.ckpt has 32.*leave model.d_model out"),
        ("model.norm=layernorm", "model.norm=layernorm, and .* has rmsnorm"),
        ("model.max_seq_len=999", "model.max_seq_len=999, and .* has 32"),
        ("tokenizer.kind=gpt2", "tokenizer.kind=gpt2, and .* has bpe"),
        ("tokenizer.vocab_size=999", "tokenizer.vocab_size=999, and .* has 400"),
        ("training.seq_len=64", "training.seq_len=64 is longer than model.max_seq_len=32"),
        ("model.d_modle=64", "unknown key model.d_modle"),
        ("base_ckpt=nowhere.ckpt", "base_ckpt: checkpoint nowhere.ckpt does not exist"),
        ("base_ckpt=README.md", "base_ckpt: README.md is not a checkpoint"),
        ("base_ckpt=null", "no checkpoint to start from"),
        ("base_ckpt=5", "base_ckpt: checkpoint 5 does not exist"),
        ("template=llama", "template=llama is not one of chat, alpaca"),
        ("lora.targets=[c_attn]", "no block has a c_attn"),
        ("lora.rank=0", "lora.rank=0"),
        ("lora.r=4", "unknown key lora.r; did you mean lora.rank"),
        ("data.streaming=true", "streaming does not belong to source=instructions"),
        ("data.document_mask=true", "document_mask does not belong to source=instructions"),
        ("data.fields={question: instruction}", "fields: question is not one of instruction, input, output"),
        (
            "data.val_split=test",
            "--override data.path and --override data.val_split exclude each other; give one of them",
        ),
        ("training.seq_len=2", r"none of \d+ instructions fits training.seq_len=2"),
    ],
)
def test_a_config_that_contradicts_the_base_or_makes_no_sense_is_refused(sft, tmp_path, override, said):
    with pytest.raises(UserError, match=said):
        sft(tmp_path / "sft", override)
    assert not (tmp_path / "sft").exists()


def test_dropout_nulls_and_values_equal_to_those_of_the_base_are_accepted(sft, tmp_path):
    made = sft(
        tmp_path,
        "model.dropout=0.1",
        "model.gradient_checkpointing=true",
        "model.d_model=32",
        "model.d_ff=null",
        "training.max_steps=1",
    )
    assert made.checkpoint()[KEY]["config"]["model"]["dropout"] == 0.1


def test_each_script_refuses_the_config_of_the_other(tmp_path):
    with pytest.raises(UserError, match="run it with python3 finetune"):
        train.main(["--config", "config_finetune.yaml"])
    with pytest.raises(UserError, match="no checkpoint to start from"):
        finetune.main(["--config", "config_smoke.yaml", "--override", f"checkpoint.dir={tmp_path}"])


@pytest.mark.parametrize("override", ["lora.rank=4", "template=chat"])
def test_pretraining_refuses_adapters_and_templates(argv_of, tmp_path, override):
    """A model with random weights whose adapters alone are trained could not learn."""
    with pytest.raises(UserError, match=r"belongs to fine-tuning, where there is a model to adapt"):
        train.main(argv_of(tmp_path / "run", override))
    assert not (tmp_path / "run").exists()


def test_a_model_is_validated_with_the_template_it_was_trained_with(sft, tmp_path):
    """A config with another template only chooses the rows; the model's own template is used."""
    made = sft(tmp_path / "sft", "training.max_steps=1")
    model, tokenizer, metadata = load_model(made.folder / "final.ckpt")
    (tmp_path / "other.yaml").write_text(
        (made.folder / "run_config.yaml").read_text().replace("Ask {instruction}", "Q {instruction}")
    )
    config = scoring_config(model, metadata, "final.ckpt", str(tmp_path / "other.yaml"))
    assert config.template.model_dump() == metadata["template"]
    assert validate(model, tokenizer, documents_of(config, None), config).loss == pytest.approx(
        made.val_rows[-1]["val_loss"], rel=1e-5
    )


def test_fine_tuning_on_plain_text_works_too(sft, tmp_path):
    """Without instructions it works like pretraining, and also reports how much the loss on the new text has
    changed."""
    text = f"data={{source: text, path: {REPO / 'README.md'}}}"
    argv = [
        word
        for word in sft.argv(tmp_path, text, *LORA)
        if "data." not in word and not word.startswith("--override=template")
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        assert finetune.main(argv) == 0
    made = Run(tmp_path, 0, "", "")
    assert [row["val_loss_change"] for row in made.val_rows] == [
        row["val_loss"] - made.val_rows[0]["val_loss"] for row in made.val_rows
    ]
    assert made.val_rows[-1]["val_loss_change"] < 0 and "token_accuracy" not in made.val_rows[0]
    assert made.checkpoint()[KEY]["template"] is None, (
        "a model trained on more text does not answer questions"
    )


def test_the_template_of_the_base_is_kept(sft, tmp_path):
    first = sft(tmp_path / "first", "training.max_steps=1")
    argv = [
        word
        for word in sft.argv(tmp_path / "second", f"base_ckpt={first.folder / 'final.ckpt'}")
        if not word.startswith("--override=template")
    ]
    config = tmp_path / "config.yaml"
    config.write_text(
        "".join(line for line in (REPO / "config_finetune.yaml").open() if not line.startswith("template:"))
    )
    with contextlib.redirect_stdout(io.StringIO()):
        finetune.main(["--config", str(config), *argv[2:]])
    assert (
        read_checkpoint(tmp_path / "second" / "final.ckpt")[KEY]["template"]
        == first.checkpoint()[KEY]["template"]
    )


# ---- what is measured ----------------------------------------------------------------------------


def test_validation_starts_with_the_base_and_equals_that_of_eval_val(sft, tiny_run, tmp_path):
    made = sft(tmp_path)
    assert [row["step"] for row in made.val_rows] == [0, 3, 6]
    for path, row in (
        (tiny_run.folder / "final.ckpt", made.val_rows[0]),
        (made.folder / "final.ckpt", made.val_rows[-1]),
    ):
        model, tokenizer, metadata = load_model(path)
        config = scoring_config(model, metadata, str(path), str(made.folder / "run_config.yaml"))
        found = validate(model, tokenizer, documents_of(config, None), config)
        assert found.loss == pytest.approx(row["val_loss"], rel=1e-5)
        for name in ("token_accuracy", "response_accuracy", "perplexity"):
            assert getattr(found, name) == pytest.approx(row[name], rel=1e-5), name
    changes = [row["val_loss_change"] for row in made.val_rows]
    assert changes == [row["val_loss"] - made.val_rows[0]["val_loss"] for row in made.val_rows]
    assert changes[-1] < -0.02
    metrics = made.checkpoint()[KEY]["metrics"]
    assert metrics["base_val_loss"] == made.val_rows[0]["val_loss"]
    assert metrics["token_accuracy"] == made.val_rows[-1]["token_accuracy"]


def naive_gradient(path: Path, pairs: list[Pair], template: Template) -> dict[str, torch.Tensor]:
    """The gradient of the mean loss over all response tokens, one pair at a time, without padding, labels or
    masks."""
    model, tokenizer, _ = load_model(path)
    losses = []
    n_response_tokens = 0
    for pair in pairs:
        prompt = tokenizer.encode(template.fill(pair.instruction, pair.input))
        response = [*tokenizer.encode(pair.output), tokenizer.eos_id]
        ids = torch.tensor([prompt + response])
        log_p = model(ids[:, :-1]).log_softmax(dim=-1)[0, len(prompt) - 1 :]
        losses.append(-log_p.gather(1, ids[0, len(prompt) :, None]).sum())
        n_response_tokens += len(response)
    (sum(losses) / n_response_tokens).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture
def gradient_of(sft, tmp_path, monkeypatch) -> Callable[..., dict[str, torch.Tensor]]:
    """gradient_of(words...): the gradient of the first step, without clipping."""

    def get(*words: str) -> dict[str, torch.Tensor]:
        found = {}

        def keep(self, step: int, loss: float, grad_norm: float) -> None:
            if step == 0:
                found.update({name: p.grad.clone() for name, p in self.net.named_parameters()})

        with monkeypatch.context() as patch:
            patch.setattr(train.LitCausalLM, "refuse_bad_step", keep)
            sft(
                tmp_path / str(len(list(tmp_path.iterdir()))),
                "training.grad_clip=null",
                "training.max_steps=1",
                "data.shuffle=false",
                *words,
            )
        return found

    return get


@pytest.mark.parametrize(
    "words",
    [
        ("training.micro_batch_size=18", "training.grad_accum_steps=1"),
        ("training.micro_batch_size=3", "training.grad_accum_steps=6"),
        ("training.micro_batch_size=1", "training.grad_accum_steps=18"),
    ],
    ids=["one batch", "6 micro-batches", "18 micro-batches"],
)
def test_a_step_follows_the_mean_over_all_its_response_tokens(gradient_of, tiny_run, instructions, words):
    """Prompts and answers have unequal lengths, and all 18 training rows make one step."""
    config = load_config(
        "config_finetune.yaml", [f"data.path={instructions}", "data.val_docs=6", PLAIN_TEMPLATE]
    )
    pairs = split_pairs(config)[0]
    expected = naive_gradient(tiny_run.folder / "final.ckpt", pairs, config.template)
    found = gradient_of(*words)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=2e-6, msg=name)


def test_the_mean_of_the_means_of_rows_would_fail_that_test(tiny_run, instructions):
    """The usual mistake, averaging each row before averaging the rows, is far outside that tolerance."""
    config = load_config(
        "config_finetune.yaml", [f"data.path={instructions}", "data.val_docs=6", PLAIN_TEMPLATE]
    )
    pairs, base = split_pairs(config)[0], tiny_run.folder / "final.ckpt"
    right = naive_gradient(base, pairs, config.template)
    each = [naive_gradient(base, [pair], config.template) for pair in pairs]
    name = "layers.0.mlp.up_proj.weight"
    wrong = sum(gradient[name] for gradient in each) / len(each)
    assert (wrong - right[name]).norm() > 0.05 * right[name].norm()


def test_packed_rows_give_the_same_gradient_as_padded_ones(gradient_of):
    padded = gradient_of("training.micro_batch_size=18", "training.grad_accum_steps=1")
    config = ("data.packing=true", "training.micro_batch_size=1")
    with pytest.raises(AssertionError):  # one block holds only some of the pairs, so it differs
        torch.testing.assert_close(
            gradient_of(*config, "training.grad_accum_steps=1")["norm.weight"],
            padded["norm.weight"],
            rtol=1e-3,
            atol=1e-6,
        )
    n_blocks = 1
    while True:  # until a step holds all blocks
        n_blocks += 1
        packed = gradient_of(*config, f"training.grad_accum_steps={n_blocks}")
        if torch.allclose(packed["norm.weight"], padded["norm.weight"], rtol=1e-3, atol=1e-6):
            break
        assert n_blocks < 18
    for name in padded:
        torch.testing.assert_close(packed[name], padded[name], rtol=1e-3, atol=2e-6, msg=name)


def test_mask_prompt_false_trains_on_prompts_and_keeps_validation_the_same(sft, tmp_path):
    masked = sft(tmp_path / "masked", "training.max_steps=1")
    unmasked = sft(tmp_path / "unmasked", "training.max_steps=1", "data.mask_prompt=false")
    assert unmasked.val_rows[0] == masked.val_rows[0]
    assert unmasked.train_rows[0]["tokens"] > 1.5 * masked.train_rows[0]["tokens"]
    assert unmasked.train_rows[0]["loss"] != pytest.approx(masked.train_rows[0]["loss"], rel=0.01)


def test_a_chat_answers_questions_learned_by_heart(sft, tmp_path):
    """End to end: the model is trained on eight questions until each answer is the likeliest. The chat then
    gives these answers word for word and stops."""
    asked = [
        {"instruction": word, "input": "", "output": word[::-1] + "!"}
        for word in ["loss", "head", "token", "model", "layer", "mask", "step", "data"]
    ]
    (tmp_path / "eight.json").write_text(json.dumps(asked))
    made = sft(
        tmp_path / "sft",
        f"data.path={tmp_path / 'eight.json'}",
        f"data.val_path={tmp_path / 'eight.json'}",
        "data.val_docs=null",
        "training.max_steps=60",
        "training.schedule_steps=60",
        "training.val_every=60",
        "training.lr=0.01",
        "training.micro_batch_size=8",
        "training.grad_accum_steps=1",
    )
    assert made.val_rows[-1]["response_accuracy"] == 1.0 and made.val_rows[-1]["token_accuracy"] == 1.0
    model, tokenizer, metadata = load_model(made.folder / "final.ckpt")
    chat = Chat(
        model, tokenizer, Template.model_validate(metadata["template"]), 16, SamplingConfig(temperature=0)
    )
    assert ["".join(chat.answer(row["instruction"], 1)) for row in asked] == [row["output"] for row in asked]


# ---- what is trained -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "frozen"),
    [
        # The head is tied to the embedding.
        ("[embed_tokens]", lambda name: name in ("embed_tokens.weight", "lm_head.weight")),
        ("[lm_head]", lambda name: name in ("embed_tokens.weight", "lm_head.weight")),
        ("[layers.0, norm]", lambda name: name.startswith(("layers.0.", "norm."))),
        ("['layers.*.mlp', '*layernorm*']", lambda name: ".mlp." in name or "layernorm" in name),
    ],
)
def test_frozen_parameters_do_not_change_and_all_others_do(sft, tiny_run, tmp_path, patterns, frozen):
    made = sft(tmp_path, f"training.freeze={patterns}", "training.max_steps=2")
    before, after = weights_of(tiny_run.folder / "final.ckpt"), weights_of(tmp_path / "final.ckpt")
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    assert unchanged == {name for name in before if frozen(name)}
    n_states = len(made.checkpoint()["optimizer_states"][0]["state"])
    assert n_states == sum(not frozen(name) for name in before if name != "lm_head.weight")
    assert "of which" in made.out


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        ("[embed]", "did you mean embed_tokens"),
        ("['*']", "leaves nothing to train"),
        ("[layers.7]", "names no"),
    ],
)
def test_freezing_nothing_or_everything_is_refused(sft, tmp_path, patterns, said):
    with pytest.raises(UserError, match=said):
        sft(tmp_path / "sft", f"training.freeze={patterns}")


def test_lora_trains_only_adapters_and_ends_with_a_plain_model(sft, tiny_run, tmp_path):
    made = sft(tmp_path, *LORA)
    base, step, final = tiny_run.checkpoint(), made.checkpoint("step-0000006"), made.checkpoint("final")
    adapters = {name for name in step["state_dict"] if "lora_" in name}
    assert step["state_dict"].keys() - adapters == base["state_dict"].keys() == final["state_dict"].keys()
    assert all(
        torch.equal(step["state_dict"][name], weight) for name, weight in base["state_dict"].items()
    ), "a base weight has changed"
    assert len(step["optimizer_states"][0]["state"]) == len(adapters)
    assert step[KEY]["lora"] == {"rank": 2, "alpha": 4.0, "targets": None} and final[KEY]["lora"] is None
    assert "optimizer_states" not in final
    assert made.val_rows[-1]["val_loss_change"] < 0


def test_logits_are_the_same_before_and_after_the_merge(sft, tmp_path):
    """The witness is the network with its adapters, built here from the step file."""
    made = sft(tmp_path, *LORA)
    step = made.checkpoint("step-0000006")
    merged, tokenizer, _ = load_model(tmp_path / "final.ckpt")
    adapted = GPTMini(merged.config)
    add_adapters(adapted, 2, 4.0)
    adapted.load_state_dict(
        {name.removeprefix("net."): weight for name, weight in step["state_dict"].items()}, strict=True
    )
    ids = torch.randint(merged.config.vocab_size, (3, 20), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(merged(ids), adapted.eval()(ids), rtol=1e-5, atol=1e-5)
    assert same_weights(weights_of(tmp_path / "step-0000006.ckpt"), weights_of(tmp_path / "final.ckpt"))
    config = load_config(tmp_path / "run_config.yaml")
    found = validate(merged, tokenizer, split_pairs(config)[1], config)
    assert found.loss == pytest.approx(made.val_rows[-1]["val_loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["final", "step-0000003", "best"])
def test_any_checkpoint_of_a_lora_run_can_be_the_base_of_another_run(sft, tmp_path, name):
    made = sft(tmp_path / "lora", *LORA)
    again = sft(tmp_path / "again", f"base_ckpt={made.folder / name}.ckpt", "training.max_steps=1")
    step = {"final": 6, "step-0000003": 3, "best": made.checkpoint("best")[KEY]["metrics"]["step"]}[name]
    assert again.val_rows[0]["val_loss"] == pytest.approx(
        next(row for row in made.val_rows if row["step"] == step)["val_loss"], rel=1e-5
    )


@pytest.mark.parametrize(
    "changed", [{"rank": 3}, {"rank": "2"}, {"alpha": None}, {"rank": 0}, {"rank": 10**30}]
)
def test_a_checkpoint_whose_adapters_do_not_fit_is_refused(sft, tmp_path, changed):
    made = sft(tmp_path / "lora", *LORA, "training.max_steps=1")
    checkpoint = made.checkpoint("last")
    checkpoint[KEY]["lora"] |= changed
    torch.save(checkpoint, tmp_path / "bad.ckpt")
    with pytest.raises(UserError, match="adapters do not fit"):
        load_model(tmp_path / "bad.ckpt")


# ---- resume --------------------------------------------------------------------------------------

KINDS = pytest.mark.parametrize(
    "words",
    [
        (),
        LORA,
        ("training.freeze=[embed_tokens]",),
        (*LORA, "data.packing=true"),
        ("training.optimizer=muon",),
    ],
    ids=["full", "lora", "frozen", "lora, packed", "muon"],
)


@KINDS
def test_a_resumed_run_ends_with_the_same_bits(sft, tmp_path, words):
    words = (*words, "model.dropout=0.1")
    whole = sft(tmp_path / "whole", *words)
    stopped = sft(tmp_path / "cut", *words, "training.max_steps=3")
    assert stopped.sha256 != whole.sha256
    resumed = sft(tmp_path / "cut", *words, "--resume")
    assert resumed.sha256 == whole.sha256
    assert resumed.timeless_rows == whole.timeless_rows
    assert same_weights(
        weights_of(tmp_path / "cut" / "final.ckpt"), weights_of(tmp_path / "whole" / "final.ckpt")
    )
    best = [run.checkpoint("best")[KEY]["metrics"] for run in (whole, resumed)]
    assert best[0] == best[1]


def test_a_run_resumes_without_its_base(sft, tiny_run, tmp_path):
    """The checkpoint holds everything, so the config stored in it is enough."""
    shutil.copy(tiny_run.folder / "final.ckpt", tmp_path / "base.ckpt")
    words = (*LORA, f"base_ckpt={tmp_path / 'base.ckpt'}")
    whole = sft(tmp_path / "whole", *words)
    sft(tmp_path / "cut", *words, "training.max_steps=3")
    (tmp_path / "base.ckpt").unlink()
    with contextlib.redirect_stdout(io.StringIO()) as out:
        resume = ["--resume", str(tmp_path / "cut" / "last.ckpt"), "--device", "cpu"]
        assert finetune.main([*resume, "--override", "training.max_steps=6"]) == 0
    assert out.getvalue().splitlines()[-1] == whole.out.splitlines()[-1]


def test_a_base_that_would_be_moved_aside_is_refused(sft, tmp_path):
    """Fine-tuning writes into the folder that holds its base."""
    first = sft(tmp_path / "sft", "training.max_steps=1")
    files = sorted(path.name for path in first.folder.iterdir())
    for name in ("final", "step-0000001"):
        with pytest.raises(
            UserError,
            match=r"is in checkpoint.dir, whose run this one would move aside; write elsewhere with .*sft-2",
        ):
            sft(tmp_path / "sft", f"base_ckpt={first.folder / name}.ckpt")
    assert sorted(path.name for path in first.folder.iterdir()) == files


def test_a_disk_that_is_full_during_the_merge_loses_nothing(sft, tmp_path, monkeypatch):
    """The step file is saved, but the plain model does not fit. That is a warning, and --resume writes the
    model once there is room."""
    whole = sft(tmp_path / "whole", *LORA)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("support.run.saving.write_merged", full)
        made = sft(tmp_path / "full", *LORA)
    assert made.code == 0
    assert "final.ckpt could not be written" in made.err
    assert "run the same command with --resume" in made.out
    assert not (made.folder / "final.ckpt").exists() and (made.folder / "last.ckpt").exists()
    assert sft(tmp_path / "full", *LORA, "--resume").sha256 == whole.sha256


def test_resuming_from_the_merged_file_is_refused(sft, tmp_path):
    sft(tmp_path, *LORA)
    with pytest.raises(UserError, match="holds a model but no run to resume"):
        sft(tmp_path, *LORA, "training.max_steps=9", f"--resume={tmp_path / 'final.ckpt'}")
    assert "nothing left to do" in sft(tmp_path, *LORA, "--resume").out


def test_resume_with_other_adapters_template_or_freeze_is_refused(sft, tmp_path):
    sft(tmp_path, *LORA, "training.max_steps=3")
    for change, key in (
        ("lora.rank=3", "lora.rank"),
        ("template=chat", "template.prompt"),
        ("training.freeze=[norm]", "training.freeze"),
    ):
        with pytest.raises(UserError, match=f"cannot resume .* {key} was"):
            sft(tmp_path, *LORA, change, "--resume")


def test_resume_with_other_rows_is_refused(sft, tmp_path):
    sft(tmp_path / "sft", "training.max_steps=3")
    (tmp_path / "rows.json").write_text(json.dumps(rows(23)))
    with pytest.raises(UserError, match="the training text has changed"):
        sft(tmp_path / "sft", f"data.path={tmp_path / 'rows.json'}", "--resume")


@pytest.mark.slow
def test_two_processes_fine_tune_like_one(sft, tmp_path):
    """Adapters and padded rows on two processes, started as a user does. Copies of the model (DDP) give the
    same bits; pieces of it (FSDP), stopped and resumed, differ only by rounding."""
    words = (
        *LORA,
        "data.shuffle=false",
        "training.micro_batch_size=3",
        "training.val_every=6",
        "checkpoint.save_every=6",
    )

    def by_command(name: str, *more: str) -> str:
        argv = sft.argv(tmp_path / name, *words, "training.grad_accum_steps=1", "hardware.devices=2", *more)
        process = subprocess.run(
            [sys.executable, "finetune.py", *argv], capture_output=True, text=True, timeout=300
        )
        assert process.returncode == 0, process.stderr
        return process.stdout.splitlines()[-1]

    one = sft(tmp_path / "one", *words, "training.grad_accum_steps=2")
    assert by_command("ddp") == one.out.splitlines()[-1]
    fsdp = ("hardware.strategy=fsdp",)
    by_command("fsdp", *fsdp, "training.max_steps=3")
    by_command("fsdp", *fsdp, "--resume")
    ours, theirs = weights_of(tmp_path / "fsdp" / "final.ckpt"), weights_of(tmp_path / "one" / "final.ckpt")
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-4, atol=1e-6, msg=name)


# ---- --show-mask and --check ---------------------------------------------------------------------


def test_show_mask_marks_what_is_trained_on_and_writes_nothing(sft, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        finetune.main(sft.argv(tmp_path / "sft", "--show-mask=2"))
    assert not end.value.code and not (tmp_path / "sft").exists()
    out = capsys.readouterr().out
    first, second = out.split("--- example ")[1:]
    assert ">>>" in first and first.count("Ask ") == 1
    asked = [row for row in rows(24) if f"Ask {row['instruction']}" in first + second]
    assert len(asked) == 2
    for row, shown in zip(asked, (first, second), strict=True):
        assert f" Say >>>{row['output']}<|endoftext|><<<\n" in shown
    assert "18 instructions" in out


def test_show_mask_draws_a_picture(sft, tmp_path, capsys):
    with pytest.raises(SystemExit):
        finetune.main(sft.argv(tmp_path / "sft", "--show-mask=4", f"--picture={tmp_path / 'mask.svg'}"))
    svg = (tmp_path / "mask.svg").read_text()
    assert "</svg>" in svg and (tmp_path / "mask.png").stat().st_size > 5000
    capsys.readouterr()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--show-mask", "0"], "must be at least 1"),
        (["--picture", "a.svg"], "goes with --show-mask"),
        (["--show-mask", "1", "--picture", "docs"], r"ends in \.svg"),
        (["--show-mask", "1", "--picture", "v1.2"], r"ends in \.svg"),
    ],
)
def test_wrong_flags_of_show_mask_are_refused(flags, said):
    with pytest.raises(UserError, match=said):
        finetune.main(["--config", "config_finetune.yaml", *flags])


def test_check_passes_for_fine_tuning_and_adapters(sft, tmp_path, capsys):
    words = "one two three four five"
    long_prompt = (
        f"template={{prompt: '{words} {{instruction}} Say ', prompt_with_input: '{words} {{instruction}} "
        f"{{input}} Say '}}"
    )
    for words in ((), LORA, ("data.packing=true",), (long_prompt,)):
        with pytest.raises(SystemExit) as end:
            finetune.main(sft.argv(tmp_path / "sft", "--check", *words))
        assert end.value.code == 0, capsys.readouterr().out
    out = capsys.readouterr().out
    assert "everything passed" in out and not (tmp_path / "sft").exists()


# ---- the hub -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_config_finetune_yaml_downloads_its_rows_from_the_hub(tiny_run, tmp_path):
    """Only the base, the template and the number of steps are changed, and the process is started as a user
    does. The second run reads the cache, with no hub to ask."""
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row | {"text": "-"} for row in rows(60)]), file)
    files = {
        "README.md": dataset_card({"default": {"train": "data/train-*"}}),
        "data/train-00000-of-00001.parquet": file.getvalue(),
    }
    overrides = (
        f"base_ckpt={tiny_run.folder / 'final.ckpt'}",
        PLAIN_TEMPLATE,
        "training.epochs=null",
        "training.max_steps=2",
        "training.warmup_steps=1",
    )

    def by_command(name: str, environment: dict[str, str]) -> Run:
        argv = [f"--override={override}" for override in (*overrides, f"checkpoint.dir={tmp_path / name}")]
        process = subprocess.run(
            [sys.executable, "finetune.py", "--config", "config_finetune.yaml", "--device", "cpu", *argv],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return Run(tmp_path / name, process.returncode, process.stdout, process.stderr)

    with LoopbackHub("tatsu-lab/alpaca", files) as hub:
        online = by_command("online", hub.environment(tmp_path / "cache"))
    assert online.code == 0 and "57 instructions" in online.out and "val:   3 instructions" in online.out, (
        online.err
    )
    assert [row["step"] for row in online.val_rows] == [0, 2]
    cached = by_command("cached", {**hub.environment(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"})
    assert cached.code == 0 and cached.sha256 == online.sha256, cached.err
    nowhere = by_command("nowhere", hub.environment(tmp_path / "empty"))
    assert nowhere.code == 2 and re.match(
        r"(?s)error: data.dataset=tatsu-lab/alpaca: .* cannot be reached.*data.path=my_rows.json", nowhere.err
    ), nowhere.err
