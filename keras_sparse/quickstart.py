"""The quickstart is the whole path on real data: a small CNN, trained dense and pruned, exported and compared.

It writes `model.keras` (the pruned model), `model_dense.tflite`, `model_sparse.tflite`, `model_small.tflite` (with half
of the channels removed), `plot.png` and `report.html`.
"""

import base64
import contextlib
import io
import os
import tempfile
import time

import keras

from keras_sparse import callbacks, channels, comparison, reports, tflite

__all__ = ["DATASETS", "FILES", "build", "run"]

FILES = ("model.keras", "model_dense.tflite", "model_sparse.tflite", "model_small.tflite", "plot.png", "report.html")

# Dataset: epochs. As many as 90 % of zeros need to cost less than a point of accuracy (digits) or so that the run ends
# in about ten minutes on two cores (the others).
DATASETS = {"digits": 30, "mnist": 3, "fashion_mnist": 4, "cifar10": 6}

_BATCH = 64
_CHANNELS = 0.5  # share of the channels that the small model is without
_LEARNING_RATE = 3e-3  # decays to 0; pruning at 1e-3 leaves the weights that remain too little time to adapt


def run(dataset="digits", sparsity=0.9, epochs=None, output="quickstart", seed=0, console=None):
    """Train a small CNN dense, with zeros, and with fewer channels, export all to .tflite, and compare them.

    The first two trainings start from the same weights and see the same batches for the same number of epochs. The
    callback `ks.callbacks.Pruning` is the only difference. The third goes on from the dense model for a third of the
    epochs and prunes half of the channels, which `ks.shrink` then removes.

    Args:
        dataset: `"digits"` (scikit-learn's, 8x8 pixels, needs no network), `"mnist"`, `"fashion_mnist"` or `"cifar10"`
            (`keras.datasets`, which downloads them once).
        sparsity: The share of weights to prune, in [0, 1).
        epochs: Epochs of each training. `None`: as many as suit the dataset.
        output: The folder to write to; made if it does not exist. The files of an earlier run are replaced once all
            new ones are there.
        seed: Of the initial weights and the order of the batches.
        console: A `rich.console.Console` for the progress bar. `None`: no progress bar.

    Returns:
        A `Report` with the rows `dense`, `sparse` and `small`, about the .tflite files, as `ks.compare` has them:
        `model`, `accuracy` (on test data), `sparsity`, `bytes`, `gzip_bytes`, `latency_ms`; and `parity`, the largest
        absolute difference between the outputs of file and Keras model. Totals: `dataset`, `epochs`, `parameters`,
        `times_smaller` (bytes dense over bytes sparse), `accuracy_lost` (dense - sparse), `seconds`.

    Raises:
        ValueError: If an argument is out of range, or an export failed.
        ImportError: If matplotlib is not installed.
        OSError: If the folder cannot be written, or a dataset not be downloaded.

    Example:

    >>> from keras_sparse import quickstart
    >>> quickstart.run("digits", sparsity=90)
    Traceback (most recent call last):
    ...
    ValueError: A sparsity must be at least 0 and below 1: ... Received: 90. Did you mean 0.9?
    """
    start = time.perf_counter()
    if dataset not in DATASETS:
        raise ValueError(f"`dataset` must be one of {', '.join(DATASETS)}. Received: dataset={dataset!r}")
    if epochs is None:
        epochs = DATASETS[dataset]
    if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1:
        raise ValueError(f"`epochs` must be a whole number, at least 1. Received: epochs={epochs!r}")
    pruning = callbacks.Pruning(sparsity, allocation="global", end=0.5)
    fewer = callbacks.Pruning(_CHANNELS, pattern="channel", end=0.5)
    _figure_class()  # tell what is missing before training, not after it

    with _staged(output) as folder, _progress(console) as add_bar:
        data = _load(dataset)
        steps = epochs * -(-len(data[0]) // _BATCH)
        shorter = max(1, epochs // 3)
        titles = {"dense training": steps, "pruned training": steps}
        titles |= {"channels training": steps // epochs * shorter, "export": 4}
        bars = [add_bar(title, total) for title, total in titles.items()]
        dense, dense_history = _train(data, epochs, seed, [_Advance(bars[0])])
        sparse, sparse_history = _train(data, epochs, seed, [pruning, _Advance(bars[1])])
        wide, _ = _train(data, shorter, seed, [fewer, _Advance(bars[2])], dense.get_weights())
        models = {"dense": dense, "sparse": sparse, "small": channels.shrink(wide, verbose=0)}
        exported = _export(models, folder, data[2][:256], bars[3])
        rows = _compare(exported, data, bars[3])
        report = _report(dataset, epochs, sparse, rows, exported["sparse"], output, time.perf_counter() - start)
        figure = _plot(rows, dense_history, sparse_history)
        figure.savefig(os.path.join(folder, "plot.png"), dpi=120)
        _write_page(os.path.join(folder, "report.html"), [report, reports.report(sparse), exported["sparse"]], figure)
    return report


def _load(dataset):
    """Return `(x_train, y_train, x_test, y_test)`: images as float32 in [0, 1] with a channel axis, integer labels."""
    if dataset == "digits":
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        images = (digits.images / 16).astype("float32")[..., None]
        # The same split for every seed: 1347 images to train on, 450 to test.
        x, x_test, y, y_test = train_test_split(
            images, digits.target, test_size=0.25, stratify=digits.target, random_state=0
        )
        return x, y, x_test, y_test
    try:
        (x, y), (x_test, y_test) = getattr(keras.datasets, dataset).load_data()
    except Exception as error:
        raise OSError(f"The dataset {dataset!r} cannot be downloaded or read: {error}") from error
    x, x_test = ((images / 255).astype("float32").reshape(*images.shape[:3], -1) for images in (x, x_test))
    return x, y.reshape(-1), x_test, y_test.reshape(-1)


def build(shape, classes):
    """Build the quickstart's model: a plain CNN of 160,000 (digits) to 360,000 parameters (CIFAR-10).

    Args:
        shape: Shape of an image, `(height, width, channels)`.
        classes: Number of classes.

    Returns:
        A Keras model, not compiled, from images to probabilities.

    Example:

    >>> from keras_sparse import quickstart
    >>> quickstart.build((8, 8, 1), 10).count_params()
    159626
    """
    layers = [keras.Input(shape)]
    for number, filters in enumerate((32, 64, 128)):
        layers.append(keras.layers.Conv2D(filters, 3, padding="same", activation="relu", name=f"conv_{number + 1}"))
        if number or shape[0] > 8:
            layers.append(keras.layers.MaxPooling2D())
    layers += [keras.layers.Flatten(), keras.layers.Dropout(0.3)]
    layers.append(keras.layers.Dense(128, activation="relu", name="dense"))
    layers.append(keras.layers.Dense(classes, activation="softmax", name="classes"))
    return keras.Sequential(layers, name="quickstart")


def _train(data, epochs, seed, extra, weights=None):
    x, y, x_test, y_test = data
    keras.utils.set_random_seed(seed)
    model = build(x.shape[1:], int(y.max()) + 1)
    if weights is not None:
        model.set_weights(weights)
    rate = keras.optimizers.schedules.CosineDecay(_LEARNING_RATE, epochs * -(-len(x) // _BATCH))
    model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy", metrics=["accuracy"])
    history = model.fit(
        x, y, batch_size=_BATCH, epochs=epochs, validation_data=(x_test, y_test), callbacks=extra, verbose=0
    )
    return model, history.history


class _Advance(keras.callbacks.Callback):
    """Moves a progress bar by one for each batch, and shows the accuracy of each epoch."""

    def __init__(self, advance):
        super().__init__()
        self._advance = advance

    def on_train_batch_end(self, batch, logs=None):
        self._advance()

    def on_epoch_end(self, epoch, logs=None):
        text = f"epoch {epoch + 1}/{self.params['epochs']}, accuracy {logs['val_accuracy']:.1%}"
        self._advance(0, text + (f", sparsity {logs['sparsity']:.1%}" if "sparsity" in logs else ""))


@contextlib.contextmanager
def _progress(console):
    """Yield a function that adds a bar, `add(title, total) -> advance(steps=1, text="")`."""
    if console is None:
        yield lambda title, total: lambda steps=1, text="": None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:<15}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=console) as progress:

        def add(title, total):
            task = progress.add_task(title, total=total, start=False, text="")

            def advance(steps=1, text=""):
                progress.start_task(task)  # a no-op but for the first time: the clock runs when the work does
                progress.update(task, advance=steps, **({"text": text} if text else {}))

            return advance

        yield add


@contextlib.contextmanager
def _staged(output):
    """Yield a folder whose files move to `output` if the block succeeds; else nothing is left."""
    existing = os.path.abspath(output)
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        raise NotADirectoryError(f"`output` must be a folder, and {existing!r} is a file. Received: output={output!r}")
    with tempfile.TemporaryDirectory(prefix=".quickstart-", dir=existing) as folder:
        yield folder
        os.makedirs(output, exist_ok=True)
        for name in FILES:
            os.replace(os.path.join(folder, name), os.path.join(output, name))


def _export(models, folder, x, advance):
    """Write the sparse model and both .tflite files; return their `ExportReport`s."""
    models["sparse"].save(os.path.join(folder, "model.keras"))
    exported = {}
    for name, model in models.items():
        file = f"model_{name}.tflite"
        path = os.path.join(folder, file)
        exported[name] = tflite.export(model, path, target="xnnpack", sparse=name == "sparse", representative_data=x)
        exported[name].title = f"Export to {file}"  # the folder is a temporary one
        advance()
    return exported


def _compare(exported, data, advance):
    from rich.console import Console

    files = {name: file.path for name, file in exported.items()}
    # A bar of its own would get in the way of the one that is shown.
    rows = comparison.compare(files, data[2], data[3], console=Console(file=io.StringIO())).rows
    advance()
    columns = ("model", "accuracy", "sparsity", "bytes", "gzip_bytes", "latency_ms")
    return [{name: row[name] for name in columns} | {"parity": exported[row["model"]].parity} for row in rows]


def _report(dataset, epochs, model, rows, exported, output, seconds):
    dense, sparse, small = rows
    totals = {
        "dataset": dataset,
        "epochs": epochs,
        "parameters": model.count_params(),
        "times_smaller": dense["bytes"] / sparse["bytes"],
        "accuracy_lost": dense["accuracy"] - sparse["accuracy"],
        "seconds": seconds,
    }
    notes = [
        "dense, sparse: same initial weights, batches and epochs; `ks.callbacks.Pruning` is the only difference.",
        f"small: {max(1, epochs // 3)} more epochs of dense, in which half of the channels were pruned, then removed: "
        f"{small['latency_ms'] / dense['latency_ms']:.0%} of the time of dense.",
        f"Parity: largest difference between .tflite file and Keras model, on {', '.join(exported.verified_on)}.",
    ]
    if not exported.runs_sparse:
        notes.append(
            "Latency: the zeros of `sparse` make its file smaller, not its run faster; the weights are unpacked when "
            "the file is loaded."
        )
    notes += [f"The file of `sparse`: {note}" for note in exported.notes]
    notes.append("Written: " + ", ".join(os.path.join(output, name) for name in FILES))
    notes.append(
        "Next: `ks.tflite.check(your_model, target)` says whether your accelerator gains from zeros or from fewer "
        "channels; `ks.callbacks.Pruning` in `fit` makes either."
    )
    formats = dict.fromkeys(("accuracy", "sparsity"), ".1%") | dict.fromkeys(
        ("bytes", "gzip_bytes", "parameters"), ",d"
    )
    formats |= {"parity": ".1e", "latency_ms": ".3f", "times_smaller": ".1f", "accuracy_lost": ".1%", "seconds": ".0f"}
    return reports.Report("Quickstart: dense, with zeros, and with fewer channels", rows, totals, notes, formats)


def _figure_class():
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'The quickstart draws with matplotlib, which is not installed: `pip install "keras_sparse[quickstart]"`.'
        ) from error
    return Figure


def _plot(rows, dense, sparse):
    """Draw accuracy and sparsity over the epochs of both histories, and the sizes of the files."""
    figure = _figure_class()(figsize=(10, 3.6), layout="constrained")
    curves, sizes = figure.subplots(1, 2)
    epochs = range(1, len(dense["val_accuracy"]) + 1)
    marker = "o" if len(epochs) == 1 else None
    curves.plot(epochs, dense["val_accuracy"], color="tab:gray", marker=marker, label="accuracy, dense")
    curves.plot(epochs, sparse["val_accuracy"], color="tab:blue", marker=marker, label="accuracy, sparse")
    curves.plot(epochs, sparse["sparsity"], color="tab:orange", marker=marker, linestyle="--", label="sparsity")
    curves.set(xlabel="epoch", ylabel="share", ylim=(0, 1.02), title="Test accuracy and sparsity")
    curves.legend(loc="lower right", fontsize=8)
    labels = [f"{row['model']}{suffix}" for suffix in ("", ", gzip") for row in rows]
    values = [row[key] / 1e3 for key in ("bytes", "gzip_bytes") for row in rows]
    bars = sizes.barh(labels, values, color=["tab:gray", "tab:blue", "tab:green"] * 2)
    sizes.bar_label(bars, [f"{value:,.0f} kB" for value in values], padding=3, fontsize=8)
    sizes.invert_yaxis()
    sizes.set_xlim(0, 1.2 * max(values))
    sizes.set(xlabel="kB", title="Size of the .tflite file")
    return figure


def _write_page(path, tables, figure):
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    source = base64.b64encode(image.getvalue()).decode()
    picture = f'<img alt="Accuracy and size" src="data:image/png;base64,{source}">'
    with open(path, "w", encoding="utf-8") as file:
        file.write(reports.html_page("keras_sparse quickstart", picture, *tables))
