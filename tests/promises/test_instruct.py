"""instruct.py: pairs become ids and labels, and a model is scored on them one pair at a time."""

from collections import Counter

import numpy as np
import pytest
import torch
from instructions import SHORT, config_of

from instruct import IGNORE, Example, InstructPairDataset, Pair, encode_pair, score_responses
from model import GPTConfig, GPTMini
from support.evaluation.validation import validate
from support.messages import UserError
from support.text.chat_template import Template
from tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, build_tokenizer

BYTE = ByteTokenizer()


def pair(instruction: str, output: str, input: str = "") -> Pair:
    return Pair(instruction, input, output, "somewhere")


def ids_of(pair: Pair) -> tuple[list[int], list[int]]:
    """(prompt, response with EOS) of a pair in the template SHORT and bytes."""
    prompt = f"Q{pair.instruction},{pair.input}A" if pair.input else f"Q{pair.instruction}A"
    return list(prompt.encode()), [*pair.output.encode(), 256]


# ---- labels --------------------------------------------------------------------------------------


def test_the_response_and_its_eos_are_scored_and_the_prompt_is_not():
    """Q a b A x y z EOS is seven positions, each labelled with the next id. `A` is the first scored
    position, because x follows it."""
    example = encode_pair(pair("ab", "xyz"), BYTE, SHORT)
    assert (example.ids.tolist(), example.n_prompt, len(example)) == (
        [81, 97, 98, 65, 120, 121, 122, 256],
        4,
        7,
    )
    item = InstructPairDataset([pair("ab", "xyz")], BYTE, SHORT, 11)[0]
    assert item["input_ids"].tolist() == [81, 97, 98, 65, 120, 121, 122]
    assert item["labels"].tolist() == [-100, -100, -100, 120, 121, 122, 256]
    assert set(item) == {"input_ids", "labels"}
    unmasked = InstructPairDataset([pair("ab", "xyz")], BYTE, SHORT, 11, mask_prompt=False)[0]
    assert unmasked["labels"].tolist() == [97, 98, 65, 120, 121, 122, 256]
    assert torch.equal(unmasked["input_ids"], item["input_ids"])


def test_a_prompt_without_tokens_masks_nothing():
    assert Example(np.array([5, 6, 7]), 0).labels(True).tolist() == [6, 7]


def test_the_input_is_part_of_the_prompt():
    item = InstructPairDataset([pair("a", "x", "in")], BYTE, SHORT, 11)[0]
    assert item["input_ids"].tolist() == list(b"Qa,inAx")
    assert item["labels"].tolist() == [-100] * 5 + [ord("x"), 256]


def test_making_labels_leaves_the_ids_alone():
    example = Example(np.array([5, 6, 7, 8]), 2)
    assert example.labels(True).tolist() == [IGNORE, 7, 8]
    assert example.labels(False).tolist() == [6, 7, 8]
    assert example.ids.tolist() == [5, 6, 7, 8]


def test_rows_are_padded_to_the_longest_row_of_the_batch_with_unscored_eos():
    made = InstructPairDataset([pair("a", "x"), pair("b", "yyy", "i"), pair("c", "zz")], BYTE, SHORT, 23)
    batch = made.batch([2, 0])
    assert batch["input_ids"].tolist() == [[*b"QcAzz"], [*b"QaAx", 256]]
    assert batch["labels"].tolist() == [[-100, -100, *b"zz", 256], [-100, -100, ord("x"), 256, -100]]
    assert made.batch([1])["input_ids"].shape == (1, 8)
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64


LETTERS = [
    "a",
    "b",
    "e",
    " ",
    " ",
    "\n",
    "é",
    "∑",
    "\U0001f600",
    "{input}",
    "<|endoftext|>",
    "### ",
    "the",
    "\\1",
    "\t",
    ".",
]


