"""train.py --check and --show-step find what is wrong before a run starts, and change nothing."""

import itertools
import json
import os
import re
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from runs import BYTE, STREAM, stop_before
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import finetune
import model as model_module
import train
from data import PackedLMDataset, load_corpus, make_dataloaders, pack_corpus
from model import GPTConfig, GPTMini, KVCache
from optim import build_optimizer
from support.checkpoint import KEY, read_checkpoint, save_archive
from support.config.read import load_config, validate_config
from support.config.schema import Config
from support.messages import UserError
from support.run import checklist as preflight
from support.run.checklist import cache_probe, leak_probe
from support.run.estimates import (
    estimate_activations,
    estimate_memory,
    estimate_step_time,
    memory_of,
    typical_length,
)
from support.run.plan import plan_run
from support.run.show import print_header
from tokenizer import ByteTokenizer


@pytest.fixture
def check(argv_of, capsys):
    """check(folder, ...) runs --check and returns (exit status, {item: "ok" or "FAIL"}, what it printed)."""

    def call(folder: Path, *words: str) -> tuple[int, dict[str, str], str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            train.main([*argv_of(folder, *words), "--check"])
        out = capsys.readouterr().out
        verdicts = [re.match(r"(ok|FAIL) +([^:]+): ", line) for line in out.splitlines()]
        return stop.value.code, {found[2]: found[1] for found in verdicts if found}, out

    return call


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


# ---- the checklist -------------------------------------------------------------------------------


def test_check_passes_for_the_smoke_config_and_changes_nothing_on_disk(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    repo = Path(train.__file__).parent
    (tmp_path / "data").symlink_to(repo / "data")
    before = listing(repo / "checkpoints"), listing(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train.main(["--config", str(repo / "config_smoke.yaml"), "--check", "--device", "cpu"])
    out = capsys.readouterr().out
    assert (stop.value.code, "FAIL" in out) == (0, False)
    assert (listing(repo / "checkpoints"), listing(tmp_path)) == before
    items = (
        "config",
        "text: train: ",
        "text: val: ",
        "blocks",
        "tokenizer",
        "model",
        "no leak",
        "cache",
        "learns one batch",
        "optimizer",
        "memory",
    )
    for item in (*items, "time", "checkpoint folder"):
        assert re.search(f"^ok +{item}", out, re.MULTILINE), item
    assert out.splitlines()[-1] == "everything passed; nothing was written"


@pytest.mark.parametrize(
    "words",
    [
        (
            "model.mlp=gelu",
            "model.norm=layernorm",
            "model.position=learned",
            "model.bias=true",
            "model.n_kv_heads=4",
        ),
        ("model.zero_init=true", "model.tie_embeddings=false", "model.dropout=0.3"),
        (
            "data.document_mask=true",
            "training.max_steps=0",
            "training.schedule_steps=null",
            "training.warmup_steps=0",
        ),
        ("model.d_model=60", "model.n_heads=6", "model.n_kv_heads=3", "model.max_seq_len=9"),
    ],
    ids=["gpt2-like", "zero-init", "nothing to train", "odd shapes"],
)
def test_check_passes_for_other_configs(check, tmp_path, words):
    code, verdicts, out = check(tmp_path / "run", *BYTE, *words)
    assert (code, "FAIL" in verdicts.values()) == (0, False), out
    assert not (tmp_path / "run").exists()


def test_check_probes_a_large_model_on_a_small_copy(check, tmp_path):
    code, _, out = check(
        tmp_path / "run",
        *BYTE,
        "model.d_model=2048",
        "model.n_layers=2",
        "model.n_heads=16",
        "model.n_kv_heads=4",
    )
    assert (code, out.count("on a small copy")) == (0, 2), out


def attention_that_looks_ahead(q, k, v, mask, dropout):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def keys_in_reverse_order(self, layer, k, v):
    end = self.length + k.shape[2]
    self.keys[layer][:, :, self.length : end] = k.flip(2)
    self.values[layer][:, :, self.length : end] = v
    return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


def block_that_learns_nothing(self, x, *args):
    return x * 0


@pytest.mark.parametrize(
    ("target", "name", "broken", "item"),
    [
        (model_module, "fused_attention", attention_that_looks_ahead, "no leak from the future"),
        (KVCache, "append", keys_in_reverse_order, "cache"),
        (model_module.TransformerBlock, "forward", block_that_learns_nothing, "learns one batch by heart"),
        (ByteTokenizer, "encode", lambda self, text: list(text.lower().encode()), "tokenizer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_check_finds_what_is_broken_and_exits_1(check, tmp_path, monkeypatch, target, name, broken, item):
    monkeypatch.setattr(target, name, broken)
    code, verdicts, out = check(tmp_path / "run", *BYTE)
    assert (code, verdicts[item]) == (1, "FAIL"), out
    assert "nothing was written" in out.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_the_probes_pass_a_sound_model_and_find_a_broken_one(monkeypatch):
    torch.manual_seed(0)
    sound = GPTMini(
        GPTConfig(vocab_size=19, d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=11)
    ).eval()
    assert leak_probe(sound, "cpu") == 0
    assert cache_probe(sound, "cpu") < 1e-5
    monkeypatch.setattr(KVCache, "append", keys_in_reverse_order)
    assert cache_probe(sound, "cpu") > 1e-4
    monkeypatch.setattr(model_module, "fused_attention", attention_that_looks_ahead)
    assert leak_probe(sound, "cpu") > 1e-4


def test_check_finds_that_memory_is_too_small(check, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "memory_total", lambda device: 2**20)
    code, verdicts, out = check(tmp_path / "run", *BYTE)
    assert (code, verdicts["memory"]) == (1, "FAIL"), out
    assert "training.micro_batch_size" in out


def test_check_reads_only_a_few_rows_of_a_huge_step(check, tmp_path, monkeypatch):
    """A step of millions of sequences fits in no memory, so --check must not load it to find out."""
    read, batch = [], PackedLMDataset.batch

    def count(self, indices):
        indices = list(indices)
        read.append(len(indices))
        assert len(indices) <= 1000
        return batch(self, indices)

    monkeypatch.setattr(PackedLMDataset, "batch", count)
    check(tmp_path / "run", *BYTE, "training.micro_batch_size=2000", "training.grad_accum_steps=200")
    assert 0 < sum(read) <= 1000


@pytest.mark.parametrize(
    "words",
    [
        ("model.d_model=30",),
        ("data.path=nowhere.txt",),
        ("training.lr=-1",),
        ("training.seq_len=8000", "model.max_seq_len=8000"),
        ("model.depth=3",),
    ],
    ids=lambda words: words[0],
)
def test_check_says_why_a_config_cannot_run(check, tmp_path, words):
    code, verdicts, out = check(tmp_path / "run", *BYTE, "data.val_fraction=0.9", *words)
    assert (code, verdicts) == (1, {"config, text and device": "FAIL"})
    assert words[0].split("=")[0].split(".")[1] in out


def test_check_reports_an_unfinished_run_in_the_folder(check, run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_before(patch, 1)
        folder = run(tmp_path / "run", *BYTE).folder
    before = listing(folder)
    code, verdicts, out = check(folder, *BYTE)
    assert (code, verdicts["checkpoint folder"]) == (1, "FAIL"), out
    for words in (("--resume",), ("--fresh",)):
        code, verdicts, out = check(folder, *BYTE, *words)
        assert (code, verdicts["checkpoint folder"]) == (0, "ok"), out
    assert listing(folder) == before


def test_check_finds_a_folder_that_cannot_be_written(check, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        code, verdicts, out = check(folder, *BYTE)
        assert (code, verdicts["checkpoint folder"]) == (1, "FAIL"), out
        assert "checkpoint.dir=" in out


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_check_finds_a_folder_without_permission(check, tmp_path):
    tmp_path.chmod(0o500)
    code, verdicts, _ = check(tmp_path / "run", *BYTE)
    tmp_path.chmod(0o700)
    assert (code, verdicts["checkpoint folder"]) == (1, "FAIL")


# ---- the memory estimate -------------------------------------------------------------------------


def config_for(model: dict, **training) -> Config:
    training = {"max_steps": 1, "micro_batch_size": 5, "val_every": 1} | training
    return validate_config({"model": model, "data": {"path": "x"}, "training": training})


SHAPE = {"d_model": 48, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 20}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": False, "qk_norm": True},
        {"mlp": "gelu", "norm": "layernorm", "position": "learned", "bias": True},
    ],
    ids=["llama-like", "untied", "gpt2-like"],
)
def test_the_memory_of_parameters_gradients_and_optimizer_is_exact(optimizer, changes):
    """The witness is a real model, with what its optimizer holds after a step."""
    config = config_for(SHAPE | changes, optimizer=optimizer)
    model_config = GPTConfig(vocab_size=257, **SHAPE, **changes)
    net = GPTMini(model_config)
    updating = build_optimizer(net, config.training)
    ids = torch.arange(40).view(2, 20)
    net(ids, ids)[0].backward()
    real = {
        "parameters": sum(p.nbytes for p in net.parameters()),
        "gradients": sum(p.grad.nbytes for p in net.parameters()),
    }
    updating.step()
    real["optimizer"] = sum(
        t.nbytes for state in updating.state.values() for name, t in state.items() if name != "step"
    )
    estimate = estimate_memory(model_config, config, "32-true")
    assert {name: estimate[name] for name in real} == real
    assert estimate["total"] == sum(size for name, size in estimate.items() if name != "total")


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all tensors made inside the `with`, and the most that were alive at once. Tensors
    that share a storage count once."""

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.live: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self.known or key in self.live:
                continue
            self.live[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key)
        return out

    def forget(self, key: int) -> None:
        self.now -= self.live.pop(key, 0)


@pytest.mark.parametrize(
    ("vocab_size", "changes"),
    [
        (257, {}),
        (257, {"n_kv_heads": 4, "d_model": 128, "n_layers": 6}),
        (257, {"mlp": "gelu", "norm": "layernorm", "position": "learned", "bias": True, "n_kv_heads": 4}),
        (257, {"qk_norm": True, "max_seq_len": 200}),
        (257, {"dropout": 0.1, "max_seq_len": 200}),
        (257, {"max_seq_len": 200, "device": "mps"}),
        (257, {"max_seq_len": 200, "device": "mps", "dropout": 0.1}),
        (257, {"gradient_checkpointing": True, "n_layers": 8, "max_seq_len": 100}),
        (5000, {}),
        (20000, {"max_seq_len": 512, "d_model": 64}),
    ],
    ids=lambda value: str(value),
)
def test_activations_are_estimated_within_a_quarter(monkeypatch, vocab_size, changes):
    """The estimate of what is kept is compared with the bytes that saved-tensor hooks count. The estimate of
    the peak is compared with all tensors made in forward and backward, without the parameters' gradients.
    MPS uses the explicit attention."""
    shape = SHAPE | changes
    device = shape.pop("device", "cpu")
    if device == "mps":
        monkeypatch.setattr(model_module, "fused_attention", model_module.explicit_attention)
    model_config = GPTConfig(vocab_size=vocab_size, **shape)
    kept, peak = estimate_activations(model_config, config_for(shape), "32-true", device)
    torch.manual_seed(0)
    net = GPTMini(model_config).train()
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ids = torch.randint(vocab_size, (5, model_config.max_seq_len))
    saved, weights = {}, {parameter.untyped_storage()._cdata for parameter in net.parameters()}

    def pack(tensor):
        saved[tensor.untyped_storage()._cdata] = (
            tensor  # keep it alive, so that its address is not used again
        )
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(ids, ids)
    assert kept == pytest.approx(
        sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in weights), rel=0.25
    )
    with PeakMemory([*net.parameters(), *(parameter.grad for parameter in net.parameters()), ids]) as memory:
        net(ids, ids)[0].backward()
    assert peak == pytest.approx(memory.peak, rel=0.25)


def test_the_time_of_a_step_is_scaled_from_a_measured_micro_batch(argv_of, tmp_path, monkeypatch):
    """This clock ticks one second each time it is read: forward and backward of a micro-batch take one
    second, the optimizer another."""
    args = train.parse_args(argv_of(tmp_path / "run", "training.grad_accum_steps=3", "tokenizer.kind=byte"))
    plan = plan_run(args, finetuning=False, only_looks=True)
    ticks = itertools.count()
    monkeypatch.setattr("support.run.estimates.time_when_done", lambda device: float(next(ticks)))
    per_step, flops_per_sec = estimate_step_time(plan, GPTMini(plan.model_config))
    assert per_step == pytest.approx(3 * 1 + 1)
    flops = GPTMini(plan.model_config).flops_per_token(plan.config.seq_len) * plan.tokens_per_step / 3
    assert flops_per_sec == pytest.approx(flops)


def test_estimates_for_instructions_use_the_length_of_rows_not_the_context(tiny_run, tmp_path, capsys):
    """An imported model's context is often far longer than any pair. Only packed rows fill it."""
    base = read_checkpoint(tiny_run.folder / "final.ckpt")
    base[KEY]["model"]["max_seq_len"] = 4096
    save_archive(base, tmp_path / "base.ckpt")
    lengths = [3 + i for i in range(12)]
    rows = [{"instruction": "Say it", "output": "a " * n} for n in lengths]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    plans = {}
    for packing in ("false", "true"):
        words = [f"base_ckpt={tmp_path / 'base.ckpt'}", f"checkpoint.dir={tmp_path / 'run'}"]
        words += [f"data.path={tmp_path / 'rows.json'}", f"data.packing={packing}", "data.val_docs=2"]
        words += ["training.micro_batch_size=4", "training.grad_accum_steps=1", "training.warmup_steps=0"]
        argv = ["--config", "config_finetune.yaml", "--device", "cpu", "--check"]
        args = finetune.parse_args([*argv, *(f"--override={word}" for word in words)])
        plans[packing] = plan_run(args, finetuning=True, only_looks=True)
    padded, packed = plans["false"], plans["true"]
    longest = max(len(pair) for pair in padded.data.train.examples)
    assert longest < 60
    assert (padded.tokens_per_step, packed.tokens_per_step) == (4 * longest, 4 * 4096)
    short = padded.config.model_copy(
        update={"training": padded.config.training.model_copy(update={"seq_len": longest})}
    )
    assert memory_of(padded) == estimate_memory(padded.model_config, short, "32-true", "cpu")
    assert memory_of(packed)["activations"] > 50 * memory_of(padded)["activations"]
    mean = sum(len(pair) for pair in padded.data.train.examples) / len(padded.data.train.examples)
    assert mean < typical_length(padded) <= longest
    assert typical_length(packed) == 4096
    print_header(padded, GPTMini(padded.model_config), 0)
    assert f"x {longest}), up to" in capsys.readouterr().out


# ---- --show-step ---------------------------------------------------------------------------------


def test_show_step_prints_exactly_the_text_the_step_trains_on(run, argv_of, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    shown = {}
    for step in (1, 7, 12):
        with pytest.raises(SystemExit) as stop:
            train.main([*argv_of(folder, *BYTE), "--show-step", str(step)])
        assert (stop.value.code, folder.exists()) == (0, False)
        shown[step] = capsys.readouterr().out

    trained_on = []
    compute = train.LitCausalLM.training_step

    def record_batches(self, step, index):
        trained_on.append([batch["input_ids"].tolist() for batch in step.micro_batches])
        return compute(self, step, index)

    monkeypatch.setattr(train.LitCausalLM, "training_step", record_batches)
    run(folder, *BYTE)
    for step, text in shown.items():
        expected = [
            f"--- step {step}, micro-batch {micro}, row {row} ---\n"
            f"{bytes(i for i in ids if i < 256).decode(errors='replace')}"
            for micro, rows in enumerate(trained_on[step - 1], 1)
            for row, ids in enumerate(rows, 1)
        ]
        assert len(expected) == 8
        assert text.replace("<|endoftext|>", "") == "\n".join(expected) + "\n"


def test_show_step_of_a_stream_prints_what_the_loader_yields(argv_of, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "row {i} of the stream, and some more text"}}\n' for i in range(60)))
    words = (*STREAM, f"data.path={rows}", *BYTE)
    argv = argv_of(tmp_path / "run", *words)
    with pytest.raises(SystemExit):
        train.main([*argv, "--show-step", "3"])
    shown = capsys.readouterr().out
    config = load_config(argv[1], argv[5::2])
    tokenizer = ByteTokenizer()
    loader, _ = make_dataloaders(config, pack_corpus(load_corpus(config), tokenizer, config), tokenizer, 12)
    steps = iter(loader)
    third = [next(steps) for _ in range(3)][-1]
    texts = [tokenizer.decode(ids) for batch in third.micro_batches for ids in batch["input_ids"].tolist()]
    assert [
        text.strip("\n") for text in re.split(r"--- step 3, micro-batch \d, row \d ---\n", shown)[1:]
    ] == texts


@pytest.mark.parametrize("step", ["0", "-1", "13"])
def test_show_step_outside_the_run_is_refused(argv_of, tmp_path, step):
    with pytest.raises(UserError, match=rf"--show-step {step}: this run has steps 1 to 12"):
        train.main([*argv_of(tmp_path / "run", *BYTE), f"--show-step={step}"])


def test_show_step_works_next_to_an_unfinished_run(argv_of, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "step-0000003.ckpt").write_bytes(b"of an unfinished run")
    for step in ("1", "12"):
        with pytest.raises(SystemExit) as stop:
            train.main([*argv_of(tmp_path / "run", *BYTE), "--show-step", step])
        assert stop.value.code == 0
