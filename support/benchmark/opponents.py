"""The models that ours is compared with, each used as its own authors use it.

hf         transformers' model of the same family (Llama, Qwen3 or GPT-2); its `generate`
litgpt     litgpt's GPT with the same switches; its `generate`
nanogpt    model.py of a nanoGPT checkout: always GPT-2's architecture, without biases; its own optimizer
gptfast    model.py of a gpt-fast checkout: a Llama that only decodes
llamacpp   llama.cpp through llama-cpp-python, on a float32 GGUF file of the same weights

None of their code is here: it is imported from the package or from the folder that the user names. Each class
has a method for each task that the program can do (OPPONENTS_OF). Most have random weights of their own, so
the tokens they write differ; sizes and operations are shown side by side.
"""

import contextlib
import copy
import importlib.util
import io
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data import Batch
from model import GPTConfig
from support.benchmark.subject import GPT2_VOCAB, Subject
from support.exchange.gguf_file import write_gguf
from support.exchange.hf_names import config_json
from support.messages import UserError

NEEDS = {  # name: the module to import, and how to install it; None for a checkout
    "hf": ("transformers", "pip install transformers"),
    "litgpt": ("litgpt", "pip install litgpt"),
    "llamacpp": ("llama_cpp", "pip install llama-cpp-python gguf"),
    "nanogpt": None,
    "gptfast": None,
    "tokenizers": ("tokenizers", "pip install tokenizers"),
    "tiktoken": ("tiktoken", "pip install tiktoken"),
}
OPPONENTS_OF = {  # what is timed: who can do it
    "train": ("hf", "litgpt", "nanogpt"),
    "prefill": ("hf", "litgpt", "llamacpp", "nanogpt", "gptfast"),
    "decode": ("hf", "litgpt", "llamacpp", "nanogpt", "gptfast"),
    "tokens": ("tokenizers", "tiktoken"),
    "loss": ("nanogpt",),
}
Opponents = dict[str, str | None]  # {name: path of its checkout, or None}
WHERE = {"nanogpt": "github.com/karpathy/nanoGPT", "gptfast": "github.com/meta-pytorch/gpt-fast"}


@dataclass
class Trainee:
    """A model to train: the mean loss of a batch, and the optimizer."""

    model: nn.Module
    loss: Callable[[Batch], Tensor]
    optimizer: torch.optim.Optimizer


@dataclass
class Writer:
    """A model that continues a prompt. `run` does it once."""

    model: nn.Module | None
    run: Callable[[], Any]
    note: str = ""


# ---- finding them --------------------------------------------------------------------------------


def parse_against(words: str, task: str) -> Opponents:
    """The opponents of --against hf,nanogpt=PATH. Raises UserError for one that cannot do the task, a missing
    package, or a path without model.py."""
    found: Opponents = {}
    for word in filter(None, words.split(",")):
        name, _, path = word.partition("=")
        if name not in OPPONENTS_OF[task]:
            raise UserError(
                f"--against {name}: there is no such opponent for {task}; choose among "
                f"{', '.join(OPPONENTS_OF[task])}"
            )
        if NEEDS[name] is None:
            check_checkout(name, path)
        elif path:
            raise UserError(f"--against {word}: {name} is a package and takes no path; write {name}")
        else:
            module, install = NEEDS[name]
            if importlib.util.find_spec(module) is None:
                raise UserError(f"--against {name} needs a package that is not installed; {install}")
        found[name] = path or None
    return found


def check_checkout(name: str, path: str) -> None:
    """Raise UserError unless `path` is a folder with a model.py."""
    if not path:
        raise UserError(
            f"--against {name} needs the folder of a checkout: git clone https://{WHERE[name]}, then "
            f"--against {name}=PATH"
        )
    if not (Path(path).expanduser() / "model.py").is_file():
        raise UserError(
            f"--against {name}={path}: there is no model.py; name the folder of a checkout of {WHERE[name]}"
        )


