"""A proximal step shrinks weights after the optimizer's own step, so that small ones become exactly zero."""

import keras
import numpy as np
from keras import ops

from keras_sparse.registry import Configurable, serializable

__all__ = ["Shrinkage", "group_soft_threshold", "knows_step", "next_pace", "soft_threshold"]


def soft_threshold(value, threshold):
    """Move each number towards zero by `threshold`, and no further: the proximal operator of the L1 norm.

    `sign(v) * max(|v| - t, 0)`; Parikh & Boyd, "Proximal Algorithms" (2014), section 6.5.2. Zeros are +0.0, NaN stays.

    Example:

    >>> import keras, keras_sparse as ks
    >>> keras.ops.convert_to_numpy(ks.optimizers.soft_threshold([-3.0, 0.5, 2.0], 1.0))
    array([-2.,  0.,  1.], dtype=float32)
    """
    value = ops.convert_to_tensor(value)
    return value - ops.clip(value, -threshold, threshold)


def group_soft_threshold(value, threshold, groups):
    """Shorten the vector of each group by `threshold` times the root of its size: the proximal operator of group lasso.

    `v * max(1 - t * sqrt(n) / ||v||, 0)` for a group of n weights; Parikh & Boyd (2014), section 6.5.4, with the factor
    of Yuan & Lin, "Model selection and estimation in regression with grouped variables" (2006).

    Args:
        value: Tensor.
        threshold: A number, or a tensor of the shape of `value`, of which each group's mean counts.
        groups: NumPy array of the shape of `value`: indices of groups, see `Pattern.groups`.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> value = ks.optimizers.group_soft_threshold([3.0, 4.0, 0.1, 0.1], 1.0, np.array([0, 0, 1, 1]))
    >>> np.round(keras.ops.convert_to_numpy(value), 2)
    array([2.15, 2.87, 0.  , 0.  ], dtype=float32)
    """
    value = ops.convert_to_tensor(value)
    count = np.bincount(groups.reshape(-1))
    index, sizes = ops.convert_to_tensor(groups.reshape(-1)), ops.cast(ops.convert_to_tensor(count), value.dtype)

    def per_group(tensor):
        return ops.segment_sum(ops.reshape(tensor, (-1,)), index, num_segments=len(count))

    norms = ops.sqrt(per_group(ops.square(value)))
    threshold = ops.cast(ops.convert_to_tensor(threshold), value.dtype)
    if len(threshold.shape):
        threshold = per_group(threshold) / sizes
    threshold = threshold * ops.sqrt(sizes)
    gone = norms <= threshold
    factor = 1 - threshold / ops.where(gone, ops.ones_like(norms), norms)
    gone, factor = (ops.reshape(ops.take(tensor, index), value.shape) for tensor in (gone, factor))
    return ops.where(gone, ops.zeros_like(value), value * factor)


@serializable
class Shrinkage(Configurable):
    """What a `SparseOptimizer` shrinks after each step, and in which groups.

    Args:
        indices: Indices into the variables that the optimizer was built with.
        group: A `Pattern` whose groups leave together, or `None`: each weight for itself.
        output_axes: For each index the axes that count output units; needed with `group`.

    Example:

    >>> import keras_sparse as ks
    >>> ks.optimizers.Shrinkage([0]).get_config()
    {'indices': [0], 'group': None, 'output_axes': None}
    """

    def __init__(self, indices, group=None, output_axes=None):
        self.indices = [int(index) for index in indices]
        self.group = keras.saving.deserialize_keras_object(group) if isinstance(group, dict) else group
        self.output_axes = None if output_axes is None else [tuple(axes) for axes in output_axes]
        self._groups = {}

    def _groups_of(self, position, shape):
        if position not in self._groups:
            self._groups[position] = self.group.groups(tuple(shape), self.output_axes[position])
        return self._groups[position]

    def get_config(self):
        return {
            "indices": list(self.indices),
            "group": None if self.group is None else keras.saving.serialize_keras_object(self.group),
            "output_axes": None if self.output_axes is None else [list(axes) for axes in self.output_axes],
        }

    def changes(self, optimizer, rate, pace, moved, strength, variables, slots):
        """List the proximal steps after a step of `optimizer`.

        Args:
            optimizer: The optimizer whose step was taken.
            rate: The learning rate of that step, read before it.
            pace: The variable that holds what `next_pace` gave for that step.
            moved: 1 if weights moved in it, 0 if it only accumulated gradients.
            strength: The variable that holds the price of a weight's magnitude.
            variables: The variables that it was built with.
            slots: What `ks.optimizers.slots` found.

        Returns:
            List of `(variable, function, arguments)`: assign `function(value, *arguments)` to the variable.
        """
        found = {}
        for index, kind, slot in slots:
            found.setdefault(index, {})[kind] = slot
        step_size = _step_of(optimizer)
        changes = []
        for position, index in enumerate(self.indices):
            kinds = sorted(found.get(index, {}))

            def shrink(value, rate, pace, moved, strength, steps, *values, kinds=kinds, position=position):
                step = step_size(optimizer, rate, pace, steps, dict(zip(kinds, values, strict=True)))
                threshold = ops.cast(step * strength * moved, value.dtype)
                if self.group is None:
                    return soft_threshold(value, threshold)
                return group_soft_threshold(value, threshold, self._groups_of(position, value.shape))

            arguments = [rate, pace, moved, strength, optimizer.iterations, *(found[index][kind] for kind in kinds)]
            changes.append((variables[index], shrink, arguments))
        return changes


