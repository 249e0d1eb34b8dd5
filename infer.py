"""Continue a prompt with a trained checkpoint; the text appears token by token.

python3 infer.py --ckpt checkpoints/final.ckpt --prompt "Attention is"
python3 infer.py --ckpt checkpoints/final.ckpt --prompt "A token is" --temperature 0.7 --top-k 40
python3 infer.py --ckpt checkpoints/final.ckpt --prompt "A token is" --num-samples 3
echo "The loss is" | python3 infer.py --ckpt checkpoints/final.ckpt
python3 infer.py --ckpt checkpoints/final.ckpt --interactive
python3 infer.py --ckpt checkpoints/final.ckpt --prompt "A token is" --quantize int8     # faster on a CPU
python3 infer.py --ckpt checkpoints_sft/final.ckpt --chat     # a fine-tuned model answers; /reset, /quit
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from support.cli import (
    add_model_flags,
    add_quantize_flag,
    file_path,
    guarded,
    make_parser,
    unix_text,
    warn_of_other_tokenizer,
)
from support.messages import UserError, inform, printable_lines, warn


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of the command line."""
    parser = make_parser(__doc__)
    add_model_flags(parser)
    add_quantize_flag(parser)
    add_prompt_flags(parser)
    add_sampling_flags(parser)
    return parser.parse_args(argv)


def add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say where prompts come from; only one of them can be given."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="the text to continue; without it, standard input is read")
    source.add_argument("--prompt-file", type=file_path, metavar="FILE", help="a file that holds the prompt")
    source.add_argument(
        "--interactive", action="store_true", help="ask for prompts until the end of input (Ctrl-D)"
    )
    source.add_argument(
        "--chat",
        action="store_true",
        help="talk to a fine-tuned checkpoint, with its own template; /reset forgets, /quit ends",
    )


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say how much is written, and how each next token is drawn."""
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=200,
        metavar="N",
        help="stop after this many tokens, or at the end of the document (default 200)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        help="below 1: safer, above: wilder, 0: always the likeliest token (default 0.8)",
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens only")
    parser.add_argument(
        "--top-p",
        type=float,
        default=0.95,
        metavar="P",
        help="draw among the fewest tokens that together have this probability (default 0.95; 1 is off)",
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="above 1: tokens that are already in the text become less likely",
    )
    parser.add_argument(
        "--num-samples",
        type=int,
        default=1,
        metavar="N",
        help="how many continuations of the prompt; sample i is drawn with seed + i",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="translate the step of a token with torch.compile: faster on a GPU after about a minute",
    )


if __name__ == "__main__":
    guarded(parse_args)  # --help and wrong flags are answered before the slow imports below
    from infer import main  # this file again, as a module

    if sys.stdin is not None and sys.stdin.isatty():
        import readline  # noqa: F401 (gives the interactive prompt line editing and history)
    sys.exit(guarded(main))

import torch
from pydantic import ValidationError

from model import GPTMini
from sampling import SamplingConfig, generate_tokens
from support.checkpoint import load_model, saved_template
from support.device import resolve_device
from support.int8 import quantize_int8, sizes_line
from support.text.chat_template import Template, conversation_ids, prompt_ids
from support.text.mid_document import TextStream
from tokenizer import Tokenizer

# ---- from a prompt to pieces of text -------------------------------------------------------------


def prompt_to_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids of a prompt, with BOS (the token that begins a text) for the models that need it. Raises
    UserError if the prompt is empty, is not valid text, or has characters the tokenizer does not know."""
    try:
        prompt.encode()  # fails for a flag's bytes that are not UTF-8: Python keeps each as half a character
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt is not UTF-8 text (character {error.start}); convert it first") from None
    ids = tokenizer.encode_prompt(prompt)
    if len(ids) == len(tokenizer.bos_ids):  # nothing but BOS
        raise UserError('the prompt is empty; give some text to continue, e.g. --prompt "Attention is"')
    return ids


