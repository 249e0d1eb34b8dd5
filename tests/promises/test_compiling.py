"""training.compile: what it needs and the machine lacks is reported before a run begins, and wrong compiled
gradients are found."""

import itertools
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import REPO, tiny_argv
from runs import BYTE

import train
from model import GPTConfig, GPTMini
from support.checkpoint import load_model
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


class TooDifficult(RuntimeError):
    """As the compiler's own errors look."""


TooDifficult.__module__ = "torch._inductor.exc"


def checked(capsys, folder, *words: str) -> tuple[int, str]:
    """The exit status of --check, and its line on compiling."""
    with pytest.raises(SystemExit) as stop:
        train.main([*tiny_argv(folder, *BYTE, *words), "--check"])
    out = capsys.readouterr().out
    assert "ok    time" in out, "the other items are checked whatever the compiler does"
    [line] = [line for line in out.splitlines() if " compile: " in line]
    return stop.value.code, line


def as_on_a_gpu(monkeypatch) -> None:
    """Let training.compile=auto compile a short run on a CPU."""
    monkeypatch.setattr(compiling, "WORTH_SECONDS", 0)
    choose = compiling.choose_to_compile
    for module in ("compiling", "plan"):
        monkeypatch.setattr(
            f"support.run.{module}.choose_to_compile",
            lambda wanted, device, flops: choose(wanted, "cuda", flops),
        )
    monkeypatch.setattr(compiling, "bf16_peak_flops", lambda device: None)


def without_compiler(device: str) -> None:
    raise compiling.CannotCompile("needs a compiler, and none was found; install one")


