"""Flags of other programs, and ours in another spelling: what to write here, with the value that was typed.

--max-iters 500        --override training.max_steps=500
--out_dir=runs/a       --override checkpoint.dir=runs/a
--top_k 40             --top-k 40
"""

import difflib
import shlex
from collections.abc import Iterator
from typing import Any

from support.foreign.config_keys import LEAST_LIKENESS, OUR_KEYS, answer_to, is_key, normalised
from support.foreign.config_values import answer_and_keys, known_dataset, our_word, rule_of, shown

MODEL = (
    "checkpoint checkpoint_path ckpt ckpt_path model model_path model_name_or_path weights load "
    "load_checkpoint pretrained from_pretrained"
)
TEXT = (
    "data data_path data_dir train_path train_data train_file train input input_file input_path file files "
    "text text_file corpus"
)
VAL_TEXT = "val_path val_data val_file valid_path valid_file validation_file val valid eval_data"
OUT = (
    "output out out_dir output_dir save_dir output_path out_path output_file outfile out_file save_path "
    "results_dir logdir log_dir o"
)

# Ours, and theirs that it answers where the script has it; the first that fits is taken. What has no dashes
# is a config key.
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
    ("--output-dir", f"{OUT} results report"),
    ("--output", OUT),
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
    ("--to", "format export_format"),
    ("--config", "config_file cfg conf config_path"),
    ("--override", "set opt"),
    ("--device", "accelerator"),
    ("--seed", "random_seed manual_seed rng_seed"),
    ("--check", "dry_run"),
    ("--fresh", "overwrite force restart overwrite_output_dir"),
    ("data.path", TEXT),
    ("data.val_path", VAL_TEXT),
    ("checkpoint.dir", OUT),
)
WITHOUT_VALUE = {
    "cpu": "--device cpu",
    "cuda": "--device cuda",
    "gpu": "--device cuda",
    "use_cuda": "--device cuda",
    "no_cuda": "--device cpu",
}
OF_A_RUN = (
    "training.",
    "checkpoint.",
    "model.",
    "tokenizer.",
    "logging.",
    "lora.",
    "base_ckpt",
)  # keys that scoring does not ask


def flag_answers(argv: list[str], known: set[str], paths: bool) -> list[str]:
    """One line for each word of a command line that is no flag of the script, as far as there is an
    answer. `known` are the script's flags, `paths` says whether it takes paths without a flag."""
    answers = []
    for typed, name, values in unknown_words(argv, known):
        answer = answer_to_flag(name, values, known, paths) if name else answer_to_word(typed, known)
        answers += (
            [f"for {typed} write {answer}" if not answer.startswith("leave") else f"{typed}: {answer}"]
            if answer
            else []
        )
    return answers


def unknown_words(argv: list[str], known: set[str]) -> Iterator[tuple[str, str, list[str]]]:
    """(as typed, name, values) of each unknown flag; a word that cannot be a value of the flag before it
    has no name."""
    words, flag = list(argv), ""
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            if not flag or (flag not in known and answer_to_word(word, known)):
                yield shlex.quote(word), "", []
            continue
        flag, equals, value = word.partition("=")
        last = next(
            (
                n
                for n, later in enumerate(words)
                if later.startswith("--") or (n and answer_to_word(later, known))
            ),
            len(words),
        )
        values = [value] if equals else words[:last]
        words = words if equals else words[last:]
        if flag not in known:
            yield shlex.join([word] if equals else [word, *values]), flag.removeprefix("--"), values


def answer_to_word(typed: str, known: set[str]) -> str | None:
    """`my.yaml` is --config my.yaml, `training.lr=1e-3` an override."""
    if typed.lower().endswith((".yaml", ".yml", ".json")) and "--config" in known:
        return f"--config {typed}"
    return (
        f"--override {typed}"
        if typed.split("=")[0] in OUR_KEYS and "=" in typed and "--override" in known
        else None
    )


def answer_to_flag(name: str, values: list[str], known: set[str], paths: bool) -> str | None:
    """What to write in place of an unknown flag; None where nothing is near."""
    plain, value = normalised(name), shlex.join(values)
    own = "--" + plain.replace("_", "-")
    if own in known:
        return f"{own} {value}".strip()
    if plain in WITHOUT_VALUE and "--device" in known and not values:
        return WITHOUT_VALUE[plain]
    for ours, theirs in FLAGS:
        if plain not in theirs.split():
            continue
        if ours in known:
            return f"{ours} {value}".strip()
        if ours == "PATH" and paths:
            return f"{value or 'PATH'}, without a flag"
        if "-" not in ours and ours != "PATH" and takes_key(ours, known):
            return override(ours, values)
    if "--override" in known and (answer := answer_by_key(plain, values, known)):
        return answer
    near = difflib.get_close_matches(
        own[2:], [flag[2:] for flag in sorted(known)], n=1, cutoff=LEAST_LIKENESS
    )
    return f"--{near[0]} {value}".strip() if near else None


def takes_key(key: str, known: set[str]) -> bool:
    """Whether an override of this key does something in the script: scoring asks little, and only
    finetune.py has a base."""
    if "--override" not in known or (key.startswith(OF_A_RUN) and "--ckpt" in known):
        return False
    return "--show-mask" in known or not key.startswith(("base_ckpt", "lora.", "template"))


def answer_by_key(plain: str, values: list[str], known: set[str]) -> str | None:
    """The same by the names of config keys, other projects' and ours."""
    value = literal(values[0]) if len(values) == 1 else [literal(item) for item in values] or True
    rule, ours = rule_of(plain), answer_to(plain)
    if plain == "dataset" and values:
        return answer_to_dataset(values[0])
    if plain == "tokenizer" and values:
        return override("tokenizer.path" if values[0].endswith(".json") else "tokenizer.kind", values)
    if (
        rule is None and is_key(ours) and our_word(ours, value) == value
    ):  # another name and nothing else: the value as it was typed
        return override(ours, values) if takes_key(ours, known) else None
    words, keys = answer_and_keys(plain, value, lambda key: None)
    if words.startswith("leave"):
        return words
    if not keys and rule and takes_key(rule.ours, known):
        flags = " ".join(f"--override {key}=..." for key in rule.ours.split(" and "))
        return flags + (f" ({rule.words.format(name=plain)})" if rule.words else "")
    if not keys or not all(takes_key(key, known) for key in keys):
        return None
    return " ".join(override(key, [shown(new)]) for key, new in keys.items())


def answer_to_dataset(name: str) -> str:
    """A file is data.path, a name on the hub data.dataset, and a few texts have a config here."""
    if name.lower().endswith((".txt", ".jsonl", ".json")):
        return override("data.path", [name])
    answer = known_dataset(name)
    if answer and not answer.startswith("leave"):
        return answer.removeprefix("in ")
    return f"--override data.source=hf {override('data.dataset', [name])}"


def override(key: str, values: list[str]) -> str:
    """The flag that sets this key; several values are a list, and none is true."""
    value = values[0] if len(values) == 1 else f"[{', '.join(values)}]" if values else "true"
    return "--override " + shlex.quote(f"{key}={value}")


def literal(text: str) -> Any:
    """The number or switch that a word is, else the word."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
