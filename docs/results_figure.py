"""Draw docs/images/results.svg from the tables of docs/benchmarks.md: `python docs/results_figure.py`.

The numbers are read from the page, so the picture says what the page says, which names the commands that measured them.
"""

import pathlib
import re

import matplotlib
from matplotlib.figure import Figure

DOCS = pathlib.Path(__file__).parent
PICTURE = DOCS / "images" / "results.svg"


def sections():
    """The text under each heading of the page."""
    parts = re.split(r"^## (.+)\n", (DOCS / "benchmarks.md").read_text(encoding="utf-8"), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def row(section, *begins):
    """The cells of the first row of a table that begins with these cells."""
    for line in section.splitlines():
        cells = [cell.strip(" *") for cell in line.strip().strip("|").split("|")]
        if line.startswith("|") and cells[: len(begins)] == list(begins):
            return cells
    raise ValueError(f"There must be a row in docs/benchmarks.md that begins with {begins}.")


def number(cell):
    """The first number of a cell."""
    return float(re.search(r"[-+]?[\d,]*\.?\d+", cell).group().replace(",", ""))


def measured():
    """Return accuracies dense and sparse, `[(label, ratio to dense)]` of zeros and of channels, and errors on MNIST."""
    page = sections()
    words = page["Keyword spotting"]
    places = {
        "bytes of the file": "file, of dense",
        "time in a browser": "WASM time, of dense",
        "instructions of a phone": "ARM64 instructions, of dense",
    }
    zeros = [(label, number(row(words, name)[1])) for label, name in places.items()]
    accuracies = number(row(words, "accuracy, dense")[1]), number(row(words, "accuracy, sparse")[1])
    channels = [("time on a PC, MobileNetV2", number(row(page["Channels removed"], "0.5", "8")[4]))]
    table = page["Accuracy: LeNet-300-100 on MNIST"]
    dense = number(row(table, "dense")[2])
    errors = [
        (
            name,
            [
                (zeros_in_percent, number(row(table, method, f"{zeros_in_percent} %")[2]))
                for zeros_in_percent in (92, 98)
            ],
        )
        for name, method in {
            "all layers together": "`Pruning`, global",
            "layer by layer (tfmot)": "tfmot (uniform)",
        }.items()
    ]
    return accuracies, zeros, channels, dense, errors


def draw(path):
    """Write the picture."""
    (before, after), zeros, channels, dense, errors = measured()
    figure = Figure(figsize=(9, 3), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    bars = [("dense", 1.0), *zeros, *channels]
    colors = ["tab:gray", *["tab:blue"] * len(zeros), *["tab:orange"] * len(channels)]
    labels = [*(name for name, _ in bars[: 1 + len(zeros)]), *(name for name, _ in channels)]
    left.bar_label(left.barh(labels, [value for _, value in bars], color=colors), fmt="%.2f", padding=3)
    left.invert_yaxis()
    left.set(xlim=(0, 1.15), xlabel="of the dense file")
    left.set_title(
        f"Blue: 85 % zeros, spoken digits {before:.1f} → {after:.1f} % right\nOrange: half of the MACs removed",
        fontsize=9,
    )
    for name, points in errors:
        right.plot(*zip(*points, strict=True), "o-", label=name)
    right.set(xlabel="zeros, %", ylabel="test error, %", ylim=(0, None), xticks=[92, 98], xlim=(90, 100))
    right.axhline(dense, color="gray", linestyle=":", label="dense")
    right.set_title("LeNet-300-100 on MNIST", fontsize=9)
    right.legend()
    with matplotlib.rc_context({"svg.hashsalt": "keras_sparse"}):
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    PICTURE.parent.mkdir(exist_ok=True)
    draw(PICTURE)
