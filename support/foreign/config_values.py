"""Keys of other projects that mean something else than any of ours: how their value becomes ours.

A conversion takes the value and `at`, which tells the value that one of our keys has beside it (None: not
known), and returns our keys with their values, or the answer in words, or None where it cannot be computed.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from support.foreign.config_keys import answer_to, is_key, leaf_of, nearest_key, normalised

Answer = dict[str, Any] | str | None
At = Callable[
    [str], Any
]  # of `theirs.NAME` what the config calls NAME in some section, of `given.KEY` whether it gives KEY

PRECISIONS = {
    "bf16-mixed": "bf16 bfloat16 torch.bfloat16 mixed bf16_mixed",
    "32-true": "32 fp32 float32 float torch.float32 32_true no full",
}
HALF = "leave it out: 16-bit floats overflow without loss scaling; hardware.precision: bf16-mixed, or 32-true"
DEVICES = {"cuda": "gpu cuda:0 nvidia", "cpu": "cpu", "mps": "mps metal apple", "auto": "auto"}
WORDS = {  # words for the values of our keys, in one table: ours, then others'
    "hardware.accelerator": DEVICES,
    "hardware.precision": PRECISIONS,
    "model.mlp": {"gelu": "gelu_new gelu_tanh gptneoxmlp", "swiglu": "silu swish llamamlp"},
    "model.norm": {"rmsnorm": "rms rms_norm", "layernorm": "layer layer_norm ln"},
    "model.position": {"rope": "rotary", "learned": "absolute learnable", "sinusoidal": "sinusoid sin fixed"},
    "training.optimizer": {"adamw": "adam adamw_torch adamw_torch_fused adam_w fused_adamw"},
    "training.schedule": {
        "cosine": "cosine_annealing cosineannealinglr cosine_with_warmup cos",
        "constant": "none constant_with_warmup",
    },
    "tokenizer.kind": {
        "gpt2": "gpt-2 tiktoken",
        "char": "character characters",
        "byte": "bytes",
        "bpe": "subword",
    },
}
DATASETS = {  # names that others give to texts for which a config is here
    "configs/tinystories.yaml": "tinystories tiny_stories",
    "configs/shakespeare_char.yaml": "shakespeare shakespeare_char tinyshakespeare tiny_shakespeare",
    "configs/wikitext_bpe.yaml": "wikitext2 wikitext_2",
    "config.yaml": "wikipedia",
    "config_finetune.yaml": "alpaca",
}


def our_word(key: str, value: Any) -> Any:
    """The word that our key has for a value of other projects: float32 is 32-true. The value itself where
    there is none."""
    said = str(value).lower()
    for ours, theirs in WORDS.get(key, {}).items():
        if said == ours or said in theirs.split():
            return ours
    return value


def known_dataset(name: Any) -> str | None:
    """What to say of a text that another project calls `tinystories`; None for a name that has no config
    here."""
    plain = normalised(str(name))
    if plain == "local":
        return "leave it out: data.path names a local file or folder"
    return next(
        (f"in --config {config}" for config, names in DATASETS.items() if plain in names.split()), None
    )


def _number(value: Any) -> float | None:
    return (
        value
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        else None
    )


def _per_step(at: At, unit: str) -> int | None:
    """Sequences, or tokens, of one micro-batch on every device."""
    keys = ["training.micro_batch_size", "hardware.devices", "hardware.num_nodes"] + (
        ["seq_len"] if unit == "tokens" else []
    )
    counts = [_number(at(key)) for key in keys]
    return None if None in counts else int(math.prod(counts))


def _ratio_of(ours: str, base: str, kind: Callable) -> Callable:
    def convert(value: Any, at: At) -> Answer:
        factor, whole = _number(value), _number(at(base))
        return {ours: kind(factor * whole)} if factor is not None and whole is not None else None

    return convert


def _rest(value: Any, at: At) -> Answer:
    if _number(value) is None or not 0 < value < 1:
        return None
    if at("given.data.val_fraction"):
        return f"leave it out: training takes what data.val_fraction: {at('data.val_fraction')} leaves"
    return {"data.val_fraction": round(1 - value, 9)}


def _percent(value: Any, at: At) -> Answer:
    return {"data.val_fraction": value / 100} if _number(value) else None


def _batches(value: Any, at: At) -> Answer:
    tokens, batch = _number(value), [_number(at(key)) for key in ("training.micro_batch_size", "seq_len")]
    return (
        {"training.val_batches": max(1, math.ceil(tokens / math.prod(batch)))}
        if tokens and tokens >= 1 and None not in batch
        else None
    )


def _steps(value: Any, at: At) -> Answer:
    micro, accumulated = _per_step(at, "tokens"), _number(at("training.grad_accum_steps"))
    return (
        {"training.max_steps": math.ceil(value / (micro * accumulated))}
        if _number(value) and micro and accumulated
        else None
    )


def _accumulation(unit: str) -> Callable:
    def convert(value: Any, at: At) -> Answer:
        micro = _per_step(at, unit)
        fits = _number(value) and micro and value >= micro and value % micro == 0
        return {"training.grad_accum_steps": int(value // micro)} if fits else None

    return convert


def _betas(place: int) -> Callable:
    def convert(value: Any, at: At) -> Answer:
        both = [_number(at(f"theirs.beta{n + 1}")) or (0.9, 0.95)[n] for n in range(2)]
        both[place] = _number(value)
        return {"training.betas": both} if both[place] is not None else None

    return convert


def _context(value: Any, at: At) -> Answer:
    """nanoGPT's block_size is the model's context and the length it trains on; ours trains on the whole
    context by default."""
    if _number(value) is None:
        return None
    return {"training.seq_len": value} if at("given.model.max_seq_len") else {"model.max_seq_len": value}


def _precision(value: Any, at: At) -> Answer:
    found = our_word("hardware.precision", value)
    if str(value).lower() in ("fp16", "float16", "16", "half", "torch.float16", "16-mixed"):
        return HALF
    return {"hardware.precision": found} if found in ("auto", *PRECISIONS) else None


def _switch(on: Answer, off: Answer) -> Callable:
    return lambda value, at: {True: on, False: off}.get(value) if isinstance(value, bool) else None


def _device(value: Any, at: At) -> Answer:
    found = our_word("hardware.accelerator", value)
    return {"hardware.accelerator": found} if found in DEVICES else None


def _samples(value: Any, at: At) -> Answer:
    if not _number(value):
        return "leave it out: nothing is sampled without training.sample_every" if value == 0 else None
    every = at("training.val_every") or 100
    return (
        f"training.sample_every: {every} with training.sample_prompts, a list of {value:g} "
        f"text{'s' * (value != 1)} to continue"
    )


def _start(value: Any, at: At) -> Answer:
    if str(value) == "scratch":
        return "leave it out: weights are drawn anew without base_ckpt"
    if str(value) == "resume":
        return "leave it out: a run is continued by --resume on the command line"
    if str(value).startswith("gpt2"):
        return (
            f"base_ckpt of finetune.py, made by python3 convert.py --from {value} --output "
            f"checkpoints/{value}.ckpt"
        )
    return None


def _report(value: Any, at: At) -> Answer:
    named = [key for key in ("tensorboard", "wandb") if key in str(value)]
    return {f"logging.{key}": True for key in named} or "leave it out: metrics.jsonl is always written"


class Rule(NamedTuple):
    """How a name of other projects is answered."""

    ours: str  # the key, or keys, that it comes nearest to
    convert: Callable[[Any, At], Answer]
    words: str = ""  # the rule where it cannot be computed


TOKENS_OF_A_STEP = "micro_batch_size x grad_accum_steps x seq_len"
RULES = {
    "train_frac train_ratio train_fraction train_split train_size": Rule(
        "data.val_fraction", _rest, "it is 1 less {name}"
    ),
    "val_percent val_pct": Rule("data.val_fraction", _percent, "it is a hundredth of {name}"),
    "mlp_ratio mlp_expansion ffn_mult expansion_factor ffn_ratio": Rule(
        "model.d_ff", _ratio_of("model.d_ff", "model.d_model", round), "it is {name} times model.d_model"
    ),
    "warmup_ratio warmup_frac warmup_fraction": Rule(
        "training.warmup_steps",
        _ratio_of("training.warmup_steps", "training.max_steps", round),
        "it is {name} times the steps of the run",
    ),
    "min_lr_ratio min_lr_frac lr_min_ratio": Rule(
        "training.min_lr",
        _ratio_of("training.min_lr", "training.lr", float),
        "it is {name} times training.lr",
    ),
    "eval_subset eval_subset_tokens eval_tokens val_tokens": Rule(
        "training.val_batches", _batches, "it counts micro-batches, of micro_batch_size x seq_len tokens"
    ),
    "max_tokens total_tokens train_tokens max_train_tokens num_tokens token_budget": Rule(
        "training.max_steps", _steps, f"a step has {TOKENS_OF_A_STEP} tokens"
    ),
    "global_batch_size train_batch_size effective_batch_size": Rule(
        "training.grad_accum_steps",
        _accumulation("sequences"),
        "it is {name} divided by training.micro_batch_size",
    ),
    "total_batch_size": Rule(
        "training.grad_accum_steps",
        _accumulation("tokens"),
        "it is {name} divided by micro_batch_size x seq_len",
    ),
    "beta1 adam_beta1 b1": Rule("training.betas", _betas(0), "a list of both"),
    "beta2 adam_beta2 b2": Rule("training.betas", _betas(1), "a list of both"),
    "block_size": Rule("model.max_seq_len", _context, "training.seq_len, where training sees less than that"),
    "dtype amp_dtype torch_dtype mixed_precision precision": Rule("hardware.precision", _precision),
    "amp use_amp bf16 autocast": Rule(
        "hardware.precision", _switch({"hardware.precision": "bf16-mixed"}, {"hardware.precision": "32-true"})
    ),
    "fp16 half": Rule("hardware.precision", _switch(HALF, {"hardware.precision": "32-true"})),
    "device accelerator": Rule("hardware.accelerator", _device),
    "cuda gpu use_cuda use_gpu": Rule(
        "hardware.accelerator", _switch({"hardware.accelerator": "cuda"}, {"hardware.accelerator": "cpu"})
    ),
    "no_cuda": Rule(
        "hardware.accelerator", _switch({"hardware.accelerator": "cpu"}, {"hardware.accelerator": "auto"})
    ),
    "decay_lr": Rule(
        "training.schedule", _switch({"training.schedule": "cosine"}, {"training.schedule": "constant"})
    ),
    "train_on_inputs train_on_input": Rule(
        "data.mask_prompt",
        _switch({"data.mask_prompt": False}, {"data.mask_prompt": True}),
        "it is the opposite of {name}",
    ),
    "sample_n num_samples": Rule("training.sample_every and training.sample_prompts", _samples),
    "init_from": Rule("base_ckpt", _start),
    "report_to": Rule("logging.tensorboard and logging.wandb", _report),
}
BY_NAME = {name: rule for names, rule in RULES.items() for name in names.split()}


def rule_of(key: str) -> Rule | None:
    """The rule of another project's key; None where the key is ours by another name, or unknown."""
    return BY_NAME.get(leaf_of(normalised(key)))


