"""Values of other projects' configs: words that are ours by another name, and keys that mean something else
than any of ours.

To add a word for a value: WORDS. To add a key whose value must be converted: a `Rule` in RULES. Its
conversion takes the value and a function that looks up what else the config says, and returns one of three:
our keys with their values, an answer in words, or None where nothing can be computed.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from support.foreign.config_keys import answer_to, is_key, leaf_of, nearest_key, normalised

Answer = dict[str, Any] | str | None
# look_up("training.lr") is the value of that key of ours, its default where the config leaves it out; None
# where it is not known. look_up("seq_len") is the length that training sees, look_up("theirs.NAME") what the
# config calls NAME in any section, look_up("given.KEY") whether it gives our KEY.
LookUp = Callable[[str], Any]
Conversion = Callable[[Any, LookUp], Answer]

PRECISIONS = {
    "bf16-mixed": "bf16 bfloat16 torch.bfloat16 mixed bf16_mixed",
    "32-true": "32 fp32 float32 float torch.float32 32_true no full",
}
FP16_WORDS = "fp16 float16 16 half torch.float16 16-mixed"
NO_FP16 = (
    "leave it out: 16-bit floats overflow without loss scaling; hardware.precision: bf16-mixed, or 32-true"
)
DEVICES = {"cuda": "gpu cuda:0 nvidia", "cpu": "cpu", "mps": "mps metal apple", "auto": "auto"}
# Our key: our word for a value, and others' words for it.
WORDS = {
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
# A config of ours: names that other projects give to its text.
DATASETS = {
    "configs/tinystories.yaml": "tinystories tiny_stories",
    "configs/shakespeare_char.yaml": "shakespeare shakespeare_char tinyshakespeare tiny_shakespeare",
    "configs/wikitext_bpe.yaml": "wikitext2 wikitext_2",
    "config.yaml": "wikipedia",
    "config_finetune.yaml": "alpaca",
}


def our_word(key: str, value: Any) -> Any:
    """Our word for a value that other projects write differently; the value itself if we have no other word.

    >>> our_word("hardware.precision", "float32")
    '32-true'
    """
    said = str(value).lower()
    for ours, theirs in WORDS.get(key, {}).items():
        if said == ours or said in theirs.split():
            return ours
    return value


def known_dataset(name: Any) -> str | None:
    """The answer to a text that another project calls `tinystories`; None for a name that we have no config
    for."""
    plain = normalised(str(name))
    if plain == "local":
        return "leave it out: data.path names a local file or folder"
    for config, names in DATASETS.items():
        if plain in names.split():
            return f"in --config {config}"
    return None


# ---- conversions ---------------------------------------------------------------------------------


def _number(value: Any) -> float | None:
    """The value if it is a finite number, else None."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return value
    return None


def _product(keys: list[str], look_up: LookUp) -> int | None:
    """The product of the values of these keys; None unless all are known and positive."""
    factors = [_number(look_up(key)) for key in keys]
    if any(factor is None or factor <= 0 for factor in factors):
        return None
    return int(math.prod(factors))


SEQUENCES_OF_A_PASS = ["training.micro_batch_size", "hardware.devices", "hardware.num_nodes"]
TOKENS_OF_A_PASS = [*SEQUENCES_OF_A_PASS, "seq_len"]


def ratio_of(base: str, ours: str, kind: Callable[[float], Any]) -> Conversion:
    """The conversion of a ratio: our key is that many times another key of ours."""

    def convert(ratio: Any, look_up: LookUp) -> Answer:
        whole = _number(look_up(base))
        if _number(ratio) is None or whole is None:
            return None
        return {ours: kind(ratio * whole)}

    return convert


def switch(on: Answer, off: Answer) -> Conversion:
    """The conversion of a switch: one answer where it is true, another where it is false."""

    def convert(value: Any, look_up: LookUp) -> Answer:
        if value is True:
            return on
        if value is False:
            return off
        return None

    return convert


