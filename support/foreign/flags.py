"""What to write for a flag of another program, or for one of ours in another spelling, with the value that
was typed.

--max-iters 500        --override training.max_steps=500
--out_dir=runs/a       --override checkpoint.dir=runs/a
--top_k 40             --top-k 40

To add a flag: a row of FLAGS, or a name in the row of ours. What a config key is called elsewhere is in
`support.foreign.config_keys`.
"""

import difflib
import shlex
from collections.abc import Iterator
from typing import Any

from support.foreign.config_keys import LEAST_LIKENESS, OUR_KEYS, answer_to, is_key, normalised
from support.foreign.config_values import (
    answer_and_keys,
    known_dataset,
    our_word,
    rule_in_words,
    rule_of,
    shown,
)

# Names for the same thing that several rows share.
MODEL = (
    "checkpoint checkpoint_path ckpt ckpt_path model model_path model_name_or_path weights load "
    "load_checkpoint pretrained from_pretrained"
)
TEXT = (
    "data data_path data_dir train_path train_data train_file train input input_file input_path file files "
    "text text_file corpus"
)
VAL_TEXT = "val_path val_data val_file valid_path valid_file validation_file val valid eval_data"
OUTPUT = (
    "output out out_dir output_dir save_dir output_path out_path output_file outfile out_file save_path "
    "results_dir logdir log_dir o"
)

# (ours, names elsewhere). The first row that has the name and fits the script is taken: ours is a flag of the
# script, or PATH, an argument without a flag, or else a config key, for scripts that take overrides.
FLAGS = (
    ("--checkpoints", f"{MODEL} checkpoint_dir checkpoint_dirs ckpt_dir models"),
    ("--from", "model model_path model_name model_name_or_path pretrained from_pretrained hf_path repo_id"),
    ("--ckpt", f"{MODEL} checkpoint_dir ckpt_dir init_from base_model resume"),
    (
        "PATH",
        f"{MODEL} checkpoint_dir checkpoint_dirs ckpt_dir checkpoints dir path folder logdir save_dir "
        "out_dir",
    ),
    ("--resume", "resume_from resume_from_checkpoint load_checkpoint restore resume_path"),
    ("base_ckpt", f"{MODEL} base_model init_from"),
    ("--resume", "checkpoint checkpoint_path ckpt ckpt_path load weights"),
    ("--input", TEXT),
    ("--val-input", VAL_TEXT),
    ("--data", f"{VAL_TEXT} {TEXT}"),
    ("--output-dir", f"{OUTPUT} results report"),
    ("--output", OUTPUT),
    (
        "--max-new-tokens",
        "max_length max_tokens n_predict length num_tokens max_gen_len max_new n_tokens new_tokens n",
    ),
    ("--temperature", "temp"),
    ("--top-k", "topk"),
    ("--top-p", "topp nucleus nucleus_p"),
    ("--repetition-penalty", "repeat_penalty rep_penalty"),
    ("--num-samples", "num_return_sequences n_samples nsamples samples"),
    ("--prompt-file", "file prompt_path input_file"),
    ("--prompt", "text start input query start_context message"),
    ("--chat", "conversation instruct"),
    ("--cases", "prompts case test_cases eval_cases cases_file"),
    ("--lm-eval", "tasks lm_eval_task"),
    ("--lm-eval-limit", "limit"),
    ("--batch-size", "bs micro_batch_size eval_batch_size"),
    ("--vocab-size", "vocab n_vocab"),
    ("--num-proc", "workers num_workers n_proc nproc jobs num_processes"),
    ("--val-fraction", "val_frac val_ratio validation_split val_split_fraction"),
    ("--tokenizer", "tokenizer_path tokenizer_name encoding tokenizer_file"),
    ("--text-field", "text_column text_key"),
    ("--dataset-config", "dataset_config_name subset"),
    ("--max-seq-len", "context_length block_size max_length n_ctx"),
    ("--dtype", "outtype quantize quantization"),
    ("--quantize", "quantization quant"),
    ("--to", "format export_format"),
    ("--config", "config_file cfg conf config_path"),
    ("--override", "set opt"),
    ("--device", "accelerator"),
    ("--seed", "random_seed manual_seed rng_seed"),
    ("--check", "dry_run"),
    ("--fresh", "overwrite force restart overwrite_output_dir"),
    ("data.path", TEXT),
    ("data.val_path", VAL_TEXT),
    ("checkpoint.dir", OUTPUT),
)
DEVICE_FLAGS = {
    "cpu": "--device cpu",
    "cuda": "--device cuda",
    "gpu": "--device cuda",
    "use_cuda": "--device cuda",
    "no_cuda": "--device cpu",
}
# Beginnings of keys that only training asks for.
KEYS_OF_TRAINING = ("training.", "checkpoint.", "model.", "tokenizer.", "logging.", "lora.", "base_ckpt")


def flag_answers(argv: list[str], known: set[str], paths: bool) -> list[str]:
    """One line for each unknown word of a command line that has an answer. `known` are the script's flags,
    `paths` says whether it takes paths without a flag."""
    lines = []
    for typed, name, values in unknown_words(argv, known):
        answer = answer_to_flag(name, values, known, paths) if name else answer_to_word(typed, known)
        if answer and answer.startswith("leave"):
            lines.append(f"{typed}: {answer}")
        elif answer:
            lines.append(f"for {typed} write {answer}")
    return lines


