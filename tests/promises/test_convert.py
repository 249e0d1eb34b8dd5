"""Weights in, weights out: what convert.py reads and writes is compared with transformers and llama.cpp,
text and logits."""

import contextlib
import importlib.util
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import REPO, Run
from loopback_hub import LoopbackHub
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

import convert
import eval_val
import finetune
import infer
from data import StepShape, StreamingPackedLMDataset, tokenize
from model import GPTConfig, GPTMini
from sampling import SamplingConfig
from support.checkpoint import KEY, load_model, read_checkpoint, write_model
from support.exchange.gguf_file import WORD_PATTERNS
from support.exchange.hf_names import config_json, family_of, model_fields, to_ours, to_theirs
from support.exchange.tokenizer_json import gpt2_merges, tokenizer_json
from support.messages import UserError
from support.text.chat_template import TEMPLATES, conversation_ids
from tokenizer import EOS_TEXT, BPETokenizer, ByteTokenizer, CharTokenizer, FileTokenizer, GPT2Tokenizer

HOSTILE = [
    "hello  world\n\tx 1234 na\u00efve \u6771\u4eac \U0001f389 don't",
    " leading, trailing ",
    "\u200d\ufeff\u0301 combining",
    "a" * 300,
    " " * 40 + "\n\n\n",
    "I'll we've they'd 12345678901234567890",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd \U0001f468\u200d\U0001f469\u200d\U0001f467",
]
SIZES = {
    "vocab_size": 257,
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_ff": 64,
    "max_seq_len": 80,
}
GPT2 = {"norm": "layernorm", "mlp": "gelu", "position": "learned", "bias": True, "n_kv_heads": 4}
SHAPES = {
    "llama": {},
    "llama, untied": {"tie_embeddings": False, "rope_theta": 500.0, "norm_eps": 1e-3},
    "llama, biases, wide heads": {"bias": True, "head_dim": 12},
    "qwen3": {"qk_norm": True},
    "qwen3, untied, wide heads": {"qk_norm": True, "tie_embeddings": False, "head_dim": 20, "norm_eps": 1e-6},
    "gpt2": GPT2,
    "gpt2, untied": GPT2 | {"tie_embeddings": False},
}
SHAPE = pytest.mark.parametrize("switches", SHAPES.values(), ids=SHAPES)


def random_model(seed: int = 3, **switches) -> GPTMini:
    """Weights large enough that logits differ, norms and biases not at their first values."""
    torch.manual_seed(seed)
    model = GPTMini(GPTConfig(**(SIZES | switches)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() == 2 else 0.3))
    return model.eval()


