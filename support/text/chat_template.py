r"""How an instruction becomes a prompt. A template is no code, only a few texts in the config. Every
fine-tuned checkpoint keeps them, so that training, chat and evaluation write a question in the same way.

    ### User:                    \
    Name a primary color.        | the prompt: given, not trained on
                                 |
    ### Assistant:               /
    Red.<|endoftext|>            the response, ended by EOS: what the model learns to write, and where to stop

A prompt is first a list of *parts*: texts, and ids of special tokens. `Tokenizer.encode_parts` turns such a
list into ids.
"""

import re
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tokenizer import Tokenizer

SLOT = re.compile(r"\{(instruction|input)\}")  # where a template takes the text of a row


class Template(BaseModel):
    """The texts around an instruction. The response follows the prompt, and the token EOS (end of text) ends
    it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    system: str = Field("", description="Comes once, before the first prompt.")
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
        description="Whether names of special tokens in these texts (`<|im_start|>`) are the tokens, not "
        "letters.",
    )
    stop: list[str] = Field(
        [],
        description="Texts that end an answer in chat, besides EOS: what a model writes when it "
        "continues with the user's next question.",
    )

    @model_validator(mode="after")
    def _check(self) -> "Template":
        for name, slots in (("prompt", ["instruction"]), ("prompt_with_input", ["instruction", "input"])):
            if sorted(SLOT.findall(getattr(self, name))) != sorted(slots):
                wanted = " and ".join(f"{{{slot}}}" for slot in slots)
                raise ValueError(f"{name} must hold {wanted}, each once")
        try:
            "".join([self.system, self.prompt, self.prompt_with_input, *self.stop]).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise ValueError(f"half a character ({half!a}), which is not valid text") from None
        if not all(self.stop):
            raise ValueError("stop: an empty text would end every answer at once")
        return self

    def fill(self, instruction: str, input: str = "") -> str:
        """One prompt as text, without the system text. If the instruction itself has `{input}` in it, that
        stays as it is.

        >>> TEMPLATES["chat"].fill("Name a color.")
        '### User:\\nName a color.\\n\\n### Assistant:\\n'
        """
        values = {"instruction": instruction, "input": input}
        return SLOT.sub(lambda slot: values[slot[1]], self.prompt_with_input if input else self.prompt)

    def first_prompt(self, instruction: str, input: str = "") -> str:
        """The prompt that begins a conversation, as text: the system text, then the prompt."""
        return self.system + self.fill(instruction, input)


TEMPLATES = {
    "chat": Template(
        prompt="### User:\n{instruction}\n\n### Assistant:\n",
        prompt_with_input="### User:\n{instruction}\n\n{input}\n\n### Assistant:\n",
        multi_turn=True,
        stop=["### User:"],
    ),
    # Taori et al., "Stanford Alpaca" (2023), with a line end after "### Response:", as alpaca-lora has it.
    "alpaca": Template(
        prompt="Below is an instruction that describes a task. Write a response that appropriately completes "
        "the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:\n",
        prompt_with_input="Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        stop=["### Instruction:"],
    ),
}
DEFAULT_TEMPLATE = "chat"


# ---- prompts as parts ----------------------------------------------------------------------------


def template_parts(template: Template, text: str, tokenizer: Tokenizer) -> list[str | int]:
    """A text of the template as parts: each name of a special token in it becomes the id of that token.

    In: `"<|im_start|>user"`. Out: `[50257, "user"]`, if 50257 is the id of `<|im_start|>`. Only texts of the
    template come here. In what people and models write, such a name stays plain letters.
    """
    names = [name for name in tokenizer.special_ids if name in text] if template.special_tokens else []
    if not names:
        return [text] if text else []
    # The pattern takes the first name that fits, so a long name must come before a short one inside it.
    names.sort(key=len, reverse=True)
    pieces = re.split(f"({'|'.join(map(re.escape, names))})", text)
    return [tokenizer.special_ids.get(piece, piece) for piece in pieces if piece]


def prompt_parts(
    template: Template, tokenizer: Tokenizer, instruction: str, input: str = "", system: str = ""
) -> list[str | int]:
    """One prompt as parts. The text `system` comes before it.

    In: the instruction "Hi" and the template "<|im_start|>user\\n{instruction}<|im_end|>".
    Out: `[50257, "user\\n", "Hi", 50258]`.
    """
    values = {"instruction": instruction, "input": input}
    # SLOT has a group in it, so split() also returns the slots: [text, slot name, text, slot name, text].
    before, *rest = SLOT.split(template.prompt_with_input if input else template.prompt)
    parts = template_parts(template, system + before, tokenizer)
    for slot, text in zip(rest[::2], rest[1::2], strict=True):
        parts += [values[slot], *template_parts(template, text, tokenizer)]
    return parts


def first_prompt_parts(
    template: Template, tokenizer: Tokenizer, instruction: str, input: str = ""
) -> list[str | int]:
    """The prompt that begins a conversation, as parts: BOS (the token that begins a text), the system text,
    the prompt. BOS is not added if the tokenizer has none, or if the template already begins with it."""
    parts = prompt_parts(template, tokenizer, instruction, input, template.system)
    bos_ids = list(tokenizer.bos_ids)
    return parts if parts[: len(bos_ids)] == bos_ids else [*bos_ids, *parts]


# ---- ids -----------------------------------------------------------------------------------------


def prompt_ids(template: Template, tokenizer: Tokenizer, instruction: str, input: str = "") -> list[int]:
    """The ids of a prompt that begins a conversation. Training and chat both use them, so the model sees the
    same prompt in both. Raises UserError for characters that the tokenizer lacks."""
    return tokenizer.encode_parts(first_prompt_parts(template, tokenizer, instruction, input))


def conversation_ids(
    template: Template, tokenizer: Tokenizer, turns: Sequence[tuple[str, str]], question: str, room: int
) -> list[int]:
    """The ids of a conversation, up to where the next answer begins; at most `room` ids.

    In: `turns` are pairs (question, answer), the oldest first: `[("one", "1")]`; `question` is the new one:
    `"now"`. Out: the ids of the first prompt ("one"), of "1", of EOS, and of the prompt "now".

    If there are more than `room` ids, the oldest turns are forgotten. If the question alone is still too
    long, its last `room` ids are kept. A template without `multi_turn` forgets all turns.
    """
    turns = list(turns) if template.multi_turn else []
    while True:
        questions = [*(asked for asked, _ in turns), question]
        parts = first_prompt_parts(template, tokenizer, questions[0])
        for (_, answer), next_question in zip(turns, questions[1:], strict=True):
            parts += [answer, tokenizer.eos_id, *prompt_parts(template, tokenizer, next_question)]
        ids = tokenizer.encode_parts(parts)
        if len(ids) <= room or not turns:
            return ids[-room:]
        turns.pop(0)