def random_pairs(rng: np.random.Generator, n: int, longest: int = 12) -> list[Pair]:
    """Pairs of texts of any characters. The instruction and the output are never blank."""

    def text(shortest: int) -> str:
        return "".join(rng.choice(LETTERS, rng.integers(shortest, longest)))

    return [
        pair(text(0) + "i" + text(0), text(0) + "o" + text(0), text(0) if rng.random() < 0.5 else "")
        for _ in range(n)
    ]


def tokenizer_of(kind: str, pairs: list[Pair], template: Template) -> Tokenizer:
    texts = [template.system + template.fill(p.instruction, p.input) + p.output for p in pairs]
    return build_tokenizer(kind, [*texts, "".join(LETTERS)], 320)


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_the_scored_labels_spell_the_output_and_eos_for_any_texts(kind, packing):
    rng = np.random.default_rng(5)
    pairs = random_pairs(rng, 150)
    template = Template(
        system="Sys\n", prompt="\n### {instruction}\n\n", prompt_with_input="\n### {instruction} {input} "
    )
    tokenizer = tokenizer_of(kind, pairs, template)
    longest = max(len(encode_pair(p, tokenizer, template)) for p in pairs)
    made = InstructPairDataset(pairs, tokenizer, template, longest, packing=packing)
    found, prompts = [], []
    for start in range(0, len(made), 7):
        batch = made.batch(range(start, min(start + 7, len(made))))
        segments = batch.get("segments", torch.zeros_like(batch["labels"]))
        for ids, labels, numbers in zip(batch["input_ids"], batch["labels"], segments, strict=True):
            for number in numbers.unique():
                here = (numbers == number) & (labels != IGNORE)
                if here.any():
                    found.append(tokenizer.decode(labels[here].tolist()))
                    first = int(here.nonzero()[0])
                    prompts.append(
                        tokenizer.decode(ids[: first + 1][numbers[: first + 1] == number].tolist())
                    )
    assert found == [p.output + "<|endoftext|>" for p in pairs]
    assert prompts == ["Sys\n" + template.fill(p.instruction, p.input) for p in pairs]


def test_characters_that_the_tokenizer_lacks_are_refused_with_the_rows_place():
    tokenizer = CharTokenizer.train(["QabxA"])
    for bad in (Pair("a∑", "", "x", "rows.json, row 9"), Pair("a", "", "∑", "rows.json, row 9")):
        with pytest.raises(UserError, match=r"rows\.json, row 9: unknown characters '∑'"):
            InstructPairDataset([pair("a", "x"), bad], tokenizer, SHORT, 9)


# ---- too long ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seq_len", "cut", "drop"),
    [  # the pair takes 7 positions, 4 of its 8 ids are prompt
        (8, b"QabAxyz", b"QabAxyz"),
        (7, b"QabAxyz", b"QabAxyz"),
        (6, b"abAxyz", None),
        (5, b"bAxyz", None),
        (4, b"Axyz", None),
        (3, None, None),  # an answer would be left without any question
        (2, None, None),
    ],
)
def test_a_pair_that_is_too_long_loses_the_start_of_its_prompt_and_nothing_of_its_response(
    seq_len, cut, drop
):
    for too_long, kept in (("cut", cut), ("drop", drop)):
        if kept is None:
            with pytest.raises(UserError, match=f"none of 1 instructions fits training.seq_len={seq_len}"):
                InstructPairDataset([pair("ab", "xyz")], BYTE, SHORT, seq_len, too_long=too_long)
            continue
        made = InstructPairDataset([pair("ab", "xyz")], BYTE, SHORT, seq_len, too_long=too_long)
        item = made[0]
        assert item["input_ids"].tolist() == list(kept)
        assert item["labels"].tolist() == [-100] * (len(kept) - 4) + [*b"xyz", 256]
        assert (made.n_cut, made.n_dropped, made.n_bytes) == (int(len(kept) < 7), 0, 3)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("too_long", ["cut", "drop"])
