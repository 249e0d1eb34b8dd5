"""What all tests share: one thread, no network, the repository as working folder, and a small trained run.

`run(folder, "training.max_steps=4", "--resume")` trains a tiny model in this process. `tiny_run` is such a
run, made once for all tests: read from its folder, never write into it.
"""

import contextlib
import io
import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

# Set before torch is imported, here and in every process that a test starts.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
NO_SERVER = "http://127.0.0.1:9"  # nothing listens on the discard port: refused at once
PROXIES = dict.fromkeys(
    ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), NO_SERVER
)
os.environ |= OFFLINE | PROXIES | {"no_proxy": "127.0.0.1,localhost", "NO_PROXY": "127.0.0.1,localhost"}
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "agg",
}

REPO = Path(__file__).resolve().parents[1]
SHARED = REPO.parent / "shared"

TINY_OVERRIDES = (
    f"data.path={REPO / 'data' / 'tiny_corpus.txt'}",
    "data.val_fraction=0.03",
    "tokenizer.vocab_size=400",
    "model.d_model=32",
    "model.n_layers=2",
    "model.n_heads=4",
    "model.n_kv_heads=2",
    "model.max_seq_len=32",
    "training.max_steps=12",
    "training.schedule_steps=12",
    "training.warmup_steps=2",
    "training.micro_batch_size=4",
    "training.grad_accum_steps=2",
    "training.val_every=4",
    "training.log_every=1",
    "checkpoint.save_every=4",
    "checkpoint.keep_last=null",
)
# Columns that differ from run to run.
TIME_COLUMNS = ("tokens_per_sec", "examples_per_sec", "step_ms", "memory_mb", "mfu")


@dataclass
class Run:
    """A run that has ended: its folder, exit status and output."""

    folder: Path
    code: int
    out: str
    err: str

    @property
    def rows(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def train_rows(self) -> list[dict]:
        return [row for row in self.rows if "loss" in row]

    @property
    def val_rows(self) -> list[dict]:
        return [row for row in self.rows if "val_loss" in row]

    @property
    def timeless_rows(self) -> list[dict]:
        return [{key: value for key, value in row.items() if key not in TIME_COLUMNS} for row in self.rows]

    @property
    def sha256(self) -> str:
        return self.out.splitlines()[-1].removeprefix("weights sha256 ")

    def checkpoint(self, name: str = "final") -> dict:
        import torch

        return torch.load(self.folder / f"{name}.ckpt", weights_only=True)


def tiny_argv(folder: Path, *words: str) -> list[str]:
    """The command line of a tiny run. Words that begin with -- are flags (with a value after =), the others
    are overrides."""
    argv = ["--config", str(REPO / "config_smoke.yaml"), "--device", "cpu"]
    overrides = [word for word in words if not word.startswith("--")]
    for override in (*TINY_OVERRIDES, f"checkpoint.dir={folder}", *overrides):
        argv += ["--override", override]
    return argv + [word for word in words if word.startswith("--")]


def train_tiny(folder: Path, *words: str, pictures: bool = False) -> Run:
    """Train in this process and return the run. Raises what `main` raises. Pictures take half the time, so
    they are only drawn on request."""
    import support.run.show
    import train

    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.MonkeyPatch.context() as patch,
    ):
        if not pictures:
            patch.setattr(support.run.show, "draw_loss", lambda folder: None)
        code = train.main(tiny_argv(folder, *words))
    return Run(folder, code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def run() -> Callable[..., Run]:
    return train_tiny


@pytest.fixture(scope="session")
def argv_of() -> Callable[..., list[str]]:
    return tiny_argv


@pytest.fixture(scope="session")
def shared_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """shared_once(name, make): a folder that `make(folder)` has filled, once for all worker processes."""
    from filelock import FileLock

    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def get(name: str, make: Callable[[Path], None]) -> Path:
        folder, done = base / name, base / f"{name}.done"
        with FileLock(base / f"{name}.lock"):
            if not done.exists():
                make(folder)
                done.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def tiny_run(shared_once: Callable[..., Path]) -> Run:
    """A finished run of 12 steps, validated and saved at 4, 8 and 12, with bpe, muon and two micro-batches a
    step."""

    def make(folder: Path) -> None:
        made = train_tiny(folder / "checkpoints", pictures=True)
        (folder / "said.json").write_text(json.dumps([made.code, made.out, made.err]))

    folder = shared_once("tiny-run", make)
    return Run(folder / "checkpoints", *json.loads((folder / "said.json").read_text()))


@pytest.fixture(scope="session")
def instructions(shared_once: Callable[..., Path]) -> Path:
    """A JSON file with 24 questions and answers."""
    from finetuning import rows

    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / "rows.json").write_text(json.dumps(rows(24)))

    return shared_once("instructions", make) / "rows.json"


@pytest.fixture
def sft(instructions: Path, tiny_run: Run) -> Callable[..., Run]:
    """sft(folder, "training.max_steps=4", "--resume"): fine-tune the shared tiny run in this process.
    `sft.argv` takes the same words and returns the command line."""
    from finetuning import SIX_STEPS

    import finetune

    def argv(folder: Path, *words: str) -> list[str]:
        overrides = [
            f"base_ckpt={tiny_run.folder / 'final.ckpt'}",
            f"data.path={instructions}",
            f"checkpoint.dir={folder}",
            *SIX_STEPS,
            *(word for word in words if not word.startswith("--")),
        ]
        flags = [part for word in words if word.startswith("--") for part in word.split("=", 1)]
        return [
            "--config",
            "config_finetune.yaml",
            "--device",
            "cpu",
            *(f"--override={override}" for override in overrides),
            *flags,
        ]

    def run(folder: Path, *words: str) -> Run:
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setattr("support.run.show.draw_loss", lambda folder: None)
            code = finetune.main(argv(folder, *words))
        return Run(folder, code, out.getvalue(), err.getvalue())

    run.argv = argv
    return run


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> None:
    """This process can connect only to the loopback device. Its children are sent to a proxy that does not
    exist."""
    connect = socket.socket.connect
    local_hosts = ("127.0.0.1", "::1", "localhost")

    def local_only(self: socket.socket, address: object) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in local_hosts:
            raise OSError(f"a test tried to reach {address}")
        return connect(self, address)

    socket.socket.connect = local_only
    yield
    socket.socket.connect = connect
