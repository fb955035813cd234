"""Neuron sparsity: the share of a model's units that are inactive on data."""

import keras
import numpy as np

from keras_sparse import batches, graph, patterns, reports, selection, states
from keras_sparse.neurons.activity import Trace

__all__ = ["Probe", "neuron_sparsity"]


def neuron_sparsity(model, data, batch_size=32):
    """Tell which share of a model's units is inactive on data, and which units are dead.

    A unit is a channel of a layer's output: a unit of a dense or recurrent layer, a filter of a convolution, a head's
    dimension in attention. It is *inactive* on a sample if its output is exactly zero, at all positions if there are
    several (pixels, time steps). A unit that is inactive on every sample gives the next layer nothing: on data that
    stand for what the model will see, it can go.

    Every layer with a kernel has a row, and so has every activation layer that follows something else (a ReLU after an
    `Add`). If an activation layer follows the kernel's layer, directly or after normalization and dropout (Dense,
    BatchNormalization, ReLU), the row shows what comes out of the activation. A layer that a model uses several times
    has one row, and each use counts like a sample; so does each activation, if several follow.

    Rows: `layer` (path), `activation` (the function, or the name of the layer that follows), `role` (`"output"` if the
    model returns the units and nothing else uses them, `"hidden"` if there is an activation, else `"linear"`), `units`,
    `inactive` (share of units inactive on a sample, in [0, 1], mean over samples), `never_active` (share of units that
    are inactive on every sample), `dead_units` (how many have only zeros as weights; `None` without a kernel). Totals:
    `samples`; `units`, `inactive`, `never_active`, `dead_units` over all rows, weighted by units; and over the hidden
    rows `neuron_sparsity` (as `inactive`) and `dead_neurons` (as `never_active`), `None` if there are none.

    The model runs as `predict` runs it, in batches that are forgotten, and is left as it was. Not seen are functions
    that a `call` of your own applies (`keras.ops.relu(self.dense(x))`: use a layer).

    Args:
        model: A built Keras model.
        data: Data as all functions take them, see `keras_sparse.batches`; targets are not looked at. Inputs as for
            `predict`: an array, a list or dict of them for several inputs; a tuple `(x, y)` or
            `(x, y, sample_weight)`; what yields batches of these: a `tf.data.Dataset`, a `keras.utils.PyDataset`, a
            torch `DataLoader`, a generator that ends; or a function that returns one.
        batch_size: Samples in a batch if `data` are arrays.

    Returns:
        A `Report`.

    Raises:
        ValueError: If the model is not built, or the data are empty, endless, of different lengths, or of a
            shape that the model does not take.
        TypeError: If `model` is not a Keras 3 model, or `data` is none of the above.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, "relu"), keras.layers.Dense(1)])
    >>> model.layers[0].set_weights([np.array([[1.0, -1.0], [1.0, -1.0]]), np.zeros(2)])
    >>> ks.neuron_sparsity(model, np.ones((5, 2))).totals["neuron_sparsity"]
    0.5
    """
    return Probe(model).measure(data, batch_size)


