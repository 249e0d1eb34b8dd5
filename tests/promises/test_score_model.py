"""A model on cases: likelihoods against a naive loop, scores by hand, instructions as they are laid out."""

import math
from pathlib import Path

import pytest
import torch
from foreign_tokenizers import tokenizer_like

import evaluate_checkpoints
import support.evaluation.likelihoods
from infer import generate_text
from model import GPTConfig, GPTMini
from support.checkpoint import KEY, load_model
from support.evaluation.case_files import Case
from support.evaluation.case_scores import score_case
from support.evaluation.likelihoods import continuations, log_likelihoods
from support.evaluation.results import CaseResult, CheckpointResult
from support.evaluation.score_model import score_cases
from support.messages import UserError
from support.text.chat_template import TEMPLATES, Template, prompt_ids
from tokenizer import CharTokenizer


@pytest.fixture(scope="module")
def loaded(tiny_run):
    return load_model(tiny_run.folder / "final.ckpt")[:2]


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
