"""A report is a table of findings with totals: it prints, shows itself in a notebook, and exports as plain data."""

import copy
import html
import json
import weakref
from dataclasses import replace

import numpy as np

from keras_sparse import optimizers, patterns, selection

__all__ = ["Report", "emptied", "html_page", "report"]

_WIDTH = 120  # columns of the short form, and how long in it a cell and a note can be
_CELL = 42
_NOTE = 600
# Why the last pruning of a model left weights dense: {model: {id(variable): reason}}.
_SKIPPED = weakref.WeakKeyDictionary()


class Report:
    """A table of findings with totals.

    Args:
        title: Headline.
        rows: List of dicts of plain data that share their keys: the columns.
        totals: Dict of plain data about the whole table.
        notes: Sentences.
        formats: How to print columns and totals: `{name: format specification or function}`.
        columns: The columns of the short form, `None` for all: names, or a dict from names to functions of the row that
            make the text of a cell (`None`: as `formats` says).
        shown: A function that says of a row whether the short form has it. `None`: all.

    Attributes:
        below: Reports that are printed below this one.
        short: Whether it prints in the short form.

    A report prints in a short form that fits 120 columns: what sums it up, then a line for each row. Long names are
    cut, and columns without any text are left out. `full()` has all rows and columns.

    Example:

    >>> from keras_sparse.reports import Report
    >>> report = Report("Sizes", [{"file": "a.tflite", "bytes": 1200}], {"bytes": 1200}, formats={"bytes": ",d"})
    >>> report.to_dict()["totals"]
    {'bytes': 1200}
    >>> "1,200" in str(report)
    True
    """

    def __init__(self, title, rows, totals, notes=(), formats=None, columns=None, shown=None):
        self.title = title
        self.rows = [dict(row) for row in rows]
        self.totals = dict(totals)
        self.notes = list(notes)
        self.below = []
        self._formats = dict(formats or {})
        self._columns = columns if isinstance(columns, dict) else dict.fromkeys(columns or ())
        self._shown = shown
        self.short = True

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

    def full(self):
        """Return the same report in its full form: all rows and columns, nothing cut, however wide that is.

        Example:

        >>> from keras_sparse.reports import Report
        >>> report = Report("Files", [{"file": "x" * 50, "bytes": 1}], {})
        >>> max(map(len, str(report).splitlines())), max(map(len, str(report.full()).splitlines()))
        (49, 57)
        """
        found = copy.copy(self)
        found.short = False
        found.below = [part.full() for part in self.below]
        return found

    def __str__(self):
        from rich.console import Console

        # A report that is written to a log or a file must not depend on the width of a terminal.
        console = Console(width=_WIDTH if self.short else 1000, color_system=None, highlight=False)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())

    __repr__ = __str__

    def __rich__(self):
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        parts = [Text(self.title, style="bold")]
        if self.totals:
            parts.append(Text(", ".join(f"{name} {text}" for name, text in self._headline())))
        parts.extend(Text(f"- {_cut(note, _NOTE) if self.short else note}") for note in self.notes)
        if self.rows:
            names, rows = self._table(self.short)
            table = Table(
                header_style="bold", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0)
            )
            how = {"no_wrap": True, "overflow": "ellipsis"} if self.short else {"overflow": "fold"}
            for name in names:
                numeric = all(isinstance(row[name], (int, float, type(None))) for row in self.rows)
                table.add_column(name.replace("_", " "), justify="right" if numeric else "left", overflow="fold")
            for row in rows:
                table.add_row(*(Text(text, **how) for text in row))
            parts.append(table)
            hidden = self._hidden(names, rows)
            if hidden:
                parts.append(Text(f"{hidden}: `report.full()`, or `--full` on the command line"))
        for part in self.below:
            parts += [Text(), part]
        return Group(*parts)

    def to_html(self):
        """The report as a fragment of HTML: a headline, totals, notes and the table, all rows and columns folded in."""

        def cell(tag, text):
            return f'<{tag} style="text-align:left">{html.escape(text)}</{tag}>'

        def whole(names, rows):
            header = "".join(cell("th", name.replace("_", " ")) for name in names)
            body = "".join("<tr>" + "".join(cell("td", text) for text in row) + "</tr>" for row in rows)
            return f"<table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table>"

        parts = [f"<h4>{html.escape(self.title)}</h4>"]
        if self.totals:
            totals = "".join(f"<tr>{cell('th', name)}{cell('td', text)}</tr>" for name, text in self._headline())
            parts.append(f"<table>{totals}</table>")
        if self.notes:
            parts.append("<ul>" + "".join(f"<li>{html.escape(note)}</li>" for note in self.notes) + "</ul>")
        if self.rows:
            names, rows = self._table(self.short)
            parts.append(whole(names, rows))
            hidden = self._hidden(names, rows)
            if hidden:
                parts.append(f"<details><summary>{hidden}</summary>{whole(*self._table(short=False))}</details>")
        return "".join(parts) + "".join(part.to_html() for part in self.below)

    def _repr_html_(self):
        return self.to_html()  # what notebooks ask for

    def _table(self, short):
        """The names of the columns to show, and the rows as lists of texts."""
        if not short:
            names = list(self.rows[0])
            return names, [[self._format(name, row[name]) for name in names] for row in self.rows]
        shown = list(filter(self._shown, self.rows)) or self.rows
        table = {name: [self._short_text(name, row) for row in shown] for name in self._columns or self.rows[0]}
        table = {name: texts for name, texts in table.items() if any(texts)}
        return list(table), list(map(list, zip(*table.values(), strict=True)))

    def _short_text(self, name, row):
        shorten = self._columns.get(name)
        return _cut(self._format(name, row[name]) if shorten is None else shorten(row), _CELL)

    def _hidden(self, names, rows):
        """What the short form leaves out, in words."""
        columns = [n for n in self.rows[0] if n not in names and any(self._format(n, row[n]) for row in self.rows)]
        counts = {"row": len(self.rows) - len(rows), "column": len(columns)}
        more = " and ".join(f"{n} {what}{'s' * (n > 1)}" for what, n in counts.items() if n)
        return f"{more} more" if more else ""

    def _headline(self):
        """Names and texts of the totals; one without a text would be read with the next one's."""
        texts = {name.replace("_", " "): self._format(name, value) for name, value in self.totals.items()}
        return [(name, text) for name, text in texts.items() if text]

    def _format(self, name, value):
        how = self._formats.get(name)
        if value is None:
            return ""
        if how is not None:
            return how(value) if callable(how) else format(value, how)
        return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)

    def _label(self, row):
        return self._short_text(next(iter(self._columns or row)), row)