class Probe:
    """Measures the neuron sparsity of one model, any number of times with one compiled function.

    Args:
        model: A built Keras model.

    Raises:
        ValueError: If the model is not built.
        TypeError: If it is not a Keras 3 model.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, "relu"), keras.layers.Dense(1)])
    >>> probe = ks.neurons.Probe(model)
    >>> [row["role"] for row in probe.measure(np.ones((4, 2))).rows]
    ['hidden', 'output']
    """

    def __init__(self, model):
        selection.check_model(model)
        self._model = model
        layers = selection.layers(model)
        operations = [operation for layer in layers for operation in getattr(layer, "operations", ())]
        # Those that a layer uses as its `activation` belong to that layer.
        inner = {id(getattr(layer, "activation", None)) for layer in layers}
        self._recorded = {id(each): each for each in (*layers, *operations) if id(each) not in inner}.values()
        self._weights = {}
        for weight in selection.weights(model):
            if weight.kernel and weight.role != graph.EMBEDDING:
                self._weights.setdefault(id(weight.layer), []).append(weight)
        self._trace = self._found = self._notes = None
        self._ran = False
        self._counter = _Counter(model, self._count)

    def measure(self, data, batch_size=32):
        """Return the `Report` on `data`; see `neuron_sparsity`."""
        batches.check(data, batch_size)
        samples, totals = 0, None
        with self._recording(), states.put_back(self._model):
            for batch in batches.of(data, batch_size):
                sizes = [array.shape[0] if array.ndim else 0 for array in keras.tree.flatten(batch)]
                if not any(sizes):
                    continue
                counts = [count.astype("int64") for count in self._run(batch)]
                totals = counts if totals is None else [a + b for a, b in zip(totals, counts, strict=True)]
                samples += sizes[0]
        if not samples:
            raise ValueError(f"There are no samples in `data`. Received: {type(data).__name__} without any")
        return self._report(samples, totals)

    def _run(self, batch):
        self._ran = False
        try:
            # Summed: several replicas may have counted.
            return [count.sum(axis=0) for count in self._counter.predict_on_batch(batch)]
        except (TypeError, ValueError) as error:
            if self._ran:  # The model did, but the backend kept tensors to itself.
                raise ValueError(
                    f"The layers of {self._model.name!r} cannot all be observed: a `call` runs some of them in a loop "
                    "or a branch that the backend compiles for itself (`keras.ops.scan`, `while_loop`, `cond`). The "
                    f"torch backend has no such loops. Received: {type(self._model).__name__}"
                ) from error
            raise batches.misfit(self._model, batch) from error

    def _recording(self):
        """Let every layer tell the present trace what it was called on and what it returned."""
        # Rematerialization would keep the tensors to itself, and is of no use without gradients.
        functions = [(layer, "rematerialized_call", _as_it_is) for layer in self._recorded]
        functions += [(layer, "call", self._observed(layer, layer.call)) for layer in self._recorded]
        return graph.substituted(functions)

    def _observed(self, layer, call):
        def observed(*args, **kwargs):
            trace = self._trace
            if trace is None or trace.in_loop:
                return call(*args, **kwargs)
            trace.in_loop = trace.is_loop(layer, args)
            trace.calls += 1
            calls = trace.calls
            try:
                outputs = call(*args, **kwargs)
            finally:
                trace.in_loop = False
            trace.record(layer, args, kwargs, outputs, leaf=calls == trace.calls)
            return outputs

        return observed

    def _count(self, call):
        """Run `call`, the model's, and return for each row the active samples of each unit, and the samples."""
        self._trace = Trace(self._weights)
        try:
            outputs = call()
            self._ran = True
            self._found, counts, self._notes = self._trace.rows(outputs)
        finally:
            self._trace = None
        return counts

    def _report(self, samples, totals):
        rows = []
        for row, active, uses in zip(self._found, totals[::2], totals[1::2], strict=True):
            rows.append(
                {
                    "layer": row["layer"],
                    "activation": row["activation"],
                    "role": row["role"],
                    "units": row["units"],
                    "inactive": float(1 - (active / uses).mean()),
                    "never_active": float((active == 0).mean()),
                    "dead_units": _dead_units(row["weights"], row["units"], row["gates"]),
                }
            )
        hidden = [row for row in rows if row["role"] == "hidden"]
        dead = [row["dead_units"] for row in rows if row["dead_units"] is not None]
        summary = {
            "samples": samples,
            "units": sum(row["units"] for row in rows),
            "inactive": _mean(rows, "inactive"),
            "never_active": _mean(rows, "never_active"),
            "dead_units": sum(dead) if dead else None,
            "neuron_sparsity": _mean(hidden, "inactive"),
            "dead_neurons": _mean(hidden, "never_active"),
        }
        notes = list(self._notes)
        if not hidden:
            notes.append("there is no hidden layer with an activation")
        formats = dict.fromkeys(("samples", "units", "dead_units"), ",d")
        formats |= dict.fromkeys(("inactive", "never_active", "neuron_sparsity", "dead_neurons"), ".1%")
        return reports.Report(f"Neuron sparsity of {self._model.name}", rows, summary, notes, formats)


class _Counter(keras.Model):
    """Runs another model as `predict` does, compiled and without gradients, and returns what was counted."""

    def __init__(self, model, count):
        # Inputs are the model's to cast.
        super().__init__(name="neuron_counter", autocast=False)
        self.counted = model
        self.count = count
        self.built = True
        self.run_eagerly = getattr(model, "run_eagerly", False)
        # What torch compiles would be the recording functions.
        compiles = keras.config.backend() != "torch" and not self.run_eagerly
        self.jit_compile = compiles and getattr(model, "jit_compile", True)

    def call(self, inputs, training=False):
        return self.count(lambda: self.counted(inputs, training=training))


def _dead_units(weights, units, gates):
    """How many of a layer's units have only zeros as weights; `None` if no kernel can be split into these units."""
    alive, known = np.zeros(units, bool), False
    for weight in weights:
        rows = patterns.to_matrix(weight.numpy() != 0, weight.output_axes).any(axis=1)
        half = weight.role == graph.DEPTHWISE and len(weights) > 1  # Of a separable convolution.
        if not half and (rows.size == units or (gates and rows.size % units == 0)):
            alive |= rows.reshape(-1, units).any(axis=0)  # A recurrent layer's gates lie side by side.
            known = True
    return int(np.sum(~alive)) if known else None


def _as_it_is(function, *args, **kwargs):
    return function


def _mean(rows, name):
    """The mean of a column, weighted by units."""
    units = sum(row["units"] for row in rows)
    return sum(row[name] * row["units"] for row in rows) / units if units else None
