"""A config is read as it is meant, or refused with everything that is wrong with it, and nothing but a
UserError."""

import json
import random
import re
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import BaseModel

from model import GPTConfig, GPTMini
from optim import build_optimizer
from support.config.foreign_config import answers_and_our_tree
from support.config.overrides import apply_override
from support.config.read import load_config, read_config_file, validate_config
from support.config.reference import reference_markdown
from support.config.schema import PATHS, Config, sections
from support.config.values import typed
from support.files.safe_yaml import parse_yaml
from support.foreign.config_keys import FOREIGN_NAMES, OUR_KEYS
from support.messages import UserError

ROOT = Path(__file__).parents[2]
CONFIG_FILES = sorted([*ROOT.glob("config*.yaml"), *(ROOT / "configs").glob("*.yaml")])
JSON_FILES = sorted(
    (ROOT / "configs").glob("*.json")
)  # JSON has no comments, so these say nothing about their keys


def tree(**sections) -> dict:
    """The smallest valid config, with changes: tree(model={"d_model": 48}) or tree(training_lr=1)."""
    smallest = {"data": {"path": "x.txt"}, "training": {"max_steps": 5}}
    for name, value in sections.items():
        smallest[name] = {**smallest.get(name, {}), **value} if isinstance(value, dict) else value
    return smallest


def refusal(sections: dict) -> str:
    """What `validate_config` says about it."""
    with pytest.raises(UserError) as caught:
        validate_config(sections)
    return str(caught.value)


def key_names() -> set[str]:
    return set(Config.model_fields) | {
        f"{section}.{key}" for section, model in sections().items() for key in model.model_fields
    }


def write(folder: Path, text: str, name: str = "config.yaml") -> Path:
    (folder / name).write_text(text)
    return folder / name


# ---- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1e3", 1000.0),
        ("5e-5", 5e-5),
        ("+1E+2", 100.0),
        ("-2.5e-3", -2.5e-3),
        ("1.e2", 100.0),
        ("6E7", 6e7),
        ("0.1", 0.1),
    ],
)
def test_scientific_notation_is_a_number(text, value):
    """Plain PyYAML reads 3e-4 as a string."""
    read = typed(parse_yaml(f"lr: {text}", "file"))["lr"]
    assert isinstance(read, float)
    assert read == value
    assert validate_config(tree(model={"rope_theta": abs(read)})).model.rope_theta == abs(value)


@pytest.mark.parametrize("text", ["e3", "1e", "3e-4x", "'3e-4'", "1e5e5", "20231101.en"])
def test_what_only_looks_like_a_number_stays_text(text):
    assert isinstance(typed(parse_yaml(f"a: {text}", "file"))["a"], str)


@pytest.mark.parametrize("nested", [False, True])
def test_a_key_given_twice_is_refused_with_its_line(tmp_path, nested):
    lines = (
        ["training:", "  lr: 1", "  max_steps: 2", "  lr: 2"]
        if nested
        else ["seed: 1", "data: {path: x}", "training: {max_steps: 1}", "seed: 2"]
    )
    path = write(tmp_path, "\n".join(lines))
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}, line 4: key '(lr|seed)' is given twice"):
        read_config_file(path)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("seed: 1\ndata: {path: x\nmodel: 2\n", 3),
        ("a: 1\n  b: 2\n", 2),
        ("a: [1, 2\n", 2),
        ("a: 1\nb: 'x\n", 3),
        ("a: 1\n\tb: 2\n", 2),
        ("a: *b", 1),
    ],
    ids=["unclosed brace", "indentation", "unclosed bracket", "unclosed quote", "tab", "unknown anchor"],
)
def test_a_syntax_error_names_file_and_line(tmp_path, text, line):
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}, line {line}: "):
        read_config_file(path)


