"""Continue a prompt with a trained checkpoint; the text appears token by token.

python3 infer.py --ckpt checkpoints/final.ckpt --prompt "Attention is"
python3 infer.py --ckpt checkpoints/final.ckpt --prompt "A token is" --temperature 0.7 --top-k 40 --num-samples 3
echo "The loss is" | python3 infer.py --ckpt checkpoints/final.ckpt
python3 infer.py --ckpt checkpoints/final.ckpt --interactive
python3 infer.py --ckpt checkpoints_sft/final.ckpt --chat                # a fine-tuned one answers; /reset, /quit
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from support.cli import add_model_flags, file_path, guarded, make_parser, unix_text, warn_of_other_tokenizer
from support.messages import UserError, printable_lines, warn


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_model_flags(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="the text to continue; without it, standard input is read")
    source.add_argument("--prompt-file", type=file_path, metavar="FILE", help="a file that holds the prompt")
    source.add_argument(
        "--interactive", action="store_true", help="ask for prompts until end of input (Ctrl-D)"
    )
    source.add_argument(
        "--chat",
        action="store_true",
        help="talk to a fine-tuned checkpoint, with its own template; /reset forgets, /quit ends",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=200,
        metavar="N",
        help="stop after this many tokens, or at end of document (default 200)",
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
        help="draw among the fewest tokens that hold this probability (default 0.95; 1 is off)",
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="above 1: tokens already there become less likely",
    )
    parser.add_argument(
        "--num-samples",
        type=int,
        default=1,
        metavar="N",
        help="continuations of the prompt; sample i is drawn with seed + i",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    guarded(parse_args, sys.argv[1:])  # --help and wrong flags answer before torch is imported

import torch
from pydantic import ValidationError

from model import GPTMini
from sampling import SamplingConfig, generate_tokens
from support.checkpoint import load_model, saved_template
from support.device import resolve_device
from support.text.chat_template import Template, conversation_ids, prompt_ids
from support.text.mid_document import TextStream
from tokenizer import Tokenizer


def make_sampling(args: argparse.Namespace) -> SamplingConfig:
    """Raises UserError for values that make no sense."""
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
        first = error.errors()[0]
        flag = "--" + str(first["loc"][0]).replace("_", "-")
        raise UserError(
            f"{flag} {first['input']}: {first['msg'][0].lower()}{first['msg'][1:]}; see --help"
        ) from None


def prompt_to_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt is not UTF-8 text (character {error.start}); convert it first") from None
    ids = tokenizer.encode_prompt(prompt)
    if len(ids) == len(tokenizer.bos_ids):
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
    """The continuation of `prompt` (a text, or ids), piece by piece; whole characters only; ends before
    EOS. Raises UserError if the prompt is empty or has characters the tokenizer does not know. A prompt
    beyond the context is read from its end."""
    device = next(model.parameters()).device
    ids = torch.tensor(
        [prompt_to_ids(tokenizer, prompt) if isinstance(prompt, str) else prompt], device=device
    )
    generator = torch.Generator(device).manual_seed(seed)
    text = TextStream(tokenizer, ids[0].tolist())
    for token in generate_tokens(model, ids, max_new_tokens, sampling, tokenizer.eos_id, generator):
        if token.item() == tokenizer.eos_id:
            break
        yield text.push(token.item())
    yield text.flush()


def until(pieces: Iterable[str], stops: list[str]) -> Iterator[str]:
    """The pieces up to the first of the `stops` that is complete. What may be the beginning of one is held
    back until it is known not to be.

    >>> list(until(["Yes", ".#", "## ", "User: and"], ["### User"]))
    ['Yes', '.', '', '']
    """
    waiting = ""
    for piece in pieces:
        waiting += piece
        found = [(waiting.index(stop) + len(stop), waiting.index(stop)) for stop in stops if stop in waiting]
        if found:  # several: the one that is complete first
            yield waiting[: min(found)[1]]
            return
        held = max(
            (n for stop in stops for n in range(1, len(stop)) if waiting.endswith(stop[:n])), default=0
        )
        yield waiting[: len(waiting) - held]
        waiting = waiting[len(waiting) - held :]
    yield waiting


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
    """The prompt's continuation as one string. It ends before the tokenizer's EOS, and before the text
    `eos_token` if given.

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
    return "".join(
        until(
            stream_text(model, tokenizer, prompt, max_new_tokens, sampling, seed),
            [eos_token] if eos_token else [],
        )
    )


def read_prompt(args: argparse.Namespace) -> str:
    """The prompt from --prompt, --prompt-file or standard input, in this order."""
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


def shown(text: str) -> str:
    """On a terminal, what it would obey rather than show (a model can have learned `\\x1b[2J`) as an
    escape; else as it is."""
    return printable_lines(text) if sys.stdout.isatty() else text


