"""train.py: what a step computes, what it logs, and the text samples of a run."""

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foreign_tokenizers import tokenizer_like
from torch.utils.data import DataLoader

import train
from data import load_corpus, make_dataloaders, pack_corpus
from model import GPTMini
from sampling import SamplingConfig
from support.checkpoint import load_model
from support.config.read import load_config
from support.messages import UserError
from support.run.trainer import allow_tf32

ADAMW = ("training.optimizer=adamw", "training.lr=0.003")
SHORT = ("training.max_steps=3", "tokenizer.kind=byte", "training.val_every=100")


def weights(run_) -> dict[str, torch.Tensor]:
    return run_.checkpoint()["state_dict"]


def assert_weights_are_close(one, other) -> None:
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for name in one:
        # AdamW divides by the size of the gradient, so rounding shows most where a gradient is tiny. A wrong
        # weight of a micro-batch moves parameters by a large part of the learning rate, 3e-3 a step.
        torch.testing.assert_close(
            one[name], other[name], rtol=0, atol=6e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def shapes(micro: int, accum: int) -> tuple[str, str]:
    return f"training.micro_batch_size={micro}", f"training.grad_accum_steps={accum}"


# ---- the step ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [(1, 4), (2, 2)])
def test_accumulated_micro_batches_equal_one_big_batch(run, tmp_path, cut):
    whole = run(tmp_path / "whole", *SHORT, *ADAMW, *shapes(4, 1))
    parts = run(tmp_path / "parts", *SHORT, *ADAMW, *shapes(*cut))
    assert_weights_are_close(whole, parts)
    for a, b in zip(whole.train_rows, parts.train_rows, strict=True):
        assert a["tokens"] == b["tokens"]
        assert [a["loss"], a["grad_norm"]] == pytest.approx([b["loss"], b["grad_norm"]], rel=1e-4)


def with_holes(loader: DataLoader) -> DataLoader:
    """The same steps, with the first 9 * r labels of row r ignored: 0, 9, 18 and 27 of 32."""

    class Holes(torch.utils.data.IterableDataset):
        def __iter__(self):
            for step in loader:
                row = 0
                for batch in step.micro_batches:
                    for labels in batch["labels"]:
                        labels[: 9 * row] = -100
                        row += 1
                yield step

        def __len__(self):
            return len(loader)

    return DataLoader(Holes(), batch_size=None)


def test_every_target_counts_the_same_in_uneven_micro_batches(run, tmp_path, monkeypatch):
    """The step follows the mean over all its targets, not the mean of the micro-batches' means."""

    def loaders_with_holes(*args, **options):
        training, validation = make_dataloaders(*args, **options)
        return with_holes(training), validation

    monkeypatch.setattr(train, "make_dataloaders", loaders_with_holes)
    untrained = run(tmp_path / "untrained", *SHORT, *ADAMW, "training.max_steps=0", "training.warmup_steps=0")
    whole = run(tmp_path / "whole", *SHORT, *ADAMW, *shapes(4, 1))
    parts = run(tmp_path / "parts", *SHORT, *ADAMW, *shapes(1, 4))
    assert_weights_are_close(whole, parts)
    assert [row["tokens"] for row in whole.train_rows] == [
        74,
        148,
        222,
    ]  # a step has 32 + 23 + 14 + 5 targets
    assert [row["loss"] for row in whole.train_rows] == pytest.approx(
        [row["loss"] for row in parts.train_rows], rel=1e-5
    )

    config = load_config(whole.folder / "run_config.yaml")
    model, tokenizer, _ = load_model(untrained.folder / "final.ckpt")
    data = pack_corpus(load_corpus(config), tokenizer, config)
    [batch] = next(iter(with_holes(make_dataloaders(config, data, tokenizer, 3)[0]))).micro_batches
    loss = F.cross_entropy(
        model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten(), ignore_index=-100
    )
    assert whole.train_rows[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_learning_rate_warms_up_and_falls_to_zero_as_the_config_says(tiny_run):
    config = load_config(tiny_run.folder / "run_config.yaml").training
    assert (config.schedule, config.warmup_steps, config.max_steps) == ("linear", 2, 12)
    assert (config.lr, config.muon_lr) == (0.01, 0.02)
    expected = [0.5, 1.0] + [(12 - step) / 10 for step in range(2, 12)]
    assert [row["lr"] for row in tiny_run.train_rows] == pytest.approx([0.01 * factor for factor in expected])
    for name, last in (("step-0000004", 0.9), ("final", 0.1)):
        rates = {group["lr"] for group in tiny_run.checkpoint(name)["optimizer_states"][0]["param_groups"]}
        assert sorted(rates) == pytest.approx([0.01 * last, 0.02 * last])


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weights_stay_float32_and_all_of_them_change(run, tmp_path, precision, optimizer):
    made = run(tmp_path / "run", *SHORT, f"hardware.precision={precision}", f"training.optimizer={optimizer}")
    assert {tensor.dtype for tensor in weights(made).values()} == {torch.float32}
    torch.manual_seed(42)
    before = GPTMini(load_model(made.folder / "final.ckpt")[0].config).state_dict()
    unchanged = [name for name, tensor in before.items() if torch.equal(tensor, weights(made)[f"net.{name}"])]
    assert unchanged == []


def test_bf16_differs_from_float32_only_by_rounding(run, tmp_path):
    exact = run(tmp_path / "32", *SHORT, *ADAMW)
    rounded = run(tmp_path / "16", *SHORT, *ADAMW, "hardware.precision=bf16-mixed")
    assert rounded.sha256 != exact.sha256
    assert [row["loss"] for row in rounded.train_rows] == pytest.approx(
        [row["loss"] for row in exact.train_rows], rel=0.01
    )


def test_gradient_checkpointing_gives_the_same_weights(run, tmp_path):
    dropout = "model.dropout=0.2"  # recomputing must draw the same random numbers
    plain = run(tmp_path / "plain", *SHORT, dropout)
    saving = run(tmp_path / "saving", *SHORT, dropout, "model.gradient_checkpointing=true")
    assert saving.sha256 == plain.sha256


def test_each_micro_batch_draws_new_dropout_from_the_seed(run, tmp_path, monkeypatch):
    drawn = []
    seed_dropout = train.LitCausalLM.seed_dropout

    def record_draw(*args):
        seed_dropout(*args)
        drawn.append(torch.rand(1).item())
        seed_dropout(*args)

    monkeypatch.setattr(train.LitCausalLM, "seed_dropout", record_draw)
    dropped = run(tmp_path / "dropped", *SHORT, "model.dropout=0.2")
    assert len(set(drawn)) == len(drawn) == 6  # three steps of two micro-batches
    assert dropped.sha256 != run(tmp_path / "plain", *SHORT).sha256


def test_no_clipping_equals_a_clip_that_is_never_reached(run, tmp_path):
    shas = [
        run(tmp_path / clip, *SHORT, *ADAMW, f"training.grad_clip={clip}").sha256
        for clip in ("null", "1000.0", "0.01")
    ]
    assert shas[0] == shas[1] != shas[2]


def test_a_document_mask_trains_and_changes_the_weights(run, tmp_path):
    masked = run(
        tmp_path / "masked",
        *SHORT,
        "data.document_mask=true",
        "data.shuffle=false",
        "training.micro_batch_size=40",
    )
    plain = run(tmp_path / "plain", *SHORT, "data.shuffle=false", "training.micro_batch_size=40")
    assert masked.sha256 != plain.sha256
    assert masked.train_rows[-1]["loss"] < masked.train_rows[0]["loss"]


@pytest.mark.slow
def test_compiled_training_keeps_plain_weight_names(run, tmp_path):
    compiled = run(tmp_path / "compiled", *SHORT, *ADAMW, "model.n_layers=1", "training.compile=true")
    plain = run(tmp_path / "plain", *SHORT, *ADAMW, "model.n_layers=1")
    assert weights(compiled).keys() == weights(plain).keys()
    assert_weights_are_close(compiled, plain)
    load_model(compiled.folder / "final.ckpt")


def test_data_workers_do_not_change_the_run(run, tmp_path):
    assert (
        run(tmp_path / "two", *SHORT, "hardware.num_workers=2").sha256
        == run(tmp_path / "none", *SHORT).sha256
    )


@pytest.mark.parametrize("warmup", ["training.warmup_steps=0", "training.warmup_steps=2"])
def test_max_steps_zero_writes_the_untrained_model(run, tmp_path, warmup):
    made = run(tmp_path / "run", "training.max_steps=0", "training.schedule_steps=null", warmup)
    model, _, metadata = load_model(made.folder / "final.ckpt")
    torch.manual_seed(42)
    for name, tensor in GPTMini(model.config).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    assert (made.code, metadata["metrics"]["step"], made.rows) == (0, 0, [])


# ---- metrics -------------------------------------------------------------------------------------


def test_every_logged_step_has_a_full_row_in_order(tiny_run):
    assert [row["step"] for row in tiny_run.train_rows] == list(range(1, 13))
    assert [row["step"] for row in tiny_run.rows] == sorted([*range(1, 13), 4, 8, 12])
    names = ["step", "tokens", "loss", "lr", "grad_norm"]
    names += ["tokens_per_sec", "examples_per_sec", "step_ms", "memory_mb"]
    for row in tiny_run.train_rows:
        assert [name for name in names if name in row] == names
        assert all(
            isinstance(row[name], int | float) and math.isfinite(row[name]) and row[name] > 0
            for name in names
        )
        assert row["tokens"] == row["step"] * 4 * 2 * 32
        assert row["examples_per_sec"] * 32 == pytest.approx(row["tokens_per_sec"], rel=0.01)
        assert row["tokens_per_sec"] * row["step_ms"] / 1000 == pytest.approx(4 * 2 * 32, rel=0.01)


def test_rows_are_logged_at_step_one_and_every_log_every_steps(run, tmp_path):
    made = run(
        tmp_path / "run",
        "training.max_steps=8",
        "training.log_every=3",
        "training.val_every=100",
        "tokenizer.kind=byte",
    )
    assert [row["step"] for row in made.train_rows] == [1, 3, 6, 8]
    assert [row["step"] for row in made.val_rows] == [8]  # the last step always validates


def test_a_row_is_on_disk_before_the_next_step_begins(run, tmp_path, monkeypatch):
    seen = []
    step = train.LitCausalLM.training_step

    def count_rows_then_step(self, *args):
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        seen.append([line.count('"loss"') for line in lines])
        return step(self, *args)

    monkeypatch.setattr(train.LitCausalLM, "training_step", count_rows_then_step)
    run(tmp_path / "run", *SHORT)
    assert seen == [[], [1], [1, 1]]


def test_perplexity_is_the_exponential_of_val_loss(tiny_run):
    assert [row["step"] for row in tiny_run.val_rows] == [4, 8, 12]
    for row in tiny_run.val_rows:
        assert row["perplexity"] == pytest.approx(math.exp(row["val_loss"]), rel=1e-9)


def test_the_loss_starts_at_a_uniform_guess_and_falls(tiny_run):
    losses = [row["loss"] for row in tiny_run.train_rows]
    assert losses[0] == pytest.approx(math.log(400), abs=0.15)
    assert f"a uniform guess over 400 tokens has loss {math.log(400):.4f}" in tiny_run.out
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", ["step-0000004", "final"])
def test_val_loss_equals_a_full_pass_over_the_validation_text(tiny_run, name):
    """The witness reads the tokens block by block and scores every token but the first once."""
    model, tokenizer, metadata = load_model(tiny_run.folder / f"{name}.ckpt")
    tokens = []
    for document in load_corpus(load_config(tiny_run.folder / "run_config.yaml")).val:
        tokens += [*tokenizer.encode(document), tokenizer.eos_id]
    tokens = torch.tensor(tokens)
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 32):
            block = tokens[start : start + 33]
            total += F.cross_entropy(model(block[None, :-1])[0], block[1:], reduction="sum").item()
    expected = total / (len(tokens) - 1)
    step = metadata["metrics"]["step"]
    assert [row["val_loss"] for row in tiny_run.val_rows if row["step"] == step] == [
        pytest.approx(expected, rel=1e-5)
    ]
    assert metadata["metrics"]["val_loss"] == pytest.approx(expected, rel=1e-5)


def test_val_batches_limits_how_much_is_validated(run, tmp_path, monkeypatch):
    batches = []
    step = train.LitCausalLM.validation_step

    def record_batch(*args):
        batches.append(1)
        return step(*args)

    monkeypatch.setattr(train.LitCausalLM, "validation_step", record_batch)
    run(tmp_path / "run", *SHORT, "training.val_batches=2")
    assert len(batches) == 2


def test_epochs_are_converted_to_steps(run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + i * i % 26) for i in range(1000)))
    epochs = ("training.max_steps=null", "training.schedule_steps=null", "training.epochs=1.5")
    made = run(tmp_path / "run", f"data.path={text}", "data.val_fraction=0.1", "tokenizer.kind=byte", *epochs)
    # 900 training characters and an EOS make 28 blocks of 32: 1.5 epochs are 42 blocks, or 5.25 steps of 8.
    assert made.checkpoint()["tiny_transformer"]["metrics"]["step"] == 6
    assert made.checkpoint()["tiny_transformer"]["metrics"]["epoch"] == pytest.approx(48 / 28)
    assert made.checkpoint()["tiny_transformer"]["config"]["training"]["schedule_steps"] == 6


