"""The error for a flag of another program, or for one of ours in another spelling, says what to write
here; ~ in a path is the home folder."""

import argparse
import re
import shlex

import pytest

import benchmark
import convert
import eval_val
import evaluate_checkpoints
import finetune
import from_scratch
import infer
import list as list_script
import prepare
import train
from support.cli import Parser
from support.config.read import load_config
from support.config.schema import Config
from support.foreign.config_keys import FOREIGN_NAMES, OUR_KEYS
from support.foreign.flags import FLAGS

SCRIPTS = {
    "train": train,
    "finetune": finetune,
    "infer": infer,
    "eval_val": eval_val,
    "evaluate_checkpoints": evaluate_checkpoints,
    "convert": convert,
    "prepare": prepare,
    "list": list_script,
    "from_scratch": from_scratch,
    "benchmark": benchmark,
}


def answers(capsys, script: str, command: str) -> list[str]:
    """The lines after the error."""
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[script].parse_args(shlex.split(command))
    assert stop.value.code == 2
    said = capsys.readouterr().err.split("error: ", 1)[1].splitlines()
    return [line.strip() for line in said[1:]]


TRAIN = [
    ("--train-path a.npy", "--override data.path=a.npy"),
    ("--val-path=b.npy", "--override data.val_path=b.npy"),
    ("--max-iters 1000", "--override training.max_steps=1000"),
    ("--logdir runs/a", "--override checkpoint.dir=runs/a"),
    ("--save_dir 'runs/a b'", "--override 'checkpoint.dir=runs/a b'"),
    ("--load-checkpoint last.ckpt", "--resume last.ckpt"),
    ("--resume_from_checkpoint=last.ckpt", "--resume last.ckpt"),
    ("--batch_size=32", "--override training.micro_batch_size=32"),
    ("--maxIters 7", "--override training.max_steps=7"),
    ("--lr 1e-3", "--override training.lr=1e-3"),
    ("--learning_rate=5e-5", "--override training.lr=5e-5"),
    ("--epochs 3", "--override training.epochs=3"),
    ("--d_model 64", "--override model.d_model=64"),
    ("--training.lr=1", "--override training.lr=1"),
    ("--betas 0.9 0.99", "--override 'training.betas=[0.9, 0.99]'"),
    ("--train_frac 0.8", "--override data.val_fraction=0.2"),
    ("--dtype bfloat16", "--override hardware.precision=bf16-mixed"),
    ("--bf16", "--override hardware.precision=bf16-mixed"),
    ("--compile", "--override training.compile=true"),
    ("--compile=False", "--override training.compile=False"),
    ("--cpu", "--device cpu"),
    ("--dataset tinystories", "--config configs/tinystories.yaml"),
    ("--dataset a/b", "--override data.source=hf --override data.dataset=a/b"),
    ("--data my.txt", "--override data.path=my.txt"),
    ("--out x", "--override checkpoint.dir=x"),
    ("--tokenizer gpt2", "--override tokenizer.kind=gpt2"),
    ("--confg x.yaml", "--config x.yaml"),
    ("--show_step 3", "--show-step 3"),
    ("my.yaml", "--config my.yaml"),
    ("training.lr=1", "--override training.lr=1"),
]


@pytest.mark.parametrize(("typed", "answer"), TRAIN, ids=[typed for typed, _ in TRAIN])
def test_the_error_for_a_foreign_training_flag_gives_our_flag_with_the_value(capsys, typed, answer):
    """The parser and the config accept the proposal."""
    assert answers(capsys, "train", typed) == [f"for {typed} write {answer}"]
    args = train.parse_args(shlex.split(answer))
    overrides = [
        override for override in args.override if not override.startswith(("data.source", "data.dataset"))
    ]
    base = {"data": {"path": "x"}, "training": {"max_steps": 5}}
    assert isinstance(load_config(None, overrides, base), Config)


