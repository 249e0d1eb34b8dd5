"""evaluate_checkpoints.py: likelihoods equal a naive loop, scores are checked by hand, ranks follow training."""

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO
from foreign_tokenizers import tokenizer_like

import evaluate_checkpoints
import support.evaluation.likelihoods
from infer import generate_text
from model import GPTConfig, GPTMini
from support.checkpoint import KEY, load_model
from support.cli import guarded
from support.evaluation.case_files import Case, read_cases
from support.evaluation.case_scores import score_case
from support.evaluation.likelihoods import continuations, log_likelihoods
from support.evaluation.ranking import chance_of, rank
from support.evaluation.results import CaseResult, CheckpointResult
from support.evaluation.score_model import score_cases
from support.messages import UserError
from support.text.chat_template import TEMPLATES, Template, prompt_ids
from tokenizer import CharTokenizer

CORPUS_CASES = str(REPO / "cases" / "tiny_corpus.yaml")


@pytest.fixture(scope="module")
def loaded(tiny_run):
    return load_model(tiny_run.folder / "final.ckpt")[:2]


@pytest.fixture
def evaluate(capsys):
    """(rows as --json gives them, what was said to stderr)"""

    def call(*argv: object) -> tuple[list[dict], str]:
        capsys.readouterr()
        assert evaluate_checkpoints.main([str(word) for word in (*argv, "--json", "--device", "cpu")]) == 0
        said = capsys.readouterr()
        return [json.loads(line) for line in said.out.splitlines()], said.err

    return call


def write_cases(path: Path, cases: list[dict]) -> Path:
    path.write_text(json.dumps({"cases": cases}), encoding="utf-8")
    return path


# ---- likelihoods ---------------------------------------------------------------------------------


def naive(model, context: list[int], following: list[int]) -> tuple[float, bool]:
    """Token by token, each from its own forward pass over all tokens before it."""
    total, greedy = 0.0, True
    for n, token in enumerate(following):
        before = (context + following[:n])[-model.config.max_seq_len :]
        logits = model(torch.tensor([before]))[0, -1]
        total += logits.log_softmax(-1)[token].item()
        greedy &= int(logits.argmax()) == token
    return total, greedy


@pytest.mark.parametrize("logits", [1, 400 * 50, 2**25], ids=["one by one", "a few", "all at once"])
def test_likelihoods_equal_a_naive_loop_in_batches_of_any_size(loaded, monkeypatch, logits):
    model, tokenizer = loaded
    monkeypatch.setattr(support.evaluation.likelihoods, "LOGITS_AT_ONCE", logits)
    texts = [
        ("A token is", " a piece of text."),
        ("The", " x"),
        ("", "Attention is"),
        ("Loss", "."),
        ("training" * 3, " a model of language"),
    ]
    pairs = [(tokenizer.encode(a) or [tokenizer.eos_id], tokenizer.encode(b)) for a, b in texts]
    greedy = tokenizer.encode(generate_text(model, tokenizer, "The model", 3, temperature=0))
    pairs.append((tokenizer.encode("The model"), greedy))
    found = log_likelihoods(model, pairs)
    for (value, hit), pair in zip(found, pairs, strict=True):
        expected, expected_hit = naive(model, *pair)
        assert value == pytest.approx(expected, rel=1e-5)
        assert hit == expected_hit
    assert found[-1][1] is True


def test_a_long_context_loses_its_beginning_and_a_long_target_is_refused(loaded):
    model, tokenizer = loaded
    window, ids = model.config.max_seq_len, tokenizer.encode("many words of a text " * 30)
    [(value, _)] = log_likelihoods(model, [(ids[:90], ids[90:94])])
    [(same, _)] = log_likelihoods(model, [(ids[94 - window - 1 : 90], ids[90:94])])
    assert value == same
    log_likelihoods(model, [(ids[:1], ids[1 : 1 + window])])
    with pytest.raises(UserError, match=f"a target has {window + 1} tokens, and the model reads {window}"):
        log_likelihoods(model, [(ids[:1], ids[1 : 2 + window])])