# ---- text samples --------------------------------------------------------------------------------


def test_text_samples_are_printed_and_do_not_change_the_run(run, tiny_run, tmp_path):
    samples = ("training.sample_every=5", "training.sample_prompts=[Attention is, A token]")
    made = run(tmp_path / "run", *samples)
    shown = [line for line in made.out.splitlines() if "sample:" in line]
    expected = [(5, "Attention is"), (5, "A token"), (10, "Attention is"), (10, "A token")]
    for line, (step, prompt) in zip(shown, expected, strict=True):
        assert re.match(rf"step {step:>6} sample: ['\"]{prompt}.{{10}}", line)
    assert made.sha256 == tiny_run.sha256
    assert made.timeless_rows == tiny_run.timeless_rows


def test_each_sample_prompt_has_its_own_seed_which_is_the_same_in_every_run(run, tmp_path):
    """With one seed for all, an untrained model would write the same text after every prompt."""
    samples = ("training.sample_every=3", "training.sample_prompts=[a, a, a]", "training.lr=1e-9")
    texts = []
    for name in ("one", "two"):
        made = run(tmp_path / name, *SHORT, *samples)
        texts.append([line.split("sample: ")[1] for line in made.out.splitlines() if "sample:" in line])
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == len(texts[0]) == 3


