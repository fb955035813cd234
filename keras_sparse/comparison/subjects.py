"""A subject is what a comparison looks at, in one of its forms: a Keras model, or a .tflite file in its process."""

import contextlib
import os
import re
import time
import zipfile

import keras
import numpy as np

from keras_sparse import reports, selection
from keras_sparse.tflite.flatmodel import gzip_size
from keras_sparse.tflite.inspect import inspect
from keras_sparse.tflite.runtimes import Worker
from keras_sparse.tflite.signatures import output_names, signature

__all__ = ["load"]


def open_subject(name, model, timeout, stack):
    """The `Model` or `File` that a user means; a file's process ends with the `stack`."""
    if isinstance(model, (str, os.PathLike)):
        path = os.fspath(model)
        if path.endswith(".keras"):
            return Model(name, load(path))
        if not os.path.exists(path):
            raise FileNotFoundError(f"There is no such file. Received: {path!r} for the model {name!r}")
        if path.endswith((".h5", ".hdf5")):
            raise ValueError(
                "Models are compared as Keras models, .keras or .tflite files. Load a file of Keras 2 with "
                f"`keras.saving.load_model` and pass the model. Received: {path!r} for the model {name!r}"
            )
        return File(name, path, stack.enter_context(Worker(path, timeout=timeout)))
    selection.check_model(model)
    return Model(name, model)


def load(path, compile=False):
    """Load a .keras file, with errors that say what is wrong with it.

    Args:
        path: Path of a .keras file.
        compile: Whether to restore its optimizer, losses and metrics.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no .keras file, is damaged, or holds classes that are not registered.

    Example:

    >>> from keras_sparse.comparison import load
    >>> load("model.h5")
    Traceback (most recent call last):
    ...
    ValueError: Expected the path of a .keras file. Received: 'model.h5'
    """
    path = os.fspath(path)
    if not path.endswith(".keras"):
        raise ValueError(f"Expected the path of a .keras file. Received: {path!r}")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no such file. Received: {path!r}")
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            is_old = file.read(4) == b"\x89HDF"
        reason = "an HDF5 file of Keras 2: name it .h5 and load it yourself" if is_old else "damaged or another file"
        raise ValueError(f"Expected a .keras file, which is a zip archive. Received: {path!r}, {reason}")
    try:
        return keras.saving.load_model(path, compile=compile)
    except Exception as error:  # whatever zip, JSON and HDF5 readers raise on a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = reason if len(reason) < 300 else f"{reason[:300]}..."
        raise ValueError(
            "The model cannot be loaded: the file is damaged, or it has custom classes (import the module that "
            "registers them first; on the command line, `--import MODULE` does). "
            f"Received: {path!r} ({type(error).__name__}: {reason})"
        ) from error


class Model:
    """A Keras model in the comparison."""

    form = "keras"

    def __init__(self, name, model):
        self.name, self.model = name, model

    def names(self):
        """The ways to name the outputs, each a list in their order: by key or number, and by layer."""
        with contextlib.suppress(AttributeError, ValueError):  # a subclassed model, whose outputs are not known
            ways = output_names(self.model.output), list(self.model.output_names)
            return [way for way in ways if len(set(way)) == len(ways[0])]
        return []

    def predict(self, x):
        try:
            outputs = self.model.predict_on_batch(x)
        except Exception as error:  # each backend has its own
            shapes = [np.shape(array) for array in keras.tree.flatten(x)]
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"The model {self.name!r} cannot be run on such inputs. Received: a batch of shapes {shapes} "
                f"({type(error).__name__}: {reason})"
            ) from error
        arrays = [np.asarray(keras.ops.convert_to_numpy(array)) for array in keras.tree.flatten(outputs)]
        return dict(zip(output_names(outputs), arrays, strict=True))

    def prepare(self, sample):
        self._sample = sample
        self.predict(sample)

    def time(self, repeats):
        start = time.perf_counter()
        for _ in range(repeats):
            self.model.predict_on_batch(self._sample)
        return (time.perf_counter() - start) / repeats

    def facts(self):
        arrays = [selection.as_array(weight) for weight in self.model.weights]
        return {
            "sparsity": reports.report(self.model).totals["sparsity"],
            "parameters": self.model.count_params(),
            "bytes": sum(array.nbytes for array in arrays),
            "gzip_bytes": gzip_size(b"".join(array.tobytes() for array in arrays)),
        }