def batch_size_in(keys_of_a_pass: list[str]) -> Conversion:
    """The conversion of a whole step's size: the micro-batches that it takes, if it is a multiple of one."""

    def convert(size: Any, look_up: LookUp) -> Answer:
        one_pass = _product(keys_of_a_pass, look_up)
        if not _number(size) or not one_pass or size < one_pass or size % one_pass:
            return None
        return {"training.grad_accum_steps": int(size // one_pass)}

    return convert


def beta(place: int) -> Conversion:
    """The conversion of one of AdamW's betas: our key is a list of both."""

    def convert(value: Any, look_up: LookUp) -> Answer:
        if _number(value) is None:
            return None
        both = [_number(look_up("theirs.beta1")) or 0.9, _number(look_up("theirs.beta2")) or 0.95]
        both[place] = value
        return {"training.betas": both}

    return convert


def from_train_fraction(value: Any, look_up: LookUp) -> Answer:
    if _number(value) is None or not 0 < value < 1:
        return None
    if look_up("given.data.val_fraction"):
        val_fraction = look_up("data.val_fraction")
        return f"leave it out: training takes what data.val_fraction: {val_fraction} leaves"
    return {"data.val_fraction": round(1 - value, 9)}


def from_percent(value: Any, look_up: LookUp) -> Answer:
    return {"data.val_fraction": value / 100} if _number(value) else None


def from_validation_tokens(tokens: Any, look_up: LookUp) -> Answer:
    micro_batch = _product(["training.micro_batch_size", "seq_len"], look_up)
    if _number(tokens) is None or tokens < 1 or not micro_batch:
        return None
    return {"training.val_batches": max(1, math.ceil(tokens / micro_batch))}


def from_training_tokens(tokens: Any, look_up: LookUp) -> Answer:
    step = _product([*TOKENS_OF_A_PASS, "training.grad_accum_steps"], look_up)
    if not _number(tokens) or not step:
        return None
    return {"training.max_steps": math.ceil(tokens / step)}


def from_block_size(value: Any, look_up: LookUp) -> Answer:
    """nanoGPT's block_size is both the model's context and the length it trains on; ours trains on the whole
    context by default."""
    if _number(value) is None:
        return None
    return {"training.seq_len": value} if look_up("given.model.max_seq_len") else {"model.max_seq_len": value}


def from_precision(value: Any, look_up: LookUp) -> Answer:
    if str(value).lower() in FP16_WORDS.split():
        return NO_FP16
    word = our_word("hardware.precision", value)
    return {"hardware.precision": word} if word in ("auto", *PRECISIONS) else None


def from_device(value: Any, look_up: LookUp) -> Answer:
    word = our_word("hardware.accelerator", value)
    is_ours = isinstance(word, str) and word in DEVICES  # other projects also write a list of devices
    return {"hardware.accelerator": word} if is_ours else None


def from_number_of_samples(value: Any, look_up: LookUp) -> Answer:
    if value == 0:
        return "leave it out: nothing is sampled without training.sample_every"
    if not _number(value):
        return None
    every = look_up("training.val_every") or 100
    texts = "text" if value == 1 else "texts"
    return (
        f"training.sample_every: {every} with training.sample_prompts, a list of {value:g} {texts} to "
        "continue"
    )


def from_init_from(value: Any, look_up: LookUp) -> Answer:
    name = str(value)
    if name == "scratch":
        return "leave it out: weights are drawn anew without base_ckpt"
    if name == "resume":
        return "leave it out: resume a run with --resume on the command line"
    if name.startswith("gpt2"):
        return (
            f"base_ckpt of finetune.py, made by python3 convert.py --from {name} --output "
            f"checkpoints/{name}.ckpt"
        )
    return None


def from_report_to(value: Any, look_up: LookUp) -> Answer:
    named = {f"logging.{key}": True for key in ("tensorboard", "wandb") if key in str(value)}
    return named or "leave it out: metrics.jsonl is always written"


# ---- the rules -----------------------------------------------------------------------------------


class Rule(NamedTuple):
    """How names of other projects are answered whose value must be converted."""

    theirs: str
    ours: str  # the key, or keys joined by `and`, that come nearest
    convert: Conversion
    words: str = ""  # the rule in words, for a value that cannot be computed; {name} is their name


RULES = (
    Rule(
        "train_frac train_ratio train_fraction train_split train_size",
        ours="data.val_fraction",
        convert=from_train_fraction,
        words="it is 1 less {name}",
    ),
    Rule(
        "val_percent val_pct",
        ours="data.val_fraction",
        convert=from_percent,
        words="it is a hundredth of {name}",
    ),
    Rule(
        "mlp_ratio mlp_expansion ffn_mult expansion_factor ffn_ratio",
        ours="model.d_ff",
        convert=ratio_of("model.d_model", ours="model.d_ff", kind=round),
        words="it is {name} times model.d_model",
    ),
    Rule(
        "warmup_ratio warmup_frac warmup_fraction",
        ours="training.warmup_steps",
        convert=ratio_of("training.max_steps", ours="training.warmup_steps", kind=round),
        words="it is {name} times the steps of the run",
    ),
    Rule(
        "min_lr_ratio min_lr_frac lr_min_ratio",
        ours="training.min_lr",
        convert=ratio_of("training.lr", ours="training.min_lr", kind=float),
        words="it is {name} times training.lr",
    ),
    Rule(
        "eval_subset eval_subset_tokens eval_tokens val_tokens",
        ours="training.val_batches",
        convert=from_validation_tokens,
        words="it counts micro-batches, of micro_batch_size x seq_len tokens",
    ),
    Rule(
        "max_tokens total_tokens train_tokens max_train_tokens num_tokens token_budget",
        ours="training.max_steps",
        convert=from_training_tokens,
        words="a step has micro_batch_size x grad_accum_steps x seq_len tokens",
    ),
    Rule(
        "global_batch_size train_batch_size effective_batch_size",
        ours="training.grad_accum_steps",
        convert=batch_size_in(SEQUENCES_OF_A_PASS),
        words="it is {name} divided by training.micro_batch_size",
    ),
    Rule(
        "total_batch_size",
        ours="training.grad_accum_steps",
        convert=batch_size_in(TOKENS_OF_A_PASS),
        words="it is {name} divided by micro_batch_size x seq_len",
    ),
    Rule("beta1 adam_beta1 b1", ours="training.betas", convert=beta(0), words="a list of both"),
    Rule("beta2 adam_beta2 b2", ours="training.betas", convert=beta(1), words="a list of both"),
    Rule(
        "block_size",
        ours="model.max_seq_len",
        convert=from_block_size,
        words="training.seq_len, where training sees less than that",
    ),
    Rule(
        "dtype amp_dtype torch_dtype mixed_precision precision",
        ours="hardware.precision",
        convert=from_precision,
    ),
    Rule(
        "amp use_amp bf16 autocast",
        ours="hardware.precision",
        convert=switch(on={"hardware.precision": "bf16-mixed"}, off={"hardware.precision": "32-true"}),
    ),
    Rule(
        "fp16 half",
        ours="hardware.precision",
        convert=switch(on=NO_FP16, off={"hardware.precision": "32-true"}),
    ),
    Rule("device accelerator", ours="hardware.accelerator", convert=from_device),
    Rule(
        "cuda gpu use_cuda use_gpu",
        ours="hardware.accelerator",
        convert=switch(on={"hardware.accelerator": "cuda"}, off={"hardware.accelerator": "cpu"}),
    ),
    Rule(
        "no_cuda",
        ours="hardware.accelerator",
        convert=switch(on={"hardware.accelerator": "cpu"}, off={"hardware.accelerator": "auto"}),
    ),
    Rule(
        "decay_lr",
        ours="training.schedule",
        convert=switch(on={"training.schedule": "cosine"}, off={"training.schedule": "constant"}),
    ),
    Rule(
        "train_on_inputs train_on_input",
        ours="data.mask_prompt",
        convert=switch(on={"data.mask_prompt": False}, off={"data.mask_prompt": True}),
        words="it is the opposite of {name}",
    ),
    Rule(
        "sample_n num_samples",
        ours="training.sample_every and training.sample_prompts",
        convert=from_number_of_samples,
    ),
    Rule("init_from", ours="base_ckpt", convert=from_init_from),
    Rule("report_to", ours="logging.tensorboard and logging.wandb", convert=from_report_to),
)
RULE_BY_NAME = {name: rule for rule in RULES for name in rule.theirs.split()}


def rule_of(key: str) -> Rule | None:
    """The rule of another project's key; None where the key is ours by another name, or unknown."""
    return RULE_BY_NAME.get(leaf_of(normalised(key)))


# ---- the answer ----------------------------------------------------------------------------------


def shown(value: Any) -> str:
    """A value as a config file has it.

    >>> shown([True, None, 0.1])
    '[true, null, 0.1]'
    """
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def answer_and_keys(key: str, value: Any, look_up: LookUp) -> tuple[str, dict[str, Any]]:
    """(what to answer to a key that we do not have, our keys that it becomes), the second as far as it is
    known."""
    if rule := rule_of(key):
        return _answer_by_rule(leaf_of(key), value, rule, look_up)
    ours = answer_to(key)
    if ours is None:
        nearest = nearest_key(key)
        return (f"did you mean {nearest}?" if nearest else "see docs/CONFIG_REFERENCE.md"), {}
    if ours.startswith("leave"):
        return ours, {}
    if not is_key(ours):
        return f"did you mean {ours}?", {}
    word = our_word(ours, value)
    if word != value:
        return _equation(leaf_of(key), value, {ours: word}), {ours: word}
    return f"did you mean {ours}?", {ours: value}


def _answer_by_rule(name: str, value: Any, rule: Rule, look_up: LookUp) -> tuple[str, dict[str, Any]]:
    """The same for a key whose value must be converted."""
    answer = rule.convert(value, look_up)
    if isinstance(answer, dict):
        return _equation(name, value, answer), answer
    if answer is None:
        return f"did you mean {rule.ours}?{rule_in_words(rule, name)}", {}
    if answer.startswith("leave"):
        return answer, {}
    return f"{name}: {shown(value)} is {answer}", {}


def rule_in_words(rule: Rule, name: str) -> str:
    """` (it is 1 less train_frac)`, or nothing for a rule without words."""
    return f" ({rule.words.format(name=name)})" if rule.words else ""


def _equation(name: str, value: Any, ours: dict[str, Any]) -> str:
    """`mlp_ratio: 4 is model.d_ff: 768`."""
    return f"{name}: {shown(value)} is " + " and ".join(f"{key}: {shown(new)}" for key, new in ours.items())
