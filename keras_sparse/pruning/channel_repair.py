"""Where channels are gone, the weights that read them are solved for, so that outputs are nearly as they were.

He et al., "Channel pruning for accelerating very deep neural networks" (2017), equation 5, with the inputs of the
pruned model and the outputs of the dense one, as in section 3.2: later layers make up for what
earlier ones lose.
"""

import keras
import numpy as np

from keras_sparse import graph, optimizers, patterns
from keras_sparse.identity import IdentityDict
from keras_sparse.pruning.batch_norm import measured, reestimate, set_statistics
from keras_sparse.pruning.operands import sampled
from keras_sparse.pruning.repair import repaired
from keras_sparse.quiet import progress_bar

__all__ = ["Regression", "repair_channels"]

# Of the mean variance of the inputs: how strongly the weights are held to what they were.
DAMPING = 1e-3


def repair_channels(plan, masks, calibration):
    """Set the weights of a plan's goals to zero, and solve for those of all layers that read channels that are gone.

    The layers are solved for in their order, each on what the pruned and repaired ones before it make of the data,
    for the outputs that it had in the dense model. Batch normalizations get the statistics of their new inputs on
    the way. A bias, or a normalization that follows, makes up for the means.

    Depthwise kernels read and write one channel: there is nothing to solve for. Kernels of which nobody knows what
    they multiply stay as they are.

    Args:
        plan: The `ks.pruning.Plan`.
        masks: The masks to reach, a boolean array for each goal.
        calibration: A `ks.pruning.calibration.Calibration` of the model.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> from keras_sparse.pruning.calibration import Calibration
    >>> from keras_sparse.pruning.channel_repair import repair_channels
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(2), keras.layers.Dense(1)])
    >>> model.set_weights([np.array([[1.0, 2.0]]), np.zeros(2), np.ones((2, 1)), np.zeros(1)])
    >>> plan = ks.pruning.Plan(model, 0.5, pattern="channel", filters=model.layers[0])
    >>> data = np.arange(8.0).reshape(8, 1)
    >>> repair_channels(plan, plan.masks(plan.present_masks()), Calibration(model, [data]))
    >>> float(keras.ops.round(model(np.array([[10.0]]))[0, 0]))
    30.0
    """
    import threadpoolctl

    model = calibration.model
    dense = IdentityDict((v, np.array(graph.as_array(v))) for v in model.weights)
    kept = IdentityDict()
    for goal, mask in zip(plan.goals, masks, strict=True):
        kept[goal.weight.variable] = mask
        goal.weight.variable.assign(optimizers.masked_value(goal.weight.variable, mask))
    plan.zero_units(masks)
    readers = [weight for weight in graph.weights(model) if _solvable(weight, calibration.unknown)]
    for weight in readers:
        kept.setdefault(weight.variable, ~weight.pruned_zeros())
    normalized, sums = _only_normalized(model), IdentityDict()

    def visit(found):
        for weight, regression in found:
            if regression.needed:
                with threadpoolctl.threadpool_limits(1, "blas"):
                    _solve(weight, regression, kept[weight.variable], weight.layer in normalized)
            advance()

    def meet(layer, calls):
        if not isinstance(layer, keras.layers.BatchNormalization):
            return

        def look(inputs, training=None, mask=None):
            sums[layer] = sums.get(layer, 0) + measured(layer, inputs, mask)
            return inputs

        with graph.substituted([(layer, "call", look)]):
            for args, kwargs in calls:
                layer(*args, **kwargs)
        set_statistics(layer, sums[layer])

    def regression(weight):
        mask = patterns.to_matrix(kept[weight.variable], weight.output_axes)
        partly = bool((mask.any(axis=1) & ~mask.all(axis=1)).any())
        return Regression(patterns.to_matrix(_numpy(dense[weight.variable]), weight.output_axes), partly)

    with progress_bar("repair", total=len(readers)) as advance:
        calibration.run(readers, visit, regression, dense, meet)
    reestimate(model, calibration.data, sums)


def _numpy(value):
    return value if value.dtype in (np.float32, np.float64) else value.astype("float32")


def _solvable(weight, unknown):
    apart = weight.role in (graph.DEPTHWISE, graph.EMBEDDING) or getattr(weight.layer, "lora_enabled", False)
    return weight.kernel and not apart and weight.variable not in unknown


def _only_normalized(model):
    """The layers whose outputs go to batch normalizations only, which take the mean off."""
    found = IdentityDict()
    for one in graph.layers(model):
        if isinstance(one, keras.Model) and getattr(one, "inputs", None):
            layers = {layer.name: layer for layer in one.layers}
            for name, readers in graph.consumers(one).items():
                if all(isinstance(layers.get(reader), keras.layers.BatchNormalization) for reader in readers):
                    found[layers[name]] = True
    return found


def _bias(weight):
    """The bias of the units that a kernel makes, if it is one number for each of them, in their order."""
    kind, layer = graph.kind_of(weight.layer), weight.layer
    bias = getattr(layer, kind.bias, None)
    if not kind.linear or bias is None or weight.variable.name != list(kind.kernels)[-1]:
        return None
    if isinstance(layer, keras.layers.EinsumDense):
        equation = graph.Equation(layer.equation)
        if "".join(letter for letter in equation.outputs if letter in layer.bias_axes) != equation.units:
            return None
    return bias


