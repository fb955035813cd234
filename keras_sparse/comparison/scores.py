"""A score says how well outputs meet targets: it takes them batch by batch and ends in numbers."""

import re

import keras
import numpy as np

from keras_sparse import selection

__all__ = ["CLASSIFICATION", "Scores", "resolve"]

CLASSIFICATION = ("accuracy", "precision", "recall", "f1")
_NONE = -1  # the class that NaN predicts
_COLUMNS = {"model", "form", "sparsity", "parameters", "bytes", "gzip_bytes", "latency_ms", "spread_ms"}


def resolve(metrics):
    """Turn metrics, in the forms that `compile` takes, into names of `CLASSIFICATION` and Keras metrics.

    Args:
        metrics: A list, or one alone: names of `CLASSIFICATION`; names of Keras metrics and losses such as `"mse"` or
            `"sparse_categorical_crossentropy"`; `keras.metrics.Metric` and `keras.losses.Loss` objects; functions of
            `(y_true, y_pred)`.

    Returns:
        A list of strings and `keras.metrics.Metric` objects.

    Raises:
        ValueError: If Keras knows no metric or loss of that name, or a name is given twice or to another column.
        TypeError: If one is of another type.

    Example:

    >>> from keras_sparse.comparison import scores
    >>> [getattr(metric, "name", metric) for metric in scores.resolve(["f1", "mse"])]
    ['f1', 'mean_squared_error']
    """
    metrics = list(metrics) if isinstance(metrics, (list, tuple)) else [metrics]
    found = [_resolve(metric) for metric in metrics]
    names = [metric if isinstance(metric, str) else metric.name for metric in found]
    taken = sorted(set(names) & _COLUMNS)
    if taken:
        raise ValueError(
            f"These columns are in the table already: pass another `name=` to the metric. Received: {taken}"
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"Each metric needs a name of its own: pass `name=` to one of them. Received twice: {twice}")
    return found


def _resolve(metric):
    if metric in ("acc", *CLASSIFICATION):  # Keras has a class `Accuracy`, which is about equality
        return "accuracy" if metric == "acc" else metric
    if isinstance(metric, str):
        for module in (keras.metrics, keras.losses):
            try:
                known = module.get(metric)
            except ValueError:
                continue
            if not isinstance(known, keras.metrics.Metric):
                return _mean(known, metric)
            # Keras numbers the names of its objects: "auc", then "auc_1".
            return type(known).from_config(known.get_config() | {"name": re.sub(r"_\d+$", "", known.name)})
        raise ValueError(
            f"`metrics` must be {', '.join(map(repr, CLASSIFICATION))}, names that Keras knows (a loss by its own "
            f"name, such as 'sparse_categorical_crossentropy'), or objects. Received: {metric!r}"
        )
    if isinstance(metric, keras.metrics.Metric):
        return metric
    if isinstance(metric, keras.losses.Loss):
        return _mean(metric.call, metric.name)
    if callable(metric) and not isinstance(metric, type):
        return _mean(metric, getattr(metric, "__name__", type(metric).__name__))
    raise TypeError(
        "`metrics` must hold names, `keras.metrics.Metric` or `keras.losses.Loss` objects (of a class make one), or "
        f"functions of (y_true, y_pred). Received: {metric!r} of type {type(metric).__name__}"
    )


def _mean(function, name):
    return keras.metrics.MeanMetricWrapper(function, name=name)


class Scores:
    """Metrics of one output of one model.

    Accuracy, precision, recall and F1 are scikit-learn's, the last three macro-averaged over the classes, with 0 where
    nothing can be divided. Outputs of several columns are classes, the largest wins, and targets are whole numbers or
    one-hot; targets of several ones or none in a row are multi-label. An output of one column is the probability of
    class 1. NaN is no class, so it is wrong.

    Args:
        metrics: What `resolve` returns. Keras metrics may be shared between several `Scores`: each keeps a state of its
            own (the metric's variables).
        threshold: From where on an output of one column, or of a label, means 1. `None`: 0.5, and an error if an output
            is no probability.

    Attributes:
        nan: How many outputs were NaN.

    Example:

    >>> import numpy as np
    >>> from keras_sparse.comparison.scores import Scores
    >>> scores = Scores(["accuracy"])
    >>> scores.update(np.array([0, 1]), np.array([[0.9, 0.1], [0.8, 0.2]]))
    >>> scores.results()
    {'accuracy': 0.5}
    """

    def __init__(self, metrics, threshold=None):
        self._metrics = metrics
        self._states = {}
        self._classes = _Classes(threshold) if any(isinstance(metric, str) for metric in metrics) else None
        self.nan = 0

    def update(self, targets, outputs, sample_weight=None):
        """Take a batch.

        Args:
            targets: Array of shape `(batch, ...)`.
            outputs: Array of shape `(batch, ..., columns)` or `(batch,)`.
            sample_weight: `None`, or an array that broadcasts from the left to the targets.

        Raises:
            ValueError: If they do not go together.
        """
        if len(targets) != len(outputs):
            raise ValueError(f"There are {len(targets)} targets for {len(outputs)} outputs in a batch. Received: both")
        if targets.dtype.kind in "OSUc":
            raise ValueError(f"Targets must be numbers, classes too: 0, 1, ... Received: targets of {targets.dtype}")
        if sample_weight is not None and not np.all(np.asarray(sample_weight) >= 0):
            raise ValueError("Sample weights must not be negative. Received: a weight that is below 0, or NaN")
        self.nan += int(np.sum(np.isnan(outputs)))
        if self._classes is not None:
            self._classes.update(targets, outputs, sample_weight)
        for metric in self._metrics:
            if not isinstance(metric, str):
                self._update(metric, targets, outputs, sample_weight)

    def _update(self, metric, targets, outputs, sample_weight):
        self._resume(metric)
        if outputs.shape == (*targets.shape, 1):  # functions of users would broadcast one against the other
            targets = targets[..., None]
        try:
            metric.update_state(targets, outputs, sample_weight=sample_weight)
        except Exception as error:  # each backend has its own
            raise ValueError(
                f"The metric {metric.name!r} does not take such targets and outputs. Received: targets of shape "
                f"{targets.shape}, outputs of shape {outputs.shape} ({_first_line(error)})"
            ) from error
        self._states[metric.name] = [np.array(selection.as_array(variable)) for variable in metric.variables]

    def _resume(self, metric):
        state = self._states.get(metric.name)
        if state is None:
            metric.reset_state()
        else:
            for variable, value in zip(metric.variables, state, strict=True):
                variable.assign(value)

    def results(self):
        """The metrics over all batches, `{name: float}`, or a list of floats for a metric that has several."""
        found, shares = {}, {} if self._classes is None else self._classes.results()
        for metric in self._metrics:
            if isinstance(metric, str):
                found[metric] = shares[metric]
                continue
            self._resume(metric)
            value = np.asarray(keras.ops.convert_to_numpy(metric.result()), "float64")
            found[metric.name] = float(value) if value.ndim == 0 else value.ravel().tolist()
            metric.reset_state()
        return found


