"""A parity check runs a .tflite file and its Keras model on the same inputs and measures how far the outputs differ."""

import contextlib
from dataclasses import dataclass, replace

import keras
import numpy as np

from keras_sparse import states
from keras_sparse.quiet import quiet
from keras_sparse.tflite.commands import get
from keras_sparse.tflite.errors import ExportError, first_line
from keras_sparse.tflite.inputs import spread
from keras_sparse.tflite.runtimes import TIMEOUT, Worker
from keras_sparse.tflite.signatures import output_names

__all__ = ["KnownOutputs", "Parity", "Reference"]


@dataclass(frozen=True)
class Parity:
    """How far a file's outputs are from the model's.

    Attributes:
        absolute: Largest absolute difference over all outputs and inputs tried.
        relative: Largest difference of an output in a batch divided by that output's largest magnitude there, or by the
            median of these over the batches if that is more. An output of whole numbers
            may be one of class numbers, of which the next is not nearer than another: if that is less, the share of
            numbers that are others, of the share that would be by chance, to the power of three (where other outputs
            may differ by 1e-3, one number in ten may be another; by 3e-2, three in ten). Beside outputs of other
            numbers it counts a third of that: near-equal scores may come in any order.
        worst: Name of the output with the largest relative difference.
        accelerated: Whether all of the file ran on the accelerator that was asked for; `None` where nobody tells.

    Example:

    >>> Parity(absolute=1e-7, relative=1e-6, worst="output_0").worst
    'output_0'
    """

    absolute: float
    relative: float
    worst: str
    accelerated: bool | None = None


