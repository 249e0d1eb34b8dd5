"""infer.py: a prompt and its continuation on stdout, everything else on stderr."""

import functools
import io
import itertools
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from answering import craft, output_of, tiny_model
from foreign_tokenizers import tokenizer_like

import infer
from infer import pieces_before_stop
from sampling import SamplingConfig
from support.checkpoint import KEY, load_model
from support.messages import UserError
from support.text.mid_document import ids_after
from tokenizer import ByteTokenizer, CharTokenizer, Tokenizer

PROMPT = "Attention is"


@pytest.fixture
def ckpt(tiny_run) -> str:
    return str(tiny_run.folder / "final.ckpt")


@pytest.fixture
def say(capsys):
    """say("--ckpt", ...) runs infer.py in this process: (stdout, stderr)."""
    return functools.partial(output_of, capsys)


def short(ckpt: str, *more: str) -> list[str]:
    return ["--ckpt", ckpt, "--prompt", PROMPT, "--max-new-tokens", "12", *more]


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
