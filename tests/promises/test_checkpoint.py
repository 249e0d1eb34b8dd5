"""A checkpoint is one complete file: it opens safely, needs no other file, and anything wrong with it is
reported in one line."""

import io
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from model import GPTConfig, GPTMini
from support.checkpoint import load_model, model_weights, read_checkpoint, read_metadata
from support.files.atomic import atomic_write, link_or_copy
from support.messages import UserError
from support.weights import first_not_finite, misfits
from tokenizer import ByteTokenizer

FIELDS = {
    *("format_version", "model", "tokenizer", "config", "template", "lora"),
    *("metrics", "stream_state", "data_fingerprint", "sequences_per_step", "run"),
}


def byte_model(**changes) -> GPTMini:
    torch.manual_seed(0)
    return GPTMini(
        GPTConfig(
            **{
                "vocab_size": 257,
                "d_model": 24,
                "n_layers": 2,
                "n_heads": 4,
                "n_kv_heads": 2,
                "max_seq_len": 16,
            }
            | changes
        )
    )


def checkpoint_of(model: GPTMini) -> dict:
    """The smallest checkpoint of ours."""
    ours = {
        "format_version": 1,
        "model": model.config.model_dump(),
        "tokenizer": ByteTokenizer().to_dict(),
        "metrics": {"step": 3},
    }
    return {
        "state_dict": {f"net.{name}": tensor for name, tensor in model.state_dict().items()},
        "tiny_transformer": ours,
    }


@pytest.fixture
def saved(tmp_path):
    """saved(checkpoint) writes it and returns the path."""

    def save(checkpoint) -> Path:
        torch.save(checkpoint, tmp_path / "model.ckpt")
        return tmp_path / "model.ckpt"

    return save


def refusal(path: Path) -> str:
    """The one line in which `load_model` refuses this file."""
    with pytest.raises(UserError) as error:
        load_model(path)
    message = str(error.value)
    assert "\n" not in message
    assert "\x1b" not in message  # torch colours some of its messages
    assert str(path) in message
    assert len(message) < 500
    return message


# ---- what is in it -------------------------------------------------------------------------------


def test_a_checkpoint_opens_with_weights_only_and_holds_the_documented_fields(tiny_run):
    checkpoint = torch.load(tiny_run.folder / "final.ckpt", weights_only=True)
    ours = checkpoint["tiny_transformer"]
    assert ours.keys() == FIELDS
    assert (
        checkpoint["global_step"],
        ours["format_version"],
        ours["sequences_per_step"],
        ours["stream_state"],
    ) == (12, 1, 8, None)
    assert ours["metrics"].keys() == {
        "step",
        "epoch",
        "tokens",
        "train_loss",
        "lr",
        "val_loss",
        "perplexity",
        "best_val_loss",
        "best_step",
    }
    last, val = tiny_run.train_rows[-1], tiny_run.val_rows[-1]
    expected = {
        "step": 12,
        "tokens": last["tokens"],
        "train_loss": last["loss"],
        "lr": last["lr"],
        "val_loss": val["val_loss"],
    }
    assert {name: ours["metrics"][name] for name in expected} == expected
    assert {"versions", "git_commit", "command", "threads"} == ours["run"].keys()
    assert ours["run"]["versions"]["torch"] == torch.__version__.split("+")[0]
    assert ours["model"]["vocab_size"] == checkpoint["state_dict"]["net.embed_tokens.weight"].shape[0] == 400