def test_what_is_cut_and_dropped_is_counted_and_the_rest_is_whole(too_long, packing):
    """The same rule in other words: the last seq_len + 1 ids of a pair are kept if at least one of them
    belongs to the prompt."""
    pairs = random_pairs(np.random.default_rng(3), 80, longest=5)
    for seq_len in (14, 23, 40, 999):
        kept, n_cut, n_dropped, n_bytes = [], 0, 0, 0
        for p in pairs:
            prompt, response = ids_of(p)
            end = (prompt + response)[-(seq_len + 1) :]
            shortened = len(end) < len(prompt + response)
            if len(response) > seq_len or (shortened and too_long == "drop"):
                n_dropped += 1
                continue
            n_cut, n_bytes = n_cut + shortened, n_bytes + len(response) - 1
            kept.append((end, len(end) - len(response)))
        made = InstructPairDataset(pairs, BYTE, SHORT, seq_len, packing=packing, too_long=too_long)
        assert [(e.ids.tolist(), e.n_prompt) for e in made.examples] == kept
        assert (made.n_cut, made.n_dropped, made.n_bytes) == (n_cut, n_dropped, n_bytes)
        assert seq_len == 999 or n_dropped, "at these sizes some pairs are dropped"
        assert seq_len > 23 or too_long == "drop" or n_cut


# ---- padding and packing -------------------------------------------------------------------------


def pieces(made: InstructPairDataset, size: int = 3) -> list[tuple[list[int], list[int]]]:
    """(inputs, labels) of each pair, taken out of the batches; the padding is checked and left out."""
    found = []
    for start in range(0, len(made), size):
        batch = made.batch(range(start, min(start + size, len(made))))
        for row, (ids, labels) in enumerate(
            zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
        ):
            numbers = (
                batch["segments"][row].tolist()
                if "segments" in batch
                else [int(256 in labels[:t]) for t in range(len(labels))]
            )
            assert numbers == sorted(numbers) and numbers[0] == 0
            for number in range(max(numbers) + 1):
                here = [t for t, n in enumerate(numbers) if n == number]
                one = [ids[t] for t in here], [labels[t] for t in here]
                if set(one[1]) == {IGNORE}:
                    assert number == max(numbers) and set(one[0]) == {256}, (
                        "the padding is at the end, and is EOS"
                    )
                else:
                    found.append(one)
    return found


def test_packing_and_padding_hold_the_same_pairs_with_the_same_labels():
    pairs = random_pairs(np.random.default_rng(8), 60)
    expected = []
    for p in pairs:
        prompt, response = ids_of(p)
        expected.append(((prompt + response)[:-1], [IGNORE] * (len(prompt) - 1) + response))
    longest = max(len(ids) for ids, _ in expected)
    for seq_len in (longest, longest + 1, 3 * longest, 40 * longest):
        padded, packed = (
            InstructPairDataset(pairs, BYTE, SHORT, seq_len, packing=packing) for packing in (False, True)
        )
        assert pieces(padded) == expected
        assert pieces(packed) == expected
        assert len(packed) < len(padded) == 60
        assert {packed[i]["input_ids"].shape for i in range(len(packed))} == {(seq_len,)}
        assert packed.batch([len(packed) - 1])["segments"].shape == (1, seq_len)


def test_a_block_is_full_when_the_next_pair_does_not_fit():
    """Pairs of 4, 7, 5, 4 and 8 positions in blocks of 11: the first two fill a block, the next two leave
    two positions free."""
    pairs = [pair("i", "o"), pair("ab", "xyz"), pair("i", "oo"), pair("i", "o"), pair("abc", "xyz")]
    packed = InstructPairDataset(pairs, BYTE, SHORT, 11, packing=True)
    batch = packed.batch(range(len(packed)))
    assert batch["segments"].tolist() == [[0] * 4 + [1] * 7, [0] * 5 + [1] * 4 + [2] * 2, [0] * 8 + [1] * 3]
    assert batch["input_ids"][1].tolist() == [*b"QiAooQiAo", 256, 256]
    assert batch["labels"][1].tolist() == [-100, -100, *b"oo", 256, -100, -100, *b"o", 256, -100, -100]