def import_model_file(name: str, path: str) -> Any:
    """The module model.py in the user's checkout, under a name of its own, since ours is called model too."""
    spec = importlib.util.spec_from_file_location(f"{name}_model", Path(path).expanduser() / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def silently(make: Callable[[], Any]) -> Any:
    """What `make` returns, without what it prints. Raises UserError if a package cannot be imported."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return make()
    except ImportError as error:
        raise UserError(
            f"--against: a package cannot be imported ({error}); repair it, or leave it out"
        ) from None


def said(compiled: bool) -> str:
    return "compiled" if compiled else ""


def adamw(model: nn.Module, subject: Subject) -> torch.optim.AdamW:
    """AdamW with the config's settings, for programs that leave the choice to their user."""
    training = subject.config.training
    return torch.optim.AdamW(
        model.parameters(),
        lr=training.lr,
        betas=tuple(training.betas),
        weight_decay=training.weight_decay,
        fused=True if subject.device == "cuda" else None,
    )


class Opponent:
    """What they share. `build` makes the model; `weights_type` is the type of its weights when it decodes."""

    def __init__(self, subject: Subject, path: str | None):
        self.subject, self.path = subject, path

    def build(self, c: GPTConfig) -> nn.Module:
        raise NotImplementedError

    def ready(self) -> nn.Module:
        """The model with weights as decoding has them, in eval mode."""
        with torch.no_grad():
            model = silently(lambda: self.build(self.subject.model_config))
        return model.to(self.subject.device, self.subject.dtype).eval()

    def in_training(self, compiled: bool) -> nn.Module:
        """The model with its own initial weights, in train mode."""
        model = silently(lambda: self.build(self.subject.model_config)).to(self.subject.device).train()
        if compiled:
            model.compile()
        return model


# ---- packages ------------------------------------------------------------------------------------


class HuggingFace(Opponent):
    def build(self, c: GPTConfig) -> nn.Module:
        from transformers import AutoConfig, AutoModelForCausalLM

        fields = config_json(c, eos_id=0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))

    def train(self, compiled: bool) -> Trainee:
        model = self.in_training(compiled)

        def loss(batch: Batch) -> Tensor:
            # It shifts the labels itself.
            return model(input_ids=batch["input_ids"], labels=batch["input_ids"], use_cache=False).loss

        return Trainee(model, loss, adamw(model, self.subject))

    def prefill(self, ids: Tensor, compiled: bool) -> Writer:
        model = self.ready()
        if compiled:
            model.compile()
        return Writer(
            model, lambda: model(ids, use_cache=True, logits_to_keep=1).logits.argmax(-1), said(compiled)
        )

    def decode(self, ids: Tensor, n_new: int, compiled: bool) -> Writer:
        model = self.ready()
        model.generation_config.eos_token_id = None  # it must not stop early
        options = {"max_new_tokens": n_new, "do_sample": False, "pad_token_id": 0}
        if compiled:
            model.forward = torch.compile(model.forward)
            options["cache_implementation"] = "static"
        mask = torch.ones_like(ids)
        return Writer(model, lambda: model.generate(ids, attention_mask=mask, **options), said(compiled))


class LitGPT(Opponent):
    def build(self, c: GPTConfig) -> nn.Module:
        from litgpt import GPT, Config

        if (c.norm, c.mlp, c.position) != ("rmsnorm", "swiglu", "rope") or c.embed_scale:
            raise UserError("--against litgpt: only Llama's switches are set up for it; leave it out here")
        config = Config(
            name="benchmark",
            block_size=c.max_seq_len,
            vocab_size=c.vocab_size,
            padded_vocab_size=c.vocab_size,
            n_layer=c.n_layers,
            n_embd=c.d_model,
            n_head=c.n_heads,
            n_query_groups=c.n_kv_heads,
            head_size=c.head_dim,
            intermediate_size=c.d_ff,
            norm_class_name="RMSNorm",
            norm_eps=c.norm_eps,
            norm_qk=c.qk_norm,
            mlp_class_name="LLaMAMLP",
            rotary_percentage=1.0,
            rope_base=int(c.rope_theta),
            parallel_residual=False,
            bias=c.bias,
        )
        model = GPT(config)
        model.apply(model._init_weights)
        if c.tie_embeddings:
            model.transformer.wte.weight = model.lm_head.weight  # as its own pretraining ties them
        return model

    def train(self, compiled: bool) -> Trainee:
        from litgpt.utils import chunked_cross_entropy

        model = self.in_training(compiled)

        def loss(batch: Batch) -> Tensor:
            return chunked_cross_entropy(model(batch["input_ids"]), batch["labels"], chunk_size=0)

        return Trainee(model, loss, adamw(model, self.subject))

    def cached(self, n_positions: int) -> nn.Module:
        """The model with a cache for so many positions."""
        model = self.ready()
        model.max_seq_length = n_positions
        model.set_kv_cache(1, device=torch.device(self.subject.device), dtype=self.subject.dtype)
        return model

    def prefill(self, ids: Tensor, compiled: bool) -> Writer:
        model = self.cached(ids.shape[1])
        if compiled:
            model.compile()
        positions = torch.arange(ids.shape[1], device=ids.device)
        return Writer(model, lambda: model(ids, positions)[:, -1].argmax(-1), said(compiled))

    def decode(self, ids: Tensor, n_new: int, compiled: bool) -> Writer:
        from litgpt.generate.base import generate

        n_all = ids.shape[1] + n_new
        model = self.cached(n_all)
        if compiled:
            model.compile()
        return Writer(model, lambda: generate(model, ids[0], n_all, temperature=0.0), said(compiled))


