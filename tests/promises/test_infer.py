"""infer.py: a prompt and its continuation on stdout, everything else on stderr."""

import io
import itertools
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign_tokenizers import tokenizer_like

import infer
from infer import Chat, pieces_before_stop
from model import GPTConfig, GPTMini
from sampling import SamplingConfig
from support.checkpoint import KEY, load_model
from support.messages import UserError
from support.text.chat_template import Template
from support.text.mid_document import ids_after
from tokenizer import ByteTokenizer, CharTokenizer, Tokenizer

PROMPT = "Attention is"


@pytest.fixture
def ckpt(tiny_run) -> str:
    return str(tiny_run.folder / "final.ckpt")


@pytest.fixture
def say(capsys):
    """say("--ckpt", ...) runs infer.py in this process: (stdout, stderr)."""

    def call(*argv: str) -> tuple[str, str]:
        capsys.readouterr()
        assert infer.main([*argv, "--device", "cpu"]) == 0
        return capsys.readouterr()

    return call


def short(ckpt: str, *more: str) -> list[str]:
    return ["--ckpt", ckpt, "--prompt", PROMPT, "--max-new-tokens", "12", *more]


def craft(path: Path, model: GPTMini, tokenizer) -> str:
    """A checkpoint of this model and tokenizer."""
    ours = {
        "format_version": 1,
        "model": model.config.model_dump(),
        "tokenizer": tokenizer.to_dict(),
        "metrics": {"step": 0},
    }
    weights = {f"net.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": weights, KEY: ours}, path)
    return str(path)


def tiny_model(vocab_size: int, **changes) -> GPTMini:
    torch.manual_seed(0)
    sizes = {"d_model": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 16}
    return GPTMini(GPTConfig(vocab_size=vocab_size, **(sizes | changes)))


def always(path: Path, token: int, tokenizer: Tokenizer | None = None) -> str:
    """A checkpoint (of bytes) whose model says `token` after any text: the last norm gives only its bias,
    and the head is zero except in the row of that token."""
    tokenizer = tokenizer or ByteTokenizer()
    model = tiny_model(tokenizer.vocab_size, norm="layernorm", bias=True, tie_embeddings=False)
    with torch.no_grad():
        model.norm.weight.zero_()
        model.norm.bias.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[token] = 10.0
    return craft(path, model, tokenizer)


# ---- the text ------------------------------------------------------------------------------------


def test_stdout_is_the_prompt_and_its_continuation_and_nothing_else(say, ckpt):
    out, err = say(*short(ckpt))
    assert out.startswith(PROMPT)
    assert len(out) > len(PROMPT) + 1
    assert out.endswith("\n")
    assert err == ""


def test_the_same_seed_gives_the_same_text(say, ckpt):
    assert say(*short(ckpt)) == say(*short(ckpt)) == say(*short(ckpt, "--seed", "42"))
    assert say(*short(ckpt, "--seed", "1")) != say(*short(ckpt, "--seed", "2"))


@pytest.mark.parametrize("length", [12, 60], ids=["in the window", "past the window"])
def test_greedy_text_equals_generate_for_any_seed(say, ckpt, length):
    model, tokenizer, _ = load_model(ckpt)
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    whole = model.generate(ids, length, SamplingConfig(temperature=0), eos_id=tokenizer.eos_id)[0].tolist()
    expected = tokenizer.decode([i for i in whole if i != tokenizer.eos_id])
    flags = ["--temperature", "0", "--top-p", "1", "--max-new-tokens", str(length)]
    for seed in ("1", "2"):
        out, _ = say(*short(ckpt, *flags, "--seed", seed))
        assert out == expected + "\n"


def test_sampled_text_equals_generate_with_the_same_generator(say, ckpt):
    model, tokenizer, _ = load_model(ckpt)
    sampling = SamplingConfig(temperature=0.7, top_k=30, top_p=0.9, repetition_penalty=1.3)
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    generator = torch.Generator().manual_seed(5)
    whole = model.generate(ids, 12, sampling, eos_id=tokenizer.eos_id, generator=generator)[0].tolist()
    expected = tokenizer.decode([i for i in whole if i != tokenizer.eos_id])
    flags = ["--temperature", "0.7", "--top-k", "30", "--top-p", "0.9", "--repetition-penalty", "1.3"]
    flags += ["--seed", "5"]
    assert say(*short(ckpt, *flags))[0] == expected + "\n"


