"""Our network against Hugging Face's: small random models, the same weights, the same logits.

The weights move by a map of names; nothing is permuted, because our names and conventions are Llama's.
"""

import pytest
import torch
from torch import Tensor, nn

from model import GPTConfig, GPTMini
from sampling import SamplingConfig

pytestmark = pytest.mark.slow

B, T = 2, 13
TINY = {
    "vocab_size": 61,
    "d_model": 24,
    "n_layers": 3,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_ff": 40,
    "max_seq_len": 32,
}
TINY_HF = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "attn_implementation": "eager",
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def ours(**switches) -> GPTMini:
    """A network with large random weights, norm gains and biases. With the initial ones a swapped or
    forgotten tensor would hardly change the output."""
    net = GPTMini(GPTConfig(**{**TINY, **switches})).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.normal_(std=0.2, generator=generator)
            if "norm" in name and name.endswith("weight"):
                p.add_(1.0)
    return net


def rope(theta: float) -> dict:
    """The config keys of theta: transformers 5 reads `rope_parameters`, 4 the top-level `rope_theta`."""
    return {"rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def llama_weights(net: GPTMini) -> dict[str, Tensor]:
    return {
        name if name.startswith("lm_head.") else f"model.{name}": tensor
        for name, tensor in net.state_dict().items()
    }


def llama(net: GPTMini) -> nn.Module:
    import transformers  # here: `make test` collects this file without running it

    config = transformers.LlamaConfig(
        **TINY_HF,
        **rope(net.config.rope_theta),
        rms_norm_eps=net.config.norm_eps,
        tie_word_embeddings=net.config.tie_embeddings,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.load_state_dict(llama_weights(net), strict=True)
    return theirs


def qwen3(net: GPTMini) -> nn.Module:
    import transformers

    config = transformers.Qwen3Config(
        **TINY_HF,
        **rope(net.config.rope_theta),
        head_dim=net.config.head_dim,
        rms_norm_eps=net.config.norm_eps,
        tie_word_embeddings=net.config.tie_embeddings,
    )
    theirs = transformers.Qwen3ForCausalLM(config).eval()
    theirs.load_state_dict(llama_weights(net), strict=True)
    return theirs


GPT2_NAMES = {
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}


def gpt2_weights(net: GPTMini) -> dict[str, Tensor]:
    """Our weights under GPT-2's names: q, k and v in one matrix, and every matrix of a block as (in, out)."""
    state = net.state_dict()
    weights = {
        "transformer.wte.weight": state["embed_tokens.weight"],
        "transformer.wpe.weight": state["embed_positions.weight"],
        "transformer.ln_f.weight": state["norm.weight"],
        "transformer.ln_f.bias": state["norm.bias"],
        "lm_head.weight": state["lm_head.weight"],
    }
    for i in range(net.config.n_layers):
        for kind in ("weight", "bias"):
            moved = {theirs: state[f"layers.{i}.{mine}.{kind}"] for mine, theirs in GPT2_NAMES.items()}
            moved["attn.c_attn"] = torch.cat(
                [state[f"layers.{i}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            )
            for theirs, tensor in moved.items():
                weights[f"transformer.h.{i}.{theirs}.{kind}"] = tensor.t().contiguous()
    return weights


def gpt2(net: GPTMini) -> nn.Module:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=61,
        n_embd=24,
        n_layer=3,
        n_head=4,
        n_inner=40,
        n_positions=32,
        activation_function="gelu_new",
        layer_norm_epsilon=net.config.norm_eps,
        attn_implementation="eager",
        bos_token_id=None,
        eos_token_id=None,
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.load_state_dict(gpt2_weights(net), strict=True)
    return theirs


GPT2 = {"norm": "layernorm", "mlp": "gelu", "position": "learned", "bias": True, "n_kv_heads": 4}
PAIRS = pytest.mark.parametrize(
    ("switches", "counterpart"),
    [
        pytest.param({"tie_embeddings": True}, llama, id="llama-tied"),
        pytest.param(
            {"tie_embeddings": False, "rope_theta": 500.0, "norm_eps": 1e-3},
            llama,
            id="llama-untied-other-theta-and-eps",
        ),
        pytest.param(
            {"qk_norm": True, "head_dim": 10, "norm_eps": 1e-6}, qwen3, id="qwen3-qk-norm-wide-heads"
        ),
        pytest.param({"qk_norm": True, "tie_embeddings": False}, qwen3, id="qwen3-untied"),
        pytest.param(GPT2, gpt2, id="gpt2"),
        pytest.param({**GPT2, "norm_eps": 1e-2}, gpt2, id="gpt2-other-eps"),
    ],
)


@PAIRS
def test_logits_equal_hugging_face_s(switches, counterpart):
    net = ours(**switches)
    theirs, ids = counterpart(net), torch.randint(61, (B, T), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        mine, expected = net(ids), theirs(input_ids=ids).logits
    assert expected.std() > 0.5, "logits near zero would agree by chance"
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


@PAIRS
def test_loss_and_gradients_equal_hugging_face_s(switches, counterpart):
    """Hugging Face shifts the labels inside the model; ours are shifted by the data."""
    net = ours(**switches)
    theirs, rows = counterpart(net), torch.randint(61, (B, T + 1), generator=torch.Generator().manual_seed(1))
    loss_sum, n_targets = net(rows[:, :-1], labels=rows[:, 1:])
    (loss_sum / n_targets).backward()
    expected = theirs(input_ids=rows, labels=rows).loss
    expected.backward()
    assert (loss_sum / n_targets).item() == pytest.approx(expected.item(), rel=1e-5)
    grad, embeddings = net.embed_tokens.weight.grad, theirs.get_input_embeddings().weight.grad
    torch.testing.assert_close(grad, embeddings, rtol=1e-4, atol=1e-5)


@PAIRS
def test_greedy_generation_equals_hugging_face_s(switches, counterpart):
    """Their cache and loop, and ours, give one text."""
    net = ours(**switches)
    theirs, ids = counterpart(net), torch.randint(61, (B, 5), generator=torch.Generator().manual_seed(2))
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    assert net.generate(ids, 20, SamplingConfig(temperature=0)).tolist() == expected.tolist()
