"""An override sets one key, and wins over what the file says for an alternative."""

import json
import re

import pytest
from small_config import fields, tree, write

from support.config.overrides import apply_override
from support.config.read import load_config, validate_config
from support.config.schema import PATHS, Config
from support.messages import UserError


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
        ("seed.deep=5", "seed="),
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
