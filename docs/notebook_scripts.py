"""A notebook as a script: `python docs/notebook_scripts.py notebooks/06_remove_channels.ipynb > channels.py`.

Cells follow one another, texts become comments, and what a notebook shows at the end of a cell is printed. A line that
installs something (`%pip`) becomes an error that says so; pictures need a screen, or `MPLBACKEND=agg` to be left out.
"""

import ast
import json
import pathlib
import sys


def script(path):
    """Return the text of the script that a notebook is."""
    cells = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))["cells"]
    parts = []
    for cell in cells:
        source = "".join(cell["source"])
        parts.append(_code(source) if cell["cell_type"] == "code" else _comment(source))
    return "\n\n".join(parts) + "\n"


def _comment(text):
    return "# %% [markdown]\n" + "\n".join(f"# {line}".rstrip() for line in text.splitlines())


def _code(source):
    lines = []
    for line in source.splitlines():
        command = line.lstrip()
        if command.startswith("%"):
            line = line.replace(command, f"raise SystemExit({'Run first: ' + command.removeprefix('%')!r})")
        lines.append(line)
    tree = ast.parse("\n".join(lines))
    last = tree.body[-1] if tree.body else None
    # `print(...)` and `plt.show()` show by themselves; a semicolon says that nothing is to be shown.
    if isinstance(last, ast.Expr) and not _shows(last.value) and not lines[-1].rstrip().endswith(";"):
        shown = lines[last.lineno - 1 :]
        shown[0] = f"print({shown[0]}"
        lines[last.lineno - 1 :] = [*shown[:-1], f"{shown[-1]})"]
    return "# %%\n" + "\n".join(lines)


def _shows(node):
    return isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "plt.show")


if __name__ == "__main__":
    print(script(sys.argv[1]), end="")
