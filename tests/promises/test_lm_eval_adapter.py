"""support/evaluation/lm_eval_adapter.py: the EleutherAI harness gets the numbers that we get, offline, on
tasks made here."""

import csv
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO
from foreign_tokenizers import tokenizer_like

import convert
import evaluate_checkpoints
from infer import generate_text
from model import GPTConfig, GPTMini
from support.checkpoint import load_model, write_model
from support.config.read import load_config
from support.evaluation.case_files import Case, read_cases
from support.evaluation.likelihoods import log_likelihoods
from support.evaluation.lm_eval_adapter import adapter, cut_before_first, find_tasks
from support.evaluation.score_model import score_cases
from support.evaluation.validation import validate
from support.messages import UserError

TEXT = (REPO / "data" / "tiny_corpus.txt").read_text(encoding="utf-8")

MULTIPLE_CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: prompt
doc_to_choice: choices
doc_to_target: right
target_delimiter: ""
"""


@pytest.fixture(scope="module")
def lm_eval():
    return pytest.importorskip("lm_eval", reason="lm-eval is not installed")


@pytest.fixture(scope="module")
def loaded(tiny_run):
    return load_model(tiny_run.folder / "final.ckpt")


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """Those with choices, after a prompt and without one."""
    return [case for case in read_cases(["cases/tiny_corpus.yaml", "cases/grammar.yaml"]) if case.choices]


@pytest.fixture
def task(lm_eval, cases, tmp_path, monkeypatch) -> str:
    """The name of a task, described in tmp_path, with the same questions as `cases`."""
    import datasets
    import lm_eval.evaluator

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(
        lm_eval.evaluator, "add_env_info", lambda storage: None
    )  # it lists the machine's packages, for seconds
    rows = [
        {"prompt": case.prompt, "choices": case.choices, "right": case.choices.index(case.target)}
        for case in cases
    ]
    (tmp_path / "questions.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    (tmp_path / "task.yaml").write_text(
        MULTIPLE_CHOICE.format(name="tiny_choices", data=tmp_path / "questions.jsonl"), encoding="utf-8"
    )
    return "tiny_choices"


def requests(*arguments: tuple) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=args) for args in arguments]


# ---- the same numbers ----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_harness_finds_our_likelihoods_and_our_accuracy(loaded, cases, task, tmp_path):
    from lm_eval import simple_evaluate

    model, tokenizer, _ = loaded
    found = simple_evaluate(
        adapter(model, tokenizer),
        tasks=[task],
        task_manager=find_tasks([task], str(tmp_path)),
        bootstrap_iters=0,
    )
    ours = score_cases(model, tokenizer, cases)
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    for sample, result in zip(samples, ours, strict=True):
        assert [response[0][0] for response in sample["resps"]] == pytest.approx(result.logprobs, abs=1e-5)
    assert found["results"][task]["acc,none"] == pytest.approx(
        sum(result.parts["choices"] for result in ours) / len(ours)
    )


def test_an_empty_context_is_eos_and_a_merged_token_is_scored_too(lm_eval, loaded):
    """If context and continuation together are one token, the harness alone would give the continuation
    probability 1."""
    model, tokenizer, _ = loaded
    pieces = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    merged = next(
        p
        for p in pieces
        if len(p) > 2 and p.isalpha() and len(tokenizer.encode(p)) == len(tokenizer.encode(p[:-1])) == 1
    )
    found = adapter(model, tokenizer).loglikelihood(
        requests(("", "The loss"), (merged[:-1], merged[-1]), ("The ", "loss")), disable_tqdm=True
    )
    pairs = [
        ([tokenizer.eos_id], "The loss"),
        (tokenizer.encode(merged[:-1]), merged[-1]),
        (tokenizer.encode("The"), " loss"),
    ]
    expected = log_likelihoods(model, [(context, tokenizer.encode(text)) for context, text in pairs])
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert found[1][0] < 0


@pytest.mark.parametrize("n_tokens", [9, 96])
def test_rolling_likelihood_is_the_loss_sum_of_eval_val(lm_eval, loaded, n_tokens):
    """In less than one window, and in three full ones: a last window that is not full is read with more
    context than in eval_val. eval_val also predicts the EOS after a text."""
    model, tokenizer, metadata = loaded
    text = next(TEXT[:end] for end in range(len(TEXT)) if len(tokenizer.encode(TEXT[:end])) == n_tokens)
    found = validate(model, tokenizer, ["", text], load_config(None, base=metadata["config"]))
    assert found.seq_len == 32 and found.n_tokens == n_tokens + 1
    before_the_end = ([tokenizer.eos_id, *tokenizer.encode(text)])[-(n_tokens % 32 + 1) :]
    [(end, _)] = log_likelihoods(model, [(before_the_end, [tokenizer.eos_id])])
    [rolling] = adapter(model, tokenizer).loglikelihood_rolling(requests((text,)))
    assert rolling + end == pytest.approx(-found.loss * found.n_tokens, abs=1e-3)


def test_an_empty_text_is_certain(lm_eval, loaded):
    assert adapter(*loaded[:2]).loglikelihood_rolling(requests(("",))) == [0]


def test_generated_text_is_that_of_infer_up_to_the_first_stop(lm_eval, loaded):
    """One prompt goes beyond the context of 32 tokens. An empty one means EOS, which infer does not offer."""
    model, tokenizer, _ = loaded
    prompts = ["The", "A language model is", TEXT[:200]]
    plain = [generate_text(model, tokenizer, prompt, max_new_tokens=12, temperature=0) for prompt in prompts]
    lm = adapter(model, tokenizer)
    assert (
        lm.generate_until(
            requests(*[(prompt, {"until": [], "max_gen_toks": 12, "do_sample": False}) for prompt in prompts])
        )
        == plain
    )
    stop = plain[0][3]
    stopped = lm.generate_until(
        requests(*[(prompt, {"until": [stop], "max_gen_toks": 12, "temperature": 0.0}) for prompt in prompts])
    )
    assert stopped == [text.split(stop)[0] for text in plain] and len(stopped[0]) <= 3
    assert len(lm.generate_until(requests(("", {"max_gen_toks": 3})))) == 1


@pytest.mark.parametrize("name", ["bpe", "llama + bos", "llama", "space first + bos", "bytes + bos"])
def test_the_numbers_are_those_of_the_harness_for_the_same_model_in_transformers(lm_eval, tmp_path, name):
    """Requests with and without a context, whole texts, and generated ones, of a model with large random
    weights."""
    from lm_eval.models.huggingface import HFLM

    tokenizer = tokenizer_like(name)
    torch.manual_seed(0)
    model = GPTMini(
        GPTConfig(
            vocab_size=tokenizer.vocab_size, d_model=32, n_layers=1, n_heads=2, n_kv_heads=1, max_seq_len=64
        )
    ).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)  # so that what is before matters
    write_model(tmp_path / "model.ckpt", model, tokenizer, {})
    convert.main(["--ckpt", str(tmp_path / "model.ckpt"), "--to", "hf", "--output", str(tmp_path / "hf")])
    theirs, ours = (
        HFLM(pretrained=str(tmp_path / "hf"), device="cpu", dtype="float32", batch_size=1),
        adapter(model, tokenizer),
    )
    assert ours.prefix_token_id == theirs.prefix_token_id
    for text in ("tick tock", " tick"):
        assert ours.tok_encode(text) == theirs.tok_encode(text)
    pairs = requests(
        ("tick", " tock"),
        ("tick tock.", " Who"),
        ("", "tick"),
        ("Who are you? ", "fine"),
        ("a", "\n12"),
        ("clock", "s"),
    )
    found, expected = (
        ours.loglikelihood(pairs, disable_tqdm=True),
        theirs.loglikelihood(pairs, disable_tqdm=True),
    )
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-3)
    texts = requests(("tick tock. Who are you?",), ("the clock says 12345 " * 12,))
    assert ours.loglikelihood_rolling(texts) == pytest.approx(
        theirs.loglikelihood_rolling(texts, disable_tqdm=True), rel=1e-4
    )
    asked = [
        ("tick tock", {"until": [], "max_gen_toks": 6, "do_sample": False}),
        ("Who are", {"until": [], "max_gen_toks": 6, "do_sample": False}),
    ]
    for mine, other in zip(
        ours.generate_until(requests(*asked)),
        theirs.generate_until(requests(*asked), disable_tqdm=True),
        strict=True,
    ):
        assert mine.lstrip() == other.lstrip(), "theirs loses a first space where the decoder takes it off"


def test_a_task_that_samples_is_refused(lm_eval, loaded):
    with pytest.raises(UserError, match="do_sample"):
        adapter(*loaded[:2]).generate_until(requests(("The", {"do_sample": True, "temperature": 0.7})))


@pytest.mark.parametrize(
    ("ends", "kept"), [(".", "a, b"), ([";", ","], "a"), (["b", "a"], ""), ([""], "a, b. c"), ([], "a, b. c")]
)
def test_a_text_ends_before_the_first_stop(ends, kept):
    assert cut_before_first("a, b. c", ends) == kept


# ---- the command ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_flag_makes_a_table_a_csv_and_json(tiny_run, cases, task, tmp_path, capsys):
    argv = [
        "--checkpoints",
        str(tiny_run.folder),
        "--lm-eval",
        task,
        "--lm-eval-tasks",
        str(tmp_path),
        "--lm-eval-limit",
        "20",
        "--device",
        "cpu",
    ]
    assert evaluate_checkpoints.main([*argv, "--output-dir", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0].split() == ["file", "step", task, "acc", task, "acc_norm"] and len(lines) == 4
    assert said.err == ""
    with open(tmp_path / "out" / "lm_eval.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["metric"], row["n"]) for row in rows] == [
        (str(step), m, "20") for step in (4, 8, 12) for m in ("acc", "acc_norm")
    ]
    for row in rows[::2]:
        won = sum(result.parts["choices"] for result in score_cases(*load_model(row["file"])[:2], cases[:20]))
        assert float(row["value"]) == pytest.approx(won / 20) and row["higher_is_better"] == "True"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["lm_eval.csv"]
    assert evaluate_checkpoints.main([*argv, "--json"]) == 0
    said = capsys.readouterr()
    assert [json.loads(line)["value"] for line in said.out.splitlines()] == [
        float(row["value"]) for row in rows
    ]


@pytest.mark.slow
def test_an_unknown_task_is_answered_with_similar_names(task, tmp_path):
    with pytest.raises(
        UserError,
        match=r"^--lm-eval lambada_opnai: the harness has no such task; did you mean lambada_openai, ",
    ):
        find_tasks([task, "lambada_opnai"], str(tmp_path))


def test_a_task_whose_data_is_missing_is_answered(task, tmp_path):
    (tmp_path / "questions.jsonl").unlink()
    with pytest.raises(
        UserError, match=r"--lm-eval tiny_choices: FileNotFoundError: .*questions\.jsonl.*; its data must be"
    ) as caught:
        find_tasks([task], str(tmp_path))
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_package_is_answered_before_anything_slow():
    """In one line, with exit status 2, and before torch is imported."""
    code = """