def stream_text(
    model: GPTMini,
    tokenizer: Tokenizer,
    prompt: str | list[int],
    max_new_tokens: int,
    sampling: SamplingConfig | None = None,
    seed: int = 42,
) -> Iterator[str]:
    """The continuation of `prompt` (a text, or ids), piece by piece, up to `max_new_tokens` tokens. No piece
    ends inside a character; a piece can be empty. EOS ends the text and is not yielded. If the prompt is
    longer than the context, the model reads only its end. Raises UserError for a bad prompt."""
    prompt_row = prompt_to_ids(tokenizer, prompt) if isinstance(prompt, str) else prompt
    device = next(model.parameters()).device
    ids = torch.tensor([prompt_row], device=device)  # (1, T)
    generator = torch.Generator(device).manual_seed(seed)
    stream = TextStream(tokenizer, before=prompt_row)
    for token in generate_tokens(model, ids, max_new_tokens, sampling, tokenizer.eos_id, generator):
        if token.item() == tokenizer.eos_id:
            break
        yield stream.push(token.item())
    yield stream.flush()


def pieces_before_stop(pieces: Iterable[str], stops: list[str]) -> Iterator[str]:
    """The text of the pieces up to the first complete stop text, again in pieces. If the text ends with what
    may begin a stop, that end waits for the next pieces.

    >>> list(pieces_before_stop(["Yes", ".#", "## ", "User: and"], ["### User"]))
    ['Yes', '.', '', '']
    """
    held = ""  # text that has not been yielded
    for piece in pieces:
        held += piece
        found = [stop for stop in stops if stop in held]
        if found:
            # Of several stops, the one that is complete first; of two that end together, the longer one.
            first = min(found, key=lambda stop: (held.index(stop) + len(stop), -len(stop)))
            yield held[: held.index(first)]
            return
        n_safe = len(held) - longest_beginning_at_end(held, stops)
        yield held[:n_safe]
        held = held[n_safe:]
    yield held


