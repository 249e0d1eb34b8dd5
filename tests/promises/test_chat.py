"""infer.py --chat: answers in the template of the model, and a conversation that is remembered."""

import functools
import io
import sys
from collections.abc import Callable

import pytest
import torch
from answering import craft, output_of, tiny_model

import infer
from infer import Chat
from model import GPTMini
from sampling import SamplingConfig
from support.checkpoint import KEY, load_model
from support.messages import UserError
from support.text.chat_template import Template
from tokenizer import CharTokenizer, Tokenizer

ASK = {
    "system": "",
    "prompt": "Ask {instruction} Say ",
    "prompt_with_input": "Ask {instruction} {input} Say ",
    "multi_turn": True,
    "stop": [],
}
GREEDY = ("--temperature", "0", "--top-p", "1", "--max-new-tokens", "5")


@pytest.fixture
def ckpt(tiny_run) -> str:
    return str(tiny_run.folder / "final.ckpt")


@pytest.fixture
def say(capsys):
    """say("--ckpt", ...) runs infer.py in this process: (stdout, stderr)."""
    return functools.partial(output_of, capsys)


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