import importlib.util, runpy, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "lm_eval" else find_spec(name, *rest)
sys.argv = ["evaluate_checkpoints.py", "--checkpoints", "checkpoints", "--lm-eval", "hellaswag"]
try:
    runpy.run_path("evaluate_checkpoints.py", run_name="__main__")
finally:
    assert "torch" not in sys.modules
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (process.returncode, process.stderr.count("\n")) == (2, 1)
    assert (
        process.stderr
        == "error: --lm-eval needs the EleutherAI harness, which is not installed; pip install lm-eval\n"
    )


@pytest.mark.slow
def test_the_suite_needs_no_optional_package(tmp_path):
    """If none of them can be found, every test file is collected, and tests that need them skip, for
    reasons that CONTRIBUTING.md lists, or passes."""
    (tmp_path / "without_optional.py").write_text(WITHOUT_OPTIONAL)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    base = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "without_optional",
        "-p",
        "no:cacheprovider",
        "-q",
        "-rs",
        "-m",
        "not slow",
    ]
    chosen = "gguf or llama_cpp or parses or lm_eval or installed or package"
    for more in (
        ["--collect-only"],
        ["tests/promises/test_lm_eval_adapter.py"],
        [
            "tests/promises/test_convert.py",
            "tests/promises/test_gguf.py",
            "tests/promises/test_docs.py",
            "-k",
            chosen,
        ],
    ):
        found = subprocess.run([*base, *more], capture_output=True, text=True, cwd=REPO, env=environment)
        assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
        reasons = {line.split(": ", 1)[1] for line in found.stdout.splitlines() if line.startswith("SKIPPED")}
        listed = re.findall(r"^- skip: (.+)$", (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M)
        assert [reason for reason in reasons if not reason.startswith(tuple(listed))] == []
        assert "lm-eval is not installed" in reasons or "tests/promises/test_lm_eval_adapter.py" not in more


WITHOUT_OPTIONAL = """
import importlib.util, sys

OPTIONAL = {"lm_eval", "gguf", "accelerate", "llama_cpp", "xdist", "tensorboard", "hypothesis"}
installed = importlib.util.find_spec


def find_spec(name, *rest):
    return None if name.split(".")[0] in OPTIONAL else installed(name, *rest)


importlib.util.find_spec = find_spec


class Blocked:
    @staticmethod
    def find_spec(name, *rest):
        if name.split(".")[0] in OPTIONAL:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Blocked)
"""


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--cases", "cases", "--lm-eval-limit", "5"], "go with --lm-eval"),
        (["--cases", "cases", "--lm-eval-tasks", "cases"], "go with --lm-eval"),
        (["--lm-eval", "x", "--lm-eval-limit", "0"], "--lm-eval-limit 0 must be at least 1"),
        (["--lm-eval", "x", "--lm-eval-tasks", "nowhere"], "--lm-eval-tasks nowhere is not a folder"),
        (["--lm-eval", "x", "--config", "config.yaml"], "goes with --val"),
    ],
)
def test_mistakes_are_answered(lm_eval, tiny_run, argv, said):
    with pytest.raises(UserError, match=said):
        evaluate_checkpoints.main(["--checkpoints", str(tiny_run.folder), *argv])


def test_cases_or_val_or_lm_eval_must_be_given(capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluate_checkpoints.main(["--checkpoints", "checkpoints"])
    assert "give --cases, --val, --lm-eval, or several of them" in capsys.readouterr().err