def shown(value: Any) -> str:
    """A value as a config file has it."""
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    return (
        {True: "true", False: "false", None: "null"}[value]
        if value is None or isinstance(value, bool)
        else str(value)
    )


def answer_and_keys(key: str, value: Any, at: At) -> tuple[str, dict[str, Any]]:
    """What to say of a key that we do not have, and what it becomes in our keys, as far as that is known."""
    name, rule = leaf_of(key), rule_of(key)
    found = rule.convert(value, at) if rule else None
    ours = answer_to(key) if rule is None else None
    if is_key(ours) and our_word(ours, value) != value:
        found = {ours: our_word(ours, value)}
    if isinstance(found, dict):
        return (
            f"{name}: {shown(value)} is {' and '.join(f'{ours}: {shown(v)}' for ours, v in found.items())}",
            found,
        )
    if found is not None:
        return found if found.startswith("leave") else f"{name}: {shown(value)} is {found}", {}
    if rule:
        return f"did you mean {rule.ours}?" + (f" ({rule.words.format(name=name)})" if rule.words else ""), {}
    if ours is None and (nearest := nearest_key(key)):
        return f"did you mean {nearest}?", {}
    if ours is None:
        return "see docs/CONFIG_REFERENCE.md", {}
    return ours if ours.startswith("leave") else f"did you mean {ours}?", {ours: value} if is_key(
        ours
    ) else {}