def _cut(text, limit):
    """A text of at most `limit` characters; what stays of a path is its end."""
    if len(text) <= limit:
        return text
    return f"…{text[1 - limit :]}" if "/" in text and " " not in text else f"{text[: limit - 1]}…"


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
# Rounding makes zeros of the smallest weights: about a sixth of normally distributed ones in 4 bits, a hundredth in 8.
_ROUNDED = {"int4": 0.25, "gptq": 0.25, "awq": 0.25}


# A click on a column's name sorts the table's rows by it: numbers by value, a second click the other way round.
_SORTING = """
document.querySelectorAll('thead th').forEach((head) => head.addEventListener('click', () => {
  const body = head.closest('table').tBodies[0], column = head.cellIndex;
  const value = (row) => row.cells[column].textContent;
  const number = (text) => parseFloat(text.replaceAll(',', ''));
  const compare = (a, b) => number(a) - number(b) || a.localeCompare(b);
  const sign = head.dataset.order === 'up' ? -1 : 1;
  head.parentElement.querySelectorAll('th').forEach((other) => delete other.dataset.order);
  head.dataset.order = sign > 0 ? 'up' : 'down';
  body.append(...[...body.rows].sort((a, b) => sign * compare(value(a), value(b))));
}));
"""


def html_page(title, *parts):
    """Return a whole HTML page that needs no other file. A click on a column's name sorts a table by that column.

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
        "td,th{padding:.2em .8em;border-bottom:1px solid #ddd}body{overflow-wrap:anywhere}"
        "thead th{cursor:pointer}th[data-order=up]:after{content:' \\2191'}th[data-order=down]:after{content:' \\2193'}"
    )
    body = "\n".join(part if isinstance(part, str) else part.to_html() for part in parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{style}</style></head>\n<body>\n{body}\n<script>{_SORTING}</script>\n</body>\n</html>\n"
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
    frozen one and the update; of what Keras's `quantize` made, the values that the integers stand for (int8; Dense,
    and EinsumDense with kernels of two axes, in the other modes). Totals: over all kernels, `size`, `zeros`,
    `sparsity` (connection sparsity) and `density` (1 - sparsity, as some papers count); over the model,
    `parameters` and `nonzero_parameters`. Notes name kernels that have no weight left, and those whose zeros LoRA
    fills.

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
    weights = [replace(w, layout=w.quantized) if w.quantized else w for w in selection.weights(model)]
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
    columns = dict.fromkeys(("path", "shape", "size", "sparsity", "pattern", "dead_units", "reason"))
    columns["reason"] = lambda row: row["reason"].partition(": ")[0]
    return Report(f"Sparsity of {model.name}", rows, totals, notes, formats, columns, _is_of_kernel)


def _is_of_kernel(row):
    return row["dead_units"] is not None or row["status"] == "pruned"


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
    shape = value.shape if weight.quantized else weight.variable.shape
    zeros = int(value.size - np.count_nonzero(value))
    count = int(np.count_nonzero(weight.pruned_zeros(value))) if weight.kernel and zeros else 0
    # Initializers draw an exact zero now and then: in a weight that nobody is known to have pruned, few do not count.
    chance = _FEW * value.size
    if weight.quantized:
        chance = _ROUNDED.get(weight.layer.quantization_mode, 0.02) * value.size
        chance += 3 * chance**0.5  # by so many more in a small weight
    if count and (selected or count > chance):
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
        "shape": [int(n) for n in shape],
        "size": int(value.size),
        "zeros": zeros,
        "sparsity": zeros / value.size if value.size else 0.0,
        "pattern": pattern,
        "dead_units": weight.dead_units(),
        "dead_inputs": weight.dead_inputs(),
        "status": status,
        "reason": reason,
    }
