"""A compare report is the table of a comparison, the differences to its first row, and a picture of both."""

from keras_sparse import reports
from keras_sparse.comparison.scores import CLASSIFICATION

__all__ = ["CompareReport"]

_COSTS = {"bytes_ratio": "bytes", "gzip_ratio": "gzip_bytes", "latency_ratio": "latency_ms"}


class CompareReport(reports.Report):
    """What `ks.compare` found. It prints the models, and below them the differences to the first.

    Attributes:
        differences: A `Report` with a row for each model but the first: `NAME_change` is the value minus the first
            model's, for metrics and sparsity; `bytes_ratio`, `gzip_ratio` and `latency_ratio` are the value over the
            first model's, the last only where both are Keras models or both are files.
        metrics: Names of the columns that hold metrics.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation="softmax")])
    >>> pruned = keras.models.clone_model(model)
    >>> _ = ks.prune(pruned, 0.5)
    >>> report = ks.compare({"dense": model, "pruned": pruned}, np.ones((6, 4)), [0, 1, 2] * 2, seconds=0)
    >>> report.differences.rows[0]["sparsity_change"]
    0.5
    """

    def __init__(self, rows, metrics, samples, notes):
        formats = dict.fromkeys(("parameters", "bytes", "gzip_bytes"), ",d") | {"sparsity": ".1%", "samples": ",d"}
        formats |= dict.fromkeys(("latency_ms", "spread_ms"), ".4f") | dict.fromkeys(metrics, _number)
        shares = [name for name in metrics if any(name == c or name.endswith(f"_{c}") for c in CLASSIFICATION)]
        formats |= dict.fromkeys(shares, ".2%")
        columns = ("model", "form", *metrics, "sparsity", "bytes", "gzip_bytes", "latency_ms")
        super().__init__("Comparison", rows, {"samples": samples}, notes, formats, columns)
        self.metrics = list(metrics)
        self.differences = _differences(self.rows, self.metrics, shares)
        self.below = [self.differences] if self.differences.rows else []

    def to_dict(self):
        """The report as plain data: `{"title", "rows", "totals", "notes", "differences"}`."""
        return super().to_dict() | {"differences": self.differences.rows}

    def plot(self):
        """Draw the first metric over sparsity and over size. Returns a `matplotlib.figure.Figure`.

        Without metrics it draws the sparsity of each model.
        """
        numbers = [name for name in self.metrics if not any(isinstance(row[name], list) for row in self.rows)]
        if not numbers:
            return super().plot()
        figure = reports.figure_class()(figsize=(10, 4), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, column, label, unit in (
            (left, "sparsity", "sparsity (share of zeros)", 1),
            (right, "gzip_bytes", "kB, zipped", 1e-3),
        ):
            points = [
                (row[column] * unit, row[numbers[0]], row["model"]) for row in self.rows if row[column] is not None
            ]
            for number, (x, y, name) in enumerate(points):
                axes.scatter(x, y, color=f"C{number % 10}", zorder=2)
                axes.annotate(name, (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8)
            axes.set_xlabel(label)
            axes.grid(alpha=0.3)
            axes.margins(0.15)
        left.set_ylabel(numbers[0].replace("_", " "))
        figure.suptitle(self.title)
        return figure


def _number(value):
    return ", ".join(f"{v:.4g}" for v in value) if isinstance(value, list) else f"{value:.5g}"


def _differences(rows, metrics, shares):
    first, found = rows[0], []
    for row in rows[1:]:
        new = {"model": row["model"]}
        for name in (*metrics, "sparsity"):
            both = not any(value is None or isinstance(value, list) for value in (row[name], first[name]))
            new[f"{name}_change"] = row[name] - first[name] if both else None
        for ratio, name in _COSTS.items():
            new[ratio] = row[name] / first[name] if row[name] is not None and first[name] else None
        if row["form"] != first["form"]:
            new["latency_ratio"] = None  # it would tell a runtime from Keras's overhead, not one model from another
        found.append(new)
    formats = {f"{name}_change": "+.5g" for name in metrics} | dict.fromkeys(_COSTS, ".3f")
    formats |= {f"{name}_change": _points for name in (*shares, "sparsity")}
    return reports.Report(f"Against {first['model']}", found, {}, formats=formats)


def _points(value):
    return f"{100 * value:+.2f} points"