class File:
    """A .tflite file in the comparison, in the process that runs it."""

    form = "tflite"

    def __init__(self, name, path, worker):
        self.name, self._path, self._worker = name, path, worker
        # Outputs of a list by number; names of a dict in the order in which `keras.tree` has them.
        numbered = [f"output_{i}" for i in range(len(worker.outputs))]
        self._outputs = numbered if set(numbered) == set(worker.outputs) else sorted(worker.outputs)

    def predict(self, x):
        found = self._worker.predict(self._inputs(x))
        return {name: self._real(name, found[name]) for name in self._outputs}

    def prepare(self, sample):
        inputs = self._inputs(sample)
        size = self._worker.inputs[0]["shape"][0] if self._worker.inputs[0]["shape"] else 1
        self._worker.feed({name: np.repeat(values, size, axis=0) for name, values in inputs.items()})

    def time(self, repeats):
        return self._worker.time(repeats)

    def facts(self):
        totals = inspect(self._path).totals
        return {
            "sparsity": totals["kernel_sparsity"],
            "parameters": totals["parameters"],
            "bytes": totals["bytes"],
            "gzip_bytes": totals["bytes_gzip"],
        }

    def _inputs(self, x):
        """The file's inputs by name, in its types: quantised ones by their scale."""
        leaves = {leaf["name"]: leaf for leaf in self._worker.inputs}
        given = self._named(x, list(leaves))
        missing = sorted(set(leaves) - set(given))
        if missing:
            raise ValueError(
                f"The file {self.name!r} has inputs {sorted(leaves)}: pass `x` as a dict with these keys. "
                f"Received: {sorted(given) or type(x).__name__}"
            )
        return {name: self._stored(leaf, np.asarray(given[name])) for name, leaf in leaves.items()}

    def _named(self, x, names):
        if isinstance(x, dict):
            return {re.sub(r"\W", "_", name): values for name, values in x.items()}
        arrays = keras.tree.flatten(x)
        if len(arrays) == len(names) == 1:
            return {names[0]: arrays[0]}
        with contextlib.suppress(ValueError):  # a subclassed model that has not recorded its inputs
            known = [leaf.name for leaf in signature(self.like).inputs] if self.like is not None else []
            if len(known) == len(arrays):
                return dict(zip(known, arrays, strict=True))
        return {}

    def _stored(self, leaf, values):
        if values.ndim == len(leaf["shape"]) - 1 and leaf["shape"][-1] == 1:
            values = values[..., None]  # as Keras does
        if leaf["name"] not in self._worker.scales or np.dtype(leaf["dtype"]).kind not in "iu":
            return values
        scale, zero_point = self._worker.scales[leaf["name"]]
        limits = np.iinfo(leaf["dtype"])
        with np.errstate(all="ignore"):  # the scale of a damaged file may be anything
            scaled = np.asarray(values, "float64") / scale
            # TFLite's QUANTIZE rounds half away from zero (tensorflow/lite/kernels/internal/cppmath.h, TfLiteRound)
            rounded = np.trunc(scaled + np.copysign(0.5, scaled)) + zero_point
            return np.clip(rounded, limits.min, limits.max).astype(leaf["dtype"])

    def _real(self, name, values):
        scale, zero_point = self._worker.scales.get(name, (0, 0))
        return ((values.astype("float64") - zero_point) * scale).astype("float32") if scale else values