OTHERS = [
    (
        "infer",
        "--checkpoint a.ckpt --start 'a b'",
        ["for --checkpoint a.ckpt write --ckpt a.ckpt", "for --start 'a b' write --prompt 'a b'"],
    ),
    (
        "infer",
        "--ckpt a --max_length 5 --top_k=3",
        ["for --max_length 5 write --max-new-tokens 5", "for --top_k=3 write --top-k 3"],
    ),
    (
        "evaluate_checkpoints",
        "--checkpoint_dir a --output_dir b",
        ["for --checkpoint_dir a write --checkpoints a", "for --output_dir b write --output-dir b"],
    ),
    (
        "eval_val",
        "--ckpt a --batch_size 3 --val-path v.txt --lr 3",
        ["for --batch_size 3 write --batch-size 3", "for --val-path v.txt write --data v.txt"],
    ),
    ("list", "--checkpoint_dir runs", ["for --checkpoint_dir runs write runs, without a flag"]),
    (
        "convert",
        "--model gpt2 --out x",
        ["for --model gpt2 write --from gpt2", "for --out x write --output x"],
    ),
    (
        "prepare",
        "tokens --data a.txt --out x --tokenizer gpt2",
        ["for --data a.txt write --input a.txt", "for --out x write --output x"],
    ),
    ("prepare", "tokenizer --input a --output b --vocab_size 9", ["for --vocab_size 9 write --vocab-size 9"]),
    (
        "finetune",
        "--model base.ckpt --lora_r 8 --data rows.json",
        [
            "for --model base.ckpt write --override base_ckpt=base.ckpt",
            "for --lora_r 8 write --override lora.rank=8",
            "for --data rows.json write --override data.path=rows.json",
        ],
    ),
    (
        "train",
        "--init_from=scratch",
        ["--init_from=scratch: leave it out: weights are drawn anew without base_ckpt"],
    ),
    (
        "train",
        "--mlp_ratio 4",
        ["for --mlp_ratio 4 write --override model.d_ff=... (it is mlp_ratio times model.d_model)"],
    ),
]


@pytest.mark.parametrize(
    ("script", "typed", "said"), OTHERS, ids=[f"{script} {typed}" for script, typed, _ in OTHERS]
)
def test_each_script_answers_foreign_flags_with_its_own(capsys, script, typed, said):
    assert answers(capsys, script, typed) == said


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("flag", ["--nonsense", "--verbose", "--zzz 3", "--port 80"])
def test_a_flag_that_resembles_none_of_ours_gets_no_proposal(capsys, script, flag):
    assert answers(capsys, script, flag) == []


def parsers(monkeypatch) -> dict[str, list[Parser]]:
    """The parsers of each script, with those of its jobs."""
    found: dict[str, list[Parser]] = {}

    def keep(self, argv, *_):
        found[self.name] = [self, *self.tasks().values()]
        raise KeyError

    monkeypatch.setattr(Parser, "parse_args", keep)
    for name, script in SCRIPTS.items():
        monkeypatch.setattr(Parser, "name", name, raising=False)
        with pytest.raises(KeyError):
            script.parse_args([])
    return found


def flags(monkeypatch) -> list[tuple[str, argparse.Action]]:
    return [
        (name, action)
        for name, family in parsers(monkeypatch).items()
        for parser in family
        for action in parser._actions
    ]


def test_every_flag_of_the_table_is_a_flag_or_a_key(monkeypatch):
    known = {option for _, action in flags(monkeypatch) for option in action.option_strings}
    assert [ours for ours, _ in FLAGS if ours not in known and ours not in OUR_KEYS and ours != "PATH"] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_proposed_flag_is_a_flag_of_that_script(capsys, monkeypatch, script):
    with monkeypatch.context() as patch:
        known = {
            option for name, action in flags(patch) if name == script for option in action.option_strings
        }
    names = {*FOREIGN_NAMES, *(name for _, theirs in FLAGS for name in theirs.split())}
    typed = " ".join(f"--{name.split('.')[-1]} odd" for name in sorted(names))
    for line in answers(capsys, script, ("tokens " if script == "prepare" else "") + typed):
        assert set(re.findall(r"(?:write|^) (--[\w-]+)", line)) <= known, line


def test_every_flag_that_takes_a_path_expands_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = [
        (name, action)
        for name, action in flags(monkeypatch)
        if action.metavar in ("FILE", "PATH", "DIR", "CKPT")
    ]
    assert len(paths) > 20
    for name, action in paths:
        assert action.type is not None, f"{name} {action.option_strings}"
        assert action.type("~/x/*.txt") == f"{tmp_path}/x/*.txt", f"{name} {action.option_strings}"
    for name, flag in (("convert", "--from"), ("prepare", "--tokenizer")):  # names, or paths
        assert {
            action.type("~/x")
            for script, action in flags(monkeypatch)
            if script == name and flag in action.option_strings
        } == {f"{tmp_path}/x"}


def test_the_home_of_an_unknown_user_is_refused(capsys):
    with pytest.raises(SystemExit):
        infer.parse_args(["--ckpt", "~nobody-here/x.ckpt", "--prompt", "a"])
    assert "argument --ckpt: ~nobody-here/x.ckpt: there is no user nobody-here" in capsys.readouterr().err