@pytest.mark.parametrize("made_packed", [False, True])
def test_the_first_pairs_are_given_padded_or_packed(made_packed):
    pairs = [pair("i", "o"), pair("ab", "xyz"), pair("i", "oo")]
    made = InstructPairDataset(pairs, BYTE, SHORT, 11, packing=made_packed)
    assert made.example_batch(2, packing=False)["input_ids"].tolist() == [
        [*b"QiAo", 256, 256, 256],
        [*b"QabAxyz"],
    ]
    assert made.example_batch(2, packing=True)["input_ids"].tolist() == [[*b"QiAoQabAxyz"]]
    assert len(made.example_batch(99, packing=False)["labels"]) == 3


# ---- the model -----------------------------------------------------------------------------------

FEW = CharTokenizer("ab:,")  # with so few tokens some responses are right by chance
COLON = Template(prompt="{instruction}:", prompt_with_input="{instruction},{input}:")


def few_pairs(n: int = 70) -> list[Pair]:
    rng = np.random.default_rng(6)

    def word(shortest: int, longest: int) -> str:
        return "".join(rng.choice(["a", "b"], rng.integers(shortest, longest + 1)))

    return [pair(word(1, 6), word(1, 3), word(0, 3)) for _ in range(n)]


@pytest.fixture(params=["rope", "learned"])
def net(request) -> GPTMini:
    torch.manual_seed(7)
    sizes = {"vocab_size": 5, "d_model": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 37}
    model = GPTMini(GPTConfig(**sizes, position=request.param, dropout=0.2, tie_embeddings=False)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.4)  # far from uniform, and every position counts
    torch.nn.init.zeros_(
        model.lm_head.weight[2:4].detach()
    )  # no colon and no comma: guesses are right more often
    return model


def both(pairs: list[Pair], **options) -> list[InstructPairDataset]:
    return [
        InstructPairDataset(pairs, FEW, COLON, 37, packing=packing, **options) for packing in (False, True)
    ]


def batches(made: InstructPairDataset, size: int) -> list[dict]:
    return [made.batch(range(start, min(start + size, len(made)))) for start in range(0, len(made), size)]


@torch.no_grad()
def naive_scores(net: GPTMini, pairs: list[Pair]) -> list[float]:
    """The five sums, computed one pair and one token at a time, each token from all ids before it."""
    loss = n_targets = n_right = n_answers = n_answers_right = 0
    for p in pairs:
        before = FEW.encode(f"{p.instruction},{p.input}:" if p.input else f"{p.instruction}:")
        right = []
        for token in [*FEW.encode(p.output), FEW.eos_id]:
            logits = net(torch.tensor([before]))[0, -1].double()
            loss -= logits.log_softmax(-1)[token].item()
            right.append(int(logits.argmax()) == token)
            before = [*before, token]
        n_targets, n_right = n_targets + len(right), n_right + sum(right)
        n_answers, n_answers_right = n_answers + 1, n_answers_right + all(right)
    return [loss, n_targets, n_right, n_answers, n_answers_right]


def test_scores_of_responses_equal_a_naive_loop_padded_or_packed(net):
    pairs = few_pairs()
    expected = naive_scores(net, pairs)
    assert 0 < expected[4] < expected[3] == 70 and expected[4] < expected[2] < expected[1], (
        "the case is not trivial"
    )
    for made in both(pairs):
        for size in (1, 4, 70):
            found = sum(score_responses(net, batch).double() for batch in batches(made, size)).tolist()
            assert found[0] == pytest.approx(expected[0], rel=1e-5)
            assert found[1:] == expected[1:]