def test_the_file_is_data_and_never_runs_code(tmp_path):
    with pytest.raises(UserError):
        read_config_file(write(tmp_path, "a: !!python/object/apply:os.mkdir [made]"))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "text",
    [
        "lr: {{ lr }}",
        "[1, 2]: 3",
        "? {a: 1}\n: 2",
        "a: !!timestamp x",
        "a: !!bool x",
        "a: !!int x",
        "a: !!float x",
        "a: !!omap x",
        "<<: 3",
        "a: !!int " + "9" * 5000,
        "[" * 3000,
        "a: \x07",
    ],
)
def test_odd_yaml_is_a_user_error(tmp_path, text):
    """A template that was never filled in, keys that are lists, tags whose value does not fit, nesting
    without end."""
    with pytest.raises(UserError):
        read_config_file(write(tmp_path, text))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b"# only a comment\n", "is empty"),
        (b"- a\n- b\n", "not a mapping"),
        (b"hello", "not a mapping"),
        (b"\x80\x81", "not text"),
        (b"a: \xff", r"byte 3"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path, content, says):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=says):
        load_config(path)


def test_a_folder_is_no_config(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_config(tmp_path)


def test_json_is_a_config_too(tmp_path):
    """With null, a list, and a number in scientific notation."""
    content = json.dumps(
        tree(seed=7, training={"lr": 1e-5, "betas": [0.8, 0.9], "grad_clip": None}), indent=2
    )
    assert "1e-05" in content
    config = load_config(write(tmp_path, content, "config.json"))
    assert (config.seed, config.training.lr, config.training.betas, config.training.grad_clip) == (
        7,
        1e-5,
        [0.8, 0.9],
        None,
    )


# ---- unknown keys --------------------------------------------------------------------------------


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


def test_a_key_like_nothing_we_have_points_to_the_reference():
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
    ({"data": {"dataset": "local"}}, "data.dataset: local; leave it out: data.path names a local file"),
]


@pytest.mark.parametrize(("theirs", "said"), CONVERSIONS, ids=[said[:40] for _, said in CONVERSIONS])
def test_a_name_that_means_something_else_is_answered_with_the_conversion(theirs, said):
    answer = refusal(tree(**theirs))
    assert said in answer
    assert len(answer.splitlines()) == len(
        [
            line
            for line in answer.splitlines()
            if re.search(r"unknown key|model.vocab_size|tokenizer is|dataset", line)
        ]
    )


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


# ---- values --------------------------------------------------------------------------------------


def test_everything_wrong_is_said_at_once():
    wrong = tree(
        seed="x",
        nonsense=1,
        model={"d_modle": 64, "n_layers": 0},
        training={"lr": -1, "micro_batch_size": "many"},
        hardware={"devices": 0},
        tokenizer={"kind": "word"},
    )
    said = refusal(wrong)
    for key in (
        "seed=",
        "nonsense",
        "model.d_modle",
        "model.n_layers=0",
        "training.lr=-1",
        "training.micro_batch_size=",
        "hardware.devices=0",
    ):
        assert key in said
    assert "'bpe'" in said, "the choices are named"
    assert len(said.splitlines()) == 8, "one line a mistake"


WRONG_TYPES = [
    *product(
        ("model.n_layers", "training.micro_batch_size", "training.max_steps", "seed"),
        (True, "7", 50.0, 7.5, [7]),
    ),
    *product(("model.n_layers", "training.micro_batch_size", "seed"), (None,)),
    *product(("model.dropout", "training.lr", "data.val_fraction"), (True, "0.1", [0.1], None)),
    *product(
        ("model.tie_embeddings", "training.compile", "data.shuffle", "logging.wandb"),
        (1, 0, "yes", "true", None),
    ),
    *product(("data.path", "checkpoint.dir", "data.text_field"), (1, True, ["x"])),
    *product(("model", "training", "data", "hardware"), (1, "x", [1], None)),
    ("training.betas", 0.9),
    ("training.betas", [0.9]),
    ("training.betas", [0.9, 0.95, 0.99]),
    ("training.betas", ["0.9", 0.95]),
    ("training.sample_prompts", "one prompt"),
    ("training.sample_prompts", [1]),
    ("model.norm", "RMSNorm"),
    ("training.schedule", True),
    ("hardware.accelerator", "tpu"),
    ("training.optimizer", ["adamw"]),
]


@pytest.mark.parametrize(
    ("key", "value"), WRONG_TYPES, ids=lambda v: json.dumps(v) if not isinstance(v, str) else v
)
def test_a_value_of_the_wrong_type_is_refused(key, value):
    """Strictly: true is not 1, "7" is not 7, and 50.0 is no number of layers."""
    changed = tree()
    section, _, leaf = key.rpartition(".")
    if section:
        changed.setdefault(section, {})[leaf] = value
    else:
        changed[leaf] = value
    assert key in refusal(changed)


