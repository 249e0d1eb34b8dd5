"""How an instruction becomes a prompt. A template is data: a few texts in the config, kept in every
fine-tuned checkpoint, so that training, chat and evaluation lay a question out in the same way.

    ### User:                 \\
    Name a primary color.      | the prompt: given, not trained on
                               |
    ### Assistant:            /
    Red.<|endoftext|>            the response, closed by EOS: what the model learns to write, and to end
"""

import re
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tokenizer import Tokenizer

SLOT = re.compile(r"\{(instruction|input)\}")


class Template(BaseModel):
    """The layout of a conversation. The response begins where the prompt ends, and EOS ends it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    system: str = Field("", description="Stands once, before the first prompt.")
    prompt: str = Field(description="A prompt; `{instruction}` is where the instruction goes.")
    prompt_with_input: str = Field(
        description="The prompt of a row that has an input, which goes to `{input}`."
    )
    multi_turn: bool = Field(
        False,
        description="Whether the next prompt may follow an answer, so that chat remembers what was said.",
    )
    special_tokens: bool = Field(
        True,
        description="Whether names of special tokens in these texts (`<|im_start|>`) are the tokens, not letters.",
    )
    stop: list[str] = Field(
        [],
        description="Texts that end an answer in chat, besides EOS: what a model writes when it goes on for the "
        "user.",
    )

    @model_validator(mode="after")
    def _check(self) -> "Template":
        for name, slots in (("prompt", ["instruction"]), ("prompt_with_input", ["input", "instruction"])):
            if sorted(SLOT.findall(getattr(self, name))) != slots:
                raise ValueError(
                    f"{name} must hold {' and '.join(f'{{{slot}}}' for slot in reversed(slots))}, each once"
                )
        try:
            "".join([self.system, self.prompt, self.prompt_with_input, *self.stop]).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"half a character ({error.object[error.start]!a}), which is no text") from None
        if not all(self.stop):
            raise ValueError("stop: an empty text would end every answer at once")
        return self

    def fill(self, instruction: str, input: str = "") -> str:
        """One prompt, without what stands before the first. What looks like a slot inside the texts stays
        as it is."""
        values = {"instruction": instruction, "input": input}
        return SLOT.sub(lambda slot: values[slot[1]], self.prompt_with_input if input else self.prompt)

    def first(self, instruction: str, input: str = "") -> str:
        """The prompt that begins a conversation."""
        return self.system + self.fill(instruction, input)


TEMPLATES = {
    "chat": Template(
        prompt="### User:\n{instruction}\n\n### Assistant:\n",
        prompt_with_input="### User:\n{instruction}\n\n{input}\n\n### Assistant:\n",
        multi_turn=True,
        stop=["### User:"],
    ),
    "alpaca": Template(  # Taori et al., "Stanford Alpaca" (2023), with a line end behind "### Response:", as alpaca-lora has it
        prompt="Below is an instruction that describes a task. Write a response that appropriately completes "
        "the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:\n",
        prompt_with_input="Below is an instruction that describes a task, paired with an input that provides further "
        "context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        stop=["### Instruction:"],
    ),
}
DEFAULT = "chat"


def own_parts(template: Template, text: str, tokenizer: Tokenizer) -> list[str | int]:
    """A text of the template itself, in which the names of special tokens are the tokens:
    `"<|im_start|>user"` becomes `[50257, "user"]`. In what people and models write they stay letters."""
    names = [name for name in tokenizer.special_ids if name in text] if template.special_tokens else []
    names.sort(key=len, reverse=True)  # of two that begin at one place, the longer
    pieces = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
    return [tokenizer.special_ids.get(piece, piece) for piece in pieces if piece]


def prompt_parts(
    template: Template, tokenizer: Tokenizer, instruction: str, input: str = "", system: str = ""
) -> list[str | int]:
    """One prompt behind `system`, as `Tokenizer.encode_parts` takes it."""
    values = {"instruction": instruction, "input": input}
    first, *rest = SLOT.split(template.prompt_with_input if input else template.prompt)
    parts = own_parts(template, system + first, tokenizer)
    for slot, text in zip(rest[::2], rest[1::2], strict=True):
        parts += [values[slot], *own_parts(template, text, tokenizer)]
    return parts


def first_parts(
    template: Template, tokenizer: Tokenizer, instruction: str, input: str = ""
) -> list[str | int]:
    """The prompt that begins a conversation, with BOS before it where the tokenizer has one and the
    template does not write it."""
    parts, bos = (
        prompt_parts(template, tokenizer, instruction, input, template.system),
        list(tokenizer.bos_ids),
    )
    return parts if parts[: len(bos)] == bos else [*bos, *parts]


def prompt_ids(template: Template, tokenizer: Tokenizer, instruction: str, input: str = "") -> list[int]:
    """The ids of a first prompt, the same whether the response is known or still to be written. Raises
    UserError for characters that the tokenizer lacks."""
    return tokenizer.encode_parts(first_parts(template, tokenizer, instruction, input))


def conversation_ids(
    template: Template, tokenizer: Tokenizer, turns: Sequence[tuple[str, str]], question: str, room: int
) -> list[int]:
    """The ids of a conversation up to where the next answer begins: `turns` are (question, its answer).
    The oldest are forgotten where all together have more than `room` ids; of a single question that has,
    the end is kept."""
    turns = list(turns) if template.multi_turn else []
    while True:
        parts: list[str | int] = []
        for n, said in enumerate([*(said for said, _ in turns), question]):
            parts += prompt_parts(template, tokenizer, said) if n else first_parts(template, tokenizer, said)
            parts += [turns[n][1], tokenizer.eos_id] if n < len(turns) else []
        ids = tokenizer.encode_parts(parts)
        if len(ids) <= room or not turns:
            return ids[-room:]
        turns.pop(0)