# The step sizes: how far a weight moves for each unit of its (mean) gradient. With them a weight rests where the
# gradient and the penalty balance, `|g| <= strength` at zero, whatever preconditioner the optimizer has: Yun, Lozano &
# Yang, "A general family of stochastic proximal gradient methods for deep learning" (2020), equation 4. Each mirrors
# `update_step` of the optimizer (Keras 3.15); `steps` counts the step just taken.


def _plain(optimizer, rate, pace, steps, slots):
    return rate


def _sgd(optimizer, rate, pace, steps, slots):
    if not optimizer.momentum:
        return rate
    return optimizer.momentum * pace + rate if optimizer.nesterov else pace


def _rmsprop(optimizer, rate, pace, steps, slots):
    variance = slots["velocity"] - ops.square(slots["average_gradient"]) if optimizer.centered else slots["velocity"]
    return (pace if optimizer.momentum else rate) / ops.sqrt(variance + optimizer.epsilon)


def _adagrad(optimizer, rate, pace, steps, slots):
    return rate / ops.sqrt(slots["accumulator"] + optimizer.epsilon)


def _adadelta(optimizer, rate, pace, steps, slots):
    squares = (slots["accumulated_delta_var"] + optimizer.epsilon) / (slots["accumulated_grad"] + optimizer.epsilon)
    return rate * ops.sqrt(squares)


def _adam(optimizer, rate, pace, steps, slots):
    correction = ops.sqrt(1 - ops.power(float(optimizer.beta_2), ops.cast(steps, "float32")))
    velocity = slots["velocity_hat" if getattr(optimizer, "amsgrad", False) else "velocity"]
    return rate * correction / (ops.sqrt(velocity) + optimizer.epsilon)


def _adamax(optimizer, rate, pace, steps, slots):
    return rate / (slots["norm"] + optimizer.epsilon)


def _nadam(optimizer, rate, pace, steps, slots):
    correction = 1 - ops.power(float(optimizer.beta_2), ops.cast(steps, "float32"))
    return rate / (ops.sqrt(slots["velocity"] / correction) + optimizer.epsilon)


_STEPS = {
    keras.optimizers.SGD: _sgd,
    keras.optimizers.RMSprop: _rmsprop,
    keras.optimizers.Adagrad: _adagrad,
    keras.optimizers.Adadelta: _adadelta,
    keras.optimizers.Adam: _adam,
    keras.optimizers.Adamax: _adamax,
    keras.optimizers.Nadam: _nadam,
}


def next_pace(optimizer, pace, rate, moved):
    """The sum of the learning rates that a momentum buffer holds, each as far as it has faded.

    Keras multiplies gradients by the rate before they enter the buffer, so that after a decay of the rate the buffer
    still pushes with the rates of before: `sum_k momentum**k * rate[t - k]`.

    Example:

    >>> import keras, keras_sparse as ks
    >>> ks.optimizers.proximal.next_pace(keras.optimizers.SGD(momentum=0.5), pace=0.2, rate=0.1, moved=1)
    0.2
    """
    momentum = getattr(optimizer, "momentum", 0.0) or 0.0
    return pace + moved * (momentum * pace + rate - pace)


def knows_step(optimizer):
    """Whether the proximal step of an optimizer is known; others shrink by the plain learning rate.

    Example:

    >>> import keras, keras_sparse as ks
    >>> [ks.optimizers.knows_step(o) for o in (keras.optimizers.AdamW(), keras.optimizers.Lion())]
    [True, False]
    """
    return _step_of(optimizer) is not _plain


def _step_of(optimizer):
    # Muon is an Adam by inheritance only.
    if isinstance(optimizer, keras.optimizers.Muon):
        return _plain
    return next((function for kind, function in _STEPS.items() if isinstance(optimizer, kind)), _plain)