@pytest.mark.parametrize("mask_prompt", [True, False])
def test_packing_and_padding_have_the_same_loss(net, mask_prompt):
    pairs = few_pairs()
    sums = []
    for made in both(pairs, mask_prompt=mask_prompt):
        with torch.no_grad():
            sums.append(
                torch.stack([torch.stack(net(**batch)) for batch in batches(made, 5)])
                .double()
                .sum(dim=0)
                .tolist()
            )
    assert sums[0][0] == pytest.approx(sums[1][0], rel=1e-5)
    assert sums[0][1] == sums[1][1]
    if mask_prompt:
        assert sums[0] == pytest.approx(naive_scores(net, pairs)[:2], rel=1e-5)


@torch.no_grad()
def test_a_pair_in_a_block_has_the_logits_that_it_has_alone(net):
    pairs = few_pairs(30)
    _, packed = both(pairs)
    assert len(packed) < 15
    whole = packed.batch(range(len(packed)))
    logits, rest = net(whole["input_ids"], segments=whole["segments"]), iter(pairs)
    for row, numbers in enumerate(whole["segments"]):
        for number in range(len(packed.blocks[row])):
            p = next(rest)
            text = (f"{p.instruction},{p.input}:" if p.input else f"{p.instruction}:") + p.output
            alone = net(torch.tensor([FEW.encode(text)]))[0]
            torch.testing.assert_close(logits[row][numbers == number], alone, rtol=1e-5, atol=1e-5)
    assert next(rest, None) is None


@torch.no_grad()
def test_changing_one_pair_of_a_block_leaves_the_others_alone(net):
    _, packed = both(few_pairs(12))
    batch = packed.batch([0])
    ids, segments = batch["input_ids"], batch["segments"]
    before = net(ids, segments=segments)
    assert len(segments.unique()) >= 4
    for number in segments.unique():
        here = segments == number
        after = net(torch.where(here, (ids + 1) % 5, ids), segments=segments)
        torch.testing.assert_close(after[~here], before[~here], rtol=0, atol=1e-6)
        assert (after[here] - before[here]).abs().amax(dim=-1).min() > 1e-3


def test_a_batch_without_any_target_scores_nothing(net):
    """A process that has no validation rows left gets such a batch."""
    for made in both(few_pairs(9)):
        batch = made.batch(range(2))
        batch["labels"].fill_(IGNORE)
        assert score_responses(net, batch).tolist() == [0.0] * 5


def test_a_row_without_targets_is_not_counted_as_a_response(net):
    padded, _ = both(few_pairs(3))
    batch = padded.batch([0, 1, 2])
    batch["labels"][1] = IGNORE
    expected = score_responses(net, padded.batch([0])) + score_responses(net, padded.batch([2]))
    torch.testing.assert_close(score_responses(net, batch), expected, rtol=1e-5, atol=1e-5)


