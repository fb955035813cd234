"""An evaluation scores candidates on private copies of a model: masked, trained a little, normalizations re-estimated.

It travels to other processes as the name of a folder, which holds the model and the data.
"""

import contextlib
import functools
import importlib
import json
import math
import multiprocessing
import os
import pathlib
import pickle
import tempfile
import threading
import time
import traceback
import warnings
from dataclasses import dataclass

import keras
import numpy as np

from keras_sparse import batches, graph, optimizers, patterns, pruning, selection
from keras_sparse.identity import IdentityDict
from keras_sparse.pruning.batch_norm import normalizations
from keras_sparse.quiet import quiet
from keras_sparse.search import custom
from keras_sparse.search.goals import MEASURES
from keras_sparse.tflite.benchmark import benchmark
from keras_sparse.tflite.convert import convert
from keras_sparse.tflite.encoding import encode
from keras_sparse.tflite.job import Job, modules

__all__ = ["Evaluation", "Forked", "arrays"]

_LOADED_IN = os.getpid()  # a forked child has another one, and this module already
_HERE = {}  # {folder: (custom objects, data)} of the searches of this process
_COPIES = threading.local()  # `known`, {folder: _Copy}: a model is no business of two threads
_BATCHES = 20  # that re-estimate the statistics of normalizations


class Forked(RuntimeError):
    """A candidate came to a forked process, where TensorFlow and JAX hang.

    Example:

    >>> from keras_sparse.search.evaluation import Forked
    >>> issubclass(Forked, RuntimeError)
    True
    """


def arrays(data, name="data"):
    """Return `[x, y, sample_weight]` as arrays, from data with targets as all functions take them.

    Raises:
        ValueError: If there are no targets, no samples, or arrays of different lengths.
        TypeError: If it is neither.

    Example:

    >>> import numpy as np
    >>> from keras_sparse.search.evaluation import arrays
    >>> x, y, sample_weight = arrays((np.zeros((4, 2)), np.zeros(4)))
    >>> x.shape, sample_weight is None
    ((4, 2), True)
    """
    x, y, sample_weight = batches.whole(data, name)
    if y is None:
        raise ValueError(
            f"{name} must be (x, y) or (x, y, sample_weight), or yield such batches. "
            f"Received: {type(data).__name__} without targets"
        )
    return [x, y, sample_weight]