def test_a_whole_number_will_do_for_a_fraction():
    config = validate_config(tree(training={"lr": 1, "betas": [0, 0.5]}, model={"rope_theta": 500000}))
    assert (config.training.lr, config.training.betas, config.model.rope_theta) == (1, [0, 0.5], 500000)


OUT_OF_RANGE = [
    ("seed", -1),
    ("seed", 2**70),
    ("tokenizer.vocab_size", 256),
    ("model.d_model", 0),
    ("model.n_layers", -1),
    ("model.n_heads", 0),
    ("model.n_kv_heads", 0),
    ("model.max_seq_len", 1),
    ("model.dropout", 1.0),
    ("model.dropout", -0.1),
    ("model.norm_eps", 0),
    ("model.rope_theta", float("inf")),
    ("data.val_fraction", 0),
    ("data.val_fraction", 1),
    ("data.stride", 0),
    ("training.max_steps", -1),
    ("training.micro_batch_size", 0),
    ("training.grad_accum_steps", 0),
    ("training.seq_len", 1),
    ("training.lr", 0),
    ("training.lr", float("nan")),
    ("training.lr", float("inf")),
    ("training.lr", 1e39),
    ("training.min_lr", 1e39),
    ("training.muon_lr", 1e39),
    ("training.weight_decay", -0.1),
    ("training.weight_decay", 1e39),
    ("training.weight_decay", float("inf")),
    ("training.eps", 1e39),
    ("training.eps", 1e-46),
    ("training.betas", [1.0, 0.9]),
    ("training.betas", [0.9, -0.1]),
    ("training.betas", [0.9, float("nan")]),
    ("training.grad_clip", 0),
    ("training.val_every", 0),
    ("training.log_every", 0),
    ("training.sample_temperature", -1),
    ("hardware.num_workers", -1),
    ("checkpoint.save_every", 0),
    ("checkpoint.keep_last", 0),
]


@pytest.mark.parametrize(("key", "value"), OUT_OF_RANGE, ids=str)
def test_a_value_out_of_range_is_refused(key, value):
    changed = tree()
    apply_override(changed, f"{key}=0", Config)
    section, _, leaf = key.rpartition(".")
    (changed[section] if section else changed)[leaf] = value
    said = refusal(changed)
    assert leaf in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    "training",
    [
        {"lr": 10, "min_lr": 10},
        {"muon_lr": 10, "optimizer": "muon"},
        {"weight_decay": 100},
        {"eps": 1},
        {"eps": 1e-30},
    ],
)
def test_the_ends_of_the_ranges_are_numbers_that_an_optimizer_can_use(training):
    """1e39, say, is no float32: PyTorch would answer with a traceback, at the first step."""
    torch.manual_seed(0)
    model = GPTMini(GPTConfig(vocab_size=11, d_model=8, n_layers=1, n_heads=2, max_seq_len=8))
    optimizer = build_optimizer(model, validate_config(tree(training=training)).training)
    model(torch.arange(8)[None], torch.arange(8)[None])[0].backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