@pytest.mark.parametrize("flags", [("--top-k", "1"), ("--top-p", "0.0001")], ids=" ".join)
def test_one_candidate_is_greedy(say, ckpt, flags):
    assert say(*short(ckpt, *flags)) == say(*short(ckpt, "--temperature", "0"))


def test_samples_are_numbered_and_each_is_the_text_of_its_seed(say, ckpt):
    out, _ = say(*short(ckpt, "--num-samples", "3", "--seed", "7"))
    texts = [say(*short(ckpt, "--seed", str(seed)))[0] for seed in (7, 8, 9)]
    assert out == "".join(f"--- sample {i + 1} (seed {7 + i}) ---\n{text}" for i, text in enumerate(texts))


def test_generate_text_returns_only_the_continuation(say, ckpt):
    model, tokenizer, _ = load_model(ckpt)
    text = infer.generate_text(
        model, tokenizer, PROMPT, max_new_tokens=12, temperature=0.8, top_p=0.95, seed=3
    )
    assert say(*short(ckpt, "--seed", "3"))[0] == PROMPT + text + "\n"


def test_pieces_come_token_by_token_and_make_up_the_text(ckpt):
    model, tokenizer, _ = load_model(ckpt)
    pieces = list(infer.stream_text(model, tokenizer, PROMPT, 12, seed=3))
    assert len(pieces) == 13  # one for each token, and what is left at the end
    assert "".join(pieces) == infer.generate_text(model, tokenizer, PROMPT, 12, temperature=1.0, seed=3)


@pytest.mark.parametrize(
    ("token", "expected"), [(256, "ab"), (ord("x"), "ab" + 9 * "x")], ids=["EOS", "a letter"]
)
def test_text_ends_before_eos(say, tmp_path, token, expected):
    ckpt = always(tmp_path / "always.ckpt", token)
    assert say("--ckpt", ckpt, "--prompt", "ab", "--max-new-tokens", "9") == (expected + "\n", "")


def test_half_a_character_is_never_shown(say, tmp_path):
    """The model repeats the first byte of a two-byte character: no piece is text until the end."""
    ckpt = always(tmp_path / "half.ckpt", 0xC3)
    model, tokenizer, _ = load_model(ckpt)
    assert list(infer.stream_text(model, tokenizer, "a", 3)) == ["", "", "", "\ufffd" * 3]


@pytest.mark.parametrize("name", ["llama", "llama + bos", "space first"])
def test_the_space_after_the_prompt_is_kept_if_a_decoder_drops_the_first_space_of_a_text(say, tmp_path, name):
    tokenizer = tokenizer_like(name)
    [tock] = ids_after(tokenizer, ["tick"], " tock")
    ckpt = always(tmp_path / "always.ckpt", tock, tokenizer)
    out, _ = say("--ckpt", ckpt, "--prompt", "tick", "--max-new-tokens", "3", "--temperature", "0")
    assert out == "tick tock tock tock\n"


def test_generation_ends_before_the_eos_token_given_as_text(ckpt):
    model, tokenizer, _ = load_model(ckpt)
    greedy = {"max_new_tokens": 12, "temperature": 0}
    plain = infer.generate_text(model, tokenizer, PROMPT, **greedy)
    for stop in (plain[3:5], plain[:2], plain[-1]):
        ended = infer.generate_text(model, tokenizer, PROMPT, **greedy, eos_token=stop)
        assert ended == plain[: plain.index(stop)]
    for stop in (None, "not in it"):
        assert infer.generate_text(model, tokenizer, PROMPT, **greedy, eos_token=stop) == plain
    with pytest.raises(UserError, match="eos_token is empty"):
        infer.generate_text(model, tokenizer, PROMPT, eos_token="")


# ---- prompts -------------------------------------------------------------------------------------


