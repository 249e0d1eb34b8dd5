"""A short template, and a config to fine-tune with it, for the tests of instructions."""

from pathlib import Path

from support.config.read import validate_config
from support.config.schema import Config
from support.text.chat_template import Template

SHORT = Template(prompt="Q{instruction}A", prompt_with_input="Q{instruction},{input}A")


def config_of(path: Path, seed: int = 42, seq_len: int = 19, **data) -> Config:
    template = {"prompt": SHORT.prompt, "prompt_with_input": SHORT.prompt_with_input}
    return validate_config(
        {
            "seed": seed,
            "tokenizer": {"kind": "byte"},
            "model": {"max_seq_len": seq_len, "d_model": 8, "n_heads": 2},
            "data": {"source": "instructions", "path": str(path), **data},
            "training": {"max_steps": 1, "micro_batch_size": 3},
            "template": template,
        }
    )
