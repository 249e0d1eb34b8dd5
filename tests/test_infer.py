"""infer.py: a prompt and its continuation on stdout, everything else on stderr."""

import io
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import infer
from model import GPTConfig, GPTMini, SamplingConfig
from support.checkpoint import load_model
from support.cli import UserError
from tokenizer import ByteTokenizer, CharTokenizer

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
    ours = {"format_version": 1, "model": model.config.model_dump(), "tokenizer": tokenizer.to_dict(), "metrics": {"step": 0}}
    torch.save({"state_dict": {f"net.{name}": tensor for name, tensor in model.state_dict().items()}, "tiny_transformer": ours}, path)
    return str(path)


def tiny_model(vocab_size: int, **changes) -> GPTMini:
    torch.manual_seed(0)
    return GPTMini(GPTConfig(**{"vocab_size": vocab_size, "d_model": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 16} | changes))


def always(path: Path, token: int) -> str:
    """A byte model that gives `token` whatever it reads: the last norm puts out its bias, the head has one row."""
    model = tiny_model(257, norm="layernorm", bias=True, tie_embeddings=False)
    with torch.no_grad():
        model.norm.weight.zero_()
        model.norm.bias.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[token] = 10.0
    return craft(path, model, ByteTokenizer())


# ---- the text -----------------------------------------------------------------------------------------------------


def test_stdout_is_the_prompt_and_its_continuation_and_nothing_else(say, ckpt):
    out, err = say(*short(ckpt))
    assert out.startswith(PROMPT)
    assert len(out) > len(PROMPT) + 1
    assert out.endswith("\n")
    assert err == ""


def test_one_seed_one_text(say, ckpt):
    assert say(*short(ckpt)) == say(*short(ckpt)) == say(*short(ckpt, "--seed", "42"))
    assert say(*short(ckpt, "--seed", "1")) != say(*short(ckpt, "--seed", "2"))


@pytest.mark.parametrize("length", [12, 60], ids=["in the window", "past the window"])
def test_greedy_text_is_that_of_generate_whatever_the_seed(say, ckpt, length):
    model, tokenizer, _ = load_model(ckpt)
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    whole = model.generate(ids, length, SamplingConfig(temperature=0), eos_id=tokenizer.eos_id)[0].tolist()
    expected = tokenizer.decode([i for i in whole if i != tokenizer.eos_id])
    for seed in ("1", "2"):
        out, _ = say(*short(ckpt, "--temperature", "0", "--top-p", "1", "--max-new-tokens", str(length), "--seed", seed))
        assert out == expected + "\n"


def test_sampled_text_is_that_of_generate_with_the_same_generator(say, ckpt):
    model, tokenizer, _ = load_model(ckpt)
    sampling = SamplingConfig(temperature=0.7, top_k=30, top_p=0.9, repetition_penalty=1.3)
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    whole = model.generate(ids, 12, sampling, eos_id=tokenizer.eos_id, generator=torch.Generator().manual_seed(5))[0].tolist()
    flags = ("--temperature", "0.7", "--top-k", "30", "--top-p", "0.9", "--repetition-penalty", "1.3", "--seed", "5")
    assert say(*short(ckpt, *flags))[0] == tokenizer.decode([i for i in whole if i != tokenizer.eos_id]) + "\n"


@pytest.mark.parametrize("flags", [("--top-k", "1"), ("--top-p", "0.0001")], ids=" ".join)
def test_one_candidate_is_greedy(say, ckpt, flags):
    assert say(*short(ckpt, *flags)) == say(*short(ckpt, "--temperature", "0"))


def test_samples_are_numbered_and_each_is_its_seeds_text(say, ckpt):
    out, _ = say(*short(ckpt, "--num-samples", "3", "--seed", "7"))
    texts = [say(*short(ckpt, "--seed", str(seed)))[0] for seed in (7, 8, 9)]
    assert out == "".join(f"--- sample {i + 1} (seed {7 + i}) ---\n{text}" for i, text in enumerate(texts))


def test_generate_text_is_the_continuation_alone(say, ckpt):
    model, tokenizer, _ = load_model(ckpt)
    text = infer.generate_text(model, tokenizer, PROMPT, max_new_tokens=12, temperature=0.8, top_p=0.95, seed=3)
    assert say(*short(ckpt, "--seed", "3"))[0] == PROMPT + text + "\n"