STREAM = {"source": "hf", "dataset": "a/b", "streaming": True}
COMBINATIONS = [
    (
        tree(model={"d_model": 100, "n_heads": 8}),
        r"d_model=100 is not a multiple of n_heads=8; try d_model=104",
    ),
    (
        tree(model={"d_model": 96, "n_heads": 6, "n_kv_heads": 4}),
        r"n_heads=6 is not a multiple of n_kv_heads=4; try n_kv_heads=3",
    ),
    (
        tree(model={"d_model": 96, "n_heads": 4, "n_kv_heads": 8}),
        r"n_heads=4 is not a multiple of n_kv_heads=8; try n_kv_heads=4",
    ),
    (tree(model={"d_model": 36, "n_heads": 4}), r"head_dim=9 is odd"),
    (tree(model={"vocab_size": 1000}), r"model\.vocab_size .*tokenizer\.vocab_size"),
    (
        tree(model={"max_seq_len": 64}, training={"seq_len": 65}),
        r"training\.seq_len=65 is longer than model\.max_seq_len=64",
    ),
    (
        tree(model={"max_seq_len": 64}, data={"stride": 65}),
        r"data\.stride=65 is longer than training\.seq_len=64",
    ),
    (
        tree(training={"seq_len": 32}, data={"stride": 33}),
        r"data\.stride=33 is longer than training\.seq_len=32",
    ),
    (tree(training={"epochs": 1}), r"give either max_steps or epochs"),
    ({"data": {"path": "x"}, "training": {}}, r"give either max_steps or epochs"),
    (tree(training={"warmup_steps": 6}), r"warmup_steps=6 is longer than the schedule of 5 steps"),
    (
        tree(training={"warmup_steps": 4, "schedule_steps": 3}),
        r"warmup_steps=4 is longer than the schedule of 3 steps",
    ),
    (tree(training={"lr": 1e-4, "min_lr": 1e-3}), r"min_lr=0\.001 is larger than lr=0\.0001"),
    (tree(training={"sample_every": 5}), r"sample_every=5 needs sample_prompts"),
    (tree(tokenizer={"kind": "file"}), r"path goes with kind=file"),
    (tree(tokenizer={"kind": "bpe", "path": "t.json"}), r"path goes with kind=file"),
    (tree(data={"source": "hf"}), r"source=hf needs dataset"),
    (
        tree(data={"val_split": "0.1"}),
        r"val_split=0\.1 would be the name of a split; a share of the text is val_fraction: 0\.1",
    ),
    ({"data": {}, "training": {"max_steps": 1}}, r"source=text needs path"),
    (
        {"data": {"source": "hf", "dataset": "a/b", "streaming": True}, "training": {"epochs": 1}},
        r"training\.epochs .*stream",
    ),
    (
        {
            "data": {"source": "hf", "dataset": "a/b", "streaming": True},
            "tokenizer": {"kind": "char"},
            "training": {"max_steps": 1},
        },
        r"kind=char .*stream",
    ),
    ({"training": {"max_steps": 1}}, r"data is required"),
    ({}, r"data is required\n.*training is required"),
]


@pytest.mark.parametrize(("sections", "says"), COMBINATIONS, ids=[says for _, says in COMBINATIONS])
def test_values_that_contradict_each_other_are_refused(sections, says):
    assert re.search(says, refusal(sections), re.DOTALL)


@pytest.mark.parametrize("advice_of", ["d_model", "n_kv_heads"])
def test_the_advice_on_head_counts_is_itself_valid(advice_of):
    """Whatever value an error proposes, following it must work."""
    for n_heads in range(1, 17):
        for value in range(1, 40):
            model = (
                {"d_model": value, "n_heads": n_heads}
                if advice_of == "d_model"
                else {"d_model": 32 * n_heads, "n_heads": n_heads, "n_kv_heads": value}
            )
            try:
                validate_config(tree(model={**model, "position": "learned"}))
            except UserError as error:
                advised = int(re.search(rf"try {advice_of}=(\d+)", str(error))[1])
                validate_config(tree(model={**model, "position": "learned", advice_of: advised}))


@pytest.mark.parametrize("precision", ["fp16", "16-mixed", "16-true", "float16", "16", 16])
def test_fp16_is_refused_with_advice(precision):
    said = refusal(tree(hardware={"precision": precision}))
    assert "bf16-mixed or 32-true" in said


def test_keys_that_fill_themselves_in():
    config = validate_config(tree(model={"d_model": 96, "n_heads": 6, "max_seq_len": 40}))
    assert (config.model.n_kv_heads, config.model.head_dim, config.seq_len, config.stride) == (6, 16, 40, 40)
    config = validate_config(tree(model={"max_seq_len": 40}, training={"seq_len": 30}, data={"stride": 20}))
    assert (config.seq_len, config.stride) == (30, 20)


TEXT_ONLY = {"val_path": "v.txt", "errors": "replace"}
HF_ONLY = {
    "dataset": "a/b",
    "config": "en",
    "revision": "abc",
    "split": "test",
    "val_split": "test",
    "streaming": True,
    "train_docs": 5,
    "val_docs": 5,
}


