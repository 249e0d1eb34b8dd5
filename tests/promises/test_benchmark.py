"""benchmark.py: rounds take turns and leave out disturbed ones, every task runs and its figures make sense,
and what it times is what train.py, infer.py and the model really do."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPO, tiny_argv

import benchmark
import train
from model import GPTMini
from support.benchmark import opponents, race
from support.benchmark.machine import measure_machine
from support.benchmark.model_speed import bytes_per_token, forward_flops, our_step
from support.benchmark.opponents import parse_against
from support.benchmark.rounds import CpuTimes, Side, interleave, lost_share
from support.benchmark.start_speed import run_python
from support.benchmark.subject import SHAPES, read_subject, subject_of_shape
from support.messages import UserError

TINY_SHAPE = (
    "model.d_model=32",
    "model.n_layers=2",
    "model.n_heads=4",
    "model.max_seq_len=32",
    "training.micro_batch_size=2",
)
NANOGPT = """
from dataclasses import dataclass
import torch
from torch import nn

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        print("number of parameters: many")
        self.table = nn.Embedding(config.vocab_size, config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, idx, targets=None):
        logits = self.head(self.table(idx))
        if targets is None:
            return logits[:, [-1]], None
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas)

    def generate(self, idx, max_new_tokens, top_k=None):
        for _ in range(max_new_tokens):
            idx = torch.cat([idx, self(idx)[0].argmax(-1)], dim=1)
        return idx
"""


@pytest.fixture
def nanogpt(tmp_path: Path) -> str:
    """The folder of a stand-in with nanoGPT's interface."""
    (tmp_path / "nanoGPT").mkdir()
    (tmp_path / "nanoGPT" / "model.py").write_text(NANOGPT)
    return str(tmp_path / "nanoGPT")