def plain(value) -> bool:
    if isinstance(value, dict):
        return all(plain(key) and plain(inner) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return all(map(plain, value))
    return value is None or type(value) in (str, int, float, bool)


def test_our_fields_are_plain_python_types(tiny_run):
    assert plain(read_metadata(tiny_run.folder / "final.ckpt"))


def test_load_model_needs_nothing_but_the_file(tiny_run, tmp_path, monkeypatch):
    """From another folder, where no file of the repository can be opened by a relative name."""
    shutil.copyfile(tiny_run.folder / "final.ckpt", tmp_path / "alone.ckpt")
    monkeypatch.chdir(tmp_path)
    model, tokenizer, metadata = load_model("alone.ckpt")
    assert metadata["metrics"]["step"] == 12
    assert not model.training
    assert tokenizer.decode(tokenizer.encode("Attention is")) == "Attention is"
    weights = model_weights(tiny_run.checkpoint())
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert list(tmp_path.iterdir()) == [tmp_path / "alone.ckpt"]


def test_a_loaded_model_gives_the_logits_of_the_saved_one(saved):
    model = byte_model().eval()
    ids = torch.arange(14).view(2, 7)
    assert torch.equal(load_model(saved(checkpoint_of(model)))[0](ids), model(ids))


@pytest.mark.parametrize("tied", [True, False])
def test_ties_are_restored_after_load(saved, tied):
    model, _, _ = load_model(saved(checkpoint_of(byte_model(tie_embeddings=tied))))
    assert (model.lm_head.weight is model.embed_tokens.weight) == tied
    assert len(list(model.parameters())) == len(list(byte_model(tie_embeddings=tied).parameters()))
    with torch.no_grad():
        model.embed_tokens.weight[5] = 7.0
    assert bool((model.lm_head.weight[5] == 7.0).all()) == tied


# ---- strict weights ------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_orig_mod.module."])
@pytest.mark.parametrize("where", ["before net", "after net"])
def test_what_wrappers_put_before_a_name_is_taken_off(saved, prefix, where):
    checkpoint = checkpoint_of(byte_model())

    def wrapped(name: str) -> str:
        return prefix + name if where == "before net" else name.replace("net.", f"net.{prefix}", 1)

    checkpoint["state_dict"] = {wrapped(name): tensor for name, tensor in checkpoint["state_dict"].items()}
    model, _, _ = load_model(saved(checkpoint))
    assert all(
        torch.equal(tensor, model.state_dict()[name]) for name, tensor in byte_model().state_dict().items()
    )


NAME = "net.layers.1.self_attn.k_proj.weight"


def drop(weights: dict) -> None:
    del weights[NAME]


def add(weights: dict) -> None:
    weights["net.layers.2.self_attn.k_proj.weight"] = weights[NAME]


def transpose(weights: dict) -> None:
    weights[NAME] = weights[NAME].T.contiguous()


def cut(weights: dict) -> None:
    weights[NAME] = weights[NAME][1:]


@pytest.mark.parametrize(
    ("damage", "name", "words"),
    [
        (drop, "layers.1.self_attn.k_proj.weight", "provided none"),
        (add, "layers.2.self_attn.k_proj.weight", "expected none"),
        (transpose, "layers.1.self_attn.k_proj.weight", "(24, 12)"),
        (cut, "layers.1.self_attn.k_proj.weight", "(11, 24)"),
    ],
)
def test_weights_that_do_not_fit_are_named(saved, damage, name, words):
    checkpoint = checkpoint_of(byte_model())
    damage(checkpoint["state_dict"])
    message = refusal(saved(checkpoint))
    assert name in message
    assert words in message


def test_all_that_does_not_fit_is_in_one_message(saved):
    """What is wrong in the same way in every block is said once, with how often."""
    checkpoint = checkpoint_of(byte_model())
    weights = checkpoint["state_dict"]
    for i in (0, 1):
        weights[f"net.layers.{i}.mlp.up_proj.weight"] = weights[f"net.layers.{i}.mlp.up_proj.weight"][:-1]
    add(weights)
    drop(weights)
    weights["net.norm.weight"] = torch.zeros(3)
    message = refusal(saved(checkpoint))
    for said in (
        "layers.*.mlp.up_proj.weight: expected (",
        "(2 times)",
        "norm.weight: expected (24,), provided (3,)",
        "provided none",
        "expected none",
    ):
        assert said in message, message
    many = {f"odd.tensor{i}x": torch.zeros(1) for i in range(50)}
    assert misfits({}, many).count("provided") == 20
    assert misfits({}, many).endswith("; and 30 more")
    assert misfits(many, many) is None


def test_head_and_tokenizer_of_different_sizes_are_refused(saved):
    checkpoint = checkpoint_of(byte_model(vocab_size=300))
    message = refusal(saved(checkpoint))
    assert "300" in message
    assert "257" in message


# ---- not a number -----------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1, 7, 4099])  # below and above the width of a vector instruction
def test_nan_and_infinity_are_found_at_any_place(bad, dtype, size):
    """The largest finite number is not an infinity, though the sum of two of them would be."""
    for place in {0, size // 2, size - 1}:
        tensor = torch.full((size,), torch.finfo(dtype).max, dtype=dtype)
        tree = {
            "state_dict": {"net.a": torch.ones(2)},
            "optimizer_states": [{"state": {3: {"step": torch.tensor(4), "exp_avg": tensor}}}],
        }
        assert first_not_finite(tree) is None
        tensor[place] = bad
        assert first_not_finite(tree) == "optimizer_states.0.state.3.exp_avg"
        assert first_not_finite(tensor, "grad") == "grad"


def test_the_first_of_several_is_named_and_what_is_not_a_float_is_skipped():
    nan = torch.tensor([float("nan")], requires_grad=True)
    tree = {
        "empty": torch.empty(0, 3),
        "ids": torch.tensor([2**62]),
        "mask": torch.tensor([True]),
        "text": "nan",
        "loss": float("nan"),
        "none": None,
    }
    assert first_not_finite(tree) is None
    assert first_not_finite(tree | {"b": (torch.ones(2), nan), "a": nan}) == "b.1"
    assert first_not_finite({"outer": nan, "z": {"deep": nan}}, "checkpoint") == "checkpoint.outer"
    deep = loop = []
    for _ in range(5000):
        deep = [deep]
    loop.append(loop)
    assert first_not_finite({"deep": deep, "loop": loop}) is None


# ---- files that are not a checkpoint ----------------------------------------------------------------


def test_a_truncated_file_is_refused_at_every_length(tiny_run, tmp_path):
    whole = (tiny_run.folder / "final.ckpt").read_bytes()
    path = tmp_path / "cut.ckpt"
    lengths = [
        1,
        3,
        4,
        5,
        29,
        30,
        31,
        100,
        *range(1000, len(whole), len(whole) // 40),
        len(whole) - 100,
        len(whole) - 22,
        len(whole) - 1,
    ]
    for length in lengths:
        path.write_bytes(whole[:length])
        refusal(path)


def test_a_resume_of_a_truncated_file_is_refused_too(run, tiny_run, tmp_path):
    (tmp_path / "cut.ckpt").write_bytes((tiny_run.folder / "final.ckpt").read_bytes()[:-300])
    with pytest.raises(UserError, match=r"cut\.ckpt cannot be opened \(truncated or damaged\)"):
        run(tmp_path / "run", f"--resume={tmp_path / 'cut.ckpt'}")
    assert not (tmp_path / "run").exists()


def zip_file() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("letter.txt", "not torch")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "an empty file"),
        (b"Attention is all you need.\n", "not a .ckpt archive"),
        (pickle.dumps({"state_dict": {}}), "a Python pickle"),
        (zip_file(), "a zip archive"),
    ],
    ids=["empty", "text", "pickle", "zip"],
)
def test_other_files_are_refused(tmp_path, content, reason):
    path = tmp_path / "other.ckpt"
    path.write_bytes(content)
    assert reason in refusal(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert "does not exist" in refusal(tmp_path / "none.ckpt")
    assert "is a folder without a checkpoint" in refusal(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        torch.zeros(3),
        [1, 2],
        {"weight": torch.zeros(3)},
        {"state_dict": {}, "hyper_parameters": {}},
        {"state_dict": {}, "tiny_transformer": None},
        {"state_dict": {}, "tiny_transformer": {}},
        {"state_dict": None, "tiny_transformer": {"format_version": 1}},
        {"state_dict": {}, "tiny_transformer": {"format_version": 1}},
        {"state_dict": {}, "tiny_transformer": {"format_version": 1, "model": None, "tokenizer": None}},
        {
            "state_dict": {},
            "tiny_transformer": {
                "format_version": 1,
                "model": {"d_model": -1},
                "tokenizer": {"kind": "byte"},
            },
        },
        {
            "state_dict": {},
            "tiny_transformer": {"format_version": 1, "model": {}, "tokenizer": {"kind": "runes"}},
        },
    ],
    ids=lambda content: str(content)[:60],
)
def test_foreign_torch_files_are_refused(saved, content):
    refusal(saved(content))


