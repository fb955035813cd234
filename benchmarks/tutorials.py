"""The tutorials with several seeds: what a notebook shows of one run, as mean and standard deviation.

Each tutorial has a line `SEED = 0` and collects `results`, a list of rows. Here its cells run from top to bottom once
for each seed, in a fresh folder and with nothing else changed. Numbers become mean ± standard deviation over the
seeds; text that differs is listed.

`--data` names the folder that `KERAS_SPARSE_DATA` would name; without it the data come from their public homes.
"""

import argparse
import json
import os
import pathlib
import re
import statistics
import tempfile

import nbclient
import nbformat
import result

NOTEBOOKS = pathlib.Path(__file__).parents[1] / "notebooks"
DUMP = "import json\n\nprint(json.dumps(results, default=float))"


def rows_of(path, seed):
    """Return the rows that a notebook collects with another seed."""
    notebook = nbformat.read(path, as_version=4)
    changed = 0
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source, count = re.subn(r"^SEED = \d+$", f"SEED = {seed}", cell.source, flags=re.M)
            changed += count
    if changed != 1:
        raise ValueError(
            f"A tutorial sets SEED once, in a line of its own. Received: {changed} such lines, {path.name}"
        )
    notebook.cells.append(nbformat.v4.new_code_cell(DUMP))
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        nbclient.NotebookClient(notebook, timeout=None, kernel_name="python3", resources=resources).execute()
    return json.loads(notebook.cells[-1].outputs[0].text)


def summary(values):
    """Return one cell of the table: a share in percent, an amount, a ratio (in tutorials a text), or texts."""
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        return ", ".join(dict.fromkeys(str(value) for value in values))
    if all(0 <= number <= 1 for number in numbers) and not any(isinstance(value, str) for value in values):
        return result.mean_and_spread([100 * number for number in numbers])
    mean, spread = statistics.mean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else 0.0
    return f"{mean:,.0f} ± {spread:,.0f}" if mean > 100 else f"{mean:.2f} ± {spread:.2f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tutorials", nargs="+", help="such as 07_vision")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data", help="folder with the data")
    args = parser.parse_args()
    if args.data:
        os.environ["KERAS_SPARSE_DATA"] = os.path.abspath(args.data)
    # The package of this tree, wherever the kernel starts.
    os.environ["PYTHONPATH"] = str(NOTEBOOKS.parent)
    for name in args.tutorials:
        load = result.load()
        runs = []
        for seed in args.seeds:
            runs.append(rows_of(NOTEBOOKS / f"{name}.ipynb", seed))
            print(json.dumps({"seed": seed, "results": runs[-1]}), flush=True)
        every, same = [row for rows in runs for row in rows], {}
        for row in every:  # by the first column, the name; a file may have been refused with some seeds
            same.setdefault(next(iter(row.values())), []).append(row)
        columns = list(dict.fromkeys(column for row in every for column in row))
        table = []
        for rows in same.values():
            cells = [summary([row[column] for row in rows]) if column in rows[0] else "" for column in columns]
            table.append([*cells, str(len(rows))])
        result.show(f"{name}, seeds {args.seeds}", [*columns, "runs"], table, load_before=load)


if __name__ == "__main__":
    main()