@pytest.fixture
def timed(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """timed("decode", "--shape", "m1"): the JSON of a very short measurement, checked; what was printed is in
    timed.out."""
    monkeypatch.setattr("support.benchmark.machine.READ_BYTES", 2**20)
    monkeypatch.setattr("support.benchmark.machine.MATMUL_SIZES", {"cpu": (64, 128)})
    monkeypatch.setattr("support.benchmark.contest.BANDWIDTH_SECONDS", 0.01)
    monkeypatch.setattr("support.benchmark.rounds.TURN_SECONDS", 0.001)

    def run(*argv: str) -> list[dict]:
        file = tmp_path / "speed.json"
        words = [*argv, "--rounds", "2", "--seconds", "0.2", "--device", "cpu", "--json", str(file)]
        assert benchmark.main(words) == 0
        run.out = capsys.readouterr().out
        report = json.loads(file.read_text())
        assert min(report["machine"]["matmul"].values()) > 0
        assert report["machine"]["bandwidth"] > 0
        for row in report["results"]:
            assert 0 < row["lowest_ms"] <= row["ms"] <= row["highest_ms"]
            assert row["noise"] >= 0
            assert row["rounds"] >= 1
            assert row["side"] in run.out
            if row["limit"]:
                assert row["share"] == pytest.approx(row["reached_per_second"] / row["limit_per_second"])
                assert 0 < row["share"] < 3  # tests run beside each other: a limit may be measured too low
        return report["results"]

    return run


def tiny_shape() -> list[str]:
    return [word for setting in TINY_SHAPE for word in ("--override", setting)]


# ---- rounds --------------------------------------------------------------------------------------


class World:
    """A clock, and the CPU times of a machine with two CPUs, that go on only when a side works."""

    def __init__(self) -> None:
        self.now = self.others = self.ours = 0.0
        self.turns: list[str] = []

    def side(self, name: str, seconds: list[float], others: list[float]) -> Side:
        """A side whose n-th run takes `seconds[n]`, in which other processes use `others[n]` CPU seconds;
        afterwards the last of them again."""
        n_runs = 0

        def run() -> None:
            nonlocal n_runs
            i = min(n_runs, len(seconds) - 1)
            self.now += seconds[i]
            self.ours += 2 * seconds[i]
            self.others += others[min(n_runs, len(others) - 1)]
            self.turns.append(name)
            n_runs += 1

        return Side(name, run)

    def interleave(self, *sides: Side, n_rounds: int, n_threads: int = 2, max_seconds: float = 1e9):
        return interleave(
            list(sides),
            n_rounds=n_rounds,
            max_seconds=max_seconds,
            n_threads=n_threads,
            clock=lambda: self.now,
            cpu_times=lambda: CpuTimes(self.others + self.ours, self.ours, n_cpus=2),
        )


def test_sides_take_turns_and_another_one_begins_each_round():
    world = World()
    rounds = world.interleave(world.side("a", [1.0], [0.0]), world.side("b", [2.0], [0.0]), n_rounds=3)
    assert world.turns == ["a", "b", *"abbaab"]  # one warm-up each: they are slow
    assert (rounds.median("a"), rounds.median("b"), rounds.n_dropped) == (1.0, 2.0, 0)
    assert (rounds.ratio("a", "b"), rounds.difference("a", "b")) == (2.0, -1.0)


def test_a_disturbed_round_is_left_out_for_all_sides_and_another_one_made():
    world = World()
    a = world.side("a", [1, 1, 5, 1], [0, 0, 3, 0])  # the third run, in round 2, is slow and disturbed
    b = world.side("b", [2, 2, 7, 2], [0.0])
    rounds = world.interleave(a, b, n_rounds=3)
    assert [round(lost, 2) for lost in rounds.lost] == [0, 0.3, 0, 0]
    assert (rounds.n_dropped, rounds.of("a"), rounds.of("b")) == (1, [1, 1, 1], [2, 2, 2])
    assert not rounds.all_disturbed


def test_if_every_round_is_disturbed_all_count_and_it_says_so():
    world = World()
    rounds = world.interleave(world.side("a", [1.0, 1.0, 1.0, 4.0], [0.5]), n_rounds=2)
    assert rounds.all_disturbed
    assert (len(rounds.of("a")), rounds.n_dropped) == (6, 0)  # three for each one wanted


def test_there_is_one_round_even_if_time_is_over_and_no_more():
    world = World()
    rounds = world.interleave(world.side("a", [10.0], [0.0]), n_rounds=5, max_seconds=1)
    assert rounds.of("a") == [10.0]


def test_a_short_run_is_repeated_within_a_turn_and_counts_once():
    world = World()
    rounds = world.interleave(world.side("a", [0.05], [0.0]), n_rounds=1)
    assert len(world.turns) == 3 + 5  # warm-ups, then 0.25 s
    assert rounds.median("a") == pytest.approx(0.05)


def test_a_side_can_say_itself_which_seconds_count():
    world = World()
    work = world.side("a", [1.0], [0.0]).run
    assert world.interleave(Side("a", lambda: work() or 0.125), n_rounds=2).of("a") == [0.125, 0.125]


def test_noise_is_the_median_distance_from_the_median():
    world = World()
    rounds = world.interleave(world.side("a", [9, 8, 10, 12, 10, 11], [0]), n_rounds=5)
    assert rounds.of("a") == [8, 10, 12, 10, 11]
    assert rounds.noise("a") == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("others", "n_threads", "n_cpus", "lost"),
    [
        (0.2, 2, 2, 0.1),
        (0.2, 1, 2, 0.0),
        (1.5, 1, 2, 0.5),
        (8.0, 4, 16, 0.0),
        (0.0, 2, 2, 0.0),
        (0.1, 8, 1, 0.1),
    ],
)
def test_others_take_from_us_only_what_no_free_cpu_gives_them(others, n_threads, n_cpus, lost):
    before, after = CpuTimes(5.0, 2.0, n_cpus), CpuTimes(5.0 + others + 1.0, 3.0, n_cpus)
    assert lost_share(before, after, 1.0, n_threads) == pytest.approx(lost)


def test_where_the_system_tells_nothing_no_round_is_left_out():
    assert lost_share(None, None, 1.0, 2) is None
    rounds = interleave(
        [Side("a", lambda: 1.0)], n_rounds=2, max_seconds=9, n_threads=1, cpu_times=lambda: None
    )
    assert (rounds.n_dropped, rounds.all_disturbed, rounds.lost) == (0, False, [None, None])


# ---- the tasks -----------------------------------------------------------------------------------


def test_train_beside_hf_and_nanogpt(timed, nanogpt, tmp_path):
    plot = tmp_path / "speed"
    ours, hf, other = timed(
        "train", "--shape", "s1", *tiny_shape(), "--against", f"hf,nanogpt={nanogpt}", "--plot", str(plot)
    )
    assert [row["side"] for row in (ours, hf, other)] == ["ours", "hf", "nanogpt"]
    assert ours["n_params"] == hf["n_params"] != other["n_params"]
    assert ours["flops_per_unit"] == hf["flops_per_unit"]
    assert ours["ours_as_fast"] is None
    assert hf["ours_as_fast"] > 0
    assert ours["units_per_second"] * ours["ms"] / 1000 == pytest.approx(2 * 32)  # tokens of a step
    assert "number of parameters" not in timed.out
    assert "decode" not in plot.with_suffix(".svg").read_text()
    assert plot.with_suffix(".png").stat().st_size > 1000


