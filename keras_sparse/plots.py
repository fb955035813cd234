"""Plots show a network, or a training run, to those who would rather look than read."""

import math
from collections import Counter

import numpy as np

from keras_sparse import selection
from keras_sparse.reports import figure_class

__all__ = ["plot_history", "plot_network"]

_INCHES = 8  # the width of a picture: 800 pixels at 100 a inch
_SHARES = ("sparsity", "val_sparsity")


def plot_network(*models, titles=None):
    """Draw networks: a bar for each layer with kernels, as wide as it has outputs, coloured by its sparsity.

    Layers stand from left to right in the order in which they are called, and have the same place in all pictures, so
    that a network can be compared with what pruning or `ks.shrink` made of it. What is white at the top of a bar are
    outputs whose weights are all zero. Heights are square roots, so that layers of 8 and of 512 outputs are both seen.

    Args:
        models: Built Keras models, one picture for each, below one another.
        titles: Their headlines, one for each; `None`: names, parameters and sparsity.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: If there is no model, one is not built or has no kernels, or `titles` are too few or too many.
        TypeError: If one is no Keras 3 model.
        ImportError: If matplotlib is not installed.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(4)])
    >>> _ = ks.prune(model, 0.5, pattern="channel")
    >>> figure = ks.plot_network(model, ks.shrink(model, verbose=0), titles=["pruned", "shrunk"])
    >>> [axes.get_title(loc="left") for axes in figure.axes[:2]], figure.axes[1].containers[0].get_label()
    (['pruned', 'shrunk'], 'sequential/dense/kernel: 16 outputs, 0.0% zeros')
    """
    if not models:
        raise ValueError("`plot_network` needs at least one model. Received: none")
    if titles is not None and (isinstance(titles, str) or len(titles) != len(models)):
        raise ValueError(
            f"`titles` must be a list with one text for each of the {len(models)} models. Received: {titles!r}"
        )
    drawn = [_bars(model) for model in models]
    names = list(dict.fromkeys(bar["name"] for bars in drawn for bar in bars))
    tallest = max(math.sqrt(bar["outputs"]) for bars in drawn for bar in bars)
    figure = figure_class()(figsize=(_INCHES, 1.2 + 1.7 * len(models)), dpi=100, layout="constrained")
    every = figure.subplots(len(models), 1, sharex=True, squeeze=False)[:, 0]
    colors = _colors()
    for axes, bars, model, title in zip(every, drawn, models, titles or [None] * len(models), strict=True):
        for bar in bars:
            height, x = math.sqrt(bar["outputs"]), names.index(bar["name"])
            label = f"{bar['path']}: {bar['outputs']} outputs, {bar['sparsity']:.1%} zeros"
            edge = {"edgecolor": "0.4", "linewidth": 0.6, "width": 0.8}
            axes.bar(x, height, color="white", label=label, **edge)
            axes.bar(x, height * bar["alive"] / bar["outputs"], color=colors.to_rgba(bar["sparsity"]), **edge)
            if len(names) <= 30:
                axes.text(x, height, f"{bar['outputs']}", ha="center", va="bottom", fontsize=7)
        axes.set(ylim=(0, 1.2 * tallest), yticks=[], xlim=(-0.7, len(names) - 0.3))
        axes.set_title(title or _title(model, bars), loc="left", fontsize=9)
        axes.spines[["left", "top", "right"]].set_visible(False)
    shown = range(0, len(names), math.ceil(len(names) / 40))
    every[-1].set_xticks(list(shown), [names[i] for i in shown], rotation=90, fontsize=7)
    figure.colorbar(colors, ax=list(every), label="share of zeros", fraction=0.04, pad=0.01)
    return figure


def plot_history(history, metric=None):
    """Draw sparsity and a metric over the epochs of a fit.

    Args:
        history: What `model.fit` returned, or its `history`: `{name: a value for each epoch}`.
        metric: Name of the metric, such as `"val_accuracy"`. `None`: the first one of the validation data that is no
            loss; if there is none, of the training data; if there is none either, the loss.

    Returns:
        A `matplotlib.figure.Figure`: the metric on the left axis, sparsity, if there is one, on the right.

    Raises:
        ValueError: If there is no epoch, or no such metric.
        TypeError: If `history` is neither.
        ImportError: If matplotlib is not installed.

    Example:

    >>> import keras_sparse as ks
    >>> figure = ks.plot_history({"val_accuracy": [0.5, 0.8, 0.79], "loss": [1, 0.5, 0.4], "sparsity": [0.2, 0.6, 0.8]})
    >>> [axes.get_ylabel() for axes in figure.axes]
    ['val_accuracy', 'sparsity (share of zeros)']
    """
    values = getattr(history, "history", history)
    if not isinstance(values, dict):
        raise TypeError(f"`history` must be what `fit` returned, or its dict `history`. Received: {history!r}")
    values = {name: list(each) for name, each in values.items()}
    metric = _metric(values, metric)
    figure = figure_class()(figsize=(_INCHES, 3.5), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    epochs = range(1, len(values[metric]) + 1)
    axes.plot(epochs, values[metric], color="tab:blue", marker="o", markersize=3)
    axes.set(xlabel="epoch")
    axes.set_ylabel(metric, color="tab:blue")
    axes.xaxis.get_major_locator().set_params(integer=True)
    if "sparsity" in values:
        right = axes.twinx()
        right.plot(range(1, len(values["sparsity"]) + 1), values["sparsity"], color="tab:gray", linestyle="--")
        right.set_ylabel("sparsity (share of zeros)", color="tab:gray")
        right.set_ylim(0, 1)
    return figure


def _metric(values, metric):
    """The name of the metric that is drawn."""
    names = [name for name, each in values.items() if each and name not in _SHARES]
    if not names or (metric is not None and metric not in names):
        raise ValueError(
            f"`metric` must be one of the values that the fit has for each epoch: {', '.join(names) or 'none'}. "
            f"Received: metric={metric!r}"
        )
    measured = [name for name in names if "loss" not in name and name != "learning_rate"]
    validated = [name for name in measured if name.startswith("val_")]
    return metric or (validated or measured or names)[0]


def _bars(model):
    """A dict for each kernel: `path`, `name`, `size`, `outputs`, how many of them are `alive`, and its `sparsity`."""
    selection.check_model(model)
    found, seen = [], Counter()
    for weight in selection.weights(model):
        if weight.kernel:
            value = weight.in_use()
            outputs = math.prod(value.shape[axis] for axis in weight.output_axes)
            name = weight.path.removeprefix(f"{model.name}/").rpartition("/")[0] or weight.path
            seen[name] += 1
            found.append(
                {
                    "path": weight.path,
                    "name": name if seen[name] == 1 else f"{name}, {seen[name]}",
                    "size": value.size,
                    "outputs": outputs,
                    "alive": outputs - weight.dead_units(),
                    "sparsity": 1 - np.count_nonzero(value) / value.size,
                }
            )
    if not found:
        raise ValueError(f"There is nothing to plot: the model {model.name!r} has no kernels.")
    return found


def _title(model, bars):
    total = sum(bar["size"] for bar in bars)
    zeros = sum(bar["size"] * bar["sparsity"] for bar in bars)
    return f"{model.name}: {model.count_params():,} parameters, {zeros / total:.0%} of the kernels' weights zero"


def _colors():
    """What gives a share of zeros its colour."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable

    colors = ScalarMappable(cmap=colormaps["viridis_r"])
    colors.set_clim(0, 1)
    return colors
