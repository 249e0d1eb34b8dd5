"""training.compile: what it needs and the machine lacks is reported before a run begins, and wrong compiled
gradients are found."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import REPO, tiny_argv
from runs import BYTE

import train
from model import GPTConfig, GPTMini
from support.messages import UserError
from support.run import compiling


def network() -> GPTMini:
    torch.manual_seed(0)
    return GPTMini(GPTConfig(vocab_size=23, d_model=16, n_layers=1, n_heads=2, max_seq_len=8))


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(23, (2, 8), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


def compile_without_code(self) -> None:
    """Like `compile()`, but without generating code: seconds in place of a minute."""
    torch._dynamo.reset()
    torch.nn.Module.compile(self, backend="aot_eager")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_right_gradients_pass(monkeypatch, precision):
    monkeypatch.setattr(GPTMini, "compile", compile_without_code)
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    text = compiling.compare_gradients(lambda: network().to(dtype), batch(), precision, "cpu")
    assert "compiled gradients differ from eager ones by" in text


@pytest.mark.parametrize("wrong", ["all are zero", "one is doubled"])
def test_wrong_gradients_are_refused_and_named(monkeypatch, wrong):
    def miscompiled(self):
        if wrong == "all are zero":
            forward = self.forward
            self.forward = lambda **batch: [
                part * 0 if part.is_floating_point() else part for part in forward(**batch)
            ]
        else:
            self.layers[0].mlp.up_proj.weight.register_hook(lambda gradient: 2 * gradient)

    monkeypatch.setattr(GPTMini, "compile", miscompiled)
    with pytest.raises(
        UserError,
        match=r"differ.* by at most 1\.0e\+00 .*compiles this model wrongly.*training\.compile=false",
    ) as error:
        compiling.compare_gradients(network, batch(), "32-true", "cpu")
    assert wrong == "all are zero" or "layers.0.mlp.up_proj.weight" in str(error.value)


EXPLANATIONS = {  # what the compilers say: what we say
    "InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config.cpp.cxx: "
    "(None, 'g++')": "needs a C.. compiler.*apt-get install g",
    "C++ compile error\nmain.cpp:2:10: fatal error: Python.h: "
    "No such file or directory": "needs Python's header files.*python3-dev",
    "Failed to find C compiler. Please specify via CC environment variable": "needs a C compiler.*gcc",
    "Cannot find a working triton installation. Either the package is not installed or it is "
    "too old.": "needs Triton.*pip install triton",
    "something that nobody has seen before": "failed .*nobody has seen before",
}


@pytest.mark.parametrize("text", EXPLANATIONS)
def test_any_compiler_error_is_one_short_message_before_the_folder_is_made(monkeypatch, tmp_path, text):
    def broken(*args, **kwargs):
        try:
            raise OSError(text)
        except OSError as error:
            raise RuntimeError("backend='inductor' raised") from error

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(UserError, match=f"training.compile=true {EXPLANATIONS[text]}") as error:
        train.main(tiny_argv(tmp_path / "run", *BYTE, "training.compile=true"))
    assert "--override training.compile=false" in str(error.value)
    assert len(str(error.value).splitlines()) <= 2
    assert not (tmp_path / "run").exists()


def test_a_compiler_that_drops_part_of_a_gradient_is_refused(monkeypatch):
    """As the compiler of PyTorch 2.5 does for a token that occurs several times."""

    def loses(function):
        return lambda table, ids: function(table, ids[:1].unique()) + 0 * table.sum()

    monkeypatch.setattr(torch, "compile", loses)
    with pytest.raises(
        UserError,
        match=r"PyTorch .* wrongly here; install a newer one, or train without: --override "
        r"training.compile=false",
    ):
        compiling.try_compiler("cpu")
    monkeypatch.setattr(torch, "compile", lambda function: function)
    compiling.try_compiler("cpu")


def test_check_compares_compiled_gradients(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(GPTMini, "compile", compile_without_code)
    monkeypatch.setattr("support.run.checklist.try_compiler", lambda device: None)
    for words, items in (((), 0), (("training.compile=true",), 1)):
        with pytest.raises(SystemExit) as stop:
            train.main([*tiny_argv(tmp_path / "run", *BYTE, *words), "--check"])
        assert (
            stop.value.code,
            capsys.readouterr().out.count("ok    compile: compiled gradients differ"),
        ) == (0, items)


def test_check_reports_a_missing_compiler(monkeypatch, tmp_path, capsys):
    def missing(device):
        raise UserError("a compiler is missing")

    monkeypatch.setattr("support.run.checklist.try_compiler", missing)
    with pytest.raises(SystemExit) as stop:
        train.main([*tiny_argv(tmp_path / "run", *BYTE, "training.compile=true"), "--check"])
    out = capsys.readouterr().out
    assert stop.value.code == 1
    assert "FAIL  compile: a compiler is missing" in out
    assert "ok    time" in out, "the other items are still checked"


def test_a_compiler_error_during_training_is_explained_too(run, monkeypatch, tmp_path):
    class TooDifficult(RuntimeError):
        pass

    TooDifficult.__module__ = "torch._inductor.exc"
    step = train.LitCausalLM.training_step

    def fails(self, *args):
        if self.trainer.global_step == 4:
            raise TooDifficult("LoweringException: cannot\n" + "lower this\n" * 200)
        return step(self, *args)

    monkeypatch.setattr("support.run.plan.try_compiler", lambda device: None)
    monkeypatch.setattr(GPTMini, "compile", lambda self: None)
    monkeypatch.setattr(train.LitCausalLM, "training_step", fails)
    with pytest.raises(
        UserError, match=r"(?s)training\.compile=true failed.*training\.compile=false.*step-0000004\.ckpt"
    ) as error:
        run(tmp_path / "run", *BYTE, "training.compile=true")
    assert len(str(error.value)) < 900


@pytest.mark.slow
def test_a_run_without_a_compiler_ends_with_a_one_line_error(tmp_path):
    """Nothing is simulated: the process has an empty PATH and a new cache."""
    empty = tmp_path / "empty"
    empty.mkdir()
    env = os.environ | {
        "PATH": str(empty),
        "CXX": str(empty / "c++"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }
    command = [sys.executable, "train.py", *tiny_argv(tmp_path / "run", *BYTE, "training.compile=true")]
    ended = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True)
    assert (ended.returncode, (tmp_path / "run").exists()) == (2, False)
    assert "Traceback" not in ended.stderr
    assert "error: training.compile=true needs a C++ compiler" in ended.stderr.splitlines()[-1]