class LlamaCpp(Opponent):
    """Our own weights in its format, read by its own engine."""

    def load(self, n_positions: int) -> Any:
        import llama_cpp

        subject = self.subject
        model = copy.deepcopy(subject.trained or subject.new_model()).float().cpu()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.gguf"
            write_gguf(file, model, subject.some_tokenizer(), None, "f32", "benchmark")
            threads = torch.get_num_threads()
            return silently(
                lambda: llama_cpp.Llama(
                    str(file),
                    n_ctx=n_positions,
                    n_batch=n_positions,
                    n_ubatch=n_positions,
                    n_threads=threads,
                    n_threads_batch=threads,
                    n_gpu_layers=-1 if subject.device == "cuda" else 0,
                    type_k=0,  # 0 is float32
                    type_v=0,
                    flash_attn=False,
                    verbose=False,
                )
            )

    def prefill(self, ids: Tensor, compiled: bool) -> Writer:
        prompt = ids[0].tolist()
        llama = self.load(len(prompt))

        def run() -> int:
            llama.reset()
            llama.eval(prompt)
            return best_token(llama)

        return Writer(None, run)

    def decode(self, ids: Tensor, n_new: int, compiled: bool) -> Writer:
        prompt = ids[0].tolist()
        llama = self.load(len(prompt) + n_new)

        def run() -> None:
            llama.reset()
            tokens = prompt
            for _ in range(n_new):
                llama.eval(tokens)
                tokens = [best_token(llama)]

        return Writer(None, run)


def best_token(llama: Any) -> int:
    """The likeliest next token, from the logits of the last position."""
    import llama_cpp
    import numpy as np

    logits = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
    return int(np.ctypeslib.as_array(logits, shape=(llama.n_vocab(),)).argmax())


# ---- checkouts -----------------------------------------------------------------------------------


class NanoGPT(Opponent):
    def build(self, c: GPTConfig) -> nn.Module:
        module = import_model_file("nanogpt", self.path)
        padded = 50304 if c.vocab_size == GPT2_VOCAB else c.vocab_size  # as its training pads GPT-2's
        config = module.GPTConfig(
            block_size=c.max_seq_len,
            vocab_size=padded,
            n_layer=c.n_layers,
            n_head=c.n_heads,
            n_embd=c.d_model,
            dropout=c.dropout,
            bias=False,
        )
        return module.GPT(config)

    def train(self, compiled: bool) -> Trainee:
        training, device = self.subject.config.training, self.subject.device
        model = self.in_training(compiled)
        optimizer = silently(
            lambda: model.configure_optimizers(
                training.weight_decay, training.lr, tuple(training.betas), device
            )
        )
        return Trainee(model, lambda batch: model(batch["input_ids"], batch["labels"])[1], optimizer)

    def prefill(self, ids: Tensor, compiled: bool) -> Writer:
        model = self.ready()
        if compiled:
            model.compile()
        return Writer(model, lambda: model(ids)[0].argmax(-1), note="no cache")

    def decode(self, ids: Tensor, n_new: int, compiled: bool) -> Writer:
        model = self.ready()
        return Writer(model, lambda: model.generate(ids, n_new, top_k=1), note="no cache")


class GPTFast(Opponent):
    def build(self, c: GPTConfig) -> nn.Module:
        module = import_model_file("gptfast", self.path)
        args = module.ModelArgs(
            block_size=c.max_seq_len,
            vocab_size=c.vocab_size,
            n_layer=c.n_layers,
            n_head=c.n_heads,
            n_local_heads=c.n_kv_heads,
            dim=c.d_model,
            intermediate_size=c.d_ff,
            rope_base=c.rope_theta,
            norm_eps=c.norm_eps,
        )
        return module.Transformer(args)

    def cached(self, n_positions: int) -> nn.Module:
        """The model with a cache for so many positions."""
        model = self.ready()
        with torch.device(self.subject.device):
            model.setup_caches(1, n_positions)
        return model

    def prefill(self, ids: Tensor, compiled: bool) -> Writer:
        model = self.cached(ids.shape[1])
        positions = torch.arange(ids.shape[1], device=ids.device)
        if compiled:
            model.compile()
        return Writer(model, lambda: model(ids, positions)[:, -1].argmax(-1), said(compiled))

    def decode(self, ids: Tensor, n_new: int, compiled: bool) -> Writer:
        """A step is its `decode_one_token` with the likeliest token in place of a drawn one."""
        model = self.cached(ids.shape[1] + n_new)
        prompt_positions = torch.arange(ids.shape[1], device=ids.device)

        def next_token(token: Tensor, position: Tensor) -> Tensor:
            return model(token, position)[:, -1].argmax(-1, keepdim=True)

        step = torch.compile(next_token, mode="reduce-overhead", fullgraph=True) if compiled else next_token

        @torch.no_grad()
        def run() -> None:
            token = next_token(ids, prompt_positions)
            position = torch.tensor([ids.shape[1]], device=ids.device)
            for _ in range(n_new - 1):
                token = step(token, position).clone()
                position += 1

        return Writer(model, run, said(compiled))


MODELS: dict[str, type[Opponent]] = {
    "hf": HuggingFace,
    "litgpt": LitGPT,
    "llamacpp": LlamaCpp,
    "nanogpt": NanoGPT,
    "gptfast": GPTFast,
}