def test_decode_and_prefill_beside_hf_and_nanogpt(timed, nanogpt, tiny_run):
    ckpt = str(tiny_run.folder / "final.ckpt")
    for task, unit_ms in (("decode", 1), ("prefill", 32)):
        ours, hf, _ = timed(task, "--ckpt", ckpt, "--against", f"hf,nanogpt={nanogpt}")
        assert ours["n_params"] == hf["n_params"]
        assert ours["bytes_per_unit"] == hf["bytes_per_unit"]
        assert ours["units_per_second"] * ours["ms"] / 1000 == pytest.approx(unit_ms)
        assert ours["subject"] == ckpt


def test_int8_is_timed_beside_our_exact_weights(timed):
    int8, exact = timed("decode", "--shape", "s1", "--quantize", "int8")
    assert (int8["note"], exact["side"]) == ("int8", "ours, exact")
    assert int8["n_params"] == exact["n_params"]
    assert int8["bytes_per_unit"] < exact["bytes_per_unit"] / 3


def test_tokens_are_compared_and_counted(timed):
    ours, tokenizers, tiktoken = timed("tokens", "--against", "tokenizers,tiktoken")
    assert (tokenizers["note"], tiktoken["note"]) == ("the same ids", "the same ids")
    assert ours["units_per_second"] > 0
    _, tiktoken = timed(
        "tokens",
        "--config",
        "config_smoke.yaml",
        "--override",
        "tokenizer.kind=gpt2",
        "--against",
        "tiktoken",
    )
    assert tiktoken["note"] == "the same ids"


def test_batches_and_load(timed, tiny_run):
    ours, get_batch = timed("batches", "--shape", "s1", "--override", "training.micro_batch_size=3")
    assert ours["units_per_second"] * ours["ms"] / 1000 == pytest.approx(3 * 128)
    assert get_batch["ours_as_fast"] > 0
    ckpt = str(tiny_run.folder / "final.ckpt")
    ours, its_bytes = timed("load", "--ckpt", ckpt)
    assert its_bytes["ours_longer_ms"] == pytest.approx(ours["ms"] - its_bytes["ms"], rel=0.5)


def test_start_runs_infer_py_and_a_bare_import(timed, tiny_run, monkeypatch):
    """Each process is started once here, since it takes seconds."""
    started = []

    def once(words: list[str]) -> None:
        if words not in started:
            started.append(words)
            run_python(words)

    monkeypatch.setattr("support.benchmark.start_speed.run_python", once)
    ours, bare = timed("start", "--ckpt", str(tiny_run.folder / "final.ckpt"))
    assert (ours["side"], bare["side"]) == ("ours", "import torch")
    assert [words[0] for words in started] == ["infer.py", "-c"]


def test_a_process_that_fails_is_an_error_with_its_last_words():
    with pytest.raises(UserError, match=r"infer\.py failed: .*none\.ckpt does not exist"):
        run_python(["infer.py", "--ckpt", "none.ckpt", "--prompt", "e"])


def test_overhead_is_that_of_train_py_over_a_bare_loop(timed, monkeypatch):
    monkeypatch.setattr("support.benchmark.overhead.FIRST_TIMED", 1)
    monkeypatch.setattr("support.benchmark.overhead.N_STEPS", 4)
    monkeypatch.setattr("support.run.show.draw_loss", lambda folder: None)
    tiny = [word for word in tiny_argv(Path("unused"))[4:] if "checkpoint.dir" not in word]
    tiny = [word for word in tiny if word != "--override"]
    settings = [part for word in tiny for part in ("--override", word)]
    ours, bare = timed("overhead", "--config", "config_smoke.yaml", *settings)
    assert (ours["side"], bare["side"]) == ("train.py", "bare loop")
    assert bare["ours_longer_ms"] < ours["ms"]
    assert not Path("unused").exists()