def test_check_compares_compiled_gradients(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(GPTMini, "compile", compile_without_code)
    monkeypatch.setattr("support.run.checklist.try_compiler", lambda device: None)
    compared = "ok    compile: compiled gradients differ"
    assert checked(capsys, tmp_path) == (0, "ok    compile: off (auto: only on CUDA)")
    assert checked(capsys, tmp_path, "training.compile=false") == (
        0,
        "ok    compile: off (training.compile=false)",
    )
    code, line = checked(capsys, tmp_path, "training.compile=true")
    assert code == 0 and line.startswith(compared)
    as_on_a_gpu(monkeypatch)
    code, line = checked(capsys, tmp_path)
    assert code == 0 and line.startswith(compared)


def test_check_reports_a_missing_compiler_and_for_auto_that_is_no_failure(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("support.run.checklist.try_compiler", without_compiler)
    as_on_a_gpu(monkeypatch)
    why = "needs a compiler, and none was found; install one"
    code, line = checked(capsys, tmp_path, "training.compile=true")
    assert code == 1 and line.startswith(f"FAIL  compile: training.compile=true {why}")
    assert checked(capsys, tmp_path) == (0, f"ok    compile: off; training.compile=auto {why}")


# ---- auto ----------------------------------------------------------------------------------------

FIVE_MINUTES_OF_A100 = 300 * 0.2 * 312e12


@pytest.mark.parametrize(
    ("wanted", "device", "flops", "peak", "expected"),
    [
        (True, "cpu", 0, None, (True, "training.compile=true")),
        (False, "cuda", 1e30, None, (False, "training.compile=false")),
        ("auto", "cpu", 1e30, None, (False, "auto: only on CUDA")),
        ("auto", "mps", 1e30, None, (False, "auto: only on CUDA")),
        ("auto", "cuda", 0.9 * FIVE_MINUTES_OF_A100, 312e12, (False, "auto: the run is too short .*")),
        ("auto", "cuda", 1.1 * FIVE_MINUTES_OF_A100, 312e12, (True, "auto: a long run on CUDA")),
        ("auto", "cuda", 0.9 * 300 * 0.2 * 100e12, None, (False, "auto: the run is too short .*")),
        ("auto", "cuda", 1.1 * 300 * 0.2 * 100e12, None, (True, "auto: a long run on CUDA")),
    ],
)
def test_auto_compiles_long_runs_on_cuda(monkeypatch, wanted, device, flops, peak, expected):
    monkeypatch.setattr(compiling, "bf16_peak_flops", lambda device: peak)
    compiles, reason = compiling.choose_to_compile(wanted, device, flops)
    assert compiles is expected[0] and re.fullmatch(expected[1], reason)


def test_auto_counts_the_operations_of_the_steps_that_are_left(run, monkeypatch, tmp_path, tiny_run):
    """Witness: the row of metrics knows the tokens, the network the operations of one."""
    seen = []
    monkeypatch.setattr(
        "support.run.plan.choose_and_try", lambda *args: (seen.append(args), (False, "a test"))[1]
    )
    run(tmp_path / "run", "training.max_steps=2", "training.schedule_steps=12")
    run(tmp_path / "run", "training.schedule_steps=12", "--resume")
    net, _, _ = load_model(tiny_run.folder / "final.ckpt")
    tokens = tiny_run.train_rows[-1]["tokens"]
    per_token = net.flops_per_token(32)
    assert seen == [("auto", "cpu", tokens * per_token * share) for share in (2 / 12, 10 / 12)]


def test_the_header_says_whether_a_run_is_compiled_and_run_config_keeps_auto(tiny_run):
    assert "\ncompile: off (auto: only on CUDA)\n" in tiny_run.out
    assert "compile: auto" in (tiny_run.folder / "run_config.yaml").read_text()


def test_without_a_compiler_auto_warns_once_and_trains(run, monkeypatch, tmp_path):
    monkeypatch.setattr(compiling, "try_compiler", without_compiler)
    as_on_a_gpu(monkeypatch)
    made = run(tmp_path / "run", *BYTE, "training.max_steps=2")
    assert made.err.splitlines() == [
        "warning: training.compile=auto needs a compiler, and none was found; install one; the run goes on "
        "without compiling"
    ]
    assert "\ncompile: off (auto: it does not work here)\n" in made.out


def fail_at_call(number: int, in_backward: bool):
    """In place of `compile()`: the network is not compiled, and the given call fails like a compiler."""

    def compile(self):
        calls = itertools.count(1)

        def fail(*_):
            raise TooDifficult("LoweringException: cannot\nlower this")

        def call(*args, **kwargs):
            is_bad = next(calls) == number
            if is_bad and not in_backward:
                fail()
            out = self._call_impl(*args, **kwargs)
            if is_bad:
                out[0].register_hook(fail)
            return out

        self._compiled_call_impl = call

    return compile


@pytest.fixture(scope="module")
def eager(run, tmp_path_factory):
    """A run of four steps of two micro-batches, then a validation, with dropout and `train_eval_batches`."""
    return run(tmp_path_factory.mktemp("eager") / "run", *FOUR_STEPS)


FOUR_STEPS = (*BYTE, "training.max_steps=4", "model.dropout=0.1", "training.train_eval_batches=2")


@pytest.mark.parametrize(
    ("number", "in_backward"),
    [
        (1, False),
        (1, True),
        (2, False),
        (2, True),
        (7, False),
        (9, False),
        (10, False),
        (11, False),
        (12, False),
    ],
)
def test_when_the_compiler_fails_auto_goes_on_as_if_it_had_not_compiled(
    run, monkeypatch, tmp_path, eager, number, in_backward
):
    """In the first micro-batch, in the second, which adds to gradients, in a later step, and in each part of
    the validation: calls 9 and 10 are the `train_eval_batches`."""
    monkeypatch.setattr(compiling, "try_compiler", lambda device: None)
    monkeypatch.setattr(GPTMini, "compile", fail_at_call(number, in_backward))
    as_on_a_gpu(monkeypatch)
    made = run(tmp_path / "run", *FOUR_STEPS)
    assert "\ncompile: on (auto: a long run on CUDA)\n" in made.out
    assert (made.sha256, made.timeless_rows) == (eager.sha256, eager.timeless_rows)
    [warning] = made.err.splitlines()
    assert warning.startswith(
        "warning: training.compile=auto failed (TooDifficult: LoweringException: cannot"
    )
    assert warning.endswith("the run goes on without compiling")


def test_a_real_compiler_that_fails_is_left_too(run, monkeypatch, tmp_path, eager):
    def broken(graph, inputs):
        raise RuntimeError("no code for this device")

    def compile(self):
        torch._dynamo.reset()
        torch.nn.Module.compile(self, backend=broken)

    monkeypatch.setattr(compiling, "try_compiler", lambda device: None)
    monkeypatch.setattr(GPTMini, "compile", compile)
    as_on_a_gpu(monkeypatch)
    made = run(tmp_path / "run", *FOUR_STEPS)
    assert (made.sha256, made.timeless_rows) == (eager.sha256, eager.timeless_rows)
    assert [line.count("no code for this device") for line in made.err.splitlines()] == [1]


def test_an_error_that_is_not_the_compiler_s_is_not_retried(run, monkeypatch, tmp_path):
    def compile(self):
        def fail(**batch):
            raise ZeroDivisionError("a bug of ours")

        self._compiled_call_impl = fail

    monkeypatch.setattr(compiling, "try_compiler", lambda device: None)
    monkeypatch.setattr(GPTMini, "compile", compile)
    as_on_a_gpu(monkeypatch)
    with pytest.raises(ZeroDivisionError, match="a bug of ours"):
        run(tmp_path / "run", *FOUR_STEPS)


# ---- during training -----------------------------------------------------------------------------


def test_a_compiler_error_during_training_is_explained_too(run, monkeypatch, tmp_path):
    step = train.LitCausalLM.training_step

    def fails(self, *args):
        if self.trainer.global_step == 4:
            raise TooDifficult("LoweringException: cannot\n" + "lower this\n" * 200)
        return step(self, *args)

    monkeypatch.setattr("support.run.compiling.try_compiler", lambda device: None)
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