def print_continuation(
    model: GPTMini,
    tokenizer: Tokenizer,
    prompt: str,
    args: argparse.Namespace,
    sampling: SamplingConfig,
    seed: int,
) -> None:
    pieces = stream_text(model, tokenizer, prompt, args.max_new_tokens, sampling, seed)
    first = next(pieces)  # so that a bad prompt is an error before anything is printed
    print(prompt, end=shown(first), flush=True)
    for piece in pieces:
        print(shown(piece), end="", flush=True)
    print(flush=True)


def interact(
    model: GPTMini, tokenizer: Tokenizer, args: argparse.Namespace, sampling: SamplingConfig
) -> None:
    """Prompt by prompt, until end of input. A bad prompt is answered, not fatal."""
    seed = args.seed
    while True:
        try:
            prompt = unix_text(input("prompt> " if sys.stdin.isatty() else "") + "\n").removesuffix("\n")
        except EOFError:
            print()
            return
        try:
            print_continuation(model, tokenizer, prompt, args, sampling, seed)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        seed += 1


class Chat:
    """A conversation: what has been said, within the context of the model and by the rules of its template."""

    def __init__(
        self,
        model: GPTMini,
        tokenizer: Tokenizer,
        template: Template,
        max_new_tokens: int,
        sampling: SamplingConfig,
    ):
        self.model, self.tokenizer, self.template, self.sampling = model, tokenizer, template, sampling
        window = model.config.max_seq_len
        self.max_new_tokens = min(max_new_tokens, window // 2)
        self.room = window - self.max_new_tokens  # for the question and what was said before
        self.turns: list[tuple[str, str]] = []  # (question, answer)

    def answer(self, question: str, seed: int) -> Iterator[str]:
        """The answer, piece by piece; remembered when it has ended, also if it is cut short by Ctrl-C.
        Raises UserError."""
        prompt_to_ids(self.tokenizer, question)  # refuses what is no text
        ids = conversation_ids(self.template, self.tokenizer, self.turns, question, self.room)
        if (n := len(prompt_ids(self.template, self.tokenizer, question))) > self.room:
            warn(f"the question has {n} tokens with its template, and {self.room} fit: only its end is read")
        said = ""
        try:
            for piece in until(
                stream_text(self.model, self.tokenizer, ids, self.max_new_tokens, self.sampling, seed),
                self.template.stop,
            ):
                said += piece
                yield piece
        finally:
            self.turns.append((question, said.strip()))


def talk(chat: Chat, seed: int) -> None:
    """Question by question, until /quit or end of input. Ctrl-C ends an answer, and at a question the
    program."""
    if sys.stdin is None:
        raise UserError("--chat reads questions from standard input, which is closed")
    terminal = sys.stdin.isatty()
    if terminal:
        memory = "remembers what was said" if chat.template.multi_turn else "answers each question by itself"
        print(
            f"This model {memory}, within {chat.model.config.max_seq_len} tokens. /reset forgets, /quit "
            "ends, Ctrl-C stops an answer."
        )
    while True:
        try:
            question = unix_text(input("you> " if terminal else "")).strip()
        except EOFError:
            print()
            return
        if question == "/quit":
            return
        if question == "/reset":
            chat.turns.clear()
            print("(forgotten)")
        elif question.startswith("/"):
            print(f"{question.split()[0]} is no command; there are /reset and /quit", file=sys.stderr)
        elif question:
            try:
                for piece in chat.answer(question, seed):
                    print(shown(piece), end="", flush=True)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
            except KeyboardInterrupt:
                if not terminal:
                    raise
            print(flush=True)
            seed += 1


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    sampling, device = make_sampling(args), resolve_device(args.device)
    prompt = None if args.interactive or args.chat else read_prompt(args)
    model, tokenizer, metadata = load_model(args.ckpt, device)
    warn_of_other_tokenizer(args.tokenizer, tokenizer.kind, tokenizer.vocab_size)
    if args.chat:
        if (template := saved_template(metadata, args.ckpt)) is None:
            raise UserError(
                f"{args.ckpt} is no instruction model: it continues texts (--interactive) and does not "
                "answer. "
                "Make it one:\n       python3 finetune.py --config config_finetune.yaml --override "
                f"base_ckpt={args.ckpt}"
            )
        talk(Chat(model, tokenizer, template, args.max_new_tokens, sampling), args.seed)
        return 0
    if prompt is None:
        interact(model, tokenizer, args, sampling)
        return 0
    n_prompt = len(prompt_to_ids(tokenizer, prompt))
    if n_prompt > model.config.max_seq_len:
        warn(
            f"the prompt has {n_prompt} tokens, the model sees {model.config.max_seq_len}: it reads the "
            f"last {model.config.max_seq_len}"
        )
    for i in range(args.num_samples):
        if args.num_samples > 1:
            print(f"--- sample {i + 1} (seed {args.seed + i}) ---")
        print_continuation(model, tokenizer, prompt, args, sampling, args.seed + i)
    return 0


if __name__ == "__main__":
    if sys.stdin is not None and sys.stdin.isatty():
        import readline  # noqa: F401 (gives the interactive prompt line editing and history)
    sys.exit(guarded(main))