def feed(monkeypatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


def test_the_prompt_may_come_from_a_file_or_standard_input(say, ckpt, tmp_path, monkeypatch):
    direct = say(*short(ckpt))
    (tmp_path / "prompt.txt").write_text(PROMPT + "\n")
    rest = ["--ckpt", ckpt, "--max-new-tokens", "12"]
    assert say(*rest, "--prompt-file", str(tmp_path / "prompt.txt")) == direct
    feed(monkeypatch, PROMPT.encode() + b"\n")
    assert say(*rest) == direct


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "mark"])
@pytest.mark.parametrize("source", ["file", "pipe", "flag", "interactive", "chat"])
def test_a_byte_order_mark_and_windows_line_ends_are_not_part_of_a_prompt(
    say, monkeypatch, tmp_path, source, mark
):
    """Nor of texts for training. This tokenizer knows neither of them."""
    tokenizer = CharTokenizer.train(["abc\n"])
    path = craft(tmp_path / "char.ckpt", tiny_model(tokenizer.vocab_size, max_seq_len=64), tokenizer)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint[KEY]["template"] = {"prompt": "a{instruction}b", "prompt_with_input": "{instruction}{input}"}
    torch.save(checkpoint, path)
    (tmp_path / "prompt.txt").write_bytes(mark + b"a\r\nb\r\n")
    feed(monkeypatch, mark + (b"a\r\nb\r\n" if source == "pipe" else b"a\r\n"))
    flags = {
        "file": ["--prompt-file", str(tmp_path / "prompt.txt")],
        "pipe": [],
        "flag": ["--prompt", mark.decode() + "a\r\nb"],
    }
    out, err = say("--ckpt", path, "--max-new-tokens", "3", *flags.get(source, [f"--{source}"]))
    assert err == "" and out.startswith({"interactive": "a", "chat": ""}.get(source, "a\nb"))


def test_interactive_answers_prompt_by_prompt_until_the_end_of_input(say, ckpt, monkeypatch):
    feed(monkeypatch, b"Attention is\n\nA token\n")
    out, err = say("--ckpt", ckpt, "--interactive", "--max-new-tokens", "5", "--temperature", "0")
    texts = [
        say("--ckpt", ckpt, "--prompt", prompt, "--max-new-tokens", "5", "--temperature", "0")[0]
        for prompt in ("Attention is", "A token")
    ]
    assert out == "".join(texts) + "\n"
    assert "the prompt is empty" in err  # the empty line is answered, and the next prompt is read


def test_a_prompt_longer_than_the_context_is_read_from_its_end_with_a_warning(say, ckpt):
    model, tokenizer, _ = load_model(ckpt)
    long = "All that matters is the end of this long text, not its beginning. " * 4 + PROMPT
    ids = tokenizer.encode(long)
    assert len(ids) > 33
    out, err = say("--ckpt", ckpt, "--prompt", long, "--max-new-tokens", "1", "--temperature", "0")
    assert f"the prompt has {len(ids)} tokens, the model sees 32" in err
    with torch.no_grad():
        expected = model(torch.tensor([ids[-32:]]))[0, -1].argmax().item()
    assert out == tokenizer.decode([*ids, expected]) + "\n"


@pytest.mark.parametrize(
    ("name", "warns"), [("auto", False), ("bpe", False), ("gpt2", True), ("nonsense", True)]
)
def test_another_tokenizers_name_only_warns(say, ckpt, name, warns):
    out, err = say(*short(ckpt, "--tokenizer", name))
    assert out == say(*short(ckpt))[0]
    assert (f"--tokenizer {name}" in err and "bpe, 400 tokens" in err) == warns
    assert (err == "") == (not warns)


# ---- where an answer stops -----------------------------------------------------------------------


def up_to(text: str, stops: list[str]) -> str:
    """The text before the first stop in it."""
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]


def cut_anywhere(rng: np.random.Generator, text: str) -> list[str]:
    """The text in pieces of 0 to 3 characters."""
    ends = [0, *np.cumsum(rng.integers(0, 4, len(text) + 1)).clip(max=len(text)).tolist(), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(ends)]