def test_a_sample_shows_the_space_between_the_prompt_and_the_text_after_it(run, tmp_path):
    """This tokenizer's decoder removes the first space of a text, and its BOS is not part of a text."""
    (tmp_path / "tokenizer.json").write_text(tokenizer_like("llama + bos").backend.to_str())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (tmp_path / "text.txt").write_text("tick tock " * 600)
    chosen = (
        "tokenizer.kind=file",
        f"tokenizer.path={tmp_path / 'tokenizer.json'}",
        f"data.path={tmp_path / 'text.txt'}",
    )
    samples = ("training.sample_every=30", "training.sample_prompts=[tick]", "training.sample_temperature=0")
    made = run(
        tmp_path / "run",
        *chosen,
        *samples,
        "training.max_steps=30",
        "training.schedule_steps=30",
        "training.lr=1e-2",
    )
    assert re.search(r"sample: 'tick tock tick", made.out)


def test_samples_are_drawn_without_dropout_and_do_not_change_the_run(run, tmp_path):
    dropout = (*SHORT, "model.dropout=0.2")
    samples = ("training.sample_every=3", "training.sample_prompts=[Attention is]")
    made = run(tmp_path / "with", *dropout, *samples)
    assert made.sha256 == run(tmp_path / "without", *dropout).sha256
    model, tokenizer, _ = load_model(made.folder / "final.ckpt")
    ids, sampling = torch.tensor([tokenizer.encode("Attention is")]), SamplingConfig(temperature=0.8)
    seed = int(np.random.SeedSequence([42, 3, 0]).generate_state(1)[0])
    text = tokenizer.decode(
        model.generate(
            ids, 64, sampling, eos_id=tokenizer.eos_id, generator=torch.Generator().manual_seed(seed)
        )[0].tolist()
    )
    assert f"step      3 sample: {text!r}" in made.out.splitlines()


@pytest.mark.parametrize("prompts", ['[""]', "[Attention ∑]"])
def test_a_sample_prompt_that_cannot_be_encoded_is_refused_before_training(run, tmp_path, prompts):
    with pytest.raises(UserError, match="sample_prompts"):
        run(
            tmp_path / "run",
            *SHORT,
            "tokenizer.kind=char",
            "training.sample_every=3",
            f"training.sample_prompts={prompts}",
        )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# ---- TF32 ----------------------------------------------------------------------------------------


def test_tf32_is_allowed_on_cuda_only_and_elsewhere_there_is_a_warning(run, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    made = run(tmp_path / "run", *SHORT, "hardware.tf32=true")
    assert made.err == (
        "warning: hardware.tf32=true changes nothing here: only NVIDIA GPUs have TF32, and this is cpu\n"
    )
    assert asked == [] and "TF32" not in made.out

    config = load_config(made.folder / "run_config.yaml")
    for tf32, expected in ((False, []), (True, ["high"])):
        config.hardware.tf32 = tf32
        plan = SimpleNamespace(config=config, device="cuda")
        allow_tf32(plan)
        assert asked == expected