def test_a_response_is_right_only_if_all_its_tokens_are():
    """The net answers 1 everywhere. Each row holds two responses: 1 1 and 1 2, then 2 and 1."""
    labels = torch.tensor([[-100, 1, 1, -100, 1, 2, -100], [-100, -100, 2, -100, 1, -100, -100]])
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 2], [0, 0, 0, 1, 1, 2, 2]])

    def net(input_ids: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
        return torch.tensor([0.0, 1.0, 0.0]).expand(*input_ids.shape, 3)

    wrong = np.log(2 + np.e)  # the loss of a wrong token, whose probability is 1 / (1 + e + 1)
    loss, *counts = score_responses(
        net, {"input_ids": torch.zeros_like(labels), "segments": segments, "labels": labels}
    ).tolist()
    assert loss == pytest.approx(4 * (wrong - 1) + 2 * wrong)
    assert counts == [6, 4, 4, 2]


def test_the_loss_of_zero_weights_is_the_logarithm_of_the_vocabulary_for_each_token(tmp_path):
    """All 257 tokens are equally likely. The outputs have 3 bytes and 1 byte; with EOS that is 4 and 2
    targets."""
    config = config_of(tmp_path / "rows.json", seq_len=19)
    model = GPTMini(GPTConfig(vocab_size=257, d_model=8, n_heads=2, n_layers=1, max_seq_len=19)).eval()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    found = validate(model, BYTE, [pair("ab", "xyz"), pair("i", "o", "in")], config)
    assert found.loss == pytest.approx(np.log(257))
    assert (found.n_documents, found.n_tokens, found.n_bytes, found.seq_len) == (2, 6, 4, 19)
    assert found.bits_per_byte == pytest.approx(6 * np.log2(257) / 4)
    assert (found.token_accuracy, found.response_accuracy) == (0, 0)


# ---- fingerprint and description -----------------------------------------------------------------


def test_the_fingerprint_changes_with_any_token_and_not_with_the_packing():
    texts = [("ab", "xyz", ""), ("c", "u", "in"), ("d", "vw", "")]

    def fingerprint(texts: list[tuple[str, str, str]], **options) -> str:
        return InstructPairDataset([pair(*row) for row in texts], BYTE, SHORT, 23, **options).fingerprint()

    found = [fingerprint(texts)]
    assert fingerprint(texts) == fingerprint(texts, packing=True) == found[0]
    for row in range(3):
        for part in range(3):
            for place in range(len(texts[row][part])):
                changed = [list(row) for row in texts]
                changed[row][part] = texts[row][part][:place] + "#" + texts[row][part][place + 1 :]
                found.append(fingerprint([tuple(row) for row in changed]))
    assert len(found) == 1 + sum(len(part) for row in texts for part in row) == 13
    found += [fingerprint(texts[:2]), fingerprint(texts[::-1]), fingerprint([*texts, texts[0]])]
    assert max(Counter(found).values()) == 1


def test_the_fingerprint_changes_with_where_the_response_begins():
    """The ids are the same in both cases: a b c EOS."""
    bare = Template(prompt="{instruction}", prompt_with_input="{instruction}{input}")
    early, late = (InstructPairDataset([pair(*row)], BYTE, bare, 23) for row in (("a", "bc"), ("ab", "c")))
    assert early.examples[0].ids.tolist() == late.examples[0].ids.tolist() == [*b"abc", 256]
    assert early.fingerprint() != late.fingerprint()


def test_the_description_counts_pairs_tokens_rows_and_blocks():
    """The first three pairs have 8, 5 and 8 ids. In 6 positions two of them lose one id each, and the
    fourth pair never fits."""
    pairs = [pair("ab", "xyz"), pair("i", "o"), pair("abcd", "z")]
    assert (
        InstructPairDataset(pairs, BYTE, SHORT, 9).describe(3)
        == "3 instructions, 21 tokens, 8 of them scored, rows of up to 7"
    )
    assert (
        InstructPairDataset(pairs, BYTE, SHORT, 9, mask_prompt=False)
        .describe(3)
        .startswith("3 instructions, 21 tokens, 18 of them scored")
    )
    assert InstructPairDataset(pairs, BYTE, SHORT, 11, packing=True).describe(3) == (
        "3 instructions, 21 tokens, 8 of them scored, packed into 2 blocks of 11"
    )
    pairs.append(pair("a", "toolong"))
    assert InstructPairDataset(pairs, BYTE, SHORT, 6).describe(4) == (
        "4 instructions, 19 tokens, 8 of them scored, rows of up to 6 (2 cut at the start of their prompt "
        "and 1 dropped: longer than 6)"
    )
    assert InstructPairDataset(pairs, BYTE, SHORT, 6, too_long="drop").describe(4) == (
        "4 instructions, 5 tokens, 2 of them scored, rows of up to 4 (3 dropped: longer than 6)"
    )
    thousands = InstructPairDataset([pair("i", "o")] * 1200, BYTE, SHORT, 11, packing=True)
    assert (
        thousands.describe(1200)
        == "1,200 instructions, 6,000 tokens, 2,400 of them scored, packed into 600 blocks of 11"
    )