class _Classes:
    """True and predicted classes, for scikit-learn. Which kind of targets it is, all batches decide together."""

    def __init__(self, threshold):
        self._threshold, self._any = (0.5, False) if threshold is None else (threshold, True)
        self._single, self._labels = [], []  # (targets, predicted, weights) of each batch
        self._one_hot, self._outside = True, False

    def update(self, targets, outputs, sample_weight):
        columns = outputs.shape[-1] if outputs.ndim > 1 else 1
        if columns == 1 and targets.size == outputs.size:
            labels, scores = _whole(targets.reshape(-1), 2), outputs.reshape(-1)
            self._check_range(np.any((scores < 0) | (scores > 1)))
            predicted = np.where(np.isnan(scores), _NONE, scores > self._threshold)
            self._single.append((labels, predicted, _weights(sample_weight, outputs.shape[:-1] or outputs.shape)))
            return
        rows = outputs.reshape(-1, columns)
        predicted = np.where(np.isnan(rows).any(axis=1), _NONE, np.argmax(rows, axis=1))
        weights = _weights(sample_weight, outputs.shape[:-1])
        if columns > 1 and targets.shape in (outputs.shape[:-1], (*outputs.shape[:-1], 1)):
            labels = _whole(targets.reshape(-1), columns)
        elif columns > 1 and targets.shape == outputs.shape:
            truth = _whole(targets.reshape(-1, columns), 2)
            labels = np.argmax(truth, axis=1)
            self._one_hot &= bool(np.all(truth.sum(axis=1) == 1))
            self._labels.append((truth, np.where(np.isnan(rows), 1 - truth, rows > self._threshold), weights))
            self._outside |= bool(np.any((rows < 0) | (rows > 1)))
            self._check_range(self._outside and not self._one_hot)
        else:
            raise ValueError(
                "Targets must be classes as whole numbers, of the outputs' shape without its last axis, or 0 and 1 in "
                f"the outputs' shape. Received: targets of shape {targets.shape}, outputs of shape {outputs.shape}"
            )
        self._single.append((labels, predicted, weights))

    def _check_range(self, outside):
        if outside and not self._any:
            raise ValueError(
                "The outputs are no probabilities in [0, 1], so 0.5 does not tell the classes apart: pass "
                "`threshold=0.0` for logits. Received: outputs outside of [0, 1]"
            )

    def results(self):
        from sklearn import metrics

        batches = self._single if self._one_hot else self._labels
        truth, predicted, weights = map(np.concatenate, zip(*batches, strict=True))
        # The classes that occur, as scikit-learn has it; what is no class is not one of them.
        classes = np.setdiff1d(np.concatenate([truth, predicted]), [_NONE]) if self._one_hot else None
        means = metrics.precision_recall_fscore_support(
            truth, predicted, labels=classes, average="macro", sample_weight=weights, zero_division=0
        )
        accuracy = metrics.accuracy_score(truth, predicted, sample_weight=weights)
        return dict(zip(CLASSIFICATION, map(float, (accuracy, *means[:3])), strict=True))


def _whole(targets, classes):
    """Targets as whole numbers below `classes`."""
    with np.errstate(invalid="ignore"):  # NaN is no whole number
        labels = targets.astype("int64")
    if np.any(labels != targets) or (labels.size and not 0 <= labels.min() <= labels.max() < classes):
        raise ValueError(
            f"Accuracy, precision, recall and F1 are for classes: here, targets must be whole numbers from 0 to "
            f"{classes - 1}. For a regression pass Keras metrics such as 'mse'. Received: targets from "
            f"{np.min(targets)} to {np.max(targets)} of type {targets.dtype}"
        )
    return labels


def _weights(sample_weight, shape):
    if sample_weight is None:
        return np.ones(int(np.prod(shape)))
    weights = np.asarray(sample_weight, "float64")
    if weights.ndim > len(shape) and weights.shape[-1] == 1:
        weights = weights[..., 0]
    if weights.shape != tuple(shape[: weights.ndim]):
        raise ValueError(f"Sample weights must fit targets of shape {tuple(shape)}. Received: shape {weights.shape}")
    return np.broadcast_to(weights.reshape(weights.shape + (1,) * (len(shape) - weights.ndim)), shape).reshape(-1)


def _first_line(error):
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
