"""A config of another project is answered at once: each of its names with ours, each value converted."""

import re

import pytest
from small_config import key_names, refusal, tree

from support.config.foreign_config import answers_and_our_tree
from support.config.overrides import apply_override
from support.config.read import validate_config
from support.config.schema import Config
from support.foreign.config_keys import FOREIGN_NAMES, OUR_KEYS


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("model.d_modle", "model.d_model"),
        ("training.max_step", "training.max_steps"),
        ("tokenizer.vocabsize", "tokenizer.vocab_size"),
        ("checkpoint.directory", "checkpoint.dir"),
        ("sed", "seed"),
        ("hardware.acelerator", "hardware.accelerator"),
        ("training.dropout", "model.dropout"),
        ("max_steps", "training.max_steps"),
        ("model.max_steps", "training.max_steps"),
        ("trainig.lr", "training.lr"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(typed, meant):
    changed = tree()
    apply_override(changed, f"{typed}=1", Config)
    assert f"unknown key {typed}; did you mean {meant}?" in refusal(changed)


def test_a_key_unlike_all_of_ours_points_to_the_reference():
    assert "unknown key zzz; see docs/CONFIG_REFERENCE.md" in refusal(tree(zzz=1))


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("seq_length", "training.seq_len"),
        ("learning_rate", "training.lr"),
        ("n_embd", "model.d_model"),
        ("batch_size", "training.micro_batch_size"),
        ("optim.lr", "training.lr"),
        ("schedule.max_steps", "training.max_steps"),
        ("data.max_seq_length", "training.seq_len"),
        ("checkpointing.save_dir", "checkpoint.dir"),
        ("model.n_head", "model.n_heads"),
        ("model.hidden_size", "model.d_model"),
        ("train.gradient_accumulation_steps", "training.grad_accum_steps"),
        ("optim.betas", "training.betas"),
        ("trainer.optim.max_norm", "training.grad_clip"),
        ("max-iters", "training.max_steps"),
        ("maxIters", "training.max_steps"),
        ("batchSize", "training.micro_batch_size"),
        ("Model.d-model", "model.d_model"),
        ("emb_dim", "model.d_model"),
        ("evalIter", "training.val_batches"),
        ("weight_tying", "model.tie_embeddings"),
        ("nEpochs", "training.epochs"),
        ("training.eval_interval", "training.val_every"),
        ("dtype", "hardware.precision"),
        ("device", "hardware.accelerator"),
        ("out_dir", "checkpoint.dir"),
        ("runtime.seed", "seed"),
        ("data.seed", "seed"),
        ("train.epochs", "training.epochs"),
        ("model.context_length", "model.max_seq_len"),
        ("max_iters", "training.max_steps"),
        ("optim.weight_decay", "training.weight_decay"),
    ],
)
def test_names_of_other_projects_are_answered_with_ours(theirs, ours):
    changed = tree()
    apply_override(changed, f"{theirs}=1", Config)
    assert f"unknown key {theirs}; did you mean {ours}?" in refusal(changed)


@pytest.mark.parametrize("theirs", FOREIGN_NAMES)
def test_every_foreign_name_is_foreign_and_leads_to_keys_that_exist(theirs):
    """Nobody gets an answer that is itself refused."""
    known = key_names()
    assert theirs not in known
    answer = FOREIGN_NAMES[theirs]
    if not answer.startswith("leave it out: "):
        assert set(re.split(r", | and ", answer)) <= known
    changed = tree()
    changed.pop("training") if theirs == "training.max_steps" else None
    apply_override(changed, f"{theirs}=odd", Config)
    said = refusal(changed)
    assert f"unknown key {theirs}; " in said
    assert answer in said


def test_our_names_are_those_of_the_schema():
    """Written out beside the table of others' names, so that a wrong flag is answered without a second of
    imports."""
    assert set(OUR_KEYS) == key_names()


@pytest.mark.parametrize(
    "key",
    [
        "loss",
        "backend_type",
        "foo.bar",
        "mystery",
        "verbose",
        "eval.mode",
        "n_things",
        "tags",
        "comment",
        "pad",
        "project.lang",
        "amount",
    ],
)
def test_where_nothing_is_near_nothing_is_proposed(key):
    changed = tree()
    apply_override(changed, f"{key}=1", Config)
    assert refusal(changed) == f"config: unknown key {key}; see docs/CONFIG_REFERENCE.md"


