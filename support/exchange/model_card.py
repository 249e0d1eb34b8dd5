"""The README.md of an exported model, and its name. No path of this machine gets into them."""

import math
import os
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from model import GPTConfig, GPTMini
from support.text.chat_template import Template
from tokenizer import Tokenizer

CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A decoder-only transformer of {n_params:,} parameters, {origin}

{facts}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
inputs = {inputs}
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```
"""
PLAIN_INPUTS = 'tokenizer("Once", return_tensors="pt")'
CHAT_INPUTS = (
    'tokenizer.apply_chat_template([{"role": "user", "content": "Who are you?"}], '
    'return_tensors="pt", return_dict=True)'
)


def public_path(path: str) -> str:
    """The path as others may see it: only its last part if the rest would tell about this machine.

    >>> public_path("data/tiny_corpus.txt"), public_path("/books/plays.txt"), public_path("~/plays.txt")
    ('data/tiny_corpus.txt', 'plays.txt', 'plays.txt')
    """
    is_private = (
        path.startswith("~")
        or PurePosixPath(path).is_absolute()
        or PureWindowsPath(path).drive
        or ".." in PureWindowsPath(path).parts
    )
    return PureWindowsPath(path).name if is_private else path


def source_name(source: str, revision: str | None) -> str:
    """What a model was imported from: its name on the hub, or the last part of a local folder's path."""
    if os.path.isdir(source):
        return Path(source).resolve().name
    return f"{source} (revision {revision})" if revision else source


def model_name(metadata: dict[str, Any], ckpt: str) -> str:
    """The name of an exported model: that of what was imported, or of its run's folder; if neither is known,
    the file's own name."""
    run_folder = ((metadata.get("config") or {}).get("checkpoint") or {}).get("dir")
    known = (metadata.get("run") or {}).get("source") or run_folder or ""
    return PureWindowsPath(str(known)).name or Path(ckpt).stem


def model_card(
    model: GPTMini, tokenizer: Tokenizer, metadata: dict[str, Any], ckpt: str, template: Template | None
) -> str:
    """The text of README.md: what the run's config and metrics say about the model."""
    config = metadata.get("config")
    facts = [*shape_facts(model.config), f"- tokenizer: {tokenizer.kind}, {tokenizer.vocab_size:,} tokens"]
    origin = "trained with Tiny Transformer."
    if config:
        facts += training_facts(config, metadata["metrics"])
    else:
        source = (metadata.get("run") or {}).get("source")
        from_source = f" from `{source}`" if source else ""
        origin = f"imported{from_source} with Tiny Transformer; nothing was trained here."
    return CARD.format(
        name=model_name(metadata, ckpt),
        origin=origin,
        n_params=model.n_params(),
        facts="\n".join(facts),
        inputs=CHAT_INPUTS if template else PLAIN_INPUTS,
    )


def shape_facts(config: GPTConfig) -> list[str]:
    c = config
    embeddings = "tied" if c.tie_embeddings else "untied"
    return [
        f"- {c.n_layers} layers, width {c.d_model}, {c.n_heads} query and {c.n_kv_heads} key/value heads, "
        f"context {c.max_seq_len}",
        f"- norm {c.norm}, mlp {c.mlp}, positions {c.position}, {embeddings} embeddings",
    ]


def training_facts(config: dict[str, Any], metrics: dict[str, Any]) -> list[str]:
    training, data = config["training"], config["data"]
    text = public_path(str(data.get("path") or data.get("dataset")))
    start = f", from `{public_path(config['base_ckpt'])}`" if config.get("base_ckpt") else ""
    facts = [
        f"- trained for {metrics['step']:,} steps on {metrics['tokens']:,} target tokens of `{text}`{start}",
        f"- {training['optimizer']}, lr {training['lr']:g}, schedule {training['schedule']}, "
        f"{training['micro_batch_size']} x {training['grad_accum_steps']} sequences a step, "
        f"seed {config['seed']}",
    ]
    for name in ("train_loss", "val_loss", "token_accuracy"):
        if metrics.get(name) is not None:
            facts.append(f"- {name}: {metrics[name]:.4f}")
    if metrics.get("val_loss") is not None:
        facts.append(f"- validation perplexity: {math.exp(min(metrics['val_loss'], 700)):.2f}")
    return facts