def test_all_is_every_task(timed, monkeypatch):
    done = []

    def prepare(args, folder):
        done.append(len(done))
        return benchmark.Contest("x", "y", "z", "w"), [lambda: Side("ours", lambda: 0.01)]

    monkeypatch.setattr(benchmark, "PREPARE", dict.fromkeys(benchmark.PREPARE, prepare))
    assert len(timed()) == len(done) == len(set(benchmark.TASKS) - {"all", "loss"})


# ---- the real code -------------------------------------------------------------------------------


def args_of(*words: str):
    return benchmark.parse_args([*words, "--device", "cpu"])


def test_the_step_that_is_timed_gives_the_weights_of_train_py(run, tmp_path):
    """Three steps, from the same seed on the same batches: the same weights, bit for bit."""
    words = ("training.max_steps=3", "training.schedule_steps=3", "training.schedule=constant")
    words += ("training.warmup_steps=0",)
    trained = run(tmp_path / "run", *words).checkpoint()["state_dict"]
    args = args_of("train", "--config", "config_smoke.yaml")
    args.override = [word for word in tiny_argv(tmp_path, *words)[4:] if word != "--override"]
    subject = read_subject(args, "s1")
    net = subject.new_model().train()
    step = our_step(net, subject.steps(3), subject)
    for _ in range(3):
        step()
    for name, weight in net.state_dict().items():
        assert torch.equal(trained[f"net.{name}"], weight), name


@pytest.mark.parametrize("shape", SHAPES)
def test_a_named_shape_has_its_vocabulary_and_its_step(shape):
    vocab_size, micro_batch_size, sizes = SHAPES[shape]
    subject = subject_of_shape(shape, ["hardware.accelerator=cpu"])
    assert subject.model_config.vocab_size == vocab_size
    assert subject.tokens_per_step == micro_batch_size * sizes["max_seq_len"]
    assert shape in benchmark.SHAPES
    with torch.device("meta"):
        net = GPTMini(subject.model_config)
    if shape == "gpt2":
        assert 123e6 < net.n_params() < 125e6
    forward = forward_flops(net, subject, subject.config.seq_len)
    assert 3 * forward == net.flops_per_token(subject.config.seq_len)


@pytest.mark.parametrize("tied", [True, False])
def test_a_token_reads_each_weight_once_and_one_row_of_a_separate_table(tied):
    subject = subject_of_shape(
        "s1", [f"model.tie_embeddings={str(tied).lower()}", "hardware.accelerator=cpu"]
    )
    net = subject.new_model()
    table = net.embed_tokens.weight.numel()
    assert bytes_per_token(net) == 4 * (net.n_params() - (0 if tied else table))


def test_limits_grow_with_nothing_but_the_machine(monkeypatch):
    monkeypatch.setattr("support.benchmark.machine.READ_BYTES", 2**20)
    monkeypatch.setattr("support.benchmark.machine.MATMUL_SIZES", {"cpu": (64, 128)})
    machine = measure_machine("cpu", seconds=0.01)
    text = "\n".join(machine.describe())
    assert "GFLOP/s in float32" in text and "GB/s" in text and "1 MB" in text


# ---- opponents -----------------------------------------------------------------------------------


def test_nanogpt_gets_the_vocabulary_to_which_it_pads_that_of_gpt2(nanogpt):
    subject = subject_of_shape("s3", ["hardware.accelerator=cpu", "model.d_model=16"])
    net = opponents.MODELS["nanogpt"](subject, nanogpt).build(subject.model_config)
    assert net.head.weight.shape == (50304, 16)


@pytest.mark.parametrize("name", ["litgpt", "llamacpp"])
def test_optional_opponents_do_what_they_can(timed, name):
    module, _ = opponents.NEEDS[name]
    pytest.importorskip(module, reason="an optional opponent of benchmark.py is not installed")
    shape = ["--shape", "m1", "--override", "model.n_layers=1", "--override", "model.max_seq_len=32"]
    tasks = [task for task in ("train", "prefill", "decode") if name in opponents.OPPONENTS_OF[task]]
    for task in tasks:
        ours, theirs = timed(task, *shape, "--against", name)
        assert ours["n_params"] == theirs["n_params"]
        assert ours["flops_per_unit"] == theirs["flops_per_unit"]