@pytest.mark.parametrize(
    ("source", "key", "value"),
    [("hf", *kv) for kv in TEXT_ONLY.items()] + [("text", *kv) for kv in HF_ONLY.items()],
)
def test_keys_of_another_data_source_are_refused(source, key, value):
    own = {"source": "hf", "dataset": "a/b"} if source == "hf" else {"source": "text", "path": "x.txt"}
    validate_config({"data": own, "training": {"max_steps": 1}})
    assert f"{key} does not belong to source={source}" in refusal(
        {"data": {**own, key: value}, "training": {"max_steps": 1}}
    )


# ---- overrides -----------------------------------------------------------------------------------


def test_overrides_reach_nested_keys_in_order(tmp_path):
    path = write(tmp_path, "data: {path: x}\ntraining: {max_steps: 5, lr: 1}\nmodel:\nlogging: null\n")
    overrides = [
        "training.lr=3e-4",
        "training.betas=[0.8, 0.9]",
        "model.d_model=64",
        "logging.wandb=true",
        "training.grad_clip=null",
    ]
    config = load_config(
        path, [*overrides, "hardware.precision=bf16-mixed", "seed=1", "seed=2", "data.path=a=b.txt"]
    )
    assert (config.training.lr, config.training.betas, config.training.grad_clip) == (3e-4, [0.8, 0.9], None)
    assert (config.model.d_model, config.logging.wandb, config.hardware.precision) == (64, True, "bf16-mixed")
    assert (config.seed, config.data.path) == (2, "a=b.txt")


@pytest.mark.parametrize("override", ["training.lr", "=3", "", "training.lr 3", "lr"])
def test_an_override_without_key_or_value_shows_how_to_write_one(override):
    with pytest.raises(UserError, match="KEY=VALUE"):
        apply_override(tree(), override, Config)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.lr.x=1", "lr is not a section of keys"),
        ("training.betas=[1", "--override training.betas="),
        ("training..lr=1", r"unknown key training\."),
        (".lr=1", r"unknown key"),
        ("training=5", "training=5: this is a section of keys"),
        ("training.freeze=embed_tokens", "takes a list of texts; write --override 'training.freeze=."),
        ("training.sample_prompts=[a, b", "--override training.sample_prompts="),
        ("model.d_model=", "model.d_model=None"),
        ("training.lr=fast", "training.lr='fast'"),
        ("training.betas={{a}}", "--override training.betas="),
    ],
)
def test_a_bad_override_is_refused_by_its_name(tmp_path, override, says):
    path = write(tmp_path, "data: {path: x}\ntraining: {max_steps: 5, lr: 1}\n")
    with pytest.raises(UserError, match=says):
        load_config(path, [override])


def test_overrides_leave_the_base_they_start_from_untouched():
    """A resume compares the checkpoint's own config with the overridden one, so the two must not be one
    object."""
    base = validate_config(tree()).to_dict()
    before = json.dumps(base)
    config = load_config(None, ["training.lr=0.5", "model.d_model=64"], base=base)
    assert (config.training.lr, config.model.d_model) == (0.5, 64)
    assert json.dumps(base) == before


ROWS = {"source": "instructions", "dataset": "a/b", "config": "en", "revision": "abc", "val_split": "test"}
ALTERNATIVES = [  # (what the file says, what is overridden, what is left)
    (
        tree(training={"max_steps": None, "epochs": 3}),
        "training.max_steps=40",
        {"training.max_steps": 40, "training.epochs": None},
    ),
    (tree(), "training.epochs=2", {"training.max_steps": None, "training.epochs": 2}),
    (tree(), "training={epochs: 2}", {"training.max_steps": None, "training.epochs": 2}),
    (
        tree(data=ROWS),
        "data.path=rows.json",
        {"data.path": "rows.json", "data.dataset": None, "data.val_split": None, "data.revision": None},
    ),
    (
        tree(data={"source": "instructions", "path": "r.json"}),
        "data.dataset=c/d",
        {"data.path": None, "data.dataset": "c/d"},
    ),
    (
        tree(data=ROWS | {"path": None}),
        "data.val_path=v.json",
        {"data.dataset": "a/b", "data.val_path": "v.json", "data.val_split": None},
    ),
    (
        tree(data=ROWS | {"path": None, "val_split": None, "val_path": "v"}),
        "data.val_split=x",
        {"data.val_path": None, "data.val_split": "x"},
    ),
    (
        tree(data={"val_path": "v.txt"}),
        "data.val_fraction=0.2",
        {"data.val_path": None, "data.val_fraction": 0.2},
    ),
    (
        tree(data=ROWS | {"path": None, "val_docs": 9}),
        "data.val_fraction=0.2",
        {"data.val_docs": None, "data.val_split": None},
    ),
    (
        tree(data={"source": "hf", "dataset": "json"}),
        "data.dataset=a/b",
        {"data.path": None, "data.dataset": "a/b"},
    ),
    (
        tree(tokenizer={"kind": "file", "path": "t.json"}),
        "tokenizer.kind=char",
        {"tokenizer.kind": "char", "tokenizer.path": None},
    ),
    (
        tree(tokenizer={"kind": "bpe", "vocab_size": 500}),
        "tokenizer.path=t.json",
        {"tokenizer.kind": "file", "tokenizer.path": "t.json"},
    ),
]


