"""What convert.py reads and writes: the weights, logits and texts of transformers, and errors of one line."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from converting import GPT2, HOSTILE, SHAPES, call, random_model, same_weights, save_checkpoint
from safetensors.torch import load_file, save_file

import convert
import eval_val
from model import GPTMini
from sampling import SamplingConfig
from support.checkpoint import load_model, read_checkpoint, write_model
from support.exchange.hf_names import config_json, to_theirs
from support.exchange.tokenizer_json import tokenizer_json
from support.messages import UserError
from tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, FileTokenizer, GPT2Tokenizer

SHAPE = pytest.mark.parametrize("switches", SHAPES.values(), ids=SHAPES)


@pytest.fixture
def saved(tmp_path) -> Callable[..., Path]:
    """saved(name, model, tokenizer): the path of a checkpoint without a run."""
    return functools.partial(save_checkpoint, tmp_path)


# ---- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [True, False], ids=["another", "a copy of the embedding"])
def test_a_head_that_differs_from_a_tied_embedding_is_kept(saved, tmp_path, own):
    """As in transformers 5, with which conversions are compared; older programs drop such a head silently."""
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


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8"])
def test_a_quantized_folder_is_refused_with_its_method_and_plain_weights_are_read(saved, tmp_path, method):
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


# ---- what is refused -----------------------------------------------------------------------------


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


# ---- what can be done with it --------------------------------------------------------------------


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