def test_every_opponent_can_do_its_tasks():
    for task in ("train", "prefill", "decode"):
        for name in opponents.OPPONENTS_OF[task]:
            assert hasattr(opponents.MODELS[name], task)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            "train --against gpt5",
            "--against gpt5: there is no such opponent for train; choose among hf, litgpt",
        ),
        ("train --against gptfast=x", "--against gptfast: there is no such opponent for train"),
        ("train --against nanogpt", "--against nanogpt needs the folder of a checkout: git clone"),
        ("train --against nanogpt=configs", "--against nanogpt=configs: there is no model.py"),
        ("train --against hf=x", "--against hf=x: hf is a package and takes no path"),
        (
            "tokens --config config_smoke.yaml --override tokenizer.kind=char --against tiktoken",
            "--against tiktoken: it cannot hold a vocabulary of kind char",
        ),
        ("decode --ckpt none.ckpt", "checkpoint none.ckpt does not exist"),
        ("load --ckpt none.ckpt", "checkpoint none.ckpt does not exist"),
        ("train --ckpt a.ckpt", "--ckpt goes with prefill, decode, tokens, load, start"),
        ("--against hf", "--against goes with train, prefill, decode, tokens, loss; name one"),
        ("decode --config a --ckpt b", "--config and --ckpt both say what to time"),
        ("train --rounds 0", "--rounds 0 must be above 0"),
        ("train --quantize int8", "--quantize goes with decode"),
        ("decode --quantize int8 --compile", "--quantize and --compile do not go together"),
        ("train --threads -1", "--threads -1 must be above 0"),
        ("train --config none.yaml", "none.yaml"),
        ("train --config config_finetune.yaml --override base_ckpt=null", "is for fine-tuning"),
        ("train --optimizer adam", "training.optimizer='adam'"),
        ("decode --override model.max_seq_len=16", "m1 sees only 16 tokens"),
        ("load --shape s2", "no byte-pair tokenizer has the 65 tokens of shape s2"),
    ],
)
def test_a_mistake_is_answered_before_anything_is_measured(argv, message, monkeypatch):
    monkeypatch.setattr(benchmark, "measure_machine", None)
    with pytest.raises(UserError, match=re.escape(message)):
        benchmark.main([*argv.split(), "--device", "cpu"])


def test_a_missing_package_is_named_with_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="litgpt needs a package that is not installed; pip install litgpt"):
        parse_against("litgpt", "train")


def test_as_a_process_a_mistake_ends_with_status_2_and_one_line():
    command = [sys.executable, "benchmark.py", "train", "--against", "nobody"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n"), done.stdout) == (2, 1, "")


# ---- a race to a loss ----------------------------------------------------------------------------


def test_a_race_trains_both_sides_on_one_text(nanogpt, tmp_path, capsys, monkeypatch):
    """Ours ends with the weights of train.py, and each half of the validation text is scored."""
    monkeypatch.setattr(race, "STEPS", 80)
    argv = tiny_argv(tmp_path / "run", "tokenizer.kind=byte", "data.val_fraction=0.2")
    assert (
        benchmark.main(["loss", *argv, "--against", f"nanogpt={nanogpt}", "--json", str(tmp_path / "r")]) == 0
    )
    ours, theirs = json.loads((tmp_path / "r").read_text())["results"]
    assert (theirs["steps"], theirs["tokens"] % (80 * 12)) == (80, 0)
    assert 0 < ours["val_loss_first_half"] < 7 and 0 < theirs["val_loss_second_half"] < 7
    assert "of the training time" in capsys.readouterr().out
    train.main(argv)
    [*_, last] = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    between = sorted([ours["val_loss_first_half"], ours["val_loss_second_half"]])
    assert between[0] - 1e-3 <= last["val_loss"] <= between[1] + 1e-3


def test_the_opponents_rate_is_its_schedule():
    """Warmup to the peak in 100 steps, then half a cosine down to a tenth, as in nanoGPT's train.py."""
    rates = [race.nanogpt_rate(step, 1e-3) for step in (0, 99, 100, 1050, 2000)]
    assert rates == pytest.approx([1e-3 / 101, 1e-3 * 100 / 101, 1e-3, 5.5e-4, 1e-4])


@pytest.mark.parametrize(
    "argv, message",
    [
        (["loss", "--against", "nanogpt={}"], "name a config"),
        (["loss", "--config", "config_smoke.yaml"], "loss needs one opponent"),
        (["train", "--opponent-lr", "1e-3"], "--opponent-lr goes with loss"),
    ],
)
def test_what_cannot_be_raced_is_said(argv, message, nanogpt):
    with pytest.raises(UserError, match=message):
        benchmark.main([word.format(nanogpt) for word in argv])