@pytest.mark.parametrize("weights", [None, [], {"net.norm.weight": "no tensor"}], ids=str)
def test_a_state_dict_of_something_else_is_refused(saved, weights):
    checkpoint = checkpoint_of(byte_model())
    checkpoint["state_dict"] = weights if not weights else checkpoint["state_dict"] | weights
    refusal(saved(checkpoint))


class Evil:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("where", ["whole", "inside"])
def test_a_malicious_file_is_refused_and_its_code_never_runs(saved, tmp_path, where):
    evil = Evil(tmp_path / "touched")
    checkpoint = checkpoint_of(byte_model())
    if where == "inside":
        checkpoint["tiny_transformer"]["metrics"]["step"] = evil
    path = saved(evil if where == "whole" else checkpoint)
    torch.load(path, weights_only=False)
    assert evil.target.exists()  # the file is as dangerous as it is meant to be
    evil.target.unlink()
    assert "would run code" in refusal(path)
    with pytest.raises(UserError):
        read_checkpoint(path, mmap=False)
    assert not evil.target.exists()


@pytest.mark.parametrize("version", [2, 0, None, "1"])
def test_another_format_version_is_refused_with_both_numbers(saved, version):
    checkpoint = checkpoint_of(byte_model())
    checkpoint["tiny_transformer"]["format_version"] = version
    message = refusal(saved(checkpoint))
    assert f"format_version {version!r}" in message
    assert "reads 1" in message