def texts_and_stops(seed: int, n: int):
    """Yield (pieces, their text, stops). The letters are few, so that stops, beginnings of stops and stops
    next to each other are common."""
    rng = np.random.default_rng(seed)
    for _ in range(n):
        text = "".join(rng.choice(["#", "a", "\n", "é"], rng.integers(0, 25)))
        stops = ["".join(rng.choice(["#", "a", "\n"], rng.integers(1, 6))) for _ in range(rng.integers(0, 4))]
        yield cut_anywhere(rng, text), text, stops


def test_an_answer_is_the_text_before_the_first_stop_however_it_is_cut_into_pieces():
    n_stopped = n_whole = 0
    for pieces, text, stops in texts_and_stops(1, 4000):
        if any(one in other[1:-1] for one in stops for other in stops):
            continue  # a stop inside a stop: which of the two comes first is not defined
        found = "".join(pieces_before_stop(pieces, stops))
        assert found == up_to(text, stops), (pieces, stops)
        n_stopped, n_whole = n_stopped + (found != text), n_whole + (found == text != "" and bool(stops))
    assert n_stopped > 500 and n_whole > 500


def test_no_stop_is_ever_shown_and_only_what_may_be_one_is_held_back():
    """At each moment the pieces given so far are the beginning of the answer. The text held back is
    shorter than the longest stop."""
    for pieces, text, stops in texts_and_stops(2, 2000):
        asked, shown = [], ""

        def asking(pieces: list[str] = pieces, asked: list[str] = asked):
            for piece in pieces:
                asked.append(piece)
                yield piece

        for given in pieces_before_stop(asking(), stops):
            shown += given
            assert text.startswith(shown)
            assert not any(stop in shown for stop in stops)
            read = "".join(asked)
            if not any(stop in read for stop in stops):
                assert len(read) - len(shown) < max(map(len, stops), default=1)


def test_after_a_stop_no_more_text_is_generated():
    """The model need not write text that nobody will see."""
    pieces = iter(["one", "#", "#two", "three", "four"])
    assert "".join(pieces_before_stop(pieces, ["##"])) == "one"
    assert list(pieces) == ["three", "four"]


def test_text_that_only_looked_like_a_stop_is_given_at_the_end():
    assert "".join(pieces_before_stop(["a#", "#"], ["###"])) == "a##"
    assert "".join(pieces_before_stop(["a##", "##b"], ["####"])) == "a"
    assert "".join(pieces_before_stop(["#a#", "a#a", "b"], ["#a#ab"])) == "#a", (
        "the beginning of a stop inside the beginning of a stop"
    )
    assert "".join(pieces_before_stop(["a", "", "b"], [])) == "ab"
    assert "".join(pieces_before_stop([], ["#"])) == ""
    for pieces in (["abcd"], ["a", "b", "c", "d"], ["ab", "cd"]):
        assert "".join(pieces_before_stop(pieces, ["abcd", "c"])) == "ab", (
            "the stop that is complete first, for any pieces"
        )


# ---- chat ----------------------------------------------------------------------------------------

ASK = {
    "system": "",
    "prompt": "Ask {instruction} Say ",
    "prompt_with_input": "Ask {instruction} {input} Say ",
    "multi_turn": True,
    "stop": [],
}
GREEDY = ("--temperature", "0", "--top-p", "1", "--max-new-tokens", "5")


@pytest.fixture
def chatty(tiny_run, tmp_path) -> Callable[..., str]:
    """chatty(stop=["x"]): the tiny run with a template, and with large random weights. After 12 steps of
    training a model writes blanks after any text; here each answer has to depend on all text before it."""

    def make(**changes: object) -> str:
        checkpoint, generator = tiny_run.checkpoint(), torch.Generator().manual_seed(4)
        weights = checkpoint["state_dict"]
        for name in sorted(weights):
            if weights[name].dim() == 2:
                weights[name] = torch.randn(weights[name].shape, generator=generator) * 0.4
        weights["net.lm_head.weight"] = weights["net.embed_tokens.weight"].roll(1, dims=0)
        checkpoint[KEY]["model"]["tie_embeddings"] = False
        checkpoint[KEY]["template"] = changes.pop("template", ASK | changes)
        path = tmp_path / f"chat-{len(list(tmp_path.iterdir()))}.ckpt"
        torch.save(checkpoint, path)
        return str(path)

    return make


