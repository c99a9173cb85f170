"""`python -m benchmarks`: what each benchmark measures, and its command."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent


def benchmarks() -> Iterator[tuple[str, str]]:
    """List what each benchmark measures and its command: the first line of its docstring, and the first in it
    that starts with its own `python -m`. Modules without one are run by others, or not at all."""
    for file in sorted(HERE.glob("*/[!_]*.py")):
        text = ast.get_docstring(ast.parse(file.read_text())) or ""
        lines = [line.strip() for line in text.splitlines()]
        module = f"python -m benchmarks.{file.parent.name}.{file.stem}"
        if command := next((line for line in lines if f"{line} ".startswith(f"{module} ")), None):
            yield lines[0], command


def main() -> None:
    if sys.argv[1:] not in ([], ["-h"], ["--help"]):
        raise SystemExit("python -m benchmarks lists the benchmarks; run one by its own command")
    for what, command in benchmarks():
        print(f"{what}\n    {command}\n")
    print("Each answers --help.")


if __name__ == "__main__":
    main()
