"""convert.py with models of the hub, and with models of their full size."""

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import REPO
from converting import call, random_model, same_weights, save_checkpoint
from loopback_hub import LoopbackHub
from safetensors.torch import load_file
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from sampling import SamplingConfig
from support.checkpoint import load_model
from support.exchange.hf_names import config_json, to_theirs
from support.exchange.tokenizer_json import gpt2_merges, tokenizer_json
from tokenizer import EOS_TEXT, ByteTokenizer


@pytest.fixture
def saved(tmp_path) -> Callable[..., Path]:
    """saved(name, model, tokenizer): the path of a checkpoint without a run."""
    return functools.partial(save_checkpoint, tmp_path)


# ---- the hub -------------------------------------------------------------------------------------


def convert_process(environment: dict[str, str], *argv: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "convert.py", *argv],
        cwd=REPO,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_a_model_of_the_hub_comes_in_and_opens_from_the_cache_later(saved, tmp_path):
    """Through a hub on this machine: the download, names that are missing there, and no hub at all."""
    call("--ckpt", saved("ours", random_model()), "--to", "hf", "--output", tmp_path / "hf")
    files = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    with LoopbackHub("some/model", files | {"onnx/model.onnx": b"not wanted"}, "models") as hub:
        online = hub.environment(tmp_path / "cache")
        done = convert_process(online, "--from", "some/model", "--output", str(tmp_path / "one.ckpt"))
        assert done.returncode == 0 and "verified: largest difference" in done.stdout, done.stderr
        assert "Fetching" in done.stderr and not any("onnx" in request for request in hub.requests)
        assert same_weights(load_model(tmp_path / "one.ckpt")[0], random_model())
        for argv, said in (
            (["some/other"], "no model on the hub has this name"),
            (["some/model", "--revision", "v9"], "has no revision 'v9'"),
        ):
            done = convert_process(online, "--from", *argv, "--output", str(tmp_path / "none.ckpt"))
            assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, (
                done.stderr
            )
    done = convert_process(online, "--from", "some/model", "--output", str(tmp_path / "two.ckpt"))
    assert done.returncode == 0, done.stderr
    assert same_weights(load_model(tmp_path / "two.ckpt")[0], random_model())
    done = convert_process(online, "--from", "gpt2", "--output", str(tmp_path / "none.ckpt"))
    assert done.returncode == 2 and done.stderr.startswith(
        "error: --from gpt2: there is no such folder, the Hugging Face hub cannot be reached"
    )
    assert not (tmp_path / "none.ckpt").exists()


@pytest.mark.slow
def test_older_repositories_have_pytorch_bin(saved, tmp_path):
    model = random_model()
    torch.save(to_theirs(model.config, model.state_dict()), tmp_path / "w.bin")
    files = {
        "config.json": json.dumps(config_json(model.config, 256)).encode(),
        "tokenizer.json": tokenizer_json(ByteTokenizer()).encode(),
    }
    with LoopbackHub(
        "some/model", files | {"pytorch_model.bin": (tmp_path / "w.bin").read_bytes()}, "models"
    ) as hub:
        done = convert_process(
            hub.environment(tmp_path / "cache"),
            "--from",
            "some/model",
            "--output",
            str(tmp_path / "one.ckpt"),
        )
    assert done.returncode == 0, done.stderr
    assert same_weights(load_model(tmp_path / "one.ckpt")[0], model)


# ---- full size -----------------------------------------------------------------------------------

TELLS_ITS_PEAK = """
import sys
import convert, transformers
from transformers import GPT2LMHeadModel, LlamaForCausalLM

def peak():
    lines = open("/proc/self/status").read().splitlines()
    [kilobytes] = [line.split()[1] for line in lines if line.startswith("VmHWM")]
    return int(kilobytes) * 1024

before = peak()
code = convert.main(sys.argv[1:])
print("beyond", peak() - before)
sys.exit(code)
"""


def peak_of_convert(argv: list[str]) -> int:
    """Bytes that a process of convert.py takes at its peak, beyond what its imports take."""
    done = subprocess.run(
        [sys.executable, "-c", TELLS_ITS_PEAK, *argv], cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 0 and "verified: largest difference" in done.stdout, done.stderr
    [beyond] = re.findall(r"beyond (\d+)", done.stdout)
    return int(beyond)


def gpt2_124m():
    import transformers

    return transformers.GPT2LMHeadModel(transformers.GPT2Config())


def smollm2_135m():
    """Its shape as published, in bfloat16, with the heads of a Llama and a long context."""
    import transformers

    sizes = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    sizes |= {
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.04,
    }
    special = {"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": True}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **special)).bfloat16()


@pytest.mark.slow
@pytest.mark.parametrize("make", [gpt2_124m, smollm2_135m])
def test_models_at_their_full_size(tmp_path, make):
    """In, out again, and as GGUF; the same 64 tokens as from transformers; in memory for the model and its
    largest file."""
    import transformers

    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "hf", max_shard_size="100MB")
    largest = max(path.stat().st_size for path in (tmp_path / "hf").glob("*.safetensors"))
    if make is smollm2_135m:
        vocabulary, merges = gpt2_merges()
        kept = {token: id for token, id in vocabulary.items() if id < 49151}
        backend = Backend(
            models.BPE(vocab=kept, merges=[pair for pair in merges if {*pair, "".join(pair)} <= kept.keys()])
        )
        backend.pre_tokenizer, backend.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
        backend.add_special_tokens([EOS_TEXT])
        (tmp_path / "hf" / "tokenizer.json").write_text(backend.to_str())
    argv = ["--from", str(tmp_path / "hf"), "--output", str(tmp_path / "ours.ckpt")]
    beyond = peak_of_convert(argv)
    model, tokenizer, _ = load_model(tmp_path / "ours.ckpt")
    # 250 MB: the compared logits, the cache, and the libraries that are imported late
    most = 4 * model.n_params() + largest + 250e6
    for _ in range(2):  # a busy machine only ever adds to the peak (pages of files, arenas of threads)
        if beyond >= most:
            (tmp_path / "ours.ckpt").unlink()
            beyond = min(beyond, peak_of_convert(argv))
    assert beyond < most, f"{beyond:,}"

    ids = torch.tensor([tokenizer.encode("The history of the city")])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").float().eval()
    text = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=64,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert model.generate(ids, 64, SamplingConfig(temperature=0)).tolist() == text.tolist()
    assert "verified" in call("--ckpt", tmp_path / "ours.ckpt", "--to", "hf", "--output", tmp_path / "out")
    if make is gpt2_124m:
        again = {
            name: tensor
            for file in (tmp_path / "out").glob("*.safetensors")
            for name, tensor in load_file(file).items()
        }
        first = {
            name: tensor
            for file in (tmp_path / "hf").glob("*.safetensors")
            for name, tensor in load_file(file).items()
        }
        assert again.keys() == first.keys() and all(
            torch.equal(again[name], tensor) for name, tensor in first.items()
        )
    if importlib.util.find_spec("gguf"):
        assert "written" in call(
            "--ckpt",
            tmp_path / "ours.ckpt",
            "--to",
            "gguf",
            "--dtype",
            "q8_0",
            "--output",
            tmp_path / "m.gguf",
        )
        assert (tmp_path / "m.gguf").stat().st_size < 1.1 * model.n_params() * 34 / 32 + 5e6