def test_continuations_of_any_length_are_those_of_infer(loaded, monkeypatch):
    """Also beyond the context, where the window slides, and in batches of two."""
    model, tokenizer = loaded
    prompts = ["A", "The loss is", "Attention is a way to", "training a model " * 4, "word " * 30, "x"]
    lengths = [20, 1, 7, 12, 5, 40]
    expected = [
        generate_text(model, tokenizer, prompt, n, temperature=0)
        for prompt, n in zip(prompts, lengths, strict=True)
    ]
    for rows in (128, 2):
        monkeypatch.setattr(support.evaluation.likelihoods, "CONTINUATIONS_AT_ONCE", rows)
        assert (
            continuations(model, tokenizer, [tokenizer.encode(prompt) for prompt in prompts], lengths)
            == expected
        )


def test_a_continuation_ends_before_eos(loaded):
    """A model that is made to end after every third token: EOS inside one row leaves the others alone."""
    model, tokenizer = loaded

    class Ends(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config, self.embed_tokens = model.config, model.embed_tokens
            self.new_cache = model.new_cache

        def hidden_states(self, ids, cache=None):
            cache.length += ids.shape[1]
            ends = torch.full(ids.shape, cache.length % 3 == 0)
            return ends[..., None]

        def lm_head(self, ends):
            wanted = torch.where(ends[:, 0], tokenizer.eos_id, 65)
            return torch.nn.functional.one_hot(wanted, tokenizer.vocab_size)

    texts = continuations(Ends(), tokenizer, [[70], [70, 70], [70, 70, 70]], [9, 9, 9])
    letter = tokenizer.decode([65])
    assert texts == [letter * 2, letter, ""]


# ---- scores --------------------------------------------------------------------------------------


def scored(likelihoods: list[float], text: str | None = None, **fields) -> CaseResult:
    case = Case(prompt="p", **fields)
    return score_case(case, [(value, False) for value in likelihoods], [[1, 2]] * len(likelihoods), text)


def test_the_score_of_a_case_is_the_mean_of_its_parts():
    assert scored([-6.0], target="four").score == pytest.approx(math.exp(-6 / 4))
    assert scored([-6.0], target="zwölf").score == pytest.approx(math.exp(-6 / 6)), (
        "per byte, not per character"
    )
    assert scored([-6.0, -5.0], choices=["a", "b"], target="b").parts == {"choices": 1.0}
    assert scored([-6.0, -5.0], choices=["a", "b"], target="a").parts == {"choices": 0.0}
    assert scored([-5.0, -5.0, -9.0], choices=["a", "b", "c"], target="b").score == 0.5, (
        "equally likely: its share"
    )
    assert scored([], "one two", contains=["two", "one"]).score == 1
    assert scored([], "one two", contains=["two", "three"]).score == 0
    assert scored([], "one 22", regex=r"\d+$").score == 1
    assert scored([], "one", regex=r"\d+$").score == 0
    both = scored([-4.0], "none of it", target="four", contains=["five"])
    assert both.parts == {"target": pytest.approx(math.exp(-1)), "contains": 0.0}
    assert both.score == pytest.approx(math.exp(-1) / 2)


def test_texts_the_tokenizer_cannot_encode_score_zero():
    nothing = scored([-math.inf], target="four")
    assert (nothing.score, nothing.chosen) == (0.0, None)
    assert scored([-math.inf, -math.inf], choices=["a", "b"], target="b").parts == {"choices": 0.0}
    assert scored([-math.inf, -7.0], choices=["a", "b"], target="b").parts == {"choices": 1.0}
    assert scored([], None, regex=".*").score == 0, "no output at all"


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_the_score_of_an_all_zero_model_follows_from_its_vocabulary(run, tmp_path, kind):
    made = run(tmp_path / "run", "training.max_steps=0", f"tokenizer.kind={kind}")
    checkpoint = made.checkpoint()
    checkpoint["state_dict"] = {
        name: torch.zeros_like(weight) for name, weight in checkpoint["state_dict"].items()
    }
    torch.save(checkpoint, tmp_path / "zero.ckpt")
    model, tokenizer, _ = load_model(tmp_path / "zero.ckpt")
    [result] = score_cases(model, tokenizer, [Case(prompt="The", target=" learning rate")])
    n_tokens = len(tokenizer.encode(" learning rate"))
    assert (result.n_tokens, result.n_bytes) == (n_tokens, 14)
    assert result.score == pytest.approx(tokenizer.vocab_size ** (-n_tokens / 14), rel=1e-5)


def test_an_empty_prompt_is_the_start_of_a_document(loaded):
    model, tokenizer = loaded
    [result] = score_cases(
        model, tokenizer, [Case(prompt="", choices=["It is.", "It are."], target="It is.")]
    )
    assert result.continuation is None
    for value, text in zip(result.logprobs, ("It is.", "It are."), strict=True):
        assert value == pytest.approx(naive(model, [tokenizer.eos_id], tokenizer.encode(text))[0], rel=1e-5)


# ---- instructions --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama + bos", "space first + bos", "bytes + bos", "bpe"])
def test_a_target_is_scored_with_the_ids_that_it_has_after_its_prompt(name):
    """The expected ids come from prompt and target as one text: encoded apart, some of these tokenizers put
    an extra space before the target."""
    tokenizer = tokenizer_like(name)
    torch.manual_seed(0)
    model = GPTMini(
        GPTConfig(
            vocab_size=tokenizer.vocab_size, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, max_seq_len=32
        )
    ).eval()
    pairs = [
        ("tick", " tock"),
        ("Who are", " you?"),
        ("", "tick tock"),
        ("tick tock.\n", "Who"),
        ("the clock says ", "12345"),
    ]
    cases = [Case(prompt=prompt, target=target, choices=[target, target + "!"]) for prompt, target in pairs]
    for case, result in zip(cases, score_cases(model, tokenizer, cases), strict=True):
        context = (
            tokenizer.encode_prompt(case.prompt)
            if case.prompt
            else [*tokenizer.bos_ids] or [tokenizer.eos_id]
        )
        whole = tokenizer.encode(case.prompt + case.target)
        known = len(tokenizer.encode(case.prompt))
        if whole[:known] == tokenizer.encode(case.prompt):
            [(expected, _)] = log_likelihoods(model, [(context, whole[known:])])
            assert (
                result.logprobs[0] == pytest.approx(expected, abs=1e-5)
                and result.n_tokens == len(whole) - known
            )
        else:
            assert case.prompt.endswith(" "), "only there a token reaches over the border"


TEMPLATE = Template(
    system="Be. ", prompt="Ask {instruction} Say ", prompt_with_input="Ask {instruction} {input} Say "
)
INSTRUCTIONS = [
    Case(prompt="the loss", instruction=True, target="is high."),
    Case(prompt="a head", input="it", instruction=True, choices=["one", "none", "two"], target="none"),
    Case(prompt="the loss", target="is high."),
    Case(prompt="a step", instruction=True, contains=["x"], max_new_tokens=4),
]


@pytest.mark.parametrize("template", [TEMPLATE, None, TEMPLATES["alpaca"]], ids=["given", "none", "alpaca"])
def test_an_instruction_is_laid_out_by_the_models_template_or_by_the_one_named_chat(loaded, template):
    model, tokenizer = loaded
    results = score_cases(model, tokenizer, INSTRUCTIONS, template)
    layout = template or TEMPLATES["chat"]
    for case, result in zip(INSTRUCTIONS, results, strict=True):
        prompt = (
            prompt_ids(layout, tokenizer, case.prompt, case.input)
            if case.instruction
            else tokenizer.encode(case.prompt)
        )
        following = [
            tokenizer.encode(text) for text in case.choices or ([case.target] if case.target else [])
        ]
        expected = log_likelihoods(model, [(prompt, ids) for ids in following])
        assert result.logprobs == pytest.approx([value for value, _ in expected], rel=1e-5)
        assert result.continuation == continuations(model, tokenizer, [prompt], [case.max_new_tokens])[0]


def test_the_layout_changes_only_instructions(loaded):
    model, tokenizer = loaded
    other = TEMPLATE.model_copy(
        update={"prompt": "{instruction}? ", "prompt_with_input": "{instruction}: {input}? "}
    )
    results = [
        score_cases(model, tokenizer, INSTRUCTIONS[:3], template) for template in (TEMPLATE, other, None)
    ]
    for n, case in enumerate(INSTRUCTIONS[:3]):
        assert len({tuple(round(value, 4) for value in found[n].logprobs) for found in results}) == (
            3 if case.instruction else 1
        )


def test_likelihoods_of_an_answer_equal_a_naive_loop_over_the_written_out_text(loaded):
    model, tokenizer = loaded
    [one, two] = score_cases(model, tokenizer, INSTRUCTIONS[:2], TEMPLATE)
    [value] = one.logprobs
    assert value == pytest.approx(
        naive(model, tokenizer.encode("Be. Ask the loss Say "), tokenizer.encode("is high."))[0], rel=1e-5
    )
    prompt = tokenizer.encode("Be. Ask a head it Say ")
    assert two.logprobs == pytest.approx(
        [naive(model, prompt, tokenizer.encode(text))[0] for text in ("one", "none", "two")], rel=1e-5
    )


def evaluate_without_val(path: Path) -> CheckpointResult:
    return evaluate_checkpoints.evaluate_checkpoint(
        path, INSTRUCTIONS, with_val=False, config_path=None, device="cpu", texts_read={}
    )


def test_a_checkpoints_own_template_is_used_and_a_damaged_one_is_an_error(tiny_run, tmp_path):
    checkpoint = tiny_run.checkpoint()
    model, tokenizer, _ = load_model(tiny_run.folder / "final.ckpt")
    for name, template in (("own", TEMPLATE), ("none", None)):
        checkpoint[KEY]["template"] = template and template.model_dump()
        torch.save(checkpoint, tmp_path / f"{name}.ckpt")
        found = evaluate_without_val(tmp_path / f"{name}.ckpt")
        assert found.results == score_cases(model, tokenizer, INSTRUCTIONS, template)
    checkpoint[KEY]["template"] = {"prompt": "no slot"}
    torch.save(checkpoint, tmp_path / "damaged.ckpt")
    with pytest.raises(UserError, match=r"damaged\.ckpt has a damaged template"):
        evaluate_without_val(tmp_path / "damaged.ckpt")


def test_a_layout_the_tokenizer_cannot_encode_scores_zero():
    """The template named chat has characters that this vocabulary lacks; the same words without it are
    readable."""
    tokenizer = CharTokenizer.train(["the loss is high."])
    model = GPTMini(
        GPTConfig(
            vocab_size=tokenizer.vocab_size, d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=40
        )
    ).eval()
    results = score_cases(
        model,
        tokenizer,
        [INSTRUCTIONS[0], INSTRUCTIONS[2], Case(prompt="the loss", instruction=True, contains=["i"])],
    )
    assert [result.logprobs == [-math.inf] for result in results[:2]] == [True, False]
    assert (results[0].score, results[2].score, results[2].continuation) == (0, 0, None)


def test_the_command_reads_files_of_instructions(evaluate, tiny_run, tmp_path):
    file = tmp_path / "c.json"
    file.write_text(
        json.dumps(
            {
                "instructions": True,
                "cases": [{"prompt": "Name it.", "input": "a", "choices": ["one", "two"], "target": "two"}],
            }
        )
    )
    [row], _ = evaluate("--checkpoints", tiny_run.folder / "final.ckpt", "--cases", file)
    model, tokenizer, _ = load_model(tiny_run.folder / "final.ckpt")
    prompt = prompt_ids(TEMPLATES["chat"], tokenizer, "Name it.", "a")
    (one, _), (two, _) = log_likelihoods(model, [(prompt, tokenizer.encode(text)) for text in ("one", "two")])
    assert row["score"] == float(two > one)


# ---- ranks ---------------------------------------------------------------------------------------


def results_of(*scores: float) -> list[CaseResult]:
    return [CaseResult(score, {}, None, [], 0, 0, None, None) for score in scores]


def checkpoint_of(file: str, *scores: float) -> CheckpointResult:
    return CheckpointResult(file, [], "", 0, 0, 1, "byte 257", results_of(*scores))


def cases_of(n: int, **fields) -> list[Case]:
    return [Case(prompt="p", target="t", **fields) for _ in range(n)]


def test_ranks_with_ties():
    cases = cases_of(4)
    ranked = rank(
        [
            checkpoint_of("c", 0, 0, 1, 1),
            checkpoint_of("a", 1, 1, 0, 0),
            checkpoint_of("b", 0, 0, 0, 0),
            checkpoint_of("d", 1, 1, 1, 1),
        ],
        cases,
        seed=1,
    )
    assert [(c.file, c.rank, c.tied, c.score) for c in ranked] == [
        ("d", 1, False, 1),
        ("a", 2, True, 0.5),
        ("c", 2, True, 0.5),
        ("b", 4, False, 0),
    ]


def test_weights_and_categories():
    cases = [*cases_of(2, category="x"), *cases_of(1, category="y", weight=6)]
    [found] = rank([checkpoint_of("a", 1, 0, 0.5)], cases, seed=1)
    assert found.score == pytest.approx((1 + 0 + 6 * 0.5) / 8)
    assert found.categories == {"x": 0.5, "y": 0.5}


def test_the_interval_is_that_of_the_normal_approximation():
    """For n draws of 0 or 1 with mean p, it is p -+ 1.96 sqrt(p (1 - p) / n)."""
    n, wins = 400, 120
    [found] = rank([checkpoint_of("a", *[1] * wins, *[0] * (n - wins))], cases_of(n), seed=3)
    half = 1.96 * math.sqrt(0.3 * 0.7 / n)
    assert (found.low, found.high) == (
        pytest.approx(0.3 - half, abs=0.006),
        pytest.approx(0.3 + half, abs=0.006),
    )


def test_checkpoints_are_told_apart_by_their_differences_case_by_case():
    """Both differ from the first by 0.1. One is always a little worse, the other sometimes much better,
    sometimes worse."""
    dice = np.random.default_rng(5)
    first = dice.uniform(0.3, 0.7, 60)
    steady, noisy = first - 0.1, first - 0.1 + np.where(np.arange(60) % 2, 0.6, -0.6)
    found = {
        c.file: c
        for c in rank(
            [
                checkpoint_of("first", *first),
                checkpoint_of("steady", *steady),
                checkpoint_of("noisy", *noisy),
            ],
            cases_of(60),
            0,
        )
    }
    assert found["steady"].score == pytest.approx(found["noisy"].score, abs=1e-5)
    assert (found["first"].same_as_first, found["steady"].same_as_first, found["noisy"].same_as_first) == (
        True,
        False,
        True,
    )


def test_the_bootstrap_is_a_function_of_the_seed():
    made = [
        rank([checkpoint_of("a", *np.linspace(0, 1, 30) ** 2)], cases_of(30), seed)[0] for seed in (1, 1, 2)
    ]
    assert made[0] == made[1]
    assert (made[0].low, made[0].high) != (made[2].low, made[2].high)


def test_the_score_of_guessing():
    four = Case(prompt="p", choices=["a", "b", "c", "d"], target="a", category="x")
    two = Case(prompt="p", choices=["a", "b"], target="a", category="x", weight=3)
    assert chance_of(
        [
            four,
            two,
            *cases_of(1, category="y"),
            *cases_of(1, category="z"),
            four.model_copy(update={"category": "z"}),
        ]
    ) == {"x": pytest.approx((0.25 + 3 * 0.5) / 4), "y": None, "z": pytest.approx(0.125)}


# ---- the command ---------------------------------------------------------------------------------


def test_a_folder_is_ranked_with_each_file_once_and_the_same_each_time(evaluate, tiny_run):
    rows, err = evaluate("--checkpoints", tiny_run.folder, "--cases", CORPUS_CASES)
    assert sorted(row["step"] for row in rows) == [4, 8, 12]
    assert {row["rank"] for row in rows} <= {1, 2, 3}
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    assert all(row["low"] <= row["score"] <= row["high"] for row in rows)
    assert "last" in next(row["names"] for row in rows if row["step"] == 12)
    assert err == ""
    assert evaluate("--checkpoints", f"{tiny_run.folder}/step-*.ckpt", "--cases", CORPUS_CASES)[0] == rows


def test_validation_losses_are_those_of_the_training(evaluate, tiny_run):
    rows, _ = evaluate("--checkpoints", tiny_run.folder, "--cases", CORPUS_CASES, "--val")
    logged = {row["step"]: row["val_loss"] for row in tiny_run.val_rows}
    assert {row["step"]: row["val_loss"] for row in rows} == pytest.approx(logged, rel=1e-5)
    assert all(row["bits_per_byte"] > 0 for row in rows)


def test_without_cases_the_validation_loss_decides_the_rank(evaluate, tiny_run, tmp_path):
    """In the table, in --json, and in files: no scores, and no cases.csv of an earlier evaluation."""
    (tmp_path / "cases.csv").write_text("of an earlier evaluation")
    rows, _ = evaluate("--checkpoints", tiny_run.folder, "--val", "--output-dir", tmp_path)
    logged = sorted((row["val_loss"], row["step"]) for row in tiny_run.val_rows)
    assert [(row["val_loss"], row["step"]) for row in rows] == [
        (pytest.approx(loss, rel=1e-5), step) for loss, step in logged
    ]
    assert [row["rank"] for row in rows] == [1, 2, 3]
    assert all(row[name] is None for row in rows for name in ("score", "low", "high", "same_as_first"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "evaluation_results.csv",
        "report.html",
        "scores.png",
        "scores.svg",
    ]
    with open(tmp_path / "evaluation_results.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["val_loss"]) for row in table] == [row["val_loss"] for row in rows] and {
        row["score"] for row in table
    } == {""}
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "by their validation loss" in page and "Loss over step" in page
    assert "bootstrap" not in page and "Score" not in page and "<script>" not in page
    assert all(f"{row['val_loss']:.4f}" in page for row in rows)


def test_an_untrained_checkpoint_is_compared_whatever_its_warmup(evaluate, run, tmp_path):
    """A run of 0 steps writes a schedule of 1 step, shorter than the warmup of its config, and its
    validation text can still be read."""
    run(
        tmp_path / "untrained",
        "training.max_steps=0",
        "training.schedule_steps=null",
        "training.warmup_steps=5",
    )
    [row], err = evaluate("--checkpoints", tmp_path, "--val")
    assert row["step"] == 0 and row["val_loss"] == pytest.approx(math.log(400), abs=0.2) and err == ""


def test_the_table_without_cases_shows_losses_alone(tiny_run, capsys):
    assert evaluate_checkpoints.main(["--checkpoints", str(tiny_run.folder), "--val", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["rank", "file", "step", "val", "loss", "bits/byte"] and len(lines) == 4
    assert [line.split()[0] for line in lines[1:]] == ["1", "2", "3"]


def test_losses_are_ranked_in_bits_per_byte_and_equal_ones_share_a_rank():
    """A byte tokenizer has a lower loss on more tokens; a model that predicts nothing well is last, also
    where its loss is not a number."""
    plain = {"names": [], "run": "", "step": 1, "tokens": 1, "n_params": 1, "results": []}
    losses = {"bpe": (3.0, 2.0), "byte": (1.5, 2.2), "same": (3.0, 2.0), "broken": (math.nan, math.nan)}
    made = [
        CheckpointResult(name, tokenizer=name, val_loss=loss, bits_per_byte=bits, **plain)
        for name, (loss, bits) in losses.items()
    ]
    ranked = rank(made, [], 42)
    assert [(c.file, c.rank, c.tied) for c in ranked] == [
        ("bpe", 1, True),
        ("same", 1, True),
        ("byte", 3, False),
        ("broken", 4, False),
    ]


def test_result_files_agree_with_the_printed_results(evaluate, tiny_run, tmp_path):
    rows, _ = evaluate(
        "--checkpoints",
        tiny_run.folder,
        "--cases",
        CORPUS_CASES,
        "--output-dir",
        tmp_path / "results" / "baseline",
    )
    folder, cases = tmp_path / "results" / "baseline", read_cases([CORPUS_CASES])
    assert sorted(path.name for path in folder.iterdir()) == [
        "cases.csv",
        "evaluation_results.csv",
        "report.html",
        "scores.png",
        "scores.svg",
    ]
    with open(folder / "evaluation_results.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["file"], float(row["score"])) for row in table] == [
        (row["file"], row["score"]) for row in rows
    ]
    with open(folder / "cases.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(rows) * len(cases)
    best = [row for row in table if row["checkpoint"] == rows[0]["file"]]
    weighted = sum(float(row["score"]) * float(row["weight"]) for row in best) / sum(
        float(row["weight"]) for row in best
    )
    assert weighted == pytest.approx(rows[0]["score"], abs=1e-6)
    for row in best:
        if row["score_target"]:
            assert math.exp(float(row["logprob_per_byte"])) == pytest.approx(float(row["score_target"]))
            assert float(row["logprob_per_byte"]) == pytest.approx(
                float(row["logprob"]) / len(row["target"].encode())
            )
    assert {row["id"]: row["chosen"] == row["target"] for row in best if row["score_choices"]} == {
        row["id"]: row["score_choices"] == "1.0" for row in best if row["score_choices"]
    }
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert all(case.id in page for case in cases)


def test_the_table_shows_ranks_intervals_and_guessing(tiny_run, tmp_path, capsys):
    cases = write_cases(
        tmp_path / "c.yaml", [{"prompt": "", "choices": ["is", "are"], "target": "is", "category": "[bold]"}]
    )
    assert (
        evaluate_checkpoints.main(
            ["--checkpoints", str(tiny_run.folder), "--cases", str(cases), "--device", "cpu"]
        )
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["rank", "file", "step", "score", "95%", "interval", "[bold]"]
    assert "guessing" in lines[4] and lines[4].split()[-1] == "0.500"
    assert lines[5] == "= the same score", "one case that is won or lost cannot tell three apart"


def test_damaged_checkpoints_are_left_out_with_a_warning(evaluate, tiny_run, tmp_path):
    shutil.copyfile(tiny_run.folder / "final.ckpt", tmp_path / "whole.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "whole.ckpt").read_bytes()[:-500])
    rows, err = evaluate("--checkpoints", tmp_path, "--cases", CORPUS_CASES)
    assert [Path(row["file"]).name for row in rows] == ["whole.ckpt"]
    assert "cut.ckpt is left out" in err
    (tmp_path / "whole.ckpt").write_bytes(b"")
    with pytest.raises(UserError, match="none of the checkpoints"):
        evaluate("--checkpoints", tmp_path, "--cases", CORPUS_CASES)


def test_models_with_different_tokenizers_compare_and_unknown_characters_are_reported(evaluate, run, tmp_path):
    short = ("training.max_steps=1", "training.warmup_steps=0")
    for kind in ("byte", "char"):
        run(tmp_path / kind, *short, f"tokenizer.kind={kind}")
    cases = write_cases(
        tmp_path / "c.yaml",
        [
            {"prompt": "λ", "target": " a"},
            {"prompt": "The", "target": " loss"},
            {"prompt": "A", "contains": "λ"},
        ],
    )
    rows, err = evaluate("--checkpoints", tmp_path, "--cases", cases, "--tokenizer", "byte")
    assert {row["tokenizer"].split()[0] for row in rows} == {"byte", "char"}
    assert "--tokenizer byte is not what this model was trained with; using the checkpoint's own (char" in err
    assert "1 of 3 cases have characters that the tokenizer char" in err


def test_a_bad_output_folder_is_noticed_before_the_work(tiny_run, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(evaluate_checkpoints, "evaluate", None)
    with pytest.raises(SystemExit) as end:
        guarded(
            evaluate_checkpoints.main,
            [
                "--checkpoints",
                str(tiny_run.folder),
                "--cases",
                CORPUS_CASES,
                "--output-dir",
                str(tmp_path / "file"),
            ],
        )
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'file'}: File exists\n"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--checkpoints", "nowhere", "--cases", CORPUS_CASES], "nowhere: no checkpoint"),
        (["--checkpoints", "{run}", "--cases", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["--checkpoints", "{run}", "--cases", CORPUS_CASES, "--config", "config.yaml"], "goes with --val"),
        (["--checkpoints", "{run}", "--cases", CORPUS_CASES, "--seed", "-1"], "--seed -1"),
        (["--checkpoints", "nowhere", "--val"], "nowhere: no checkpoint"),
        (["--checkpoints", "{run}", "--cases", CORPUS_CASES, "--device", "tpu"], "device 'tpu'"),
    ],
)
def test_mistakes_are_answered(tiny_run, argv, said):
    with pytest.raises(UserError, match=said.replace(".", r"\.")):
        evaluate_checkpoints.main([word.format(run=tiny_run.folder) for word in argv])


# ---- does the rank follow the training? ----------------------------------------------------------


def next_word_cases(path: Path, shuffled: bool) -> Path:
    """200 places in the bundled corpus: which of four words comes next? With `shuffled`, a random one is
    declared right."""
    dice = np.random.default_rng(7)
    sentences = [
        line.split()
        for line in (REPO / "data" / "tiny_corpus.txt").read_text(encoding="utf-8").splitlines()
        if len(line.split()) > 10
    ]
    words = sorted({f" {word}" for sentence in sentences for word in sentence})
    cases = []
    for _ in range(200):
        sentence = sentences[dice.integers(len(sentences))]
        place = dice.integers(5, len(sentence))
        target = f" {sentence[place]}"
        choices = [
            target,
            *dice.choice([word for word in words if word != target], 3, replace=False).tolist(),
        ]
        dice.shuffle(choices)
        right = str(dice.choice(choices)) if shuffled else target
        cases.append(
            {
                "prompt": " ".join(sentence[max(0, place - 8) : place]),
                "choices": choices,
                "target": right,
                "max_new_tokens": 1,
            }
        )
    return write_cases(path, cases)


def spearman(one: list[float], other: list[float]) -> float:
    """The correlation of ranks (no ties are expected)."""
    return float(np.corrcoef(np.argsort(np.argsort(one)), np.argsort(np.argsort(other)))[0, 1])


@pytest.mark.slow
def test_the_rank_follows_the_training_but_not_with_shuffled_targets(evaluate, run, tmp_path):
    words = (
        "model.d_model=64",
        "tokenizer.vocab_size=512",
        "data.stride=8",
        "training.micro_batch_size=16",
        "training.grad_accum_steps=1",
    )
    steps = ("training.schedule_steps=120", "training.val_every=120", "checkpoint.save_every=20")
    true, shuffled = (
        next_word_cases(tmp_path / f"{name}.json", name == "shuffled") for name in ("true", "shuffled")
    )
    gained: dict[str, list[float]] = {"true": [], "shuffled": []}
    for seed in (1, 2, 3):
        for name, n in (("trained", 120), ("untrained", 0)):
            run(tmp_path / str(seed) / name, *words, *steps, f"training.max_steps={n}", f"seed={seed}")
        rows, _ = evaluate("--checkpoints", tmp_path / str(seed), "--cases", true)
        assert sorted(row["step"] for row in rows) == [0, 20, 40, 60, 80, 100, 120]
        assert rows[-1]["step"] == 0, "the untrained one is last"
        assert spearman([row["step"] for row in rows], [row["score"] for row in rows]) >= 0.8
        for name, cases in (("true", true), ("shuffled", shuffled)):
            scores = {
                row["step"]: row["score"]
                for row in evaluate("--checkpoints", tmp_path / str(seed), "--cases", cases)[0]
            }
            gained[name].append(scores[120] - scores[0])
        assert all(0.15 < score < 0.35 for score in scores.values()), "with shuffled targets all guess"
    assert np.mean(gained["true"]) > 0.1
    assert abs(np.mean(gained["shuffled"])) < np.mean(gained["true"]) / 3