class Reference:
    """The outputs of a Keras model on some inputs, to compare files with.

    Args:
        model: A built Keras model, on any backend.
        signature: Its `Signature`.
        batches: List of flat lists of arrays, one for each input.

    Attributes:
        name: The model's.

    Raises:
        ExportError: If the model itself fails on these inputs.

    Example:

    >>> import keras
    >>> from keras_sparse.tflite.convert import convert
    >>> from keras_sparse.tflite.inputs import random_batches
    >>> from keras_sparse.tflite.job import Job
    >>> from keras_sparse.tflite.parity import Reference
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> job = Job(model)
    >>> reference = Reference(model, job.signature, random_batches(model, job.signature))
    >>> reference.compare(convert(job).content).absolute < 1e-5
    True
    """

    def __init__(self, model, signature, batches):
        self.name = model.name
        batches = [[a.astype(i.dtype) for a, i in zip(batch, signature.inputs, strict=True)] for batch in batches]
        self._inputs = [dict(zip([i.name for i in signature.inputs], batch, strict=True)) for batch in batches]
        self._model, self._call = model, lambda batch: signature.call(model, batch)
        self._batches = batches
        try:
            self._outputs, self._remembers = self._computed()
        except Exception as error:
            raise ExportError(
                f"The model {model.name!r} fails on the inputs it should be checked with. If it takes only certain "
                "values, pass some as `representative_data`. Received from the model: "
                f"{first_line(error)}"
            ) from error

    def _computed(self, values=()):
        """The model's outputs, with other values of some weights, and whether it remembers what it has seen."""
        found = []
        with quiet(), states.put_back(self._model, begin=True) as changed:
            with keras.StatelessScope(state_mapping=values) if values else contextlib.nullcontext():
                for batch in self._batches:
                    outputs = self._call(batch)
                    arrays = [_numbers(keras.ops.convert_to_numpy(y)) for y in keras.tree.flatten(outputs)]
                    found.append(dict(zip(output_names(outputs), arrays, strict=True)))
            return found, changed()

    def with_weights(self, change):
        """The `Parity` of the model with other weights, which it does not keep.

        Args:
            change: Returns new values of a weight, or `None` for those that it has.
        """
        changed = [(weight, change(weight)) for weight in self._model.weights]
        values = [
            (weight, keras.ops.convert_to_tensor(value, dtype=weight.dtype))
            for weight, value in changed
            if value is not None
        ]
        return self._parity(self._outputs, self._computed(values)[0])

    def alike(self, tolerance):
        """Names of the outputs that differ by less than `tolerance`, relative to their magnitude, between samples.

        On these a comparison sees little: another network's may be about the same.
        """
        found = []
        for name, first in self._outputs[0].items():
            values = [outputs[name] for outputs in self._outputs]
            samples = [[y] for value in values for y in (value if first.ndim else [value])]
            samples = [[y] for [y] in samples if y.shape == samples[0][0].shape]
            found += [name] if spread(samples)[0] < tolerance else []
        return found

    def uneven_inputs(self, steps):
        """Magnitudes of features that one scale of so many steps cannot hold together, `{input: (smallest, largest)}`.

        Of tables, shape `(batch, features)`, and sequences, `(batch, time, features)`: the largest magnitude of a
        feature over all samples.
        """
        return _uneven(self._inputs, steps)

    def uneven_outputs(self, steps):
        """The same of the outputs, but for probabilities, of which small ones are near enough to 0."""
        outputs = [{k: y for k, y in batch.items() if not _are_shares(y)} for batch in self._outputs]
        return _uneven(outputs, steps)

    def compare(self, content):
        """Run a file (bytes) with ai-edge-litert in this process and compare it. Returns a `Parity`."""
        from ai_edge_litert.interpreter import Interpreter

        with quiet():
            interpreter = Interpreter(model_content=content, num_threads=1)
            run = interpreter.get_signature_runner("serving_default")
            # A model input that no output depends on is not in the file.
            wanted = set(run.get_input_details())
            results = (
                run(**{name: value for name, value in inputs.items() if name in wanted}) for inputs in self._inputs
            )
            return self._parity(self._outputs, results)

    def compare_on(self, runtime, content, timeout=TIMEOUT):
        """Run a file (bytes) in a process of its own and compare it.

        Args:
            runtime: One of `runtimes.RUNTIMES`. Slow ones (all but `"native"`) run the first batch, the third and the
                last, of those whose size they take; the first three of a model that keeps state.
            content: The file.
            timeout: Seconds that loading and each run may take.

        Returns:
            A `Parity`.

        Raises:
            ValueError: If the file cannot be loaded or run there.
            TimeoutError: If it took longer than `timeout`.
            RuntimeMissing: If the runtime is not installed; an `OSError`.
        """
        with Worker(content, runtime, timeout=timeout) as worker:
            wanted = {leaf["name"]: leaf["dtype"] for leaf in worker.inputs}
            scales = worker.scales  # LiteRT.js does not tell, and takes no integers of 8 bits
            results = []
            some = range(len(self._inputs)) if get(runtime).thorough else self._some(worker)
            for inputs in (_renamed(self._inputs[i], list(wanted)) for i in some):
                worker.feed({name: _quantized(inputs[name], wanted[name], scales.get(name)) for name in wanted})
                outputs = worker.run()
                results.append({name: _dequantized(value, scales.get(name)) for name, value in outputs.items()})
            accelerated = worker.accelerated
        return replace(self._parity([self._outputs[i] for i in some], results), accelerated=accelerated)

    def _some(self, worker):
        """Numbers of a few batches that a worker takes: of several sizes, and of inputs as the model will meet them."""
        names = [leaf["name"] for leaf in worker.inputs]
        fit = [i for i, inputs in enumerate(self._inputs) if worker.fits(_renamed(inputs, names))]
        if self._remembers:  # each output depends on the inputs before
            return range(min(3, len(self._inputs)))
        return sorted({fit[i] for i in (0, 2, -1) if i < len(fit)}) if fit else [0]

    def _parity(self, outputs, results):
        found = {name: [] for name in outputs[0]}
        for expected, result in zip(outputs, results, strict=True):
            result = _renamed(result, list(expected))
            for name, value in expected.items():
                found[name].append((value, _numbers(result[name])))
        whole = {name for name, pairs in found.items() if all(_are_whole(y) for pair in pairs for y in pair)}
        differences = {}
        for name, pairs in found.items():
            typical = float(np.median([_magnitude(expected) for expected, _ in pairs]))
            differences[name] = [_difference(*pair, typical) for pair in pairs]
            if name in whole:
                labels = _labels_apart(pairs) / (1 if len(whole) == len(found) else 3)
                differences[name] = [(largest, min(ratio, labels)) for largest, ratio in differences[name]]
        ratios = {name: max(ratio for _, ratio in pairs) for name, pairs in differences.items()}
        worst = max(ratios, key=ratios.get, default="")
        absolute = max((largest for pairs in differences.values() for largest, _ in pairs), default=0.0)
        return Parity(absolute, ratios.get(worst, 0.0), worst)


