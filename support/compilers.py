"""Errors of torch.compile in words for the user: what the machine lacks, and what to do.

torch.compile translates Python into C++ (on a CPU) or Triton (on a GPU), for which it needs a compiler.
"""

from collections.abc import Iterator

import torch

# The modules whose errors come from compiling.
COMPILERS = ("torch._dynamo", "torch._inductor", "torch._functorch", "torch._C._dynamo", "triton")
# A piece of the compiler's own message -> (what is missing, how to get it).
MISSING = {
    "Python.h": (
        "Python's header files (Python.h)",
        "install them (Debian, Ubuntu: apt-get install python3-dev)",
    ),
    "triton installation": ("Triton, the compiler for GPUs,", "pip install triton"),
    "C++ compiler": (
        "a C++ compiler",
        "install one (Debian, Ubuntu: apt-get install g++; macOS: xcode-select --install)",
    ),
    "C compiler": ("a C compiler", "install one (Debian, Ubuntu: apt-get install gcc)"),
    "'setuptools'": ("the package setuptools", "pip install setuptools"),
    "Compiler: cl": ("a C++ compiler", "install the Visual Studio build tools"),
}
OR_WITHOUT = "or train without: --override training.compile=false"


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and the errors that it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def is_of_compiler(error: BaseException) -> bool:
    """Whether the error, or one that it came from, is of a kind that only the compiler raises."""
    return any(type(cause).__module__.startswith(COMPILERS) for cause in causes(error))


def why_it_failed(error: BaseException) -> str:
    """What is missing or has failed, and what to do about it, in one or two lines that begin with a verb."""
    text = " ".join(" ".join(str(cause) for cause in causes(error)).split())
    for piece, (missing, remedy) in MISSING.items():
        if piece in text:
            return f"needs {missing}, and none was found; {remedy}"
    said = f"{type(error).__name__}: {text[:200]}"
    return f"failed ({said})\n       try another version of PyTorch (this is {torch.__version__})"


def advice_on_compiling(
    error: BaseException, asked_by: str = "training.compile=true", or_without: str = OR_WITHOUT
) -> str:
    """The same as a sentence for the user. `asked_by` is the setting or the flag that asked to compile,
    `or_without` how to go without it."""
    return f"{asked_by} {why_it_failed(error)}, {or_without}"
