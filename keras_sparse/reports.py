"""A report is a table of findings with totals: it prints, shows itself in a notebook, and exports as plain data."""

import html
import json
import weakref

import numpy as np

from keras_sparse import optimizers, patterns, selection

__all__ = ["Report", "emptied", "html_page", "report"]

# Why the last pruning of a model left weights dense: {model: {id(variable): reason}}.
_SKIPPED = weakref.WeakKeyDictionary()


class Report:
    """A table of findings with totals.

    Args:
        title: Headline.
        rows: List of dicts of plain data that share their keys: the columns.
        totals: Dict of plain data about the whole table.
        notes: Sentences shown below the table.
        formats: How to print columns and totals: `{name: format specification or function}`.

    Example:

    >>> from keras_sparse.reports import Report
    >>> report = Report("Sizes", [{"file": "a.tflite", "bytes": 1200}], {"bytes": 1200}, formats={"bytes": ",d"})
    >>> report.to_dict()["totals"]
    {'bytes': 1200}
    >>> "1,200" in str(report)
    True
    """

    def __init__(self, title, rows, totals, notes=(), formats=None):
        self.title = title
        self.rows = [dict(row) for row in rows]
        self.totals = dict(totals)
        self.notes = list(notes)
        self._formats = dict(formats or {})

    def to_dict(self):
        """The report as plain data: `{"title", "rows", "totals", "notes"}`."""
        return {
            "title": self.title,
            "rows": [dict(row) for row in self.rows],
            "totals": dict(self.totals),
            "notes": list(self.notes),
        }

    def to_json(self, indent=2):
        """The report as a JSON string."""
        return json.dumps(self.to_dict(), indent=indent)

    def plot(self):
        """Draw the report: a bar for each row's `sparsity`. Returns a `matplotlib.figure.Figure`.

        Raises:
            ValueError: If the rows have no column `sparsity`.
        """
        bars = [(self._label(row), row["sparsity"]) for row in self.rows if row.get("sparsity") is not None]
        if not bars:
            raise ValueError(f"There is nothing to plot: no row of {self.title!r} has a value for `sparsity`.")
        figure = figure_class()(figsize=(8, 0.8 + 0.3 * len(bars)), layout="constrained")
        axes = figure.add_subplot()
        labels, values = zip(*bars, strict=True)
        positions = range(len(bars))
        drawn = axes.barh(positions, values, color="tab:blue")
        axes.bar_label(drawn, [f"{value:.1%}" for value in values], padding=3, fontsize=8)
        axes.set_yticks(positions, labels, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.1)
        axes.set_xlabel("sparsity (share of zeros)")
        axes.set_title(self.title)
        return figure

    def __str__(self):
        from rich.console import Console

        # As wide as its content: a report that is written to a log or a file must not be cut at 80 columns.
        console = Console(width=1000, color_system=None, highlight=False)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())

    __repr__ = __str__

    def __rich__(self):
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        parts = [Text(self.title, style="bold")]
        if self.rows:
            table = Table(header_style="bold", show_edge=False, pad_edge=False)
            for name in self.rows[0]:
                numeric = all(isinstance(row[name], (int, float, type(None))) for row in self.rows)
                table.add_column(name.replace("_", " "), justify="right" if numeric else "left", overflow="fold")
            for row in self.rows:
                table.add_row(*(Text(self._format(name, value)) for name, value in row.items()))
            parts.append(table)
        if self.totals:
            parts.append(Text(", ".join(f"{k.replace('_', ' ')} {self._format(k, v)}" for k, v in self.totals.items())))
        parts.extend(Text(f"- {note}") for note in self.notes)
        return Group(*parts)

    def to_html(self):
        """The report as a fragment of HTML: a headline, tables and notes."""

        def cell(tag, text):
            return f'<{tag} style="text-align:left">{html.escape(text)}</{tag}>'

        parts = [f"<h4>{html.escape(self.title)}</h4>"]
        if self.rows:
            header = "".join(cell("th", name.replace("_", " ")) for name in self.rows[0])
            body = "".join(
                "<tr>" + "".join(cell("td", self._format(name, value)) for name, value in row.items()) + "</tr>"
                for row in self.rows
            )
            parts.append(f"<table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table>")
        if self.totals:
            totals = "".join(
                f"<tr>{cell('th', name.replace('_', ' '))}{cell('td', self._format(name, value))}</tr>"
                for name, value in self.totals.items()
            )
            parts.append(f"<table>{totals}</table>")
        if self.notes:
            parts.append("<ul>" + "".join(f"<li>{html.escape(note)}</li>" for note in self.notes) + "</ul>")
        return "".join(parts)

    _repr_html_ = to_html  # what notebooks ask for

    def _format(self, name, value):
        how = self._formats.get(name)
        if value is None:
            return ""
        if how is not None:
            return how(value) if callable(how) else format(value, how)
        return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)

    def _label(self, row):
        return str(next(iter(row.values())))