def _uneven(batches, steps):
    found = {}
    for name in set.intersection(*map(set, batches)):
        arrays = [batch[name] for batch in batches]
        if arrays[0].ndim in (2, 3) and arrays[0].dtype.kind == "f":
            sizes = np.max([np.abs(array).reshape(-1, array.shape[-1]).max(axis=0) for array in arrays], axis=0)
            sizes = sizes[sizes > 0]
            if sizes.size and sizes.max() > steps * sizes.min():
                found[name] = float(sizes.min()), float(sizes.max())
    return found


def _are_shares(values):
    return ((values >= 0) & (values <= 1)).all()


class KnownOutputs(Reference):
    """A reference whose outputs are known.

    Args:
        name: Of what computed them.
        inputs: List of dicts from the name of each input to an array, one for each batch.
        outputs: Likewise, what comes of them.

    Example:

    >>> from keras_sparse.tflite.parity import KnownOutputs
    >>> KnownOutputs("other", [{"x": np.ones((1, 4))}], [{"y": np.ones((1, 2))}]).name
    'other'
    """

    def __init__(self, name, inputs, outputs):
        self.name, self._inputs, self._remembers = name, inputs, False
        self._outputs = [{name: _numbers(values) for name, values in batch.items()} for batch in outputs]


def _renamed(arrays, names):
    """Arrays by the names that are wanted: in their order, if they have others, as in files that others wrote."""
    if set(names) <= set(arrays):
        return arrays
    if len(names) != len(arrays):
        raise ValueError(
            f"The file must have the inputs and outputs of its reference. Received: {sorted(arrays)}, {sorted(names)}"
        )
    return dict(zip(names, arrays.values(), strict=True))


def _quantized(values, dtype, scale):
    """The integers of type `dtype` that stand for `values`, if there is a `(scale, zero point)`."""
    if scale is None:
        return values
    limits = np.iinfo(dtype)
    return np.clip(np.round(_numbers(values) / scale[0]) + scale[1], limits.min, limits.max).astype(dtype)


def _dequantized(values, scale):
    return values if scale is None else scale[0] * (_numbers(values) - scale[1])


def _numbers(array):
    # bfloat16, float16, bool and integers alike; float64 holds all but the largest int64 exactly
    return np.asarray(array).astype("float64")


def _are_whole(values):
    return np.isfinite(values).all() and np.array_equal(values, np.round(values))


def _labels_apart(pairs):
    """The share of whole numbers that are others, of the share that would be by chance, to the power of three."""
    if any(expected.shape != found.shape for expected, found in pairs):
        return np.inf
    expected, found = (np.concatenate([pair[i].ravel() for pair in pairs]) for i in (0, 1))
    _, counts = np.unique(expected, return_counts=True)
    by_chance = 1 - np.square(counts / max(1, expected.size)).sum()
    share = np.mean(expected != found) if expected.size else 0.0
    return float(min(1.0, share / max(by_chance, 1e-20))) ** 3


def _magnitude(values):
    return float(np.abs(values[np.isfinite(values)]).max(initial=0.0))


def _difference(expected, found, typical):
    """Largest difference, absolute and relative to the largest magnitude; NaN equals NaN and nothing else.

    A batch whose magnitude is less than `typical` is measured by that: the only output of one sample may be near zero.
    """
    if expected.shape != found.shape:
        return np.inf, np.inf
    with np.errstate(invalid="ignore"):
        apart = np.atleast_1d(np.abs(expected - found))
    apart[np.atleast_1d((expected == found) | (np.isnan(expected) & np.isnan(found)))] = 0.0
    apart[np.isnan(apart)] = np.inf
    largest = float(apart.max(initial=0.0))
    # The floor keeps an output of zeros from turning rounding noise into an infinite ratio.
    return largest, largest / max(_magnitude(expected), typical, 1e-20)
