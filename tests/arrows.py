"""Who imports whom, read from the files themselves; `make docs` draws it into docs/ARCHITECTURE.md.

A room is a file of the top level, a file of support/, or a folder of support/. The drawing shows floors: a
room imports only from floors below its own. Arrows that follow from others are left out: if train imports
support/run, and support/run imports model, then train -> model adds nothing to the picture.
"""

import ast
import functools
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
FILES = sorted([*REPO.glob("*.py"), *(REPO / "support").rglob("*.py")])
PAGE = REPO / "docs" / "ARCHITECTURE.md"
BLOCK = re.compile(r"(?<=<!-- arrows: made by `make docs` -->\n).*?(?=<!-- end of arrows -->)", re.DOTALL)


def module_name(path: Path) -> str:
    """support/run/plan.py is support.run.plan."""
    return ".".join(path.relative_to(REPO).with_suffix("").parts)


def room_of(module: str) -> str:
    """The room a module is in: support.run for support.run.plan, itself for model."""
    return ".".join(module.split(".")[:2])


OURS = {module_name(path) for path in FILES}


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[str]:
    """Every module that the file imports, also inside functions: `from support import cli` is support.cli."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: a relative import; write the full name"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in OURS else node.module


def imported_rooms() -> dict[str, set[str]]:
    """For each room, the other rooms that its files import."""
    rooms: dict[str, set[str]] = {}
    for path in FILES:
        room = room_of(module_name(path))
        used = {room_of(name) for name in imports(path) if name in OURS}
        rooms.setdefault(room, set()).update(used - {room})
    return rooms


def everything_below(room: str, arrows: dict[str, set[str]]) -> set[str]:
    """All rooms that `room` needs, directly or through others."""
    below = set(arrows[room])
    for other in arrows[room]:
        below |= everything_below(other, arrows)
    return below


def without_the_implied(arrows: dict[str, set[str]]) -> dict[str, set[str]]:
    """The arrows that do not follow from others."""
    kept = {}
    for room, used in arrows.items():
        implied = set().union(*(everything_below(other, arrows) for other in used))
        kept[room] = used - implied
    return kept


def floor_of(room: str, arrows: dict[str, set[str]]) -> int:
    """0 for a room that imports nothing of ours, else one more than the highest room it imports."""
    return 1 + max((floor_of(other, arrows) for other in arrows[room]), default=-1)


def drawing() -> str:
    """The floors from top to bottom, a line for each room, with the rooms below that it builds on."""
    arrows = imported_rooms()
    kept = without_the_implied(arrows)
    floors: dict[int, list[str]] = {}
    for room in sorted(arrows):
        floors.setdefault(floor_of(room, arrows), []).append(room)
    width = max(map(len, arrows))
    lines = []
    for floor in sorted(floors, reverse=True):
        for n, room in enumerate(floors[floor]):
            label = f"floor {floor}" if n == 0 else ""
            name = room.replace(".", "/")
            below = " ".join(sorted(other.replace(".", "/") for other in kept[room]))
            line = f"{label:<9}{name:<{width}}"
            if below:
                line += "  -> " + textwrap.fill(
                    below, 95 - width, subsequent_indent=" " * (width + 14), break_on_hyphens=False
                )
            lines.append(line.rstrip())
        lines.append("")
    return "\n".join(lines[:-1])


def page_with_drawing() -> str:
    """docs/ARCHITECTURE.md as it should be: with the drawing of today's imports."""
    return BLOCK.sub(lambda _: f"```text\n{drawing()}\n```\n", PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    PAGE.write_text(page_with_drawing(), encoding="utf-8")