def figure_class():
    """Return matplotlib's class `Figure`, or raise an ImportError that says how to install it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Plots need matplotlib, which is not installed: `pip install matplotlib` or "
            '`pip install "keras_sparse[plots]"`.'
        ) from error
    return Figure


# The share of zeros up to which a weight counts as dense if it is not known to have been pruned.
_FEW = 0.01


def html_page(title, *parts):
    """Return a whole HTML page that needs no other file.

    Args:
        title: Title of the page.
        parts: Reports, or strings of HTML.

    Example:

    >>> import keras_sparse as ks
    >>> ks.reports.html_page("Sizes", "<p>none</p>").startswith("<!DOCTYPE html>")
    True
    """
    style = (
        "body{font-family:sans-serif;margin:2em}table{border-collapse:collapse;margin:1em 0}img{max-width:100%}"
        "td,th{padding:.2em .8em;border-bottom:1px solid #ddd}"
    )
    body = "\n".join(part if isinstance(part, str) else part.to_html() for part in parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{style}</style></head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def remember(model, skipped):
    """Keep why weights of `model` were left dense, `{id(variable): reason}`, for the reports to come."""
    _SKIPPED[model] = dict(skipped)


def emptied(weights, masks=None):
    """Say of each kernel that pruning has left no weight: a sentence that names it and tells what to do.

    Args:
        weights: A list of `ks.selection.Weight`.
        masks: The masks that were chosen for them, a boolean array for each; `None` asks their zeros.

    Returns:
        List of sentences, empty if every kernel has a weight left.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, name="head")])
    >>> ks.reports.emptied(ks.selection.select(model)[:1], [np.zeros((2, 2), bool)])
    ['sequential/head/kernel has no weight left: all 4 are zero, its layer passes on only its bias. Lower its ...']
    """
    if masks is None:
        values = [weight.in_use() for weight in weights]
        masks = [v if v.any() else ~w.pruned_zeros(v) for w, v in zip(weights, values, strict=True)]
    return [
        f"{weight.path} has no weight left: all {weight.size} are zero, {_what_is_left(weight)}. Lower its sparsity, "
        'use allocation="erk" or ks.pruning.Global(floor=1), or leave it out by `filters`.'
        for weight, mask in zip(weights, masks, strict=True)
        if weight.kernel and weight.size and not mask.any()
    ]


def _what_is_left(weight):
    if weight.variable.name == "recurrent_kernel":
        return "its layer has no memory of earlier steps"
    return f"its layer passes on only {'zeros' if getattr(weight.layer, 'bias', None) is None else 'its bias'}"


def report(model, notes=()):
    """Tell what is sparse in a model, what was skipped, and why.

    Rows: `path`, `shape`, `size` and `zeros` (elements), `sparsity` (share of zeros in [0, 1]), `pattern` (where the
    zeros of a pruned weight stand, as `ks.patterns.recognize` names it; else `""`), `dead_units` (output units whose
    weights are all zero) and `dead_inputs` (inputs that meet only zeros, of a convolution input channels; both `None`
    for weights that are not kernels), `status` (`"pruned"`, `"dense"` or `"skipped"`) and `reason`. Zeros that an
    initializer put there do not make a weight pruned. Of a layer with LoRA the kernel in use is counted, the sum of the
    frozen one and the update. Totals: over all kernels, `size`, `zeros`, `sparsity` (connection sparsity) and `density`
    (1 - sparsity, as some papers count); over the model, `parameters` and `nonzero_parameters`. Notes name kernels that
    have no weight left, and those whose zeros LoRA fills.

    Args:
        model: A built Keras model.
        notes: Sentences to show below the table.

    Returns:
        A `Report`.

    Raises:
        ValueError: If the model is not built.
        TypeError: If it is not a Keras 3 model.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> ks.report(model).rows[0]["sparsity"]
    0.0
    """
    selection.check_model(model)
    known = _SKIPPED.get(model)
    sparse = optimizers.find(model)
    weights = selection.weights(model)
    rows = []
    for weight in weights:
        key = id(weight.variable)
        selected = (known is not None and key not in known) or (
            sparse is not None and sparse.sparse_parts.masks.of(weight.variable) is not None
        )
        rows.append(_row(weight, (known or {}).get(key, weight.skipped), selected))
    kernels = [row for row, weight in zip(rows, weights, strict=True) if weight.kernel]
    size, zeros = sum(row["size"] for row in kernels), sum(row["zeros"] for row in kernels)
    totals = {
        "size": size,
        "zeros": zeros,
        "sparsity": zeros / size if size else 0.0,
        "density": 1 - zeros / size if size else 1.0,
        "parameters": sum(row["size"] for row in rows),
        "nonzero_parameters": sum(row["size"] - row["zeros"] for row in rows),
    }
    notes = [*notes, *emptied([w for w in weights if w.kernel]), *_filled_by_lora(weights)]
    counts = dict.fromkeys(("size", "zeros", "parameters", "nonzero_parameters"), ",d")
    formats = counts | {"sparsity": ".1%", "density": ".1%", "shape": lambda shape: "x".join(map(str, shape))}
    return Report(f"Sparsity of {model.name}", rows, totals, notes, formats)


def _filled_by_lora(weights):
    """Sentences about kernels whose zeros the update of LoRA fills, or will fill in training."""
    notes = []
    for weight in weights:
        if weight.kernel and getattr(weight.layer, "lora_enabled", False):
            zeros, left = (int(np.sum(value == 0)) for value in (weight.numpy(), weight.in_use()))
            if zeros > left:
                notes.append(
                    f"{weight.path}: LoRA's update fills {zeros - left} of the {zeros} zeros of the frozen kernel. "
                    "Prune the model again after merging, or train without LoRA, with `ks.callbacks.KeepSparsity`."
                )
            elif zeros:
                notes.append(f"{weight.path}: LoRA's update fills its zeros as soon as it is trained.")
    return notes


def _row(weight, skipped, selected):
    value = weight.in_use()
    zeros = int(value.size - np.count_nonzero(value))
    count = int(np.count_nonzero(weight.pruned_zeros(value))) if weight.kernel and zeros else 0
    # Initializers draw an exact zero now and then: in a weight that nobody is known to have pruned, few do not count.
    if count and (selected or count > _FEW * value.size):
        status, reason = "pruned", ""
    elif skipped:
        status, reason = "skipped", skipped
    elif weight.kernel and zeros and zeros == value.size:
        status, reason = "dense", "all zeros: counts as zero-initialised, not as pruned"
    elif weight.kernel and zeros > _FEW * value.size:
        status, reason = "dense", "zeros of its initializer, not of pruning"
    else:
        status, reason = "dense", ""
    pattern = ""
    if status == "pruned":
        pattern = patterns.recognize(patterns.to_matrix(value != 0, weight.output_axes))
    return {
        "path": weight.path,
        "shape": [int(n) for n in weight.variable.shape],
        "size": int(value.size),
        "zeros": zeros,
        "sparsity": zeros / value.size if value.size else 0.0,
        "pattern": pattern,
        "dead_units": weight.dead_units(),
        "dead_inputs": weight.dead_inputs(),
        "status": status,
        "reason": reason,
    }