def answer_to(ckpt: str, *questions: str, n: int = 5, system: str = "") -> str:
    """The answer of `model.generate` to the last question after the others, the ids put together by hand."""
    model, tokenizer, _ = load_model(ckpt)
    ids = tokenizer.encode(system) if system else []
    for question in questions:
        ids += tokenizer.encode(f"Ask {question} Say ")
        answer = greedy_answer(model, tokenizer, ids, n)
        ids += [*tokenizer.encode(answer.strip()), tokenizer.eos_id]
    return answer


def greedy_answer(model: GPTMini, tokenizer: Tokenizer, ids: list[int], n: int) -> str:
    """The text of the n likeliest tokens after `ids`, which fit into the context with them."""
    assert len(ids) + n <= model.config.max_seq_len
    whole = model.generate(torch.tensor([ids]), n, SamplingConfig(temperature=0), eos_id=tokenizer.eos_id)
    return tokenizer.decode([i for i in whole[0, len(ids) :].tolist() if i != tokenizer.eos_id])


def greedy_chat(model: GPTMini, tokenizer: Tokenizer, metadata: dict, max_new_tokens: int) -> Chat:
    """A conversation with a loaded checkpoint, always with the likeliest token."""
    template = Template.model_validate(metadata["template"])
    return Chat(model, tokenizer, template, max_new_tokens, SamplingConfig(temperature=0))


@pytest.fixture
def chat(say, monkeypatch):
    """chat(ckpt, "a question", "/reset") runs infer.py --chat with these lines as its input: (stdout,
    stderr)."""

    def call(ckpt: str, *lines: str, flags: tuple[str, ...] = GREEDY) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        return say("--ckpt", ckpt, "--chat", *flags)

    return call


def test_a_model_that_only_continues_texts_refuses_to_chat(ckpt, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)  # not even read
    with pytest.raises(UserError) as error:
        infer.main(["--ckpt", ckpt, "--chat", "--device", "cpu"])
    message = str(error.value)
    assert f"{ckpt} is not an instruction model" in message and "--interactive" in message
    assert f"python3 finetune.py --config config_finetune.yaml --override base_ckpt={ckpt}" in message
    assert len(message.splitlines()) <= 3 and capsys.readouterr().out == ""


def test_each_question_is_answered_and_the_end_of_input_ends_the_chat(chat, chatty):
    ckpt = chatty()
    first, second = answer_to(ckpt, "who"), answer_to(ckpt, "who", "why")
    assert first != second and len(first) > 1
    assert chat(ckpt, "who") == (first + "\n\n", "")
    assert chat(ckpt, "  who ", "why") == (f"{first}\n{second}\n\n", ""), (
        "blanks around a question are not part of it"
    )
    assert chat(ckpt) == ("\n", "")


def test_a_question_that_is_not_text_gets_an_error_and_is_forgotten(chat, chatty):
    """Bytes that are not UTF-8 arrive as halves of characters."""
    ckpt = chatty()
    out, err = chat(ckpt, "a\udcffb", "who")
    assert "not UTF-8 text (character 1)" in err and out == f"\n{answer_to(ckpt, 'who')}\n\n"


def test_chat_without_standard_input_says_so(chatty, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="reads questions from standard input, which is closed"):
        infer.main(["--ckpt", chatty(), "--chat", "--device", "cpu"])


def test_an_answer_depends_on_earlier_turns_until_a_reset(chat, chatty):
    ckpt = chatty()
    who, how, alone = (answer_to(ckpt, question) for question in ("who", "how", "why"))
    after_who, after_how = answer_to(ckpt, "who", "why"), answer_to(ckpt, "how", "why")
    assert len({alone, after_who, after_how}) == 3, "the answer should depend on the first question"
    assert chat(ckpt, "who", "why", "/quit")[0] == f"{who}\n{after_who}\n"
    assert chat(ckpt, "how", "why", "/quit")[0] == f"{how}\n{after_how}\n"
    assert chat(ckpt, "who", "/reset", "why", "/quit") == (f"{who}\n(forgotten)\n{alone}\n", "")