# ---- writing -------------------------------------------------------------------------------------


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Interrupted])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_write(path) as file:
        file.write(b"half of the n")
        file.flush()
        assert path.read_bytes() == b"old"
        raise error
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_succeeds_replaces_the_file_and_not_its_other_names(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    os.link(path, tmp_path / "other name")
    with atomic_write(path) as file:
        file.write(b"new")
    assert (path.read_bytes(), (tmp_path / "other name").read_bytes()) == (b"new", b"old")
    assert len(list(tmp_path.iterdir())) == 2


def no_links(*args) -> None:
    raise OSError("links are not supported here")


@pytest.mark.parametrize("links", [True, False])
def test_a_second_name_is_a_link_or_where_links_fail_a_copy(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    source, target = tmp_path / "step-0000001.ckpt", tmp_path / "last.ckpt"
    target.write_bytes(b"older")
    source.write_bytes(b"content")
    for _ in range(2):  # the second time both names are one file already
        link_or_copy(source, target)
        assert target.read_bytes() == b"content"
        assert source.samefile(target) == links
        assert len(list(tmp_path.iterdir())) == 2
    source.unlink()
    assert target.read_bytes() == b"content"


def test_a_run_where_links_fail_has_the_same_files(run, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", no_links)
    made = run(tmp_path / "run")
    assert {path.name for path in made.folder.glob("*.ckpt")} == {
        path.name for path in tiny_run.folder.glob("*.ckpt")
    }
    assert made.sha256 == tiny_run.sha256
    assert not made.folder.joinpath("last.ckpt").samefile(made.folder / "final.ckpt")
