"""A calibration runs a model on data, layer by layer, and stops where a kernel meets what it multiplies."""

import contextlib

import keras
import numpy as np

from keras_sparse import batches, graph, states
from keras_sparse.graph.kinds import of_keras
from keras_sparse.graph.rebuilding import packed
from keras_sparse.identity import IdentityDict
from keras_sparse.pruning.operands import Moment, operands
from keras_sparse.pruning.watching import Watch

__all__ = ["Calibration", "blocks"]


def blocks(data, batch_size=32):
    """Return the batches of inputs in `data` as a list, checked: finite, two samples at least.

    Args:
        data: As for `keras_sparse.batches.check`; targets are left out.
        batch_size: Samples in a batch if `data` are arrays.

    Raises:
        ValueError: If there are less than two samples, or a number is not finite; as `keras_sparse.batches.check`.
        TypeError: As `keras_sparse.batches.check`.

    Example:

    >>> import numpy as np
    >>> from keras_sparse.pruning.calibration import blocks
    >>> blocks(np.array([[1.0], [np.nan]]))
    Traceback (most recent call last):
    ...
    ValueError: `data` must be finite. Received: 1 of 2 numbers is NaN or infinite, in batch 0
    """
    batches.check(data, batch_size)
    found, samples = [], 0
    for number, batch in enumerate(batches.of(data, batch_size)):
        arrays = keras.tree.flatten(batch)
        sizes = [len(array) if array.ndim else 0 for array in arrays]
        for array in arrays:
            wrong = int(np.sum(~np.isfinite(array))) if array.dtype.kind == "f" else 0
            if wrong:
                raise ValueError(
                    f"`data` must be finite. Received: {wrong} of {array.size} numbers {'is' if wrong == 1 else 'are'} "
                    f"NaN or infinite, in batch {number}"
                )
        if any(sizes):
            found.append(batch)
            samples += sizes[0]
    if samples < 2:
        raise ValueError(
            "`data` must have at least two samples, better some hundred: weights are fitted to what they have in "
            f"common. Received: {samples}"
        )
    return found