def test_pieces_come_token_by_token_and_make_up_the_text(ckpt):
    model, tokenizer, _ = load_model(ckpt)
    pieces = list(infer.stream_text(model, tokenizer, PROMPT, 12, seed=3))
    assert len(pieces) == 13  # a piece a token, and what is left
    assert "".join(pieces) == infer.generate_text(model, tokenizer, PROMPT, 12, temperature=1.0, seed=3)


@pytest.mark.parametrize(("token", "expected"), [(256, "ab"), (ord("x"), "ab" + 9 * "x")], ids=["EOS", "a letter"])
def test_text_ends_before_eos(say, tmp_path, token, expected):
    ckpt = always(tmp_path / "always.ckpt", token)
    assert say("--ckpt", ckpt, "--prompt", "ab", "--max-new-tokens", "9") == (expected + "\n", "")


def test_half_a_character_is_never_shown(say, tmp_path):
    """The model repeats the first byte of a two-byte character: no piece is text until the end."""
    ckpt = always(tmp_path / "half.ckpt", 0xC3)
    model, tokenizer, _ = load_model(ckpt)
    assert list(infer.stream_text(model, tokenizer, "a", 3)) == ["", "", "", "\ufffd" * 3]


# ---- prompts ------------------------------------------------------------------------------------------------------


def feed(monkeypatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


def test_the_prompt_may_come_from_a_file_or_standard_input(say, ckpt, tmp_path, monkeypatch):
    direct = say(*short(ckpt))
    (tmp_path / "prompt.txt").write_text(PROMPT + "\n")
    rest = ["--ckpt", ckpt, "--max-new-tokens", "12"]
    assert say(*rest, "--prompt-file", str(tmp_path / "prompt.txt")) == direct
    feed(monkeypatch, PROMPT.encode() + b"\n")
    assert say(*rest) == direct


def test_interactive_answers_prompt_by_prompt_until_the_end_of_input(say, ckpt, monkeypatch):
    feed(monkeypatch, b"Attention is\n\nA token\n")
    out, err = say("--ckpt", ckpt, "--interactive", "--max-new-tokens", "5", "--temperature", "0")
    texts = [say("--ckpt", ckpt, "--prompt", prompt, "--max-new-tokens", "5", "--temperature", "0")[0] for prompt in ("Attention is", "A token")]
    assert out == "".join(texts) + "\n"
    assert "the prompt is empty" in err  # the empty line is answered, and the talk goes on


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


@pytest.mark.parametrize(("name", "warns"), [("auto", False), ("bpe", False), ("gpt2", True), ("nonsense", True)])
def test_another_tokenizers_name_only_warns(say, ckpt, name, warns):
    out, err = say(*short(ckpt, "--tokenizer", name))
    assert out == say(*short(ckpt))[0]
    assert (f"--tokenizer {name}" in err and "bpe, 400 tokens" in err) == warns
    assert (err == "") == (not warns)


# ---- mistakes -----------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("content", "words"), [(b"", "the prompt is empty"), (b"\n", "the prompt is empty"), (b"a\xff", "not UTF-8 text")])
def test_bad_standard_input_is_a_clear_error(char_ckpt, monkeypatch, content, words):
    feed(monkeypatch, content)
    with pytest.raises(UserError, match=words):
        infer.main(["--ckpt", char_ckpt])


@pytest.mark.parametrize(
    "flags", [["--prompt", "a", "--interactive"], ["--prompt", "a", "--prompt-file", "b"], ["--top-k", "many"], []], ids=" ".join
)
def test_flags_that_contradict_each_other_exit_2(capsys, flags):
    with pytest.raises(SystemExit) as stop:
        infer.main([*(["--ckpt", "x.ckpt"] if flags else []), *flags])
    assert stop.value.code == 2
    assert "usage: " in capsys.readouterr().err


def test_ctrl_c_exits_130_without_a_traceback(ckpt):
    command = [sys.executable, "infer.py", "--ckpt", ckpt, "--prompt", PROMPT, "--max-new-tokens", "100000000", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    assert process.stdout.read(len(PROMPT)) == PROMPT.encode()  # it has begun
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err