class Evaluation:
    """Scores candidates.

    Args:
        folder: Where the model and the data are, see `prepare`.
        indices: Which weights the sparsity is counted over: positions in `ks.selection.weights(model)`.
        measures: What to measure besides the sparsity and what `model.evaluate` returns: `"macs"`, `"bytes"`,
            `"latency_ms"`.
        epochs: Of training each candidate with its zeros kept, on the training data.
        batch_size: Samples in a batch.
        timeout: Seconds that a candidate may take, or `None`.
        runtime: For `"latency_ms"`, as in `ks.tflite.benchmark`.

    Example:

    >>> from keras_sparse.search.evaluation import Evaluation
    >>> Evaluation("folder", [0, 2], ["bytes"]).measures
    ('bytes',)
    """

    def __init__(self, folder, indices, measures=(), epochs=0, batch_size=128, timeout=None, runtime="native"):
        self.folder, self.indices, self.measures = os.path.abspath(folder), tuple(indices), tuple(measures)
        self.epochs, self.batch_size, self.timeout, self.runtime = epochs, batch_size, timeout, runtime

    def prepare(self, model, train, test, processes=False):
        """Write the model and the data, `[x, y, sample_weight]`, into the folder.

        Args:
            model: A compiled Keras model. It is saved, and otherwise left alone.
            train: The training data, or `None`.
            test: The validation data.
            processes: Whether other processes will need them.

        Raises:
            ValueError: If the model cannot be saved and loaded.
        """
        folder = pathlib.Path(self.folder)
        self.forget()
        _HERE[self.folder] = custom.objects(model), train, test
        try:
            with quiet():
                model.save(folder / "model.keras")
            self._copy()
        except Exception as error:
            raise ValueError(
                f"Candidates are copies of the model, and {model.name!r} cannot be saved and loaded again. "
                f"Received: {type(model).__name__} ({type(error).__name__}: {str(error).strip()[:500]})"
            ) from error
        if processes:
            # A fresh process imports the caller's script by itself.
            found = [module for module in modules(folder / "model.keras", compiled=True) if module != "__main__"]
            places = custom.places(_HERE[self.folder][0])
            job = {"backend": keras.config.backend(), "modules": found, "objects": places}
            (folder / "job.json").write_text(json.dumps(job))
            with open(folder / "data.pickle", "wb") as file:
                pickle.dump((train, test), file, protocol=pickle.HIGHEST_PROTOCOL)

    def check(self):
        """Load the model and the data, in the process that this comes to.

        Returns:
            The text of the traceback, or `None`.

        Raises:
            Forked: If this process was forked.
        """
        _refuse_forks()
        try:
            self._copy()
        except Exception:
            return traceback.format_exc()

    def forget(self):
        """Let go of the model and the data in this process."""
        _HERE.pop(self.folder, None)
        _COPIES.__dict__.get("known", {}).pop(self.folder, None)

    def __call__(self, allocation, seed):
        """Score one candidate.

        Args:
            allocation: `{index: (sparsity, pattern)}` with positions in `ks.selection.weights(model)`, or `None` for
                the model as it is, without training.
            seed: Of the order of the training data, and of layers that draw.

        Returns:
            Dict of floats, or `{"error": text of the traceback}`; with `seconds`.

        Raises:
            Forked: If this process was forked.
        """
        _refuse_forks()
        start = time.perf_counter()
        try:
            copy = self._copy()
            start = time.perf_counter()
            with _drawing(seed):
                # The model itself is measured once, and everything is compiled with it.
                deadline = _Deadline(None if allocation is None else self.timeout)
                values = self._score(copy, allocation, seed, deadline)
        except Exception:  # a candidate that fails is a result, and the search goes on
            values = {"error": traceback.format_exc()}
        return values | {"seconds": time.perf_counter() - start}

    def uses(self):
        """How often each weight is multiplied for one sample, `{index: int}`; see `ks.graph.uses`."""
        copy = self._copy()
        return {i: copy.uses[w.variable] for i, w in enumerate(copy.weights) if w.variable in copy.uses}

    def _score(self, copy, allocation, seed, deadline):
        model = copy.model
        copy.restore(seed)
        if allocation is not None:
            if self.epochs:
                copy.wrap(any(_silences(pattern) for _, pattern in allocation.values()))
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".* has no weight left")  # Its score will say it.
                pruning.prune(model, copy.target(allocation), filters=lambda variable: True)
            if self.epochs:
                self._train(copy, seed, deadline)
            copy.estimate(self.batch_size, deadline)
        x, y, weight = copy.test
        options = {"batch_size": self.batch_size, "verbose": 0, "callbacks": [deadline], "return_dict": True}
        found = model.evaluate(x, y, sample_weight=weight, **options)
        taken = sorted({*MEASURES, "error", "seconds"} & set(found))
        if taken:
            raise ValueError(f"A search itself measures {taken}: give metrics of these names another `name`.")
        numbers = {name: np.asarray(keras.ops.convert_to_numpy(value)) for name, value in found.items()}
        values = {name: float(value.item()) for name, value in numbers.items() if value.size == 1}
        zeros = sum(int(np.sum(weight.numpy() == 0)) for weight in copy.chosen)
        values["sparsity"] = zeros / sum(weight.size for weight in copy.chosen)
        deadline.check()
        if "macs" in self.measures:
            values["macs"] = float(copy.macs())
        if {"bytes", "latency_ms"} & set(self.measures):
            content = _file(model)
            values["bytes"] = float(len(content))
            deadline.check()
            if "latency_ms" in self.measures:
                values["latency_ms"] = _latency(content, self.runtime)
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise ValueError(f"These are no finite numbers: {bad}. Received: {values}")
        deadline.check()
        return values

    def _train(self, copy, seed, deadline):
        rng, count = np.random.default_rng(seed), len(keras.tree.flatten(copy.train[0])[0])
        for epoch in range(self.epochs):
            order = rng.permutation(count)
            x, y, weight = (None if part is None else _take(part, order) for part in copy.train)
            options = {"batch_size": self.batch_size, "verbose": 0, "shuffle": False}
            # At each epoch anew: the first `fit` of a model draws when it is built.
            anew = keras.callbacks.LambdaCallback(on_epoch_begin=lambda _, logs, epoch=epoch: _seed(seed + epoch))
            copy.model.fit(x, y, sample_weight=weight, callbacks=[deadline, anew], **options)
            _seed(seed + self.epochs)

    def _copy(self):
        known = _COPIES.__dict__.setdefault("known", {})
        if self.folder not in known:
            known.clear()  # of earlier searches
            known[self.folder] = self._load()
        return known[self.folder]

    def _load(self):
        folder = pathlib.Path(self.folder)
        if self.folder in _HERE:
            objects, train, test = _HERE[self.folder]
        else:
            job = json.loads((folder / "job.json").read_text())
            if multiprocessing.parent_process() is not None:
                _one_thread()
            if keras.config.backend() != job["backend"]:
                raise RuntimeError(
                    f"The search runs on the Keras backend {job['backend']!r} and this worker on "
                    f"{keras.config.backend()!r}: start it with KERAS_BACKEND={job['backend']} in its environment."
                )
            for module in job["modules"]:
                importlib.import_module(module)
            with open(folder / "data.pickle", "rb") as file:
                objects, train, test = custom.imported(job["objects"]), *pickle.load(file)
        # The file was written by the search from the caller's own model: its Lambda layers are the caller's code.
        with quiet(), keras.saving.custom_object_scope(objects):
            model = keras.saving.load_model(folder / "model.keras", safe_mode=False)
        return _Copy(model, train, test, self.indices)


