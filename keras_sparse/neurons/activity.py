"""Activity: which units of a model's layers are not zero, recorded while the model runs."""

import keras
import numpy as np

from keras_sparse.graph.kinds import MOVES, NORMALIZES, OVER_CHANNELS, UNKNOWN, Equation, kind_of, of_keras

__all__ = ["Trace"]


class _Use:
    """One use of a layer's units."""

    def __init__(self, layer, holder, output, axes, activation):
        self.layer, self.holder = layer, holder
        self.axes, self.activation = axes, activation
        self.own = _active(output, axes)
        self.activated = []  # What activation layers made of it.
        self.tensors = []  # The forms it takes on its way through the layers that pass it on.

    def follow(self, layer, output):
        self.activation = layer.name
        self.activated.append(_active(output, self.axes))


class Trace:
    """What the layers did in one run of a model. Tensors are known by identity, and kept so that it stays theirs.

    Args:
        weights: The kernels of each layer that has some: `{id(layer): [Weight]}`.

    Example:

    >>> import keras, keras_sparse as ks
    >>> dense = keras.layers.Dense(3, activation="relu")
    >>> x = keras.ops.ones((2, 4))
    >>> y = dense(x)
    >>> trace = ks.neurons.activity.Trace({id(dense): ks.selection.weights(dense)})
    >>> trace.record(dense, (x,), {}, y, leaf=True)
    >>> [(row["activation"], row["role"], row["units"]) for row in trace.rows(y)[0]]
    [('relu', 'output', 3)]
    """

    def __init__(self, weights):
        self.in_loop = False
        self.calls = 0
        self._weights = weights
        self._uses = []
        self._users = {}  # Tensor: the use of units it holds, and whether it has been through an activation.
        self._axes = {}  # Tensor: which axes count its units.
        self._consumed = set()
        self._kept = []
        self._notes = []

    def is_loop(self, layer, args):
        """Whether a layer runs what it holds once for each step, in ways that differ among backends.

        Those that hold a kernel count as a whole, and others cannot be seen if the number of steps may change.
        """
        kind = kind_of(layer)
        if kind.holder is None or kind.recurrent:
            return kind.recurrent
        if id(_kernel_holder(layer)) in self._weights:
            return True
        # As it was built: TensorFlow knows the steps in some runs and not in others, and all must count the same.
        unknown = (layer.get_build_config() or {}).get("input_shape", args[0].shape)[1] is None
        if unknown:
            self._notes.append(f"the layers in {layer.path} are not seen: its number of time steps is not fixed")
        return unknown

    def record(self, layer, args, kwargs, outputs, leaf):
        inputs = [x for x in keras.tree.flatten((args, kwargs)) if keras.ops.is_tensor(x)]
        produced = [x for x in keras.tree.flatten(outputs) if keras.ops.is_tensor(x)]
        self._kept.extend((inputs, produced))
        if not inputs or not produced:
            return
        source, output = inputs[0], produced[0]
        use, activated = self._users.get(id(source), (None, False))
        holder = _kernel_holder(layer)
        axes = self._find_axes(layer, holder, source, output)
        same = len(inputs) == 1 and tuple(source.shape) == tuple(output.shape)
        activation = leaf and _is_activation(layer, same)
        if id(holder) in self._weights:
            self._consumed.update(map(id, inputs))
            activation = _activation_name(holder)
            self._start(layer, holder, output, axes, activation, activation is not None)
        elif use is not None and kind_of(layer).inert:
            self._pass(use, activated, output)
        elif use is not None and same and activation and not activated:
            use.follow(layer, output)
            self._pass(use, True, output)
        else:
            self._consumed.update(map(id, inputs))
            if activation and not _is_softmax(layer) and kind_of(layer).activates:
                self._start(layer, None, output, axes, layer.name, True)

    def _start(self, layer, holder, output, axes, activation, activated):
        if len(output.shape) < 2 or any(output.shape[axis] is None for axis in axes):
            return
        self._uses.append(_Use(layer, holder, output, axes, activation))
        self._pass(self._uses[-1], activated, output)

    def _pass(self, use, activated, output):
        self._users[id(output)] = (use, activated)
        self._axes[id(output)] = use.axes
        use.tensors.append(id(output))

    def _find_axes(self, layer, holder, source, output):
        """Which axes of `output` count units; remembered for what elementwise layers make of it."""
        if id(output) in self._axes and id(holder) not in self._weights:
            return self._axes[id(output)]  # A layer inside of this one returned it.
        rank = len(output.shape)
        axes = (rank - 1,)
        if isinstance(holder, keras.layers.EinsumDense):
            axes = Equation(holder.equation).output_axes(rank)
        elif getattr(holder, "data_format", None) == "channels_first":
            spatial = len(holder.kernel_size) if hasattr(holder, "kernel_size") else rank - 2
            axes = (rank - 1 - spatial,)
        elif id(holder) not in self._weights and rank == len(source.shape) and kind_of(layer).channels != MOVES:
            axes = self._axes.get(id(source), axes)
        self._axes[id(output)] = axes
        return axes

    def rows(self, outputs):
        """Return a description of each row, two tensors for each (see `_sums`), and notes."""
        returned = {id(x) for x in keras.tree.flatten(outputs)} - self._consumed
        groups, times = {}, {}
        for use in self._uses:
            key = id(use.layer)
            if use.holder is None:  # An activation layer without weights has other units in each of its uses.
                times[key] = times.get(key, 0) + 1
                key = (key, times[key])
            groups.setdefault(key, []).append(use)
        found, counts = [], []
        for key, uses in groups.items():
            first = uses[0]
            active = [part for use in uses for part in use.activated or [use.own]]
            activations = [use.activation for use in uses if use.activation is not None]
            repeated = f" (use {key[1]})" if first.holder is None and key[1] > 1 else ""
            counts.extend(_sums(active))
            if all(any(tensor in returned for tensor in use.tensors) for use in uses):
                role = "output"
            else:
                role = "hidden" if activations else "linear"
            found.append(
                {
                    "layer": (getattr(first.layer, "path", None) or first.layer.name) + repeated,
                    "activation": activations[0] if activations else "linear",
                    "role": role,
                    "units": int(first.own.shape[1]),
                    "weights": self._weights.get(id(first.holder), []),
                    "gates": kind_of(first.layer).recurrent,
                }
            )
        return found, counts, self._notes