class Calibration:
    """The kernels of a model in the order in which they are used, and what they multiply on data.

    Args:
        model: A built Keras model.
        data: List of batches, as `blocks` returns it.

    Attributes:
        model: The same.
        data: The same.
        unknown: `IdentityDict` from the kernels that cannot be calibrated to the reason.

    Raises:
        ValueError: If the model does not take the data.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, name="a"), keras.layers.Dense(1, name="b")])
    >>> calibration = ks.pruning.calibration.Calibration(model, [np.ones((4, 2))])
    >>> def visit(moments):
    ...     print([(weight.layer.name, moment.matrices.shape) for weight, moment in moments])
    >>> calibration.run([weight for weight in ks.graph.weights(model) if weight.kernel], visit)
    [('a', (1, 2, 2))]
    [('b', (1, 3, 3))]
    """

    def __init__(self, model, data):
        self.model, self.data = model, data
        kernels = [weight for weight in graph.weights(model) if weight.kernel]
        self._events = IdentityDict()  # Layer: how often one run of the model uses it, in the order of first uses.
        understood = IdentityDict()

        def record(layer, args):
            for weight in of_layer.get(layer, ()):
                understood[weight.variable] = operands(layer, weight.variable.name, args) is not None

        def count(layer):
            self._events[layer] = self._events.get(layer, 0) + 1

        of_layer = IdentityDict()
        for weight in kernels:
            of_layer.setdefault(weight.layer, []).append(weight)
        # Layers that keep states take batches of one size only.
        one = data[0] if states.memory(model) else keras.tree.map_structure(lambda array: array[:2], data[0])
        try:
            with states.rewound(model), Watch(of_layer, record, count).on(model):
                model(one, training=False)
        except Exception as error:  # each backend has its own
            raise batches.misfit(model, data[0]) from error
        self.unknown = IdentityDict()
        for weight in kernels:
            if not understood.get(weight.variable, False):
                why = f"what {weight.variable.name} of {type(weight.layer).__name__} multiplies is not known"
                unused = "the model does not use it on `data`"
                self.unknown[weight.variable] = why if weight.variable in understood else unused

    def run(self, weights, visit, sums=Moment, beside=None, meet=None):
        """Call `visit` for each layer that has some of the weights, in the order of its first use.

        Args:
            weights: Kernels, a list of `ks.graph.Weight` of which none is `unknown`.
            visit: Function of a list of `(weight, Moment)`. It may assign to the weights: later layers then meet what
                the new ones make.
            sums: What takes in the operands of a weight, in place of `Moment`: it has `add` and `finite`.
            beside: Values of all variables, `IdentityDict`: the model runs a second time with these, and `add` gets
                the operands there as a second argument.
            meet: Function `(layer, calls)`, called for each layer of a graph, before it runs, with the pairs
                `(args, kwargs)` of each batch. It may assign to the layer's weights.
        """
        of_layer = IdentityDict()
        for weight in weights:
            of_layer.setdefault(weight.layer, []).append(weight)
        self._left, self._visit, self._sums, self._meet = IdentityDict(), visit, sums, meet
        self._beside = beside and [(v, keras.ops.convert_to_tensor(value, v.dtype)) for v, value in beside.items()]
        for layer in self._events:
            if layer in of_layer:
                self._left[layer] = of_layer[layer]
        self._shared = any(self._events[layer] > 1 for layer in self._left)
        with contextlib.suppress(_Reached):
            self._walk(self.model, [((batch,), {}) for batch in self.data] * (2 if beside else 1), last=True)

    def _values(self, index, calls):
        """The scope for one of the calls: those of the second half are with the values of the model beside."""
        if self._beside is None or index < len(calls) // 2:
            return contextlib.nullcontext()
        return keras.StatelessScope(self._beside)

    def _walk(self, layer, calls, last=False):
        """Calibrate the kernels in a layer that is called so, and return its outputs, unless nobody asks for them.

        A functional model goes operation by operation over all batches, so that nothing is computed twice. Whatever
        else holds layers runs anew for each of them, and so does a model that uses one of them several times.
        """
        inside = [one for one in graph.layers(layer) if one in self._left] if _is_layer(layer) else []
        if inside and not self._shared and _is_plain_graph(layer):
            return self._replay(layer, calls)
        for target in [one for one in self._left if one in IdentityDict.fromkeys(inside)]:
            moments = [(weight, self._sums(weight)) for weight in self._left.pop(target)]
            self._run_until(layer, calls, target, moments)
            if not all(moment.finite for _, moment in moments):
                raise ValueError(
                    f"The inputs of {target.path} are not finite on `data`: the model computes NaN or infinity. "
                    f"Received: {self.model.name!r}"
                )
            self._visit(moments)
        if last:
            return None
        if self._meet:
            self._meet(layer, calls if self._beside is None else calls[: len(calls) // 2])
        found = []
        with states.rewound(self.model):
            for i, (args, kwargs) in enumerate(calls):
                with self._values(i, calls):
                    found.append(_detached(layer(*args, **_inference(layer, kwargs))))
        return found

    def _run_until(self, layer, calls, target, moments):
        """Run a layer on all batches, each up to the last use of the target in it, and take in what it multiplies."""
        uses, found = 0, []

        def record(_, args):
            found.append([operands(target, weight.variable.name, args) for weight, _ in moments])

        def count(_):
            nonlocal uses
            uses += 1
            if uses == self._events[target]:
                raise _Reached

        watched = IdentityDict.fromkeys([target])
        batches = len(self.data)
        with states.rewound(self.model), Watch(watched, record, count).on(layer):
            for first in range(batches):
                runs = []
                for i in range(first, len(calls), batches):
                    uses, found = 0, []
                    args, kwargs = calls[i]
                    with self._values(i, calls), contextlib.suppress(_Reached):
                        layer(*args, **_inference(layer, kwargs))
                    runs.append(found)
                for pieces in zip(*runs, strict=True):
                    for (_, moment), *own in zip(moments, *pieces, strict=True):
                        moment.add(*own)

    def _replay(self, model, calls):
        def call(operation, args, kwargs):
            if not self._left:
                raise _Reached
            parts = [_part((args, kwargs), i) for i in range(len(calls))]
            outputs = [keras.tree.flatten(output) for output in self._walk(operation, parts)]
            return [_Batches(tensors) for tensors in zip(*outputs, strict=True)]

        inputs = [_inputs(model, args[0] if args else kwargs["inputs"]) for args, kwargs in calls]
        outputs = graph.replay(model, [_Batches(tensors) for tensors in zip(*inputs, strict=True)], call)
        return [packed(model, [tensors[i] for tensors in outputs]) for i in range(len(calls))]


class _Reached(BaseException):  # Keras rewrites each `Exception` that passes a layer.
    """The layer that a run was for has been used."""


class _Batches:
    """One tensor of a graph, for each batch."""

    def __init__(self, tensors):
        self.tensors = tensors

    def __getitem__(self, index):
        return self.tensors[index]


def _part(structure, index):
    """A structure with the tensors of one batch."""
    return keras.tree.map_structure(lambda leaf: leaf[index] if isinstance(leaf, _Batches) else leaf, structure)


def _is_layer(operation):
    return isinstance(operation, keras.layers.Layer)


def _inference(operation, kwargs):
    """Arguments of a call as a functional model makes it in inference, whatever they were when it was built."""
    return {**kwargs, "training": False} if _is_layer(operation) else kwargs


def _is_plain_graph(layer):
    """Whether a layer is a functional or Sequential model that runs its operations and does nothing else."""
    return isinstance(layer, keras.Model) and of_keras(layer) and bool(getattr(layer, "inputs", None))


def _inputs(model, batch):
    """The flat list of a functional model's inputs as tensors, as the model itself takes them from a batch."""
    names = [x.name for x in model.inputs]
    structure = None if isinstance(model, keras.Sequential) else model.input
    if isinstance(batch, dict) and not isinstance(structure, dict) and set(names) <= set(batch):
        batch = [batch[name] for name in names]
    elif isinstance(batch, dict) and isinstance(structure, dict):
        batch = {name: batch[name] for name in structure}
    found = []
    for symbolic, value in zip(model.inputs, keras.tree.flatten(batch), strict=True):
        value = keras.ops.convert_to_tensor(value, symbolic.dtype)
        missing = len(symbolic.shape) - len(value.shape)
        if missing == -1 and value.shape[-1] == 1:
            value = keras.ops.squeeze(value, -1)
        found.append(keras.ops.expand_dims(value, -1) if missing == 1 else value)
    return found


def _detached(outputs):
    """The outputs without their gradients, with the masks that layers have attached to them."""
    layer = keras.layers.Activation(keras.ops.stop_gradient, autocast=False, name="detached")
    return keras.tree.map_structure(lambda x: layer(x) if keras.ops.is_tensor(x) else x, outputs)
