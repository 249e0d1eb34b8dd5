"""Checks a checkpoint file before and after it is opened, so that no file can run code or fill the memory.

A checkpoint is a zip archive. One entry of it is a *pickle*: a list of instructions for a small machine with
a stack, which rebuild Python values and may call functions. A harmful file hides such a call there.
"""

import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from support.messages import printable

# All classes and functions that the pickles of our checkpoints name. torch.load(weights_only=True) allows
# more, and some of these can fill the memory: bytearray(10**11), a tensor made from nested lists.
SAFE_NAMES = {
    "collections OrderedDict",
    "torch Size",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
} | {
    f"torch {kind}Storage"
    for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
}
# Instructions of a pickle that change a value on the stack instead of making a new one.
GROWS = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD"}
# Instructions that take from the stack all values above a mark, and this number of values below it.
UNDER_MARK = {"TUPLE": 0, "APPENDS": 1, "SETITEMS": 1}
# The most values and characters in all that a checkpoint holds besides its tensors. A value that is in it
# twice counts twice.
MAX_SIZE = 10**8
MAX_DEPTH = 100  # lists inside lists
LEGACY_VERSION = 1001  # files from before PyTorch 1.6 hold this number, even if they are shorter than that


class Damage(ValueError):
    """What one of the checks below has found wrong, in words for the user."""


def check_archive(path: Path) -> None:
    """Raise Damage for a file that would take much more memory than its size, or would call functions that no
    checkpoint needs.

    torch.load believes the sizes that an archive states: a few kilobytes can unfold into gigabytes. But
    torch.save only ever writes uncompressed entries, one after the other, so anything else is refused.
    Nothing is unpickled here.
    """
    with zipfile.ZipFile(path) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        ends = [*(entry.header_offset for entry in entries[1:]), archive.start_dir]
        for entry, end in zip(entries, ends, strict=True):
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise Damage("an entry of it is compressed")
            if entry.header_offset + entry.file_size > end:
                raise Damage("its entries overlap")
        # PyTorch ignores upper and lower case in this name, so we do too.
        pickles = [entry for entry in entries if entry.filename.lower().endswith("data.pkl")]
        if len(pickles) != 1 or entries[0].header_offset or pickles[0].file_size > MAX_SIZE:
            raise Damage("truncated or damaged")
        check_pickle(archive.read(pickles[0]))


def check_legacy(path: Path) -> None:
    """The same check for files of PyTorch before 1.6. Such a file is five pickles (a magic number, a version,
    the machine, the content, the order of the storages) and then the numbers of the tensors.

    For each storage (the numbers of a tensor), torch.load takes as much memory as the content says it needs,
    before it reads any. So no number in the pickles may be larger than the file.
    """
    largest_number = max(path.stat().st_size, LEGACY_VERSION)
    with open(path, "rb") as file:
        for _ in range(5):
            start = file.tell()
            is_magic_number = start == 0
            for _, value, _ in pickletools.genops(file):
                too_large = type(value) is int and not is_magic_number and value > largest_number
                if too_large or file.tell() - start > MAX_SIZE:
                    raise Damage("truncated or damaged")
            end = file.tell()
            file.seek(start)
            check_pickle(file.read(end - start))


def check_pickle(data: bytes) -> None:
    """Raise Damage for a pickle that names anything but SAFE_NAMES, or that unfolds to more than MAX_SIZE.

    A tuple that holds another tuple ten times, which holds another ten times, and so on, takes a few bytes to
    write and hours to use. So this follows the instructions as Python would, but the stack holds only the
    size of each value. A size is a list of one number, so that it can grow in every place that refers to it.
    """
    stack, marks, memo = [], [], {}
    for opcode, value, _ in pickletools.genops(data):
        name = opcode.name
        if name == "GLOBAL" and value not in SAFE_NAMES:
            raise Damage(f"it would run code when opened, {printable(value)[:100]}")
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[value] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[value])
        elif name == "MARK":
            marks.append(len(stack))
        elif not opcode.stack_before:
            stack.append([len(value) + 1 if type(value) is str else 1])
        else:
            if name in UNDER_MARK:
                start = marks.pop() - UNDER_MARK[name]
            else:
                start = len(stack) - len(opcode.stack_before)
            taken = stack[start:]
            del stack[start:]
            size = taken.pop(0) if name in GROWS else [1]
            size[0] += sum([inner[0] for inner in taken])
            if size[0] > MAX_SIZE:
                raise Damage("a few bytes of it unfold without end")
            stack.append(size)


def check_plain(tree: Any) -> None:
    """Raise Damage unless `tree` is made of plain dicts, lists, texts and numbers, and is finite: a list can
    also hold itself."""
    todo = [(tree, 0)]
    size = 0
    while todo:
        value, depth = todo.pop()
        size += 100 + (len(value) if type(value) is str else 0)
        if size > MAX_SIZE or depth > MAX_DEPTH:
            raise Damage("its description of itself is nested without end")
        if type(value) in (dict, list, tuple):
            parts = (*value.keys(), *value.values()) if type(value) is dict else value
            todo += [(part, depth + 1) for part in parts]
        elif value is not None and type(value) not in (str, int, float, bool):
            raise Damage(f"its description of itself holds a {type(value).__name__}")


def check_tensors(tree: Any) -> None:
    """Raise Damage for a tensor with more elements than its storage: PyTorch can show one number as a tensor
    of a terabyte."""
    for name, tensor in named_tensors(tree):
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise Damage(f"{printable(name)[:100]} claims more elements than the file holds")


def named_tensors(tree: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in nested dicts and lists, in order, with its path: `state_dict.net.norm.weight`."""
    # A loop, not a recursion, so that this ends even if the tree is very deep or holds itself.
    todo = [(name, tree)]
    seen = set()
    while todo:
        name, value = todo.pop()
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            inner = dict.items(value) if isinstance(value, dict) else enumerate(value)
            above = f"{name[:300]}." if name else ""  # keeps names short, however deep the tree is
            todo += [(f"{above}{key}", item) for key, item in reversed(list(inner))]
