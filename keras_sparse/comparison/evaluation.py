"""An evaluation runs all subjects of a comparison on the same batches and scores what they put out."""

import contextlib
import logging
import math

import keras
import numpy as np

from keras_sparse import batches
from keras_sparse.comparison.report import CompareReport
from keras_sparse.comparison.scores import Scores, resolve
from keras_sparse.comparison.subjects import Model, open_subject
from keras_sparse.quiet import progress_bar
from keras_sparse.tflite.benchmark import in_turns
from keras_sparse.tflite.runtimes import TIMEOUT

__all__ = ["compare"]


def compare(
    models,
    x=None,
    y=None,
    metrics=("accuracy",),
    sample_weight=None,
    batch_size=32,
    threshold=None,
    seconds=1.0,
    timeout=TIMEOUT,
    console=None,
    data=None,
):
    """Put models in one table: metrics on the same data, sparsity, size, latency, and the differences to the first.

    All models see the same batches. A .tflite file runs in a process of its own, one sample at a time as on a phone (or
    as many as its fixed batch size asks for), with ai-edge-litert on one thread. Its quantised inputs and outputs are
    converted by the file's own scales: `x` holds the same numbers for every model.

    Args:
        models: Dict from a name to a built Keras model, or to the path of a .keras file, or of a .tflite file that you
            trust.
        x: An array, a list or dict of them; or data with targets in any form (see `keras_sparse.batches`):
            a tuple `(x, y)` or `(x, y, sample_weight)`, a dataset, a `keras.utils.PyDataset` or a generator of such
            batches that ends, or a function that returns one.
        y: Targets, if `x` are arrays: an array, or a list or dict of them for several outputs. Outputs of the models
            belong together if they have the same key, or number in a list, or if their layers have the same name.
        metrics: A list of `"accuracy"`, `"precision"`, `"recall"`, `"f1"` (scikit-learn's; the last three
            macro-averaged over the classes, for two classes too), names of Keras metrics and losses,
            `keras.metrics.Metric` and `keras.losses.Loss` objects, and functions; `[]` for none. For several outputs a
            dict from their names to lists; a list is for all of them.
        sample_weight: One number for each sample, if `x` are arrays.
        batch_size: Samples in a batch, if `x` are arrays.
        threshold: From where on an output of one column means class 1. `None`: 0.5, and an error if the outputs are no
            probabilities; 0.0 is right for logits.
        seconds: How long to measure the latency of each model; 0 does not measure it.
        timeout: Seconds that each step of a .tflite file, such as one batch, may take.
        console: A `rich.console.Console` for the progress bar, which appears after two seconds. `None`: stderr, if that
            is a terminal.
        data: In place of `x`, the name that they have in other functions.

    Returns:
        A `CompareReport` with a row for each model. Columns: `model`; `form` (`"keras"` or `"tflite"`); the metrics,
        for several outputs as `OUTPUT_METRIC`; `sparsity`, the share of zeros over all kernels; `parameters`, in a file
        without those that the converter folded away; `bytes` and `gzip_bytes`, of a .tflite file the whole file, of a
        Keras model its weights alone, as they are in memory: what a dense file holds besides the graph, without the
        optimizer's state that a .keras file may contain; `latency_ms`, the median for one sample, and `spread_ms`,
        between the quartiles, all models measured in turns. Of a Keras model it is that of `predict_on_batch`, with
        Keras's own overhead and on as many threads as the backend takes. Totals: `samples`.

    Raises:
        ValueError: If there are no models or no data, a metric is unknown, shapes do not fit, or a file cannot be read
            or run.
        TypeError: If an argument is of another type.
        FileNotFoundError: If a file does not exist.
        TimeoutError: If a .tflite file took longer than `timeout`.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation="softmax")])
    >>> x, y = np.eye(4), np.array([0, 1, 2, 0])
    >>> report = ks.compare({"dense": model}, x, y, metrics=["accuracy", "f1"], seconds=0)
    >>> list(report.rows[0])[:5]
    ['model', 'form', 'accuracy', 'f1', 'sparsity']
    """
    if (x is None) == (data is None):
        given = "both" if data is not None else "neither"
        raise TypeError(f"`x` or `data` must hold what the models are compared on, not both. Received: {given}")
    x = data if x is None else x
    if not isinstance(models, dict) or not all(isinstance(name, str) for name in models):
        raise TypeError(
            "`models` must be a dict from names to Keras models or paths of .keras and .tflite files. "
            f"Received: {type(models).__name__}"
        )
    if not models:
        raise ValueError("`models` must hold at least one model. Received: {}")
    for name, value in ("seconds", seconds), ("timeout", timeout):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ValueError(f"`{name}` must be a number, at least 0. Received: {name}={value!r}")
    wanted = {key: resolve(of) for key, of in metrics.items()} if isinstance(metrics, dict) else resolve(metrics)
    data = batches.labelled(x, y, sample_weight, batch_size)
    with contextlib.ExitStack() as stack:
        logger = logging.getLogger("tensorflow")  # it takes several models for one that is traced again and again
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.ERROR)
        subjects = [open_subject(name, model, timeout, stack) for name, model in models.items()]
        reference = next((one for one in subjects if isinstance(one, Model)), None)
        for one in subjects:
            one.like = reference and reference.model
        evaluation = _Evaluation(subjects, wanted, threshold, reference)
        with progress_bar("compare", batches.count(x, batch_size), console) as advance:
            for batch in data:
                evaluation.update(*batch)
                advance()
        results = evaluation.results()
        times = [None] * len(subjects)
        if seconds:
            for one in subjects:
                one.prepare(evaluation.sample)
            times = in_turns([one.time for one in subjects], seconds)
        rows = [
            {"model": one.name, "form": one.form} | scores | one.facts() | _latency(own)
            for one, scores, own in zip(subjects, results, times, strict=True)
        ]
    return CompareReport(rows, list(results[0]), evaluation.samples, evaluation.notes())