def call(*argv: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert convert.main([str(word) for word in argv]) == 0
    return out.getvalue()


@pytest.fixture
def saved(tmp_path) -> Callable[..., Path]:
    """saved(name, model, tokenizer): a checkpoint without a run."""

    def save(name: str, model: GPTMini, tokenizer=None) -> Path:
        write_model(tmp_path / f"{name}.ckpt", model, tokenizer or ByteTokenizer(), {})
        return tmp_path / f"{name}.ckpt"

    return save


def same_weights(one: GPTMini, other: GPTMini) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [True, False], ids=["another", "a copy of the embedding"])
def test_a_head_that_differs_from_a_tied_embedding_is_kept(saved, tmp_path, own):
    """As transformers 5 does, with which conversions are compared; older programs drop such a head silently."""
    call("--ckpt", saved("ours", random_model()), "--to", "hf", "--output", tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    weights = load_file(file)
    embedding = weights["model.embed_tokens.weight"]
    head = torch.randn_like(embedding) if own else embedding.clone()
    save_file({**weights, "lm_head.weight": head}, file, metadata={"format": "pt"})
    said = call("--from", tmp_path / "hf", "--output", tmp_path / "back.ckpt")
    assert ("which is kept" in said) == own
    model = load_model(tmp_path / "back.ckpt")[0]
    assert model.config.tie_embeddings != own
    assert torch.equal(model.lm_head.weight, head)


def test_a_missing_head_is_named_with_a_way_to_fix_it(saved, tmp_path):
    call(
        "--ckpt", saved("ours", random_model(tie_embeddings=False)), "--to", "hf", "--output", tmp_path / "hf"
    )
    file, settings = tmp_path / "hf" / "model.safetensors", tmp_path / "hf" / "config.json"
    weights = load_file(file)
    del weights["lm_head.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(
        UserError,
        match=r"lm_head.weight: expected .*, provided none; if its head .* write tie_word_embeddings: true",
    ):
        convert.main(["--from", str(tmp_path / "hf"), "--output", str(tmp_path / "back.ckpt")])
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tie_word_embeddings": True}))
    assert "verified" in call("--from", tmp_path / "hf", "--output", tmp_path / "back.ckpt")


@SHAPE
def test_a_model_goes_to_hugging_face_and_comes_back_with_the_same_bits(saved, tmp_path, switches):
    import transformers

    model = random_model(**switches)
    said = call("--ckpt", saved("ours", model), "--to", "hf", "--output", tmp_path / "hf")
    assert "verified: largest difference" in said
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ids = torch.randint(257, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
    assert expected.std() > 0.3, "logits near zero would agree by chance"
    torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-4)
    text = theirs.generate(
        ids[:1, :5],
        attention_mask=torch.ones(1, 5),
        max_new_tokens=64,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert model.generate(ids[:1, :5], 64, SamplingConfig(temperature=0)).tolist() == text.tolist()

    said = call("--from", tmp_path / "hf", "--output", tmp_path / "back.ckpt")
    assert "verified: largest difference" in said and "greedily, it writes: 'Once upon a time" in said
    back, tokenizer, _ = load_model(tmp_path / "back.ckpt")
    assert same_weights(back, model)
    assert back.config == model.config
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.eos_id) == ("file", 257, 256)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "mistral"])
@pytest.mark.parametrize("sharded", [False, True])
def test_what_transformers_saves_is_read(tmp_path, kind, sharded):
    """Random models made by transformers, also in several files, and with more rows than the tokenizer has
    tokens."""
    import transformers

    llama = {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    llama |= {
        "intermediate_size": 48,
        "max_position_embeddings": 90,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    made = {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama)),
        "mistral": lambda: transformers.MistralForCausalLM(
            transformers.MistralConfig(**llama, sliding_window=70)
        ),
        "qwen3": lambda: transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(**llama, head_dim=12, tie_word_embeddings=True)
        ),
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=300,
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=90,
                bos_token_id=None,
                eos_token_id=None,
            )
        ),
    }
    torch.manual_seed(0)
    theirs = made[kind]().eval()
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="20KB" if sharded else "1GB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2 if sharded else 1
    (tmp_path / "hf" / "tokenizer.json").write_text(tokenizer_json(ByteTokenizer()))
    said = call("--from", tmp_path / "hf", "--output", tmp_path / "ours.ckpt")
    assert "verified" in said and "vocabulary: 257 of 300 rows" in said
    model, _, _ = load_model(tmp_path / "ours.ckpt")
    assert model.config.max_seq_len == (70 if kind == "mistral" else 90)
    ids = torch.randint(257, (2, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(input_ids=ids).logits[..., :257], rtol=1e-4, atol=1e-4)


def test_a_pytorch_bin_is_read_safely(tmp_path):
    model = random_model()
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_json(model.config, 256)))
    (folder / "tokenizer.json").write_text(tokenizer_json(ByteTokenizer()))
    torch.save(to_theirs(model.config, model.state_dict()), folder / "pytorch_model.bin")
    call("--from", folder, "--output", tmp_path / "ours.ckpt")
    assert same_weights(load_model(tmp_path / "ours.ckpt")[0], model)
    torch.save({"model.norm.weight": print}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="would run code when opened"):
        call("--from", folder, "--output", tmp_path / "evil.ckpt")