def test_a_single_turn_template_answers_each_question_by_itself(chat, chatty):
    ckpt = chatty(multi_turn=False)
    assert chat(ckpt, "who", "why", "/quit")[0] == f"{answer_to(ckpt, 'who')}\n{answer_to(ckpt, 'why')}\n"


def test_commands_and_empty_lines_are_not_questions(chat, chatty):
    ckpt = chatty()
    who, why = answer_to(ckpt, "who"), answer_to(ckpt, "who", "why")
    out, err = chat(ckpt, "", "   ", "who", "/help me", "/", "", "why", "/quit", "who")
    assert out == f"{who}\n{why}\n", "what comes after /quit is not read"
    assert err.splitlines() == [
        "/help is not a command; there are /reset and /quit",
        "/ is not a command; there are /reset and /quit",
    ]


def test_the_system_text_comes_before_the_first_question_only(chat, chatty):
    ckpt = chatty(system="Be.\n")
    who, why = answer_to(ckpt, "who", n=2, system="Be.\n"), answer_to(ckpt, "who", "why", n=2, system="Be.\n")
    assert who != answer_to(ckpt, "who", n=2)
    assert chat(ckpt, "who", "why", "/quit", flags=(*GREEDY[:-1], "2"))[0] == f"{who}\n{why}\n"


def test_a_stop_ends_an_answer_and_is_neither_shown_nor_remembered(chat, chatty):
    plain = answer_to(chatty(), "who", n=9)
    place = next(
        i for i in range(2, len(plain)) if plain.index(plain[i : i + 2]) == i and not plain[:i].isspace()
    )
    ckpt = chatty(stop=["never said by it", plain[place : place + 2]])
    assert chat(ckpt, "who", "/quit", flags=(*GREEDY[:-1], "9")) == (plain[:place] + "\n", "")
    model, tokenizer, metadata = load_model(ckpt)
    conversation = greedy_chat(model, tokenizer, metadata, max_new_tokens=9)
    assert "".join(conversation.answer("who", seed=1)) == plain[:place]
    assert conversation.turns == [("who", plain[:place].strip())]


def test_samples_follow_the_seed_and_each_question_has_its_own_seed(chat, chatty):
    ckpt, drawn = chatty(), ("--temperature", "1", "--top-p", "1", "--max-new-tokens", "5")
    assert chat(ckpt, "who", "why", flags=drawn) == chat(ckpt, "who", "why", flags=(*drawn, "--seed", "42"))
    assert chat(ckpt, "who", flags=drawn) != chat(ckpt, "who", flags=(*drawn, "--seed", "43"))
    both, later = (
        chat(ckpt, "/reset", *lines, "/quit", flags=(*drawn, "--seed", seed))[0]
        for lines, seed in ((("a", "/reset", "b"), "5"), (("b",), "6"))
    )
    assert both.endswith(later.removeprefix("(forgotten)\n"))


def test_a_question_that_is_too_long_is_read_from_its_end_with_a_warning(chat, chatty):
    ckpt = chatty()
    model, tokenizer, _ = load_model(ckpt)
    long = "what do we know of the loss of a model that reads " * 3
    ids = tokenizer.encode(f"Ask {long.strip()} Say ")
    assert len(ids) > 32
    expected = greedy_answer(model, tokenizer, ids[-27:], n=5)
    out, err = chat(ckpt, "who", long, "/quit")
    assert out == f"{answer_to(ckpt, 'who')}\n{expected}\n"
    rule = f"the question has {len(ids)} tokens with its template, and 27 fit"
    assert err == f"warning: {rule}: only its end is read\n"


