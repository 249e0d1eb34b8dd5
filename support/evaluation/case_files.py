"""Case files: prompts with what should follow, read and checked. docs/EVALUATION.md shows the format."""

import difflib
import glob
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from support.cli import unix_text
from support.config.values import typed
from support.files.find_files import find_files
from support.files.safe_yaml import read_mapping
from support.messages import UserError


class Case(BaseModel):
    """A prompt, and at least one of: a target (alone or among choices), texts that the output should contain,
    a regular expression that it should match."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: str = ""
    prompt: str
    input: str = ""  # only with an instruction
    instruction: bool = False  # whether the prompt is laid out by the checkpoint's template
    target: Annotated[str, Field(min_length=1)] | None = None
    choices: list[Annotated[str, Field(min_length=1)]] | None = Field(None, min_length=2, max_length=100)
    contains: list[Annotated[str, Field(min_length=1)]] = []
    regex: str | None = None
    category: str = "other"
    weight: float = Field(1.0, gt=0, le=1000)
    max_new_tokens: int = Field(24, ge=1, le=1000)  # of the greedy output
    file: str = ""  # the file the case is from, filled in by `read_cases`

    @field_validator("contains", mode="before")
    @classmethod
    def _text_to_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("prompt", "input", "target", "choices", "contains", mode="before")
    @classmethod
    def _clean_as_in_training(cls, value: Any) -> Any:
        if isinstance(value, list):
            return [cls._clean_as_in_training(text) for text in value]
        return unix_text(value) if isinstance(value, str) else value

    @field_validator("weight", mode="before")
    @classmethod
    def _accept_whole_number(cls, value: Any) -> Any:
        return float(value) if type(value) is int else value

    @field_validator("regex")
    @classmethod
    def _check_regex(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{value!r} is not a regular expression ({error})") from None
        return value

    @model_validator(mode="after")
    def _check(self) -> "Case":
        if self.choices is not None:
            if len(set(self.choices)) < len(self.choices):
                raise ValueError(f"a choice is given twice among {self.choices}")
            if self.target not in self.choices:
                raise ValueError(f"target {self.target!r} must be one of the choices {self.choices}")
        if self.target is None and not self.contains and self.regex is None:
            raise ValueError("nothing to score; give a target, contains or regex")
        if self.input and not self.instruction:
            raise ValueError("input goes with an instruction; set instructions: true for the file")
        if self.instruction and not self.prompt.strip():
            raise ValueError("an instruction cannot be empty")
        return self

    @property
    def right(self) -> int:
        """The index of the target among the texts whose likelihood counts: the choices, or it alone."""
        return self.choices.index(self.target) if self.choices else 0

    @property
    def continued(self) -> bool:
        """Whether the model should write a continuation: not for sentences that are compared whole."""
        return bool(self.prompt or self.contains or self.regex)


class CaseFile(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = ""
    description: str = ""
    instructions: bool = False  # whether all prompts are instructions
    cases: list[Any] = Field(min_length=1)


def explain(error: dict, where: str) -> str:
    """One line for one pydantic error; `where` names the file and the case."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(
            str(error["loc"][-1]), [*Case.model_fields, *CaseFile.model_fields], n=1, cutoff=0.5
        )
        advice = f"did you mean {near[0]}?" if near else "see docs/EVALUATION.md"
        return f"{where}: unknown key {key}; {advice}"
    if error["type"] == "missing":
        return f"{where}: {key} is required"
    if error["type"] == "value_error":
        return f"{where}: {error['msg'].removeprefix('Value error, ')}"
    value, rule = error["input"], error["msg"][0].lower() + error["msg"][1:]
    is_unquoted = error["type"] == "string_type" and isinstance(value, int | float | bool | None)
    advice = "; put it in quotes" if is_unquoted else ""
    return f"{where}: {key}={repr(value)[:60]}: {rule}{advice}"


def find_case_files(paths: list[str]) -> list[Path]:
    """The files that the paths name: files, folders of .yaml and .json files, or globs. Raises UserError for
    a path that names none."""
    found: list[Path] = []
    for path in paths:
        if not Path(path).is_file() and (Path(path).is_dir() or glob.has_magic(path)):
            found += find_files(path, "--cases", (".yaml", ".json"), strict=True)
        else:
            found.append(Path(path))
    return list(dict.fromkeys(found))


def read_case_file(path: Path) -> list[Case]:
    """The cases of one file. Raises UserError that lists everything wrong with it."""
    tree = read_mapping(
        path,
        "case file",
        "try --cases cases/wiki_basics.yaml",
        "it has a list `cases`; see docs/EVALUATION.md",
    )
    entries = {key: value for key, value in tree.items() if key == "cases"}
    head = typed({key: value for key, value in tree.items() if key != "cases"}, CaseFile)
    try:
        file = CaseFile.model_validate(head | entries)
    except ValidationError as error:
        raise UserError("\n       ".join(explain(e, str(path)) for e in error.errors())) from None
    problems: list[str] = []
    cases: list[Case] = []
    ids: set[str] = set()
    for number, entry in enumerate(file.cases, start=1):
        where = f"{path}, case {number}"
        if not isinstance(entry, dict):
            problems.append(
                f"{where}: {repr(entry)[:60]} is not a mapping with a prompt; see docs/EVALUATION.md"
            )
            continue
        if isinstance(entry.get("id"), str):
            where += f" ({entry['id'][:40]})"
        defaults = {"instruction": file.instructions}
        try:
            case = Case.model_validate(defaults | typed(entry, Case) | {"file": str(path)})
        except ValidationError as error:
            problems += [explain(e, where) for e in error.errors()]
            continue
        case.id = case.id or f"{path.stem}-{number}"
        if case.id in ids:
            problems.append(f"{where}: another case has the id {case.id}")
        ids.add(case.id)
        cases.append(case)
    if problems:
        more = [f"and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise UserError("\n       ".join(problems[:10] + more))
    return cases


def read_cases(paths: list[str]) -> list[Case]:
    """All cases of the files and folders. Raises UserError."""
    return [case for path in find_case_files(paths) for case in read_case_file(path)]