CONVERSIONS = [  # (a config of theirs, what is said): worked by hand
    ({"data": {"train_frac": 0.9}}, "train_frac: 0.9 is data.val_fraction: 0.1"),
    ({"data": {"trainFrac": 0.95}}, "trainFrac: 0.95 is data.val_fraction: 0.05"),
    (
        {"data": {"train_frac": 0.9, "val_frac": 0.05}},
        "train_frac; leave it out: training takes what data.val_fraction: 0.05 leaves",
    ),
    ({"model": {"mlp_ratio": 4, "d_model": 192}}, "mlp_ratio: 4 is model.d_ff: 768"),
    ({"model": {"mlp_ratio": 2.5, "n_embd": 64}}, "mlp_ratio: 2.5 is model.d_ff: 160"),
    ({"model": {"mlp_ratio": "wide"}}, "did you mean model.d_ff? (it is mlp_ratio times model.d_model)"),
    (
        {"eval": {"eval_subset": 20000}, "training": {"micro_batch_size": 4, "seq_len": 100}},
        "eval_subset: 20000 is training.val_batches: 50",
    ),
    (
        {"eval": {"eval_subset_tokens": 5000}, "data": {"batch_size": 8}, "model": {"n_ctx": 128}},
        "eval_subset_tokens: 5000 is training.val_batches: 5",
    ),
    ({"optim": {"beta1": 0.8, "beta2": 0.99}}, "beta1: 0.8 is training.betas: [0.8, 0.99]"),
    ({"optim": {"beta2": 0.99}}, "beta2: 0.99 is training.betas: [0.9, 0.99]"),
    (
        {"max_tokens": 1_000_000, "training": {"seq_len": 250, "grad_accum_steps": 4}},
        "max_tokens: 1000000 is training.max_steps: 125",
    ),
    (
        {"schedule": {"warmup_ratio": 0.03}, "training": {"max_steps": 1000}},
        "warmup_ratio: 0.03 is training.warmup_steps: 30",
    ),
    (
        {"warmup_ratio": 0.03, "training": {"epochs": 2, "max_steps": None}},
        "did you mean training.warmup_steps? (it is warmup_ratio times",
    ),
    ({"block_size": 64}, "block_size: 64 is model.max_seq_len: 64"),
    ({"data": {"block_size": 64}, "model": {"max_seq_len": 128}}, "block_size: 64 is training.seq_len: 64"),
    (
        {"global_batch_size": 64, "training": {"micro_batch_size": 16}},
        "global_batch_size: 64 is training.grad_accum_steps: 4",
    ),
    (
        {
            "total_batch_size": 524288,
            "training": {"micro_batch_size": 16, "seq_len": 1024},
            "model": {"max_seq_len": 1024},
        },
        "training.grad_accum_steps: 32",
    ),
    ({"dtype": "bfloat16"}, "dtype: bfloat16 is hardware.precision: bf16-mixed"),
    ({"runtime": {"precision": "fp32"}}, "precision: fp32 is hardware.precision: 32-true"),
    ({"dtype": "float16"}, "leave it out: 16-bit floats overflow without loss scaling"),
    ({"runtime": {"amp": True}}, "amp: true is hardware.precision: bf16-mixed"),
    ({"runtime": {"device": "gpu"}}, "device: gpu is hardware.accelerator: cuda"),
    ({"decay_lr": False}, "decay_lr: false is training.schedule: constant"),
    (
        {"train_on_inputs": True, "data": {"source": "instructions"}},
        "train_on_inputs: true is data.mask_prompt: false",
    ),
    (
        {"eval": {"sample_n": 3, "eval_every": 50}},
        "sample_n: 3 is training.sample_every: 50 with training.sample_prompts, a list of 3 texts",
    ),
    ({"init_from": "scratch"}, "leave it out: weights are drawn anew"),
    (
        {"init_from": "gpt2-medium"},
        "python3 convert.py --from gpt2-medium --output checkpoints/gpt2-medium.ckpt",
    ),
    ({"model": {"activation": "SiLU"}}, "activation: SiLU is model.mlp: swiglu"),
    ({"optim": {"name": "AdamW"}}, "name: AdamW is training.optimizer: adamw"),
    (
        {"model": {"vocab_size": 512}},
        "model.vocab_size is not set here: it comes from the tokenizer; write tokenizer.vocab_size: 512",
    ),
    ({"tokenizer": "char"}, "tokenizer is a section; write tokenizer: {kind: char}"),
    (
        {"data": {"dataset": "tinystories"}},
        "data.dataset: tinystories is in --config configs/tinystories.yaml",
    ),
    ({"runtime": {"device": [0]}}, "did you mean hardware.accelerator?"),
    ({"data": {"dataset": "local"}}, "data.dataset: local; leave it out: data.path names a local file"),
]