class _Evaluation:
    """The scores of each subject on the same batches."""

    def __init__(self, subjects, wanted, threshold, reference):
        self._subjects, self._wanted, self._threshold, self._reference = subjects, wanted, threshold, reference
        self._scores = None
        self.sample, self.samples = None, 0

    def update(self, x, y, sample_weight):
        found = [one.predict(x) for one in self._subjects]
        self.samples += len(keras.tree.flatten(x)[0])
        if self.sample is None:
            self.sample = keras.tree.map_structure(lambda array: array[:1], x)
            self._start(found, y)
        if not self._names:
            return
        targets = self._targets(y)
        for one, outputs, scores in zip(self._subjects, found, self._scores, strict=True):
            outputs = self._in_order(one, outputs)
            for name, target in targets.items():
                try:
                    scores[name].update(target, outputs[name].astype("float32"), sample_weight)
                except ValueError as error:
                    where = f"model {one.name!r}, output {name!r}" if len(targets) > 1 else f"model {one.name!r}"
                    raise ValueError(f"{error} (of the {where})") from error

    def _start(self, found, y):
        """Settle the names of the outputs, and which metrics each has, from the first batch."""
        names = list(found[0])
        for one, outputs in zip(self._subjects, found, strict=True):
            if one.form == "keras" and set(outputs) == set(names):
                names = list(outputs)  # a file does not tell their order
                break
        own = self._reference.names()[-1] if self._reference and self._reference.names() else []
        if isinstance(y, dict) and set(y) != set(names) and set(y) == set(own) and len(own) == len(names):
            names = own  # targets by the names of the output layers, as `fit` takes them
        wanted = self._wanted if isinstance(self._wanted, dict) else dict.fromkeys(names, self._wanted)
        unknown = sorted(set(wanted) - set(names))
        if unknown:
            raise ValueError(f"`metrics` must be for the outputs {names}. Received: metrics for {unknown}")
        self._all = names
        self._names = [name for name in names if wanted.get(name)]
        self._scores = [{n: Scores(wanted[n], self._threshold) for n in self._names} for _ in self._subjects]

    def _targets(self, y):
        if y is None:
            raise ValueError("`y` is needed for metrics; `metrics=[]` compares without. Received: y=None")
        if len(self._all) == 1:
            found = dict(zip(self._all, keras.tree.flatten(y), strict=False))
        elif isinstance(y, dict):
            found = y
        else:
            found = dict(zip(self._all, y, strict=False)) if isinstance(y, (list, tuple)) else {}
            found = found if len(found) == len(y) else {}
        missing = sorted(set(self._names) - set(found))
        if missing:
            raise ValueError(
                f"`y` must hold targets for the outputs {self._all}, as a list in this order or as a dict. "
                f"Received: {sorted(y) if isinstance(y, dict) else type(y).__name__} without {missing}"
            )
        return {name: np.asarray(found[name]) for name in self._names}

    def _in_order(self, one, outputs):
        if set(outputs) == set(self._all):
            return outputs
        if len(outputs) == len(self._all) == 1:
            return dict(zip(self._all, outputs.values(), strict=True))
        for known in filter(None, (one if isinstance(one, Model) else None, self._reference)):
            ways = {frozenset(way): way for way in known.names()}
            theirs, ours = ways.get(frozenset(outputs)), ways.get(frozenset(self._all))
            if theirs and ours:
                return {name: outputs[key] for name, key in zip(ours, theirs, strict=True)}
        raise ValueError(
            "All models must have the same outputs: give those that mean the same the same key, in the dict that the "
            f"model returns. Received: {self._all} of {self._subjects[0].name!r}, {list(outputs)} of {one.name!r}"
        )

    def results(self):
        if not self.samples:
            raise ValueError("There must be at least one sample. Received: no data")
        several = len(self._all) > 1
        return [
            {f"{name}_{key}" if several else key: v for name, s in scores.items() for key, v in s.results().items()}
            for scores in self._scores
        ]

    def notes(self):
        notes = []
        for one, scores in zip(self._subjects, self._scores, strict=True):
            nan = sum(s.nan for s in scores.values())
            if nan:
                notes.append(f"{one.name}: {nan:,} outputs are NaN, which counts as wrong.")
        forms = {one.form for one in self._subjects}
        if len(forms) > 1:
            notes.append(
                "Bytes and latency: of .tflite files the file and ai-edge-litert on one thread; of Keras models the "
                "weights alone and `predict_on_batch`."
            )
        return notes


def _latency(times):
    if times is None:
        return {"latency_ms": None, "spread_ms": None}
    p25, median, p75 = (1e3 * float(q) for q in np.quantile(times, (0.25, 0.5, 0.75)))
    return {"latency_ms": median, "spread_ms": p75 - p25}
