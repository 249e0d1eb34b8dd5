"""Configs and weights under the names of Hugging Face's models, and back."""

import pytest
import torch
from converting import SHAPES, random_model

from model import GPTConfig
from support.exchange.hf_names import ARCHITECTURES, config_json, family_of, model_fields, to_ours, to_theirs
from support.foreign.model_files import FAMILIES


def test_every_model_type_that_we_claim_to_read_has_an_architecture():
    assert set(ARCHITECTURES) == set(FAMILIES)


@pytest.mark.parametrize("switches", SHAPES.values(), ids=SHAPES)
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