@pytest.mark.parametrize(
    ("base", "override", "left"), ALTERNATIVES, ids=[override for _, override, _ in ALTERNATIVES]
)
def test_what_is_overridden_wins_over_what_the_file_says_for_an_alternative(base, override, left):
    if override == "data.path=rows.json":
        base["data"]["path"] = None
    plain = load_config(None, [override], base).to_dict()
    assert {key: plain[key.split(".")[0]][key.split(".")[1]] for key in left} == left


@pytest.mark.parametrize(
    ("base", "overrides"),
    [
        (tree(), ["training.max_steps=40", "training.epochs=2"]),
        (tree(data=ROWS | {"path": None}), ["data.path=r.json", "data.dataset=c/d"]),
        (tree(data=ROWS | {"path": None}), ["data.val_path=r.json", "data.val_split=c/d"]),
        (tree(), ["tokenizer.kind=char", "tokenizer.path=t.json"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_two_overrides_that_exclude_each_other_are_refused_by_their_names(base, overrides):
    for order in (overrides, overrides[::-1]):
        with pytest.raises(UserError, match="exclude each other; give one of them") as caught:
            load_config(None, order, base)
        assert all(override.split("=")[0] in str(caught.value) for override in overrides)


def test_a_share_beside_a_validation_text_is_no_contradiction():
    config = load_config(None, ["data.val_fraction=0.2", "data.val_path=v.txt"], tree())
    assert (config.data.val_path, config.data.val_fraction) == ("v.txt", 0.2)


def test_null_takes_the_place_of_nothing():
    config = load_config(None, ["training.epochs=null", "data.val_path=null", "training.max_steps=7"], tree())
    assert (config.training.max_steps, config.training.epochs) == (7, None)


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch):
    """Quoted by the shell or in a file it would be a folder named ~, and `rm -r ~` what a user types next."""
    monkeypatch.setenv("HOME", str(tmp_path))
    values = [f"{key}=~/some/*.txt" for key in PATHS]
    config = load_config(None, [*values, "tokenizer.kind=file", "training.sample_prompts=['~/x']"], tree())
    plain = config.to_dict()
    for key in PATHS:
        section, _, leaf = key.rpartition(".")
        assert (plain[section] if section else plain)[leaf] == f"{tmp_path}/some/*.txt"
    assert config.training.sample_prompts == ["~/x"], "not a path"
    assert load_config(None, ["data.path=~"], tree()).data.path == str(tmp_path)
    assert load_config(None, ["data.path=a~b/~"], tree()).data.path == "a~b/~"
    path = write(tmp_path, "data: {path: ~/book.txt}\ntraining: {max_steps: 1}\ncheckpoint: {dir: ~/run}\n")
    assert (load_config(path).data.path, load_config(path).checkpoint.dir) == (
        f"{tmp_path}/book.txt",
        f"{tmp_path}/run",
    )


def test_the_home_of_nobody_is_an_error_whose_advice_works():
    with pytest.raises(
        UserError,
        match=r"^checkpoint\.dir=~nobody-here/run: there is no user nobody-here.* is \./~nobody-here/run$",
    ):
        load_config(None, ["checkpoint.dir=~nobody-here/run"], tree())
    assert (
        load_config(None, ["checkpoint.dir=./~nobody-here/run"], tree()).checkpoint.dir
        == "./~nobody-here/run"
    )


def test_every_key_that_is_a_path_is_among_them():
    """A new one is noticed by its name or by what is said of it."""
    paths = {name for name, field in fields(Config) if re.search(r"(^|[._])(path|dir|ckpt)$", name)}
    assert set(PATHS) == paths


# ---- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sections",
    [
        tree(),
        tree(
            seed=3,
            model={"d_model": 96, "n_heads": 6, "n_kv_heads": 2, "position": "learned"},
            training={"lr": 1e-5, "eps": 1e-12},
        ),
        {
            "data": {"source": "hf", "dataset": "a/b", "config": "20231101.en", "streaming": True},
            "training": {"max_steps": 10**9, "betas": [0, 0.5]},
        },
        tree(
            training={"sample_prompts": ["é 👩‍👩‍👧", "null", "7", "a: b # c", ""]}, data={"text_field": "yes"}
        ),
    ],
)
def test_a_config_survives_yaml_and_json(sections):
    config = validate_config(sections)
    plain = config.to_dict()
    assert "vocab_size" not in plain["model"]
    assert validate_config(plain) == config
    assert validate_config(json.loads(json.dumps(plain))) == config
    assert validate_config(typed(parse_yaml(yaml.safe_dump(plain), "text"), Config)) == config
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain, "plain types that any YAML reader understands"


@pytest.mark.parametrize(
    "command",
    ["train.py --config c.yaml", "train.py --override training.sample_prompts=['two\nlines: [']"],
    ids=["one line", "two lines"],
)
@pytest.mark.parametrize("text", ["plain", "8e42519", "1e3", "null", "two\nlines", "", " # ", "é: 'x'"])
def test_the_config_written_beside_a_run_is_read_back_the_same(tmp_path, text, command):
    """Also where a text looks like a number to our reader (a commit such as 8e42519), and whatever the
    command line held."""
    from support.run.folder import write_run_config

    data = {"source": "hf", "dataset": "a/b", "revision": text, "text_field": text}
    config = validate_config(
        {"data": data, "training": {"max_steps": 2, "sample_every": 1, "sample_prompts": [text]}}
    )
    record = {"versions": {"python": "3.11"}, "git_commit": None, "command": command}
    write_run_config(tmp_path, config, record)
    assert load_config(tmp_path / "run_config.yaml") == config


@pytest.mark.parametrize("path", [*CONFIG_FILES, *JSON_FILES], ids=lambda p: p.name)
def test_every_config_file_of_the_repository_is_valid(path):
    assert load_config(path).to_dict()


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda p: p.name)
def test_every_key_in_a_config_file_says_what_it_does(path):
    lines = [line for line in path.read_text().splitlines() if re.match(r"\s*\w+: *[^#\s]", line)]
    assert len(lines) > 15
    assert [line for line in lines if not re.search(r" # (\.\.\. )?\w.{5,}", line)] == []


def test_the_config_files_are_found():
    assert {
        "config.yaml",
        "config_smoke.yaml",
        "shakespeare_char.yaml",
        "sanity.yaml",
        "tinystories.yaml",
    } <= {p.name for p in CONFIG_FILES}
    assert [path.name for path in JSON_FILES] == ["sample_custom.json", "sample_custom_baseline.json"]


@pytest.mark.parametrize("path", JSON_FILES, ids=lambda p: p.name)
def test_a_json_example_trains(tmp_path, capsys, path):
    import train

    short = (
        "training.max_steps=2",
        "training.warmup_steps=0",
        "training.sample_every=2",
        f"checkpoint.dir={tmp_path / 'run'}",
    )
    train.main(
        [
            "--config",
            str(path),
            "--device",
            "cpu",
            *(word for override in short for word in ("--override", override)),
        ]
    )
    assert "step      2 sample: 'Attention is" in capsys.readouterr().out
    assert load_config(tmp_path / "run" / "run_config.yaml").model == load_config(path).model


@pytest.mark.parametrize(
    ("training", "warned"), [({}, True), ({"sample_every": None}, False), ({"sample_every": 5}, False)]
)
def test_prompts_that_nothing_samples_are_said_to_be_so(capsys, training, warned):
    from support.run.plan import warn_of_unused_prompts

    sections = tree(training={"sample_prompts": ["a"], **training})
    warn_of_unused_prompts(sections, validate_config(sections))
    assert ("--override training.sample_every=100" in capsys.readouterr().err) == warned


# ---- the reference -------------------------------------------------------------------------------


def fields(model: type[BaseModel], prefix: str = ""):
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def test_every_key_is_described():
    assert [name for name, field in fields(Config) if len(field.description or "") < 8] == []


def test_the_reference_lists_every_key_with_its_default():
    lines = reference_markdown().splitlines()
    for name, field in fields(Config):
        rows = [line for line in lines if line.startswith(f"| `{name}` |")]
        assert len(rows) == (name != "model.vocab_size")
        if rows:
            _, _, default, effect, _ = re.split(r"(?<!\\) ?\| ?", rows[0])
            assert effect == field.description
            assert typed(parse_yaml(default.strip("`"), name)) == field.default


def test_the_reference_in_the_docs_is_the_schema():
    path = ROOT / "docs" / "CONFIG_REFERENCE.md"
    assert path.read_text(encoding="utf-8") == reference_markdown(), (
        "run: python3 -m support.config.reference > docs/CONFIG_REFERENCE.md"
    )


# ---- anything at all -----------------------------------------------------------------------------

SCALARS = [
    None,
    True,
    False,
    0,
    1,
    -1,
    7,
    2**40,
    10**30,
    0.5,
    -0.0,
    1e-300,
    float("inf"),
    float("nan"),
    "",
    "x",
    "3e-4",
    "auto",
    "\x00",
    "é" * 80,
    b"b",
]


def random_value(draw: random.Random, depth: int) -> object:
    kind = draw.random()
    if depth and kind < 0.15:
        return [random_value(draw, depth - 1) for _ in range(draw.randrange(4))]
    if depth and kind < 0.3:
        keys = [
            *FOREIGN_NAMES,
            *(name.rsplit(".", 1)[-1] for name in key_names()),
            "",
            "a.b",
            1,
            None,
            2.5,
            (1, 2),
        ]
        return {draw.choice(keys): random_value(draw, depth - 1) for _ in range(draw.randrange(4))}
    return draw.choice(SCALARS)


def test_random_trees_are_accepted_or_refused_with_a_user_error():
    """Valid configs with a few keys turned into anything, and trees of nothing but noise."""
    draw, names, accepted = random.Random(11), sorted(key_names()), 0
    for _ in range(3000):
        changed = validate_config(tree()).to_dict() if draw.random() < 0.8 else random_value(draw, 3)
        for _ in range(draw.randrange(4) if isinstance(changed, dict) else 0):
            place, (*sections, leaf) = changed, draw.choice(names).split(".")
            for section in sections:
                place = place[section] if isinstance(place.get(section), dict) else {}
            place[leaf] = random_value(draw, 2)
        try:
            config = validate_config(changed)
        except UserError as error:
            assert str(error).startswith("config: ")
        else:
            accepted += 1
            assert validate_config(config.to_dict()) == config
    assert 100 < accepted < 2900


def test_random_text_is_read_or_refused_with_a_user_error():
    """Fragments of YAML in any order."""
    draw = random.Random(12)
    fragments = [
        "a",
        ": ",
        ":",
        "\n",
        "  ",
        "- ",
        "[",
        "]",
        "{",
        "}",
        ",",
        "'",
        '"',
        "#",
        "&a ",
        "*a",
        "!!int ",
        "!x",
        "3e-4",
        "|\n",
        ">",
        "? ",
        "---\n",
        "<<",
    ]
    fragments += [
        "%",
        "@",
        "`",
        "\t",
        "\x00",
        "é",
        "~",
        "=",
        "!!binary ",
        "2024-13-40",
        "0x",
        "1:30",
        "training",
        "...",
    ]
    for _ in range(5000):
        text = "".join(draw.choice(fragments) for _ in range(draw.randrange(12)))
        try:
            parse_yaml(text, "text")
        except UserError as error:
            assert str(error).startswith("text")
