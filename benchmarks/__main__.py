"""Every benchmark with the question it answers: python -m benchmarks."""

import ast
from pathlib import Path

HERE = Path(__file__).parent


def questions() -> dict[str, tuple[str, str]]:
    """By name of every script that has a ``QUESTION`` at its top: that, and the command its docstring gives.

    Read, not imported: a script may need what is not installed.
    """
    found = {}
    for path in sorted(HERE.glob("*.py")):
        script = ast.parse(path.read_text(encoding="utf-8"))
        lines = (ast.get_docstring(script) or "").splitlines()
        command = next((line.removeprefix("Run: ") for line in lines if line.startswith("Run: ")), "")
        for node in script.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "QUESTION":
                found[path.stem] = ast.literal_eval(node.value), command
    return found


def main() -> None:
    """Print them."""
    for question, command in questions().values():
        print(f"{question}\n    {command}")


if __name__ == "__main__":
    main()