@pytest.mark.parametrize(("wanted", "n"), [(3, 3), (15, 15), (16, 16), (17, 16), (1000, 16)])
def test_a_conversation_stays_within_the_context_and_remembers_as_much_as_fits(
    chatty, monkeypatch, wanted, n
):
    """The context has 32 tokens, of which an answer may take half."""
    model, tokenizer, metadata = load_model(chatty())
    given, stream = [], infer.stream_text

    def watched(model, tokenizer, ids, max_new_tokens, *rest):
        given.append((ids, max_new_tokens))
        return stream(model, tokenizer, ids, max_new_tokens, *rest)

    monkeypatch.setattr(infer, "stream_text", watched)
    conversation = greedy_chat(model, tokenizer, metadata, max_new_tokens=wanted)
    said, kept = [], []
    for question in ["a", "bb", "c", "d e", "f", "gg g", "h", "i"]:
        answer = "".join(conversation.answer(question, seed=1))
        asked = tokenizer.encode(f"Ask {question} Say ")
        fitting = []
        for start in range(len(said), -1, -1):
            ids = [i for turn in said[start:] for i in turn] + asked
            fitting += [(ids, len(said) - start)] * (len(ids) + n <= 32)
        expected, n_kept = fitting[-1] if fitting else (asked[-(32 - n) :], 0)
        assert given[-1] == (expected, n)
        kept.append(n_kept)
        said.append([*tokenizer.encode(f"Ask {question} Say {answer.strip()}"), tokenizer.eos_id])
    assert (max(kept) > 0) == (wanted == 3), "some earlier turns fit, but never all"
    assert max(kept) < 7


def test_characters_that_the_tokenizer_lacks_are_answered_and_the_chat_continues(say, monkeypatch, tmp_path):
    tokenizer = CharTokenizer.train(["Ask abc Say ."])
    path = craft(tmp_path / "char.ckpt", tiny_model(tokenizer.vocab_size, max_seq_len=64), tokenizer)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint[KEY]["template"] = ASK
    torch.save(checkpoint, path)
    outs = []
    for lines in ("a∑\nb\n/quit\n", "b\n/quit\n"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        outs.append(say("--ckpt", path, "--chat", *GREEDY))
    assert outs[0][1].startswith("error: unknown characters '∑'") and outs[1][1] == ""
    assert outs[0][0] == "\n" + outs[1][0], "a question that cannot be read is not remembered"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("multi_turn", "said"), [(True, "remembers what was said"), (False, "answers each question by itself")]
)
def test_on_a_terminal_the_rules_are_printed_first(say, chatty, monkeypatch, multi_turn, said):
    ckpt = chatty(multi_turn=multi_turn)
    monkeypatch.setattr(sys, "stdin", Terminal("who\n/quit\n"))
    out, _ = say("--ckpt", ckpt, "--chat", *GREEDY)
    rules, rest = out.split("\n", 1)
    assert said in rules and "within 32 tokens" in rules and "/reset" in rules and "/quit" in rules
    assert rest == f"you> {answer_to(ckpt, 'who')}\nyou> "


@pytest.mark.parametrize("terminal", [True, False])
def test_ctrl_c_ends_an_answer_on_a_terminal_and_elsewhere_the_program(chatty, monkeypatch, capsys, terminal):
    """The part of the answer that was given is remembered."""
    model, tokenizer, metadata = load_model(chatty())
    conversation = greedy_chat(model, tokenizer, metadata, max_new_tokens=5)

    def interrupted(*_):
        yield "so "
        yield "far"
        raise KeyboardInterrupt

    monkeypatch.setattr(infer, "stream_text", interrupted)
    monkeypatch.setattr(sys, "stdin", (Terminal if terminal else io.StringIO)("who\n/quit\n"))
    if terminal:
        infer.answer_questions(conversation, seed=1)
        assert capsys.readouterr().out.endswith("you> so far\nyou> ")
    else:
        with pytest.raises(KeyboardInterrupt):
            infer.answer_questions(conversation, seed=1)
    assert conversation.turns == [("who", "so far")]