def test_a_pytorch_bin_from_before_1_6_is_read_safely(tmp_path):
    """Several pickles, then the numbers, without a zip archive around them."""
    model = random_model(**GPT2)
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_json(model.config, 256)))
    (folder / "tokenizer.json").write_text(tokenizer_json(ByteTokenizer()))
    torch.save(
        to_theirs(model.config, model.state_dict()),
        folder / "pytorch_model.bin",
        _use_new_zipfile_serialization=False,
    )
    assert (folder / "pytorch_model.bin").read_bytes()[:2] != b"PK"
    assert "verified: largest difference" in call("--from", folder, "--output", tmp_path / "ours.ckpt")
    assert same_weights(load_model(tmp_path / "ours.ckpt")[0], model)
    whole = (folder / "pytorch_model.bin").read_bytes()
    for size in (len(whole) // 2, 400, 20):
        (folder / "pytorch_model.bin").write_bytes(whole[:size])
        with pytest.raises(UserError, match="truncated or damaged"):
            call("--from", folder, "--output", tmp_path / "new.ckpt")
    torch.save(
        {"model.norm.weight": print}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False
    )
    with pytest.raises(UserError, match="would run code when opened"):
        call("--from", folder, "--output", tmp_path / "evil.ckpt")


def in_bfloat16(folder: Path) -> None:
    """Change the folder to weights in bfloat16."""
    weights = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_a_model_trained_in_bfloat16_goes_out_and_comes_back(saved, tmp_path, kind):
    """Both sides compute in float32, which holds bfloat16 weights exactly; each file names the type of its
    weights."""
    import transformers

    path = saved("ours", random_model(**SHAPES[kind]).bfloat16())
    assert "verified: largest difference" in call("--ckpt", path, "--to", "hf", "--output", tmp_path / "hf")
    config, weights = (
        json.loads((tmp_path / "hf" / "config.json").read_text()),
        load_file(tmp_path / "hf" / "model.safetensors"),
    )
    assert (
        {str(tensor.dtype) for tensor in weights.values()}
        == {f"torch.{config['dtype']}"}
        == {"torch.bfloat16"}
    )
    assert transformers.AutoConfig.from_pretrained(tmp_path / "hf").dtype == torch.bfloat16
    call("--ckpt", path, "--to", "weights", "--output", tmp_path / "small.ckpt")
    assert same_weights(load_model(tmp_path / "small.ckpt")[0], load_model(path)[0])

    assert "verified: largest difference" in call(
        "--from", tmp_path / "hf", "--output", tmp_path / "back.ckpt"
    )
    back = load_model(tmp_path / "back.ckpt")[0]
    assert same_weights(back, load_model(path)[0].float())
    call("--ckpt", tmp_path / "back.ckpt", "--to", "hf", "--output", tmp_path / "hf32")
    config, weights = (
        json.loads((tmp_path / "hf32" / "config.json").read_text()),
        load_file(tmp_path / "hf32" / "model.safetensors"),
    )
    assert (
        {str(tensor.dtype) for tensor in weights.values()}
        == {f"torch.{config['dtype']}"}
        == {"torch.float32"}
    )


@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
def test_a_model_trained_in_bfloat16_becomes_gguf(saved, tmp_path, trained_bpe, dtype):
    pytest.importorskip("gguf", reason="gguf is not installed")
    path = saved("ours", random_model(vocab_size=trained_bpe.vocab_size).bfloat16(), trained_bpe)
    assert call("--ckpt", path, "--to", "gguf", "--dtype", dtype, "--output", tmp_path / "m.gguf").startswith(
        "verified: largest difference"
    )


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8"])
def test_a_quantized_folder_is_refused_with_its_method_and_plain_weights_are_read(
    saved, tmp_path, method
):
    call("--ckpt", saved("ours", random_model()), "--to", "hf", "--output", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": method, "bits": 4}})
    )
    said = call("--from", tmp_path / "hf", "--output", tmp_path / "plain.ckpt")
    assert (
        f"config.json says {method}, but they are plain floats" in said
        and "verified: largest difference" in said
    )
    assert same_weights(load_model(tmp_path / "plain.ckpt")[0], random_model())

    weights = load_file(tmp_path / "hf" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    packed = {
        "gptq": weights | {name.replace("weight", "qweight"): torch.zeros(4, 32, dtype=torch.int32)},
        "awq": {key: tensor for key, tensor in weights.items() if key != name}
        | {name.replace("weight", "qweight"): torch.zeros(4, 4)},
        "bitsandbytes": weights | {name: weights[name].to(torch.int8)},
        "fp8": weights | {name: weights[name].to(torch.float8_e4m3fn)},
    }[method]
    save_file(packed, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError,
        match=rf"is quantized \({method}, by its config.json\); .*: take the model it was made from",
    ):
        call("--from", tmp_path / "hf", "--output", tmp_path / "packed.ckpt")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"packed numbers|do not fit its config.json"):
        call("--from", tmp_path / "hf", "--output", tmp_path / "packed.ckpt")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"num_hidden_layers": 10**9}, "n_layers=1000000000, but its weights allow"),
        ({"num_hidden_layers": "two"}, "a value of the wrong type"),
        ({"num_attention_heads": 0, "head_dim": None}, "a value of the wrong type"),
        ({"hidden_size": None}, "a value of the wrong type"),
        ({"rope_parameters": [1]}, "a value of the wrong type"),
        ({"rms_norm_eps": "small"}, "a value of the wrong type"),
        ({"max_position_embeddings": "long"}, "a value of the wrong type"),
        ({"model_type": ["llama"]}, "cannot be read"),
        ({"vocab_size": "257"}, "do not belong together"),
    ],
)
def test_a_config_json_with_wrong_values_is_an_error_of_one_line(saved, tmp_path, changed, said):
    call("--ckpt", saved("ours", random_model()), "--to", "hf", "--output", tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(UserError, match=said) as caught:
        call("--from", tmp_path / "hf", "--output", tmp_path / "new.ckpt")
    assert len(str(caught.value).splitlines()) == 1


def test_bf16_weights_become_float32_and_a_shorter_context_can_be_asked_for(tmp_path):
    model = random_model(**GPT2)
    call_folder = tmp_path / "hf"
    call("--ckpt", _write(tmp_path, model), "--to", "hf", "--output", call_folder)
    in_bfloat16(call_folder)
    said = call("--from", call_folder, "--output", tmp_path / "short.ckpt", "--max-seq-len", "50")
    short = load_model(tmp_path / "short.ckpt")[0]
    assert "context: 50 of its 80 tokens" in said and short.config.max_seq_len == 50
    assert torch.equal(short.embed_positions.weight, model.embed_positions.weight[:50].bfloat16().float())
    with pytest.raises(UserError, match="--max-seq-len 81 is more than the 80"):
        call("--from", call_folder, "--output", tmp_path / "long.ckpt", "--max-seq-len", "81")


def _write(folder: Path, model: GPTMini) -> Path:
    write_model(folder / "plain.ckpt", model, ByteTokenizer(), {})
    return folder / "plain.ckpt"


# ---- names and shapes ----------------------------------------------------------------------------


@SHAPE
def test_names_there_and_back_are_inverse(switches):
    model = random_model(**switches)
    theirs = to_theirs(model.config, model.state_dict())
    back = {}
    for name, tensor in theirs.items():
        back |= to_ours(family_of(model.config), name, tensor)
    expected = {
        name: t
        for name, t in model.state_dict().items()
        if not (model.config.tie_embeddings and name == "lm_head.weight")
    }
    assert back.keys() == expected.keys() and all(
        torch.equal(back[name], tensor) for name, tensor in expected.items()
    )
    fields = model_fields(config_json(model.config, 256))
    assert GPTConfig(**fields, vocab_size=257) == model.config


def test_the_fused_matrix_of_gpt2_is_cut_as_in_its_own_code():
    """x W + b with W (D, 3 D): the first D columns are q, the next k, the last v."""
    W, b, x = torch.arange(48.0).view(4, 12), torch.arange(12.0), torch.randn(5, 4)
    q, k, v = (x @ W + b).split(4, dim=-1)
    parts = to_ours("gpt2", "transformer.h.3.attn.c_attn.weight", W) | to_ours(
        "gpt2", "h.3.attn.c_attn.bias", b
    )
    for letter, expected in zip("qkv", (q, k, v), strict=True):
        name = f"layers.3.self_attn.{letter}_proj"
        torch.testing.assert_close(
            torch.nn.functional.linear(x, parts[f"{name}.weight"], parts[f"{name}.bias"]), expected
        )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model_type": "qwen2"}, "q, k and v have biases"),
        ({"model_type": "bert"}, "'bert' cannot be read"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type='llama3'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, "rope_type='linear'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias and mlp_bias differ"),
        ({"num_attention_heads": 5}, "describes no model"),
        (
            {"intermediate_size": 60},
            r"layers.\*.mlp.gate_proj.weight: expected \(60, 32\), provided \(64, 32\) \(2 times\); "
            r".*up_.*; .*down_",
        ),
        (
            {"num_hidden_layers": 3},
            r"layers.2.input_layernorm.weight: expected \(32,\), provided none; .*layers.2.mlp.down_proj",
        ),
        ({"num_hidden_layers": 1}, r"layers.1.input_layernorm.weight: expected none, provided \(32,\); "),
        ({"vocab_size": 200}, "its embedding has 200 rows, and its tokenizer 257"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_written(saved, tmp_path, changed, said):
    call("--ckpt", saved("ours", random_model()), "--to", "hf", "--output", tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(UserError, match=said):
        call("--from", tmp_path / "hf", "--output", tmp_path / "new.ckpt")
    assert not (tmp_path / "new.ckpt").exists()


def test_missing_and_damaged_files_are_errors_of_one_line(saved, tmp_path):
    call("--ckpt", saved("ours", random_model()), "--to", "hf", "--output", tmp_path / "hf")
    missing = {
        "tokenizer.json": "has no tokenizer.json",
        "model.safetensors": "holds no weights",
        "config.json": "weights without their config",
    }
    for name, said in missing.items():
        (tmp_path / "hf" / name).rename(tmp_path / "kept")
        with pytest.raises(UserError, match=said):
            call("--from", tmp_path / "hf", "--output", tmp_path / "new.ckpt")
        (tmp_path / "kept").rename(tmp_path / "hf" / name)
    whole = (tmp_path / "hf" / "model.safetensors").read_bytes()
    (tmp_path / "hf" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="truncated or damaged"):
        call("--from", tmp_path / "hf", "--output", tmp_path / "new.ckpt")
    (tmp_path / "hf" / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        call("--from", tmp_path / "hf", "--output", tmp_path / "new.ckpt")
    with pytest.raises(UserError, match="keeps the Hugging Face hub away"):
        call("--from", "nobody/nothing", "--output", tmp_path / "new.ckpt")
    with pytest.raises(UserError, match=r"cannot be (downloaded|reached)"):
        call("--from", "", "--output", tmp_path / "new.ckpt")
    with pytest.raises(UserError, match="does not exist; give a folder"):
        call("--from", "./nowhere", "--output", tmp_path / "new.ckpt")


def test_a_wrong_conversion_is_noticed_and_leaves_nothing(saved, tmp_path, monkeypatch):
    """With k and v swapped on the way out, the check fails and no folder is left."""
    right = convert.to_theirs

    def swapped(config, weights):
        out = right(config, weights)
        names = [f"model.layers.0.self_attn.{letter}_proj.weight" for letter in "kv"]
        return out | {names[0]: out[names[1]].clone(), names[1]: out[names[0]].clone()}

    monkeypatch.setattr(convert, "to_theirs", swapped)
    with pytest.raises(UserError, match="the conversion is wrong"):
        call("--ckpt", saved("ours", random_model()), "--to", "hf", "--output", tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["ours.ckpt"]


@pytest.mark.parametrize(
    ("switches", "said"),
    [
        ({"embed_scale": True}, "embed_scale"),
        ({"position": "sinusoidal"}, "sinusoidal"),
        ({"norm": "layernorm"}, "neither Llama nor GPT-2"),
        (GPT2 | {"n_kv_heads": 2}, "neither Llama nor GPT-2"),
        ({"qk_norm": True, "bias": True}, "has no counterpart"),
    ],
)
@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_a_switch_that_no_architecture_has_is_refused_before_anything_is_written(
    saved, tmp_path, switches, said, to
):
    pytest.importorskip("gguf", reason="gguf is not installed") if to == "gguf" else None
    path = saved("ours", random_model(**switches), BPETokenizer.train(["some text to train on " * 20], 257))
    with pytest.raises(UserError, match=said):
        call("--ckpt", path, "--to", to, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_an_error_of_one_line_and_leaves_nothing(saved, tmp_path, monkeypatch):
    import safetensors.torch

    def refuse(*_, **__):
        raise safetensors.SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    monkeypatch.setattr(safetensors.torch, "save_file", refuse)
    with pytest.raises(
        UserError, match=r"cannot be written: .*No space left on device.*; make room, or name another"
    ):
        call("--ckpt", saved("ours", random_model()), "--to", "hf", "--output", tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["ours.ckpt"]


def test_what_is_there_is_not_overwritten(saved, tmp_path):
    path = saved("ours", random_model())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    before = path.read_bytes()
    for to in ("hf", "gguf", "weights"):
        with pytest.raises(UserError, match="is there already"):
            call("--ckpt", path, "--to", to, "--output", path)
    with pytest.raises(UserError, match="is there already"):
        call("--ckpt", path, "--to", "hf", "--output", tmp_path / "full")
    with pytest.raises(UserError, match="is there already"):
        call("--from", tmp_path / "full", "--output", path)
    with pytest.raises(UserError, match="is a folder; name a file in it"):
        call("--from", tmp_path / "full", "--output", tmp_path / "full")
    with pytest.raises(UserError, match="is a file; name another"):
        call("--from", tmp_path / "full", "--output", path / "deep" / "x.ckpt")
    assert path.read_bytes() == before
    (tmp_path / "empty").mkdir()
    call("--ckpt", path, "--to", "hf", "--output", tmp_path / "empty")


# ---- tokenizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["byte", "char", "bpe", "gpt2"])
def test_the_exported_tokenizer_is_ours(saved, tmp_path, kind):
    import transformers

    train_on = ["".join(HOSTILE) * 3, "some more text, " * 50]
    made = {"byte": ByteTokenizer, "gpt2": GPT2Tokenizer}
    tokenizer = (
        made[kind]()
        if kind in made
        else {"char": CharTokenizer, "bpe": BPETokenizer}[kind].train(train_on, 400)
    )
    path = saved("ours", random_model(vocab_size=tokenizer.vocab_size), tokenizer)
    call("--ckpt", path, "--to", "hf", "--output", tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in HOSTILE:
        ids = tokenizer.encode(text)
        assert theirs(text).input_ids == ids, text
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == tokenizer.eos_id and len(theirs) <= tokenizer.vocab_size + 1
    again = FileTokenizer.from_file(tmp_path / "hf")
    assert (
        all(again.encode(text) == tokenizer.encode(text) for text in HOSTILE)
        and again.eos_id == tokenizer.eos_id
    )


def with_bos(tokenizer: BPETokenizer) -> FileTokenizer:
    """Its rules put <s> before each text, as those of Llama and Mistral do."""
    backend = Backend.from_str(tokenizer.backend.to_str())
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return FileTokenizer(backend.to_str(), tokenizer.eos_text)


def test_a_tokenizer_with_bos_puts_it_before_every_text(tmp_path, trained_bpe):
    """Prompts, documents in training, whole or streamed in pieces, instructions: the ids of transformers'
    own tokenizer."""
    import transformers

    tokenizer = with_bos(trained_bpe)
    model = random_model(vocab_size=tokenizer.vocab_size)
    write_model(tmp_path / "ours.ckpt", model, tokenizer, {})
    call("--ckpt", tmp_path / "ours.ckpt", "--to", "hf", "--output", tmp_path / "hf")
    call("--from", tmp_path / "hf", "--output", tmp_path / "back.ckpt")
    back = load_model(tmp_path / "back.ckpt")[1]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    bos, text = tokenizer.vocab_size - 1, "attention is"
    assert theirs(text).input_ids == infer.prompt_to_ids(back, text) == [bos, *trained_bpe.encode(text)]
    assert (theirs.bos_token_id, theirs.eos_token_id) == (bos, trained_bpe.eos_id)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["bos_token_id"] == bos
    assert bos not in back.encode("<s>") and trained_bpe.bos_ids == ()

    documents = ["attention is a sum. " * 5000, "x", ""]  # the first is encoded in several pieces
    assert len(list(back.pieces(documents[0]))) > 1
    expected = [id for document in documents for id in [bos, *back.encode(document), back.eos_id]]
    assert tokenize(documents, back).tolist() == expected
    assert conversation_ids(TEMPLATES["chat"], back, [], "How?", 1000)[0] == bos
    with pytest.raises(UserError, match="the prompt is empty"):
        infer.prompt_to_ids(back, "")


class Documents:
    """What StreamingPackedLMDataset reads: documents, with a position."""

    def __init__(self, texts: list[str]):
        self.texts = texts

    def seek(self, position: int | None) -> None:
        self.read = position or 0

    def position(self) -> int:
        return self.read

    def take(self, n: int, n_chars: int) -> list[str]:
        self.read += n
        return self.texts[self.read - n : self.read]


def test_streamed_documents_begin_with_bos(trained_bpe):
    """A stream resumed in the middle of a long document gets no BOS there."""
    tokenizer, documents = with_bos(trained_bpe), ["values", "attention is a sum. " * 5000, "of"]

    def stream(state: str | None = None):
        return iter(
            StreamingPackedLMDataset(
                Documents(documents), tokenizer, 64, 64, StepShape(4, 1), seed=0, shuffle=False, state=state
            )
        )

    expected = tokenize(documents, tokenizer).tolist()
    steps = list(itertools.islice(stream(), len(expected) // 256))
    assert (
        torch.cat([step.micro_batches[0]["input_ids"].flatten() for step in steps]).tolist()
        == expected[: len(steps) * 256]
    )
    n = len(steps) * 3 // 4  # the long document is read in two pieces, and this is in the second
    assert json.loads(steps[n].stream_state)["piece"] == 1
    again = list(itertools.islice(stream(steps[n].stream_state), len(steps) - n - 1))
    assert all(
        torch.equal(one.micro_batches[0]["input_ids"], other.micro_batches[0]["input_ids"])
        for one, other in zip(again, steps[n + 1 :], strict=True)
    )


# ---- gguf ----------------------------------------------------------------------------------------


@pytest.fixture
def trained_bpe() -> BPETokenizer:
    return BPETokenizer.train(["".join(HOSTILE) * 3, "attention is a weighted sum of values. " * 50], 400)


@pytest.mark.parametrize(
    "switches",
    [SHAPES[name] for name in ("llama", "llama, untied", "qwen3", "gpt2")],
    ids=["llama", "untied", "qwen3", "gpt2"],
)
@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
def test_llama_cpp_gives_our_logits_tokens_and_text(saved, tmp_path, trained_bpe, switches, dtype):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    pytest.importorskip("gguf", reason="gguf is not installed")
    model = random_model(vocab_size=trained_bpe.vocab_size, max_seq_len=256, **switches)
    said = call(
        "--ckpt",
        saved("ours", model, trained_bpe),
        "--to",
        "gguf",
        "--dtype",
        dtype,
        "--output",
        tmp_path / "m.gguf",
    )
    assert (
        f"from llama.cpp ({dtype})" in said
        and said.startswith("verified: largest")
        and "texts and all" in said
    )
    llama = llama_cpp.Llama(
        str(tmp_path / "m.gguf"), n_ctx=256, verbose=False, flash_attn=False, type_k=0, type_v=0
    )
    for text in HOSTILE:
        assert llama.tokenize(text.encode(), add_bos=False) == trained_bpe.encode(text), text
    if dtype == "f32":
        prompt, written = trained_bpe.encode("attention is"), []
        for token in llama.generate(prompt, temp=0, top_k=1, repeat_penalty=1.0):
            written.append(token)
            if len(written) == 64:
                break
        ours = model.generate(torch.tensor([prompt]), 64, SamplingConfig(temperature=0))[0].tolist()[
            len(prompt) :
        ]
        assert written == ours
    llama.close()


@pytest.mark.parametrize("kind", ["llama", "llama, untied", "qwen3", "gpt2"])
def test_transformers_reads_the_gguf_and_gives_our_logits_and_tokens(saved, tmp_path, trained_bpe, kind):
    """A second independent reader. It assumes that GPT-2's context and MLP, and the width of Qwen3's heads,
    are those of the published models."""
    import transformers

    pytest.importorskip("gguf", reason="gguf is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    as_published = {"qwen3": {"head_dim": 128}, "gpt2": {"d_ff": 128, "max_seq_len": 1024}}
    model = random_model(vocab_size=trained_bpe.vocab_size, **(SHAPES[kind] | as_published.get(kind, {})))
    call("--ckpt", saved("ours", model, trained_bpe), "--to", "gguf", "--output", tmp_path / "m.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    ).eval()
    ids = torch.randint(trained_bpe.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=ids).logits, model(ids), rtol=1e-4, atol=1e-4)
    if int(transformers.__version__.split(".")[0]) < 5:  # it takes the words of every tokenizer for Llama's
        return
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert [tokenizer(text).input_ids for text in HOSTILE] == [trained_bpe.encode(text) for text in HOSTILE]


def split_like(name: str) -> FileTokenizer:
    """A byte-level BPE that cuts text into words as the published tokenizers of SmolLM, Qwen and Llama 3 do."""
    backend = Backend(models.BPE())
    patterns = {called: pattern for pattern, called in WORD_PATTERNS.items()}
    if name == "smollm":
        steps = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    else:
        steps = [
            pre_tokenizers.Split(Regex(patterns[name]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[EOS_TEXT],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(
        [" ".join(HOSTILE) * 3, "attention is a weighted sum of 1234 values.\n\n DON'T! " * 50], trainer
    )
    return FileTokenizer(backend.to_str(), EOS_TEXT)


@pytest.mark.parametrize("name", ["smollm", "qwen2", "llama-bpe", "with bos"])
def test_llama_cpp_cuts_text_into_words_as_the_published_tokenizers_do(saved, tmp_path, trained_bpe, name):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    pytest.importorskip("gguf", reason="gguf is not installed")
    tokenizer = with_bos(trained_bpe) if name == "with bos" else split_like(name)
    path = saved("ours", random_model(vocab_size=tokenizer.vocab_size, max_seq_len=256), tokenizer)
    assert call("--ckpt", path, "--to", "gguf", "--output", tmp_path / "m.gguf").startswith("verified")
    llama = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=256, vocab_only=True, verbose=False)
    for text in HOSTILE:
        assert llama.tokenize(text.encode(), add_bos=True) == tokenizer.encode_prompt(text), text
    llama.close()


def test_a_wrong_gguf_is_noticed_and_leaves_nothing(saved, tmp_path, trained_bpe, monkeypatch):
    """Rows of q and k in the wrong order, also in q8_0, where the largest difference is allowed."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    pytest.importorskip("gguf", reason="gguf is not installed")
    path = saved("ours", random_model(vocab_size=trained_bpe.vocab_size, max_seq_len=256), trained_bpe)
    monkeypatch.setattr("support.exchange.gguf_file.interleave", lambda rows, n_heads: rows)
    for dtype in ("f32", "f16", "q8_0"):
        with pytest.raises(UserError, match="the conversion is wrong"):
            call("--ckpt", path, "--to", "gguf", "--dtype", dtype, "--output", tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["ours.ckpt"]


def test_gguf_refuses_what_it_cannot_hold(saved, tmp_path, trained_bpe):
    pytest.importorskip("gguf", reason="gguf is not installed")
    for tokenizer in (ByteTokenizer(), CharTokenizer.train(["abc"])):
        path = saved("ours", random_model(vocab_size=tokenizer.vocab_size), tokenizer)
        with pytest.raises(UserError, match=f"kind {tokenizer.kind} does not fit into GGUF"):
            call("--ckpt", path, "--to", "gguf", "--output", tmp_path / "m.gguf")
    path = saved("odd", random_model(vocab_size=trained_bpe.vocab_size, d_ff=40), trained_bpe)
    with pytest.raises(UserError, match="q8_0 keeps 32 numbers to a scale"):
        call("--ckpt", path, "--to", "gguf", "--dtype", "q8_0", "--output", tmp_path / "m.gguf")
    assert not list(tmp_path.glob("m.gguf*"))


# ---- what can be done with it --------------------------------------------------------------------


def test_an_imported_model_is_fine_tuned_like_any_other(saved, tmp_path, monkeypatch):
    call("--ckpt", saved("ours", random_model(max_seq_len=64)), "--to", "hf", "--output", tmp_path / "hf")
    call("--from", tmp_path / "hf", "--output", tmp_path / "base.ckpt")
    monkeypatch.setattr("support.run.show.draw_loss", lambda folder: None)
    overrides = [
        f"base_ckpt={tmp_path / 'base.ckpt'}",
        f"checkpoint.dir={tmp_path / 'sft'}",
        "training.epochs=null",
        "training.max_steps=2",
    ]
    argv = [
        "--config",
        "configs/finetune_tiny.yaml",
        "--device",
        "cpu",
        *(f"--override={o}" for o in [*overrides, "training.warmup_steps=0"]),
    ]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert finetune.main(argv) == 0
    rows = Run(tmp_path / "sft", 0, "", "").val_rows
    assert rows[-1]["val_loss"] < rows[0]["val_loss"]
    call("--ckpt", tmp_path / "sft" / "final.ckpt", "--to", "hf", "--output", tmp_path / "hf2")
    assert "chat_template" in json.loads((tmp_path / "hf2" / "tokenizer_config.json").read_text())
    for folder, said in (("hf", "Once"), ("hf2", "Who are you?")):
        assert said in run_card(tmp_path / folder)
    card = (tmp_path / "hf2" / "README.md").read_text()
    row = rows[-1]
    for said in (
        "trained for 2 steps",
        "data/tiny_instructions.json",
        "base.ckpt",
        f"- val_loss: {row['val_loss']:.4f}",
        "adamw, lr 0.003",
    ):
        assert said in card, card
    assert "trained for" not in (tmp_path / "hf" / "README.md").read_text()


HERE = re.compile(rb"/tmp/|/home/|/root|Users|secret|ada|\\.\\.")


def test_a_card_of_an_import_says_so_and_no_exported_file_names_a_path(
    saved, tmp_path, trained_bpe, monkeypatch
):
    """Of a local folder, only its name is published."""
    home = tmp_path / "home" / "ada" / "secret" / "small-model"
    call(
        "--ckpt",
        saved("ours", random_model(vocab_size=trained_bpe.vocab_size), trained_bpe),
        "--to",
        "hf",
        "--output",
        home,
    )
    monkeypatch.setattr(sys, "argv", ["convert.py", "--from", str(home)])
    monkeypatch.chdir(home.parent)
    for given, name in ((home, "small-model"), (".", "secret"), ("../secret/small-model", "small-model")):
        output = tmp_path / "ada.ckpt"
        source = tmp_path / "home" / "ada" / "secret"
        if given == ".":
            monkeypatch.chdir(home)
            name = "small-model"
        call("--from", given, "--output", output)
        monkeypatch.chdir(source)
        call("--ckpt", output, "--to", "hf", "--output", tmp_path / "out")
        card = (tmp_path / "out" / "README.md").read_text()
        assert (
            f"# {name}\n" in card
            and f"imported from `{name}` with Tiny Transformer; nothing was trained here." in card
        )
        for file in (tmp_path / "out").iterdir():
            if file.name not in ("tokenizer.json", "model.safetensors"):
                assert not HERE.search(file.read_bytes()), file.name
        output.unlink()
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("data/tiny_corpus.txt", "data/tiny_corpus.txt"),
        ("some/dataset", "some/dataset"),
        ("/home/ada/secret/plays.txt", "plays.txt"),
        ("~/secret/plays.txt", "plays.txt"),
        ("../../ada/plays.txt", "plays.txt"),
        ("C:\\Users\\ada\\plays.txt", "plays.txt"),
        ("/home/ada/*.txt", "*.txt"),
    ],
)
def test_a_card_of_a_run_shows_no_path_of_this_machine(tiny_run, tmp_path, path, shown):
    pytest.importorskip("gguf", reason="gguf is not installed")
    checkpoint = tiny_run.checkpoint()
    config = checkpoint[KEY]["config"]
    config["data"]["path"] = config["base_ckpt"] = path
    config["tokenizer"]["path"] = "/home/ada/secret/tokenizer.json"
    config["checkpoint"]["dir"] = "/home/ada/runs/plays"
    torch.save(checkpoint, tmp_path / "run.ckpt")
    call("--ckpt", tmp_path / "run.ckpt", "--to", "hf", "--output", tmp_path / "hf")
    call("--ckpt", tmp_path / "run.ckpt", "--to", "gguf", "--output", tmp_path / "m.gguf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert card.count(f"`{shown}`") == 2 and "# plays\n" in card and "trained with Tiny Transformer." in card
    for name in ("README.md", "config.json", "generation_config.json", "tokenizer_config.json"):
        assert not HERE.search((tmp_path / "hf" / name).read_bytes()), name
    assert (
        b"/home" not in (tmp_path / "m.gguf").read_bytes()
        and b"secret" not in (tmp_path / "m.gguf").read_bytes()
    )


def run_card(folder: Path) -> str:
    """What the example of the model card prints."""
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    out = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out):
        exec(code, {})
    return out.getvalue()


def test_an_imported_model_scores_a_text_without_a_config(saved, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("Attention is a weighted sum of values. " * 20)
    path = saved("ours", random_model())
    assert eval_val.main(["--ckpt", str(path), "--data", str(tmp_path / "a.txt"), "--json"]) == 0
    found, (model, tokenizer, _) = json.loads(capsys.readouterr().out), load_model(path)
    ids = torch.tensor([[*tokenizer.encode((tmp_path / "a.txt").read_text()), tokenizer.eos_id]])
    loss, n = 0.0, ids.shape[1] - 1
    for start in range(0, n, 80):
        piece = ids[:, start : start + 81]
        loss += model(piece[:, :-1], labels=piece[:, 1:])[0].item()
    assert found["loss"] == pytest.approx(loss / n, rel=1e-5) and found["n_tokens"] == n
    with pytest.raises(UserError, match="does not hold the config of its run"):
        eval_val.main(["--ckpt", str(path)])


def test_weights_alone_are_a_third_and_answer_the_same(tiny_run, tmp_path):
    call("--ckpt", tiny_run.folder / "final.ckpt", "--to", "weights", "--output", tmp_path / "small.ckpt")
    small, whole = load_model(tmp_path / "small.ckpt")[0], load_model(tiny_run.folder / "final.ckpt")[0]
    assert same_weights(small, whole) and "optimizer_states" not in read_checkpoint(tmp_path / "small.ckpt")
    assert (tmp_path / "small.ckpt").stat().st_size < 0.6 * (tiny_run.folder / "final.ckpt").stat().st_size


@pytest.mark.parametrize(
    "argv",
    [["--ckpt", "a"], ["--from", "a", "--to", "hf"], ["--ckpt", "a", "--to", "hf", "--dtype", "f16"], []],
)
def test_flags_that_do_not_go_together(argv, capsys):
    with pytest.raises(SystemExit) as end:
        convert.main([*argv, "--output", "b"])
    assert end.value.code == 2 and "Traceback" not in capsys.readouterr().err


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
peak = lambda: [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")][0] * 1024
before = peak()
code = convert.main(sys.argv[1:])
print("beyond", peak() - before)
sys.exit(code)
"""


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
    """In, out again, and as GGUF; the same 64 tokens as transformers writes; in memory for the model and its
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
    done = subprocess.run(
        [sys.executable, "-c", TELLS_ITS_PEAK, *argv], cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 0 and "verified: largest difference" in done.stdout, done.stderr
    model, tokenizer, _ = load_model(tmp_path / "ours.ckpt")
    [beyond] = re.findall(r"beyond (\d+)", done.stdout)
    assert int(beyond) < 4 * model.n_params() + largest + 200e6, (
        f"{int(beyond):,}"
    )  # the rest: the compared logits, the cache

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