def longest_beginning_at_end(text: str, stops: list[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop: the longest that fits.

    >>> longest_beginning_at_end("a##", ["###", "#b"])
    2
    """
    longest = 0
    for stop in stops:
        for length in range(1, len(stop)):
            if text.endswith(stop[:length]):
                longest = max(longest, length)
    return longest


def generate_text(
    model: GPTMini,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 42,
    eos_token: str | None = None,
) -> str:
    """The continuation of the prompt as one string, without the prompt. It ends after `max_new_tokens`
    tokens, before the tokenizer's EOS, or before the text `eos_token` if one is given.

    >>> model, tokenizer, _ = load_model("checkpoints/final.ckpt")            # doctest: +SKIP
    >>> generate_text(model, tokenizer, "Attention is", max_new_tokens=20)    # doctest: +SKIP
    """
    sampling = SamplingConfig(
        temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty
    )
    if eos_token == "":
        raise UserError(
            "eos_token is empty, which would end every text at once; give a text, or None for the "
            "tokenizer's own EOS"
        )
    stops = [eos_token] if eos_token else []
    pieces = stream_text(model, tokenizer, prompt, max_new_tokens, sampling, seed)
    return "".join(pieces_before_stop(pieces, stops))


# ---- what the flags ask for ----------------------------------------------------------------------


def make_sampling(args: argparse.Namespace) -> SamplingConfig:
    """The sampling that the flags describe. Raises UserError if one of them, --max-new-tokens, --num-samples
    or --seed is out of range."""
    if args.max_new_tokens < 1 or args.num_samples < 1:
        raise UserError(
            f"--max-new-tokens {args.max_new_tokens} and --num-samples {args.num_samples} must be at least 1"
        )
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed {args.seed} must be at least 0 and below 2**63")
    try:
        return SamplingConfig(
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            repetition_penalty=args.repetition_penalty,
        )
    except ValidationError as error:
        # pydantic's first error, in the words of the command line: loc holds the name of the field.
        first = error.errors()[0]
        flag = "--" + str(first["loc"][0]).replace("_", "-")
        rule = first["msg"][0].lower() + first["msg"][1:]
        raise UserError(f"{flag} {first['input']}: {rule}; see --help") from None


def read_prompt(args: argparse.Namespace) -> str:
    """The prompt from --prompt, --prompt-file or standard input, in this order. Raises UserError."""
    if args.prompt is not None:
        return unix_text(args.prompt)
    if args.prompt_file is not None:
        if not Path(args.prompt_file).is_file():
            raise UserError(
                f"--prompt-file {args.prompt_file} does not exist; write the text directly with --prompt"
            )
        raw = Path(args.prompt_file).read_bytes()
    elif sys.stdin is None or sys.stdin.isatty():
        raise UserError(
            'no prompt given; use --prompt "Attention is", --prompt-file, --interactive, or pipe text in'
        )
    else:
        raw = sys.stdin.buffer.read()
    try:
        return unix_text(raw.decode()).rstrip("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt is not UTF-8 text (byte {error.start}); convert it first") from None


# ---- one prompt, or one after another ------------------------------------------------------------


def safe_to_show(text: str) -> str:
    """On a terminal, the text with control characters written as escapes: a model can have learned
    `\\x1b[2J`, which clears the screen. Into a file or a pipe, the text as it is."""
    return printable_lines(text) if sys.stdout.isatty() else text


def print_continuation(
    model: GPTMini,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    sampling: SamplingConfig,
    seed: int,
) -> None:
    """Print the prompt and its continuation, as the model writes it. Raises UserError for a bad prompt."""
    pieces = stream_text(model, tokenizer, prompt, max_new_tokens, sampling, seed)
    first = next(pieces)  # a bad prompt raises here, before anything is printed
    print(prompt, end=safe_to_show(first), flush=True)
    for piece in pieces:
        print(safe_to_show(piece), end="", flush=True)
    print(flush=True)


def continue_prompts(
    model: GPTMini, tokenizer: Tokenizer, max_new_tokens: int, sampling: SamplingConfig, seed: int
) -> None:
    """Ask for a prompt and continue it, again and again until the end of input. A bad prompt is answered with
    a message and does not end the program. Each prompt has a different seed."""
    while True:
        try:
            line = input("prompt> " if sys.stdin.isatty() else "")
        except EOFError:
            print()
            return
        # input() takes off the \n of a Windows line end (\r\n) and leaves the \r. With the \n back,
        # unix_text sees both.
        prompt = unix_text(line + "\n").removesuffix("\n")
        try:
            print_continuation(model, tokenizer, prompt, max_new_tokens, sampling, seed)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        seed += 1


# ---- chat ----------------------------------------------------------------------------------------


class Chat:
    """A conversation with a fine-tuned model. It remembers the turns, each a question and its answer. The
    template says how they are laid out for the model, and whether the model reads earlier turns at all
    (`multi_turn`). Turns that do not fit into the context are left out, the oldest first."""

    def __init__(
        self,
        model: GPTMini,
        tokenizer: Tokenizer,
        template: Template,
        max_new_tokens: int,
        sampling: SamplingConfig,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.template = template
        self.sampling = sampling
        context = model.config.max_seq_len
        self.max_new_tokens = min(max_new_tokens, context // 2)  # an answer may take half of the context
        self.room = context - self.max_new_tokens  # the rest is for the question and the turns before it
        self.turns: list[tuple[str, str]] = []  # (question, answer)

    def answer(self, question: str, seed: int) -> Iterator[str]:
        """The answer, piece by piece. It ends at EOS, before a stop text of the template, or after
        `max_new_tokens` tokens. The turn is then remembered, also when Ctrl-C ends the answer. Raises
        UserError for a question that is empty, not valid text, or has characters the tokenizer does not
        know."""
        prompt_to_ids(self.tokenizer, question)  # only for its errors
        ids = conversation_ids(self.template, self.tokenizer, self.turns, question, self.room)
        n_question = len(prompt_ids(self.template, self.tokenizer, question))
        if n_question > self.room:
            warn(
                f"the question has {n_question} tokens with its template, and {self.room} fit: only its end "
                "is read"
            )
        pieces = stream_text(self.model, self.tokenizer, ids, self.max_new_tokens, self.sampling, seed)
        said = ""
        try:
            for piece in pieces_before_stop(pieces, self.template.stop):
                said += piece
                yield piece
        finally:  # also after Ctrl-C
            self.turns.append((question, said.strip()))


def print_answer(chat: Chat, question: str, seed: int) -> None:
    """Print the answer as it comes. On a terminal Ctrl-C ends the answer, elsewhere the program."""
    try:
        for piece in chat.answer(question, seed):
            print(safe_to_show(piece), end="", flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
    print(flush=True)


def answer_questions(chat: Chat, seed: int) -> None:
    """Ask for a question and print the answer, again and again until /quit or the end of input. Each question
    has a different seed."""
    if sys.stdin is None:
        raise UserError("--chat reads questions from standard input, which is closed")
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        memory = "remembers what was said" if chat.template.multi_turn else "answers each question by itself"
        print(
            f"This model {memory}, within {chat.model.config.max_seq_len} tokens. /reset forgets, /quit "
            "ends, Ctrl-C stops an answer."
        )
    while True:
        try:
            question = unix_text(input("you> " if on_terminal else "")).strip()
        except EOFError:
            print()
            return
        if question == "/quit":
            return
        if question == "/reset":
            chat.turns.clear()
            print("(forgotten)")
        elif question.startswith("/"):
            print(f"{question.split()[0]} is not a command; there are /reset and /quit", file=sys.stderr)
        elif question:
            print_answer(chat, question, seed)
            seed += 1


# ---- main ----------------------------------------------------------------------------------------


def chat_template(metadata: dict, ckpt: str) -> Template:
    """The template of an instruction model. Raises UserError for a model that only continues texts."""
    template = saved_template(metadata, ckpt)
    if template is None:
        raise UserError(
            f"{ckpt} is not an instruction model: it continues texts (--interactive) and does not answer. "
            "Make it one:\n       python3 finetune.py --config config_finetune.yaml --override "
            f"base_ckpt={ckpt}"
        )
    return template


def main(argv: list[str] | None = None) -> int:
    """The whole script as one call. Returns the exit status; raises UserError."""
    args = parse_args(argv)
    sampling = make_sampling(args)
    device = resolve_device(args.device)
    if args.quantize and args.compile and device == "cpu":
        raise UserError(
            "--quantize int8 and --compile do not go together on a CPU: PyTorch cannot compile its int8 "
            "kernel, and the rest would take a minute; leave one out"
        )
    # Before the model is loaded, so that a missing prompt is answered at once.
    prompt = None if args.interactive or args.chat else read_prompt(args)
    model, tokenizer, metadata = load_model(args.ckpt, device)
    warn_of_other_tokenizer(args.tokenizer, tokenizer.kind, tokenizer.vocab_size)
    model.compile_decoding = args.compile
    if args.quantize:
        inform(sizes_line(quantize_int8(model), device))
    if args.chat:
        template = chat_template(metadata, args.ckpt)
        answer_questions(Chat(model, tokenizer, template, args.max_new_tokens, sampling), args.seed)
        return 0
    if args.interactive:
        continue_prompts(model, tokenizer, args.max_new_tokens, sampling, args.seed)
        return 0
    n_prompt = len(prompt_to_ids(tokenizer, prompt))
    context = model.config.max_seq_len
    if n_prompt > context:
        warn(f"the prompt has {n_prompt} tokens, the model sees {context}: it reads the last {context}")
    for seed in range(args.seed, args.seed + args.num_samples):
        if args.num_samples > 1:
            print(f"--- sample {seed - args.seed + 1} (seed {seed}) ---")
        print_continuation(model, tokenizer, prompt, args.max_new_tokens, sampling, seed)
    return 0