@pytest.mark.parametrize(
    "template",
    [
        "chat",
        5,
        [],
        {},
        {"prompt": "{instruction}"},
        ASK | {"prompt": "no slot"},
        ASK | {"prompt_with_input": "{input}"},
        ASK | {"stop": [""]},
        ASK | {"stop": [1]},
        ASK | {"multi_turn": 1},
        ASK | {"prompt": None},
        ASK | {"more": "\n\x1b[2J" * 99},
    ],
)
def test_a_damaged_template_is_refused_in_one_line(chatty, capsys, template):
    ckpt = chatty(template=template)
    with pytest.raises(UserError) as error:
        infer.main(["--ckpt", ckpt, "--chat", "--device", "cpu"])
    message = str(error.value)
    assert message.startswith(f"checkpoint {ckpt} has a damaged template (") and message.endswith(
        "take another one"
    )
    assert message.isprintable()
    assert capsys.readouterr().out == ""


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.fixture
def char_ckpt(tmp_path) -> str:
    tokenizer = CharTokenizer.train(["abc def"])
    return craft(tmp_path / "char.ckpt", tiny_model(tokenizer.vocab_size), tokenizer)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prompt", ""], ["the prompt is empty"]),
        (["--prompt", "abcX∑"], ["'X'", "'∑'", "unknown characters"]),
        (["--prompt", "a", "--temperature", "-1"], ["--temperature -1.0"]),
        (["--prompt", "a", "--temperature", "nan"], ["--temperature nan"]),
        (["--prompt", "a", "--temperature", "inf"], ["--temperature inf"]),
        (["--prompt", "a", "--top-k", "0"], ["--top-k 0"]),
        (["--prompt", "a", "--top-p", "0"], ["--top-p 0.0"]),
        (["--prompt", "a", "--top-p", "1.5"], ["--top-p 1.5"]),
        (["--prompt", "a", "--top-p", "nan"], ["--top-p nan"]),
        (["--prompt", "a", "--repetition-penalty", "0"], ["--repetition-penalty 0.0"]),
        (["--prompt", "a", "--max-new-tokens", "0"], ["--max-new-tokens 0"]),
        (["--prompt", "a", "--num-samples", "-1"], ["--num-samples -1"]),
        (["--prompt", "a", "--device", "tpu"], ["'tpu'", "cpu, cuda, mps"]),
        (["--prompt", "a", "--device", "cuda"], ["'cuda' is not available here"]),
        (["--prompt", "a", "--ckpt", "nowhere.ckpt"], ["nowhere.ckpt does not exist"]),
        (["--prompt-file", "nowhere.txt"], ["nowhere.txt does not exist"]),
        (["--prompt-file", "tests"], ["tests"]),
        (["--prompt", "a", "--seed", str(2**70)], [str(2**70)]),
    ],
    ids=lambda value: " ".join(value)[:50],
)
def test_mistakes_name_the_value_in_one_to_three_lines(char_ckpt, capsys, monkeypatch, flags, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError) as error:
        infer.main(["--ckpt", char_ckpt, *flags])
    message = str(error.value)
    assert all(word in message for word in words), message
    assert len(message.splitlines()) <= 3
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "the prompt is empty"), (b"\n", "the prompt is empty"), (b"a\xff", "not UTF-8 text")],
)
def test_bad_standard_input_is_a_clear_error(char_ckpt, monkeypatch, content, words):
    feed(monkeypatch, content)
    with pytest.raises(UserError, match=words):
        infer.main(["--ckpt", char_ckpt])


@pytest.mark.parametrize(
    "flags",
    [
        ["--prompt", "a", "--interactive"],
        ["--prompt", "a", "--prompt-file", "b"],
        ["--prompt", "a", "--chat"],
        ["--chat", "--interactive"],
        ["--top-k", "many"],
        [],
    ],
    ids=" ".join,
)
def test_flags_that_contradict_each_other_exit_2(capsys, flags):
    with pytest.raises(SystemExit) as stop:
        infer.main([*(["--ckpt", "x.ckpt"] if flags else []), *flags])
    assert stop.value.code == 2
    assert "usage: " in capsys.readouterr().err


def test_ctrl_c_exits_130_without_a_traceback(ckpt):
    flags = ["--ckpt", ckpt, "--prompt", PROMPT, "--max-new-tokens", "100000000", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "infer.py", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )
    assert process.stdout.read(len(PROMPT)) == PROMPT.encode()  # it has begun
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err
