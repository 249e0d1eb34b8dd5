"""A model on cases: how likely it finds the given texts, what it writes, and so what it scores."""

import math
from dataclasses import dataclass

from model import GPTMini
from support.evaluation.case_files import Case
from support.evaluation.case_scores import score_case
from support.evaluation.likelihoods import continuations, encode, log_likelihoods
from support.evaluation.results import CaseResult
from support.messages import UserError
from support.text.chat_template import DEFAULT_TEMPLATE, TEMPLATES, Template, first_prompt_parts
from tokenizer import Tokenizer

IMPOSSIBLE = (-math.inf, False)  # the likelihood of a text that has characters the tokenizer lacks


@dataclass
class EncodedCase:
    """The ids of a case's texts; None for a text that has characters the tokenizer lacks."""

    prompt: list[int] | None
    options: list[list[int] | None]  # each as it follows the prompt


def options_of(case: Case) -> list[str]:
    """The texts whose likelihood counts: the choices, or the target alone, or none."""
    if case.choices:
        return case.choices
    return [] if case.target is None else [case.target]


def encode_case(case: Case, tokenizer: Tokenizer, layout: Template) -> EncodedCase:
    """The ids of the prompt and of each option after it; an instruction is laid out by the template. An empty
    prompt is the start of a document: BOS, or EOS for a tokenizer without BOS."""
    parts: list[str | int] = [case.prompt]
    try:
        if case.instruction:
            parts = first_prompt_parts(layout, tokenizer, case.prompt, case.input)
            prompt = tokenizer.encode_parts(parts)
        elif case.prompt:
            prompt = tokenizer.encode_prompt(case.prompt)
        else:
            prompt = list(tokenizer.bos_ids) or [tokenizer.eos_id]
    except UserError:
        return EncodedCase(None, [encode(tokenizer, option) for option in options_of(case)])
    return EncodedCase(prompt, [encode(tokenizer, option, after=parts) for option in options_of(case)])


def score_cases(
    model: GPTMini, tokenizer: Tokenizer, cases: list[Case], template: Template | None = None
) -> list[CaseResult]:
    """The result of every case, computed in a few batches. Instructions are laid out by `template`, or by
    the one named chat for a model that has none."""
    layout = template or TEMPLATES[DEFAULT_TEMPLATE]
    encoded = [encode_case(case, tokenizer, layout) for case in cases]
    likelihoods = option_likelihoods(model, encoded)
    outputs = greedy_outputs(model, tokenizer, cases, encoded)
    return [
        score_case(case, found, ids.options, output)
        for case, ids, found, output in zip(cases, encoded, likelihoods, outputs, strict=True)
    ]


def option_likelihoods(model: GPTMini, encoded: list[EncodedCase]) -> list[list[tuple[float, bool]]]:
    """For each case and each of its options, the log-probability and whether greedy decoding gives it."""
    likelihoods = [[IMPOSSIBLE] * len(ids.options) for ids in encoded]
    positions = [
        (n, k)
        for n, ids in enumerate(encoded)
        for k, option in enumerate(ids.options)
        if ids.prompt is not None and option is not None
    ]
    pairs = [(encoded[n].prompt, encoded[n].options[k]) for n, k in positions]
    for (n, k), found in zip(positions, log_likelihoods(model, pairs), strict=True):
        likelihoods[n][k] = found
    return likelihoods


def greedy_outputs(
    model: GPTMini, tokenizer: Tokenizer, cases: list[Case], encoded: list[EncodedCase]
) -> list[str | None]:
    """What the model writes after each prompt; None for a case that is only compared by likelihood, and for a
    prompt the tokenizer cannot encode."""
    numbers = [n for n, case in enumerate(cases) if case.continued and encoded[n].prompt is not None]
    prompts = [encoded[n].prompt for n in numbers]
    lengths = [cases[n].max_new_tokens for n in numbers]
    outputs: list[str | None] = [None] * len(cases)
    for n, text in zip(numbers, continuations(model, tokenizer, prompts, lengths), strict=True):
        outputs[n] = text
    return outputs
