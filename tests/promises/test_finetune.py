"""Fine-tuning, run as a user runs it: what it starts from, what it measures and what it trains."""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import REPO, Run
from finetuning import LORA, PLAIN_TEMPLATE, same_weights, weights_of

import finetune
import train
from infer import Chat
from instruct import Pair, split_pairs
from lora import add_adapters
from model import GPTMini
from sampling import SamplingConfig
from support.checkpoint import KEY, load_model, read_checkpoint
from support.config.read import load_config
from support.evaluation.validation import documents_of, scoring_config, validate
from support.messages import UserError
from support.text.chat_template import Template

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