@pytest.mark.parametrize(("theirs", "said"), CONVERSIONS, ids=[said[:40] for _, said in CONVERSIONS])
def test_a_name_that_means_something_else_is_answered_with_the_conversion(theirs, said):
    answer = refusal(tree(**theirs))
    assert said in answer
    names_something_of_theirs = re.compile(r"unknown key|model.vocab_size|tokenizer is|dataset")
    assert all(names_something_of_theirs.search(line) for line in answer.splitlines())


def test_a_conversion_does_not_divide_by_a_batch_of_zero():
    said = refusal(tree(eval_subset=20000, training={"micro_batch_size": 0}))
    assert "unknown key eval_subset; did you mean training.val_batches? (it counts micro-batches" in said
    assert "training.micro_batch_size=0: input should be greater than 0" in said


def test_a_config_of_another_project_is_answered_at_once_and_the_answer_is_a_config():
    """All names with the values that are wrong under ours; whoever follows each line has a config that is
    accepted."""
    theirs = {
        "model": {
            "name": "gpt",
            "vocab_size": 512,
            "d_model": 48,
            "n_layers": 2,
            "n_heads": 5,
            "mlp_ratio": 4,
            "max_seq_len": 64,
        },
        "data": {
            "dataset": "tinystories",
            "data_dir": "texts",
            "train_frac": 0.8,
            "tokenizer": "bpe",
            "block_size": 32,
            "batch_size": 4,
        },
        "optim": {"optimizer": "adamw", "lr": -1, "betas": [0.9, 0.99], "eps": 1e-8, "grad_clip": 1.0},
        "schedule": {"max_steps": 20, "warmup_steps": 2, "lr_schedule": "cosine", "min_lr": 0.0},
        "runtime": {
            "seed": 1,
            "device": "cpu",
            "precision": "fp32",
            "grad_accum_steps": 2,
            "log_interval": 5,
        },
        "checkpointing": {"save_dir": "runs", "save_every": 10, "keep_last_k": 2, "best_by": "val_loss"},
        "eval": {"eval_every": 10, "eval_subset": 256, "sample_n": 1, "sample_temperature": 0.8},
    }
    said = refusal(theirs)
    names = [name for section, keys in theirs.items() for name in keys]
    assert [name for name in names if f".{name}" not in said and f"{name}:" not in said] == [
        "d_model",
        "n_layers",
        "n_heads",
        "max_seq_len",
    ]
    assert "configs/tinystories.yaml" in said
    assert "training.lr=-1: input should be greater than 0" in said
    assert "d_model=48 is not a multiple of n_heads=5" in said
    assert "is required" not in said
    _, ours = answers_and_our_tree(
        theirs | {"optim": {**theirs["optim"], "lr": 0.01}, "model": {**theirs["model"], "n_heads": 4}},
        Config,
    )
    config = validate_config(ours)
    assert (
        config.model.d_ff,
        config.data.val_fraction,
        config.training.val_batches,
        config.training.seq_len,
    ) == (192, 0.2, 2, 32)
    assert (
        config.checkpoint.dir,
        config.checkpoint.keep_last,
        config.tokenizer.vocab_size,
        config.training.lr,
    ) == ("runs", 2, 512, 0.01)