class _Deadline(keras.callbacks.Callback):
    """Ends an evaluation that takes too long, between two batches."""

    def __init__(self, timeout):
        super().__init__()
        self._timeout, self._start = timeout, time.monotonic()

    def check(self):
        if self._timeout is not None and time.monotonic() - self._start > self._timeout:
            raise TimeoutError(f"the candidate took longer than {self._timeout} seconds")

    def on_train_batch_end(self, batch, logs=None):
        self.check()

    def on_test_batch_end(self, batch, logs=None):
        self.check()


@dataclass
class _Copy:
    """A private copy of the model with the data, and what it takes to start anew for each candidate."""

    model: keras.Model
    train: list | None
    test: list
    indices: tuple

    def __post_init__(self):
        self.weights = selection.weights(self.model)
        self.chosen = [self.weights[index] for index in self.indices]
        self._before = [(v, np.array(selection.as_array(v))) for v in self.model.variables]

    def restore(self, seed):
        """Put back all weights and states, and draw the seeds of layers anew."""
        rng = np.random.default_rng(seed)
        for variable, value in self._before:
            drawn = variable.name == "seed_generator_state"
            variable.assign(rng.integers(2**31, size=value.shape).astype(value.dtype) if drawn else value)

    def target(self, allocation):
        """What `ks.prune` takes as sparsity, from an allocation by index."""
        return {self.weights[index]: value for index, value in allocation.items()}

    def wrap(self, units):
        """Let the optimizer keep the zeros of the chosen weights; compiled functions stay after the first time.

        Args:
            units: Whether also what belongs to their output units can be zero.
        """
        sparse = optimizers.wrap(self.model)
        variables = [weight.variable for weight in self.chosen] + (self._unit_variables if units else [])
        masked = IdentityDict.fromkeys(variables)  # a normalization may follow several kernels
        trainable = IdentityDict.fromkeys(self.model.trainable_variables)
        masks = sparse.sparse_parts.masks
        masks.add([variable for variable in masked if variable in trainable])
        optimizers.refresh(self.model, sparse.sparse_parts)
        for variable, mask in masks.pairs:
            mask.assign(np.ones(variable.shape, bool))
        optimizers.restart(sparse, self.model.trainable_variables)

    @functools.cached_property
    def _unit_variables(self):
        found = graph.unit_variables(self.model, self.chosen)
        return [variable for variables in found if not isinstance(variables, str) for variable in variables]

    def estimate(self, batch_size, deadline):
        """Give batch normalizations the mean statistics of some batches, now that the weights are others."""
        layers = normalizations(self.model)
        if not layers:
            return
        before = [layer.momentum for layer in layers]
        x = (self.test if self.train is None else self.train)[0]
        count = len(keras.tree.flatten(x)[0])
        starts = range(0, max(1, count - batch_size + 1), batch_size)
        try:
            for number, start in enumerate(starts[:_BATCHES]):
                for layer in layers:
                    layer.momentum = number / (number + 1)  # the mean of all batches so far
                self.model(_take(x, slice(start, start + batch_size)), training=True)
                deadline.check()
        finally:
            for layer, momentum in zip(layers, before, strict=True):
                layer.momentum = momentum

    def macs(self):
        """Multiplications of one sample with weights that are not zero."""
        return sum(int(np.sum(w.numpy() != 0)) * self.uses.get(w.variable, 0) for w in self.weights if w.kernel)

    @functools.cached_property
    def uses(self):
        return graph.uses(self.model, _take(self.test[0], slice(1)))


@contextlib.contextmanager
def _drawing(seed):
    """Seed what layers draw from besides their own seeds, and leave it afterwards as it was: torch's one generator."""
    if keras.config.backend() != "torch":
        yield
        return
    import torch

    with torch.random.fork_rng():
        _seed(seed)
        yield


def _seed(seed):
    if keras.config.backend() == "torch":
        import torch

        torch.manual_seed(seed)


def _refuse_forks():
    if os.getpid() != _LOADED_IN:
        raise Forked(
            "The executor forks its processes, where TensorFlow and JAX hang. Use fresh interpreters: "
            "`ProcessPoolExecutor(2, mp_context=multiprocessing.get_context('spawn'))`."
        )


def _take(x, which):
    return keras.tree.map_structure(lambda array: array[which], x)


def _silences(pattern):
    return patterns.get(pattern).whole_units


def _one_thread():
    """Compute on one thread: as many processes as there are cores share them."""
    # Read when TensorFlow and XLA start, at the first computation; NPROC is the size of XLA's thread pools.
    os.environ |= dict.fromkeys(("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "NPROC"), "1")
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
    if keras.config.backend() == "torch":
        import torch

        torch.set_num_threads(1)


def _file(model):
    dense = convert(Job(model)).content
    return min(encode(dense).content, dense, key=len)


def _latency(content, runtime):
    with tempfile.TemporaryDirectory(prefix="keras_sparse-") as folder:
        path = pathlib.Path(folder) / "candidate.tflite"
        path.write_bytes(content)
        return benchmark(path, runtime=runtime, seconds=0.3).rows[0]["median"]