def unknown_words(argv: list[str], known: set[str]) -> Iterator[tuple[str, str, list[str]]]:
    """(as typed, name, values) of each unknown flag; a word that cannot be a value of the flag before it has
    an empty name."""
    words, flag = list(argv), ""
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            if not flag or (flag not in known and answer_to_word(word, known)):
                yield shlex.quote(word), "", []
            continue
        flag, equals, value = word.partition("=")
        if equals:
            values = [value]
        else:
            n_values = _number_of_values(words, known)
            values, words = words[:n_values], words[n_values:]
        if flag not in known:
            as_typed = shlex.join([word] if equals else [word, *values])
            yield as_typed, flag.removeprefix("--"), values


def _number_of_values(words: list[str], known: set[str]) -> int:
    """How many of the words after a flag are its values: those before the next flag. After the first value, a
    word that has an answer by itself, such as my.yaml, is not a value either."""
    for n, word in enumerate(words):
        if word.startswith("--") or (n > 0 and answer_to_word(word, known)):
            return n
    return len(words)


def answer_to_word(typed: str, known: set[str]) -> str | None:
    """What to write for a word without a flag: `my.yaml` is --config my.yaml, `training.lr=1e-3` an override;
    None for any other word."""
    if typed.lower().endswith((".yaml", ".yml", ".json")) and "--config" in known:
        return f"--config {typed}"
    key, equals, _ = typed.partition("=")
    if equals and key in OUR_KEYS and "--override" in known:
        return f"--override {typed}"
    return None


def answer_to_flag(name: str, values: list[str], known: set[str], paths: bool) -> str | None:
    """What to write in place of an unknown flag; None where nothing is near."""
    plain, value = normalised(name), shlex.join(values)
    own_spelling = "--" + plain.replace("_", "-")
    if own_spelling in known:
        return f"{own_spelling} {value}".strip()
    if plain in DEVICE_FLAGS and "--device" in known and not values:
        return DEVICE_FLAGS[plain]
    for ours, theirs in FLAGS:
        if plain not in theirs.split():
            continue
        if ours in known:
            return f"{ours} {value}".strip()
        if ours == "PATH" and paths:
            return f"{value or 'PATH'}, without a flag"
        if ours in OUR_KEYS and takes_key(ours, known):
            return override(ours, values)
    if "--override" in known and (answer := answer_by_key(plain, values, known)):
        return answer
    names_of_known = [flag.removeprefix("--") for flag in sorted(known)]
    near = difflib.get_close_matches(
        own_spelling.removeprefix("--"), names_of_known, n=1, cutoff=LEAST_LIKENESS
    )
    return f"--{near[0]} {value}".strip() if near else None


def takes_key(key: str, known: set[str]) -> bool:
    """Whether an override of this key does something in the script with these flags: scripts that score a
    checkpoint ask for few keys, and only finetune.py has a base."""
    scores_a_checkpoint = "--ckpt" in known
    if "--override" not in known or (scores_a_checkpoint and key.startswith(KEYS_OF_TRAINING)):
        return False
    is_finetune = "--show-mask" in known
    return is_finetune or not key.startswith(("base_ckpt", "lora.", "template"))


def answer_by_key(plain: str, values: list[str], known: set[str]) -> str | None:
    """What to write for a flag that has the name of a config key, ours or another project's; None for any
    other."""
    if plain == "dataset" and values:
        return answer_to_dataset(values[0])
    if plain == "tokenizer" and values:
        return override("tokenizer.path" if values[0].endswith(".json") else "tokenizer.kind", values)
    if not values:
        value: Any = True
    elif len(values) == 1:
        value = literal(values[0])
    else:
        value = [literal(item) for item in values]
    rule, ours = rule_of(plain), answer_to(plain)
    if rule is None and is_key(ours) and our_word(ours, value) == value:
        return override(ours, values) if takes_key(ours, known) else None  # the value as it was typed
    words, keys = answer_and_keys(plain, value, look_up=lambda key: None)
    if words.startswith("leave"):
        return words
    if not keys and rule and takes_key(rule.ours, known):
        flags = " ".join(f"--override {key}=..." for key in rule.ours.split(" and "))
        return flags + rule_in_words(rule, plain)
    if not keys or not all(takes_key(key, known) for key in keys):
        return None
    return " ".join(override(key, [shown(new)]) for key, new in keys.items())


def answer_to_dataset(name: str) -> str:
    """What to write for `--dataset NAME`: a file is data.path, a name on the hub data.dataset, and for a few
    texts there is a config."""
    if name.lower().endswith((".txt", ".jsonl", ".json")):
        return override("data.path", [name])
    answer = known_dataset(name)
    if answer and not answer.startswith("leave"):
        return answer.removeprefix("in ")
    return f"--override data.source=hf {override('data.dataset', [name])}"


def override(key: str, values: list[str]) -> str:
    """The flag that sets this key; several values are a list, and no value means true.

    >>> override("training.betas", ["0.9", "0.95"])
    "--override 'training.betas=[0.9, 0.95]'"
    """
    if not values:
        value = "true"
    else:
        value = values[0] if len(values) == 1 else f"[{', '.join(values)}]"
    return "--override " + shlex.quote(f"{key}={value}")


def literal(text: str) -> Any:
    """The number or switch that a word stands for, else the word."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