def _solve(weight, regression, mask, normalized):
    """Give a kernel, and the bias of its layer, their new values."""
    bias, axes = _bias(weight), weight.output_axes
    matrix, shift = regression.solved(patterns.to_matrix(mask, axes), bias is not None or normalized)
    value = patterns.from_matrix(matrix, tuple(weight.variable.shape), axes)
    weight.variable.assign(keras.ops.cast(value, weight.variable.dtype))
    if bias is not None and shift is not None:
        alive = patterns.to_matrix(mask, axes).any(axis=1)
        moved = graph.as_array(bias).astype(np.float64) + np.where(alive, shift, 0.0).reshape(bias.shape)
        bias.assign(keras.ops.cast(moved, bias.dtype))


class Regression:
    """The regression of what a kernel made in the dense model on what it multiplies in the pruned one.

    Args:
        dense: The kernel in the dense model, as a matrix [output units, inputs].
        always: Whether to solve for it also if it reads all that it read before.

    Example:

    >>> import numpy as np
    >>> from keras_sparse.pruning.channel_repair import Regression
    >>> regression = Regression(np.array([[1.0, 1.0]]))
    >>> x = np.arange(8.0)[:, None]
    >>> regression.add([(0, None, np.concatenate([x, 0 * x], 1))], [(0, None, np.concatenate([x, 2 * x + 5], 1))])
    >>> matrix, shift = regression.solved(np.array([[True, True]]), centred=True)
    >>> regression.needed, matrix.round(2).tolist(), shift.round(1).tolist()
    (True, [[3.0, 1.0]], [5.0])
    """

    def __init__(self, dense, always=False):
        self._dense = dense.astype(np.float64)
        self._groups, self._whole, self._count, self._always = None, True, 0, always
        self._rng = np.random.default_rng(0)
        self.finite = True  # whether all numbers are

    def add(self, pieces, before):
        """Take in operands in the pruned model and in the dense one, both as `ks.pruning.operands.operands` returns."""
        units, inputs = self._dense.shape
        if self._groups is None:
            groups = max(group for group, _, _ in pieces) + 1
            self._groups = [_Sums(units // groups, inputs) for _ in range(groups)]
        pairs = [(group, columns, new, old) for (group, columns, new), (_, _, old) in zip(pieces, before, strict=True)]
        for group, columns, new, old in pairs:
            self._whole &= columns is None
            self.finite &= bool(np.isfinite(new).all() and np.isfinite(old).all())
            self._groups[group].see(new, old, columns)
        if self._always or not all(sums.alive.all() for sums in self._groups):  # Else no input is gone.
            for group, columns, *both in pairs:
                (x, old), share = sampled(both, inputs, self._rng)
                self._groups[group].add(x, old, self._of(group), columns, share)
        self._count += len(pieces[0][2])

    def _of(self, group):
        size = len(self._dense) // len(self._groups)
        return self._dense[group * size : (group + 1) * size]

    @property
    def needed(self):
        """Whether it reads zeros where it read something else, or is to be solved for in any case."""
        return self._always or any((sums.before & ~sums.alive).any() for sums in self._groups)

    def solved(self, mask, centred):
        """Return the kernel that makes of the pruned model's inputs most nearly the dense model's outputs.

        Args:
            mask: Booleans of the matrix' shape, `True` for weights that stay.
            centred: Whether a number may be added to each output, as a bias is.

        Returns:
            `(matrix, shift)`: float64 arrays, the kernel with zeros where the mask is `False`, and what to add to each
            unit's outputs; `None` for nothing. Weights whose input is zero stay as they were.
        """
        centred = centred and self._whole  # blocks of a kernel that have units in common have one bias
        found = [
            sums.solved(self._of(group), rows, max(self._count, 1), centred)
            for group, (sums, rows) in enumerate(zip(self._groups, np.split(mask, len(self._groups)), strict=True))
        ]
        matrix = np.concatenate([matrix for matrix, _ in found])
        return matrix, np.concatenate([shift for _, shift in found]) if centred else None


class _Sums:
    """The sums of a regression for output units that have the same inputs."""

    def __init__(self, units, inputs):
        # Which inputs are not always zero, now and in the dense model. What follows is large, and only filled at need.
        self.alive, self.before = np.zeros(inputs, bool), np.zeros(inputs, bool)
        self.square, self.cross = np.zeros((inputs, inputs)), np.zeros((units, inputs))
        self.x, self.y = np.zeros(inputs), np.zeros(units)

    def see(self, new, old, columns):
        own = slice(None) if columns is None else columns
        self.alive[own] |= (new != 0).any(axis=0)
        self.before[own] |= (old != 0).any(axis=0)

    def add(self, x, old, dense, columns, share):
        own = slice(None) if columns is None else columns
        y = old @ dense[:, own].T
        self.square[own if columns is None else np.ix_(own, own)] += x.T @ x / share
        self.cross[:, own] += y.T @ x / share
        self.x[own] += x.sum(axis=0) / share
        self.y += y.sum(axis=0) / share

    def solved(self, dense, mask, count, centred):
        square, cross, x, y = (value / count for value in (self.square, self.cross, self.x, self.y))
        if centred:
            square, cross = square - np.outer(x, x), cross - np.outer(y, x)
        damping = DAMPING * np.trace(square) / max(1, self.alive.sum()) or 1.0
        square = square + damping * np.eye(len(square))
        new = np.linalg.solve(square, (cross + damping * dense).T).T
        new[:, ~self.alive] = dense[:, ~self.alive]
        new = repaired(new, mask, square[None], np.zeros(len(new), int))
        return new, y - new @ x