def _active(output, axes):
    """Which units are active on which samples: booleans [samples, units]."""
    others = tuple(axis for axis in range(1, len(output.shape)) if axis not in axes)
    active = keras.ops.not_equal(output, 0)
    if others:
        active = keras.ops.any(active, axis=others)
    units = int(np.prod([output.shape[axis] for axis in axes]))
    return keras.ops.reshape(active, (-1, units))


def _sums(active):
    """Return the number of active samples of each unit [1, units], and of all samples [1, 1]."""
    counts = [keras.ops.sum(keras.ops.cast(part, "int32"), axis=0, keepdims=True) for part in active]
    sizes = [keras.ops.sum(keras.ops.ones_like(part[:, :1], dtype="int32"), axis=0, keepdims=True) for part in active]
    return sum(counts[1:], counts[0]), sum(sizes[1:], sizes[0])


def _kernel_holder(layer):
    """The layer that holds the kernel behind a layer's output: in loops, what runs at each step."""
    kind = kind_of(layer)
    return layer if kind.holder is None else _kernel_holder(kind.holder(layer))


def _activation_name(holder):
    """The name of the activation function that a layer with a kernel applies itself, or `None`."""
    # A layer of which nothing is known may well have one in its `call`.
    unknown = not of_keras(holder) and kind_of(holder).channels == UNKNOWN
    activation = getattr(holder, "activation", type(holder).__name__ if unknown else None)
    if activation in (None, keras.activations.linear):
        return None
    return activation if isinstance(activation, str) else getattr(activation, "__name__", type(activation).__name__)


def _is_activation(layer, same):
    kind = kind_of(layer)
    if kind.activates:
        return getattr(layer, "activation", None) is not keras.activations.linear
    # A layer of one's own that keeps the shape and has no weights, or a Lambda.
    custom = isinstance(layer, keras.layers.Lambda) or not of_keras(layer)
    return same and custom and kind.channels == UNKNOWN and not layer.weights


def _is_softmax(layer):
    """Whether it is a softmax or its like, which behind anything but a kernel is that of attention."""
    activation = getattr(layer, "activation", None)
    if activation is None:
        return kind_of(layer).channels == NORMALIZES
    return getattr(activation, "__name__", "") in OVER_CHANNELS
