"""A proximal step shrinks weights after the optimizer's own step, so that small ones become exactly zero."""

import keras
import numpy as np
from keras import ops

from keras_sparse.optimizers.assignment import assign_in_step
from keras_sparse.optimizers.parts import Part
from keras_sparse.optimizers.slots import slots

__all__ = ["Proximal", "group_soft_threshold", "knows_step", "next_pace", "soft_threshold"]


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


class Proximal(Part):
    """The proximal step of L1 or group lasso on some weights, and the price of their magnitude.

    Micro-steps that only accumulate gradients and steps that float16 loss scaling skips do not shrink.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, kernel_initializer="ones")])
    >>> optimizer = ks.optimizers.SparseOptimizer(keras.optimizers.SGD(0.5))
    >>> optimizer.build(model.trainable_variables)
    >>> proximal = optimizer.sparse_parts.proximal
    >>> proximal.add([model.layers[0].kernel])
    >>> proximal.strength = 0.5
    >>> optimizer.apply([keras.ops.zeros((2, 1)), keras.ops.zeros((1,))])
    >>> model.layers[0].kernel.numpy().tolist()
    [[0.75], [0.75]]
    """

    name = "proximal"

    def __init__(self, parts):
        super().__init__(parts)
        self._config = None
        self._group, self._groups = None, {}
        self.enabled = False

    def add(self, variables, group=None, output_axes=None, channels=None):
        """Shrink `variables` after each step from now on.

        Args:
            variables: Variables that the optimizer was built with.
            group: A `Pattern` whose groups are shrunk as a whole, or `None`: each weight for itself.
            output_axes: For each variable the axes that count output units; needed with `group`.
            channels: For each variable `None`, or `{axis: numbers}`: the channels of several variables that are shrunk
                as one, from 1 on; what is numbered 0 is not shrunk.
        """
        channels = [None] * len(variables) if channels is None else channels
        config = {
            "indices": self.parts.indices(variables),
            "group": None if group is None else keras.saving.serialize_keras_object(group),
            "output_axes": None if output_axes is None else [list(axes) for axes in output_axes],
            "channels": [
                axes and [[int(axis), np.asarray(numbers).tolist()] for axis, numbers in axes.items()]
                for axes in channels
            ],
        }
        if config != self._config or not self.enabled:
            self._config, self._group, self._groups = config, group, {}
            self.enabled = self.parts.changed = True
        for name in ("strength", "pace"):
            variable, first = self.claim(name, lambda name=name: _scalar(name))
            if first:
                variable.assign(0.0)

    def stop(self):
        """Shrink nothing any more. Compiled steps must be made anew to be faster by it."""
        self.strength = 0.0
        self.enabled = False

    @property
    def active(self):
        return self.enabled and bool(self.claimed)

    def release(self):
        super().release()
        if self.enabled:  # A step that was compiled with it may be used again by a fit that asks for the same.
            self.variables["strength"].assign(0.0)

    def drop_unclaimed(self):
        super().drop_unclaimed()
        if not self.claimed:
            self.enabled, self._config = False, None

    @property
    def strength(self):
        """The price of a weight's magnitude in units of the loss."""
        return float(ops.convert_to_numpy(ops.convert_to_tensor(self.variables["strength"])))

    @strength.setter
    def strength(self, value):
        self.variables["strength"].assign(value)

    def shrunk(self):
        """The variables that are shrunk."""
        return [self.parts.trainable[index] for index in self._config["indices"]] if self.active else []

    def before(self, gradients):
        optimizer = self.parts.optimizer
        # Of the step to be taken: a schedule moves on with it.
        self.parts.of_replica.before = (
            ops.cast(optimizer.learning_rate, "float32"),
            ops.copy(ops.convert_to_tensor(optimizer.iterations)),
        )
        return gradients

    def after(self):
        optimizer, trainable = self.parts.optimizer, self.parts.trainable
        rate, iterations = self.parts.of_replica.before
        # A step that only accumulates gradients does not count as an iteration.
        moved = ops.cast(ops.convert_to_tensor(optimizer.iterations) - iterations, "float32")
        found = {}
        for index, kind, slot in slots(optimizer, trainable):
            found.setdefault(index, {})[kind] = slot
        pace, strength = self.variables["pace"], self.variables["strength"]
        assign_in_step([(pace, lambda *values: next_pace(optimizer, *values), [rate, moved])])
        step_size = _step_of(optimizer)
        changes, joint = [], {}
        for position, index in enumerate(self._config["indices"]):
            kinds = sorted(found.get(index, {}))
            axes = self._config["channels"][position]
            if axes:
                slots_here = {kind: ops.convert_to_tensor(found[index][kind]) for kind in kinds}
                steps = ops.convert_to_tensor(optimizer.iterations)
                step = step_size(optimizer, rate, ops.convert_to_tensor(pace), steps, slots_here)
                joint[index] = (axes, step)
                continue

            def shrink(value, rate, pace, moved, strength, steps, *values, kinds=kinds, position=position):
                step = step_size(optimizer, rate, pace, steps, dict(zip(kinds, values, strict=True)))
                threshold = ops.cast(step * strength * moved, value.dtype)
                if self._group is None:
                    return soft_threshold(value, threshold)
                return group_soft_threshold(value, threshold, self._groups_of(position, value.shape))

            arguments = [rate, pace, moved, strength, optimizer.iterations, *(found[index][kind] for kind in kinds)]
            changes.append((trainable[index], shrink, arguments))
        if joint:
            factors = self._factors(joint, ops.convert_to_tensor(strength) * moved)
            changes += [(trainable[index], _scaled(axes), [factors]) for index, (axes, _) in joint.items()]
        assign_in_step(changes)

    def _factors(self, joint, price):
        """What each channel's weights are multiplied with, by its number: see `group_soft_threshold`."""
        every = [np.asarray(numbers) for axes, _ in joint.values() for _, numbers in axes]
        number = 1 + max(int(numbers.max()) for numbers in every)
        squares, steps, sizes = ops.zeros(number), ops.zeros(number), np.zeros(number, "float32")
        for index, (axes, step) in joint.items():
            value = ops.cast(ops.convert_to_tensor(self.parts.trainable[index]), "float32")
            for axis, numbers in axes:
                others = [i for i in range(len(value.shape)) if i != axis]
                step = ops.broadcast_to(ops.cast(step, "float32"), value.shape)
                squares, steps = (
                    total + ops.segment_sum(ops.sum(tensor, others), np.asarray(numbers, "int32"), number)
                    for total, tensor in ((squares, ops.square(value)), (steps, step))
                )
                sizes += np.bincount(numbers, minlength=number) * (int(np.prod(value.shape)) // len(numbers))
        roots = ops.convert_to_tensor(np.sqrt(np.maximum(sizes, 1)))
        # The mean of the steps, times the root of the size.
        norms, thresholds = ops.sqrt(squares), price * steps / roots
        gone = norms <= thresholds
        factors = ops.where(gone, 0.0, 1 - thresholds / ops.where(gone, 1.0, norms))
        return ops.where(ops.arange(number) == 0, 1.0, factors)

    def _groups_of(self, position, shape):
        if position not in self._groups:
            self._groups[position] = self._group.groups(tuple(shape), tuple(self._config["output_axes"][position]))
        return self._groups[position]

    def contents(self):
        return self._config if self.claimed else None

    def restore(self, config):
        group = config["group"] and keras.saving.deserialize_keras_object(config["group"])
        channels = [axes and dict(axes) for axes in config["channels"]]
        self.add([self.parts.trainable[index] for index in config["indices"]], group, config["output_axes"], channels)


def _scaled(axes):
    """The function that multiplies the channels of a weight by their factors; what is shrunk to zero is +0.0."""

    def scale(value, factors):
        for axis, numbers in axes:
            own = ops.cast(ops.take(factors, np.asarray(numbers, "int32")), value.dtype)
            own = ops.reshape(own, [-1 if i == axis else 1 for i in range(len(value.shape))])
            value = ops.where(own == 0, ops.zeros_like(value), value * own)
        return value

    return scale


def _scalar(name):
    return keras.Variable("zeros", (), "float32", trainable=False, aggregation="only_first_replica", name=name)


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
