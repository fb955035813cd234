"""A statistic of gradients, kept in an optimizer's variables: what criteria know about a weight beyond its value.

Statistics are taken from the gradients that the optimizer receives anyway, one micro-step at a time: before they are
accumulated or clipped, and free of the loss scale. Under `tf.distribute` those are the gradients summed over replicas.
"""

import keras
from keras import ops

__all__ = ["KINDS", "Statistic", "dense_gradients"]

KINDS = ("gradient", "last_gradient", "movement", "taylor")
# Means are plain over this many micro-steps, then exponential with this time constant: old gradients are forgotten.
WINDOW = 100


class Statistic:
    """One kind of statistic for some of an optimizer's trainable variables.

    * `"gradient"`: running mean of abs(g);
    * `"taylor"`: running mean of abs(w * g);
    * `"movement"`: the sum of -w * g;
    * `"last_gradient"`: g of the latest optimizer step, summed over its micro-steps.

    The running mean over micro-steps t = 1, 2, ... is m <- m + (x - m) / min(t, 100).

    Args:
        kind: One of those names.
        add_variable: The optimizer's method of that name.

    Attributes:
        indices: Which of the optimizer's trainable variables have the statistic.
        values: Its `keras.Variable` for each of them.
        count: Micro-steps that were seen.

    Raises:
        ValueError: If there is no such kind.

    Example:

    >>> import keras_sparse as ks
    >>> optimizer = ks.optimizers.SparseOptimizer("sgd")
    >>> ks.optimizers.statistics.Statistic("hessian", optimizer.add_variable)
    Traceback (most recent call last):
    ...
    ValueError: A criterion's `statistic` must be None or one of ('gradient', 'last_gradient', ...). Received: 'hessian'
    """

    def __init__(self, kind, add_variable):
        if kind not in KINDS:
            raise ValueError(f"A criterion's `statistic` must be None or one of {KINDS}. Received: {kind!r}")
        self.kind = kind
        self.indices, self.values = [], []
        self._add_variable = add_variable
        self.count = self._add((), "zeros", "int", f"{kind}_count")
        # The optimizer step that `last_gradient` belongs to: its micro-steps add up.
        self._step = self._add((), keras.initializers.Constant(-1), "int", f"{kind}_step")

    def _add(self, shape, initializer, dtype, name):
        # Every replica computes the same value, from reduced gradients.
        return self._add_variable(shape, initializer, dtype, aggregation="only_first_replica", name=name)

    @property
    def variables(self):
        """All state, in an order that depends on nothing but `indices`."""
        return [self.count, self._step, *self.values]

    def add(self, index, variable):
        """Start the statistic of `variable`; those of others start anew, so that all means have the same length."""
        # Sums need more digits than half-precision weights have.
        dtype = keras.backend.result_type(variable.dtype, "float32")
        name = f"{variable.path.replace('/', '_')}_{self.kind}"
        self.indices.append(index)
        self.values.append(self._add(variable.shape, "zeros", dtype, name))
        self.count.assign(0)

    def update(self, gradients, variables, step, accumulates):
        """Take one micro-step into account, in graph.

        Args:
            gradients: Dict from the index of a trainable variable to its dense gradient; those that are not connected
                to the loss are missing.
            variables: The optimizer's trainable variables.
            step: The optimizer's iterations before this micro-step.
            accumulates: Whether several micro-steps make a step.
        """
        self.count.assign_add(1)
        length = ops.minimum(ops.cast(self.count, "float32"), float(WINDOW))
        for index, value in zip(self.indices, self.values, strict=True):
            if index not in gradients:
                continue
            gradient = ops.cast(gradients[index], value.dtype)
            if self.kind == "last_gradient":
                if accumulates:
                    gradient = ops.where(ops.equal(self._step, step), value + gradient, gradient)
                value.assign(gradient)
                continue
            # Few passes over the memory: additions in place.
            if self.kind != "gradient":
                gradient = ops.cast(ops.convert_to_tensor(variables[index]), value.dtype) * gradient
            if self.kind == "movement":
                value.assign_sub(gradient)
            else:
                value.assign_add((ops.abs(gradient) - value) / ops.cast(length, value.dtype))
        if self.kind == "last_gradient":
            self._step.assign(step)


def dense_gradients(gradients, scale):
    """Return gradients by index as whole tensors: without the loss scale, summed over replicas, `None` left out.

    Args:
        gradients: Dict from an index to a gradient, `None` or `tf.IndexedSlices`.
        scale: The factor that the loss was multiplied with, or `None`.

    Example:

    >>> import keras, keras_sparse as ks
    >>> found = ks.optimizers.statistics.dense_gradients({0: None, 2: keras.ops.ones((2,))}, scale=4.0)
    >>> {index: keras.ops.convert_to_numpy(gradient).tolist() for index, gradient in found.items()}
    {2: [0.25, 0.25]}
    """
    found = {index: gradient for index, gradient in gradients.items() if gradient is not None}
    if keras.backend.backend() == "tensorflow" and found:
        import tensorflow as tf

        # Rows that occur twice in `IndexedSlices` add up.
        found = {index: tf.convert_to_tensor(gradient) for index, gradient in found.items()}
        replica = tf.distribute.get_replica_context()
        if replica is not None and replica.num_replicas_in_sync > 1:
            reduced = replica.all_reduce(tf.distribute.ReduceOp.SUM, list(found.values()))
            found = dict(zip(found, reduced, strict=True))
    return found if scale is None else {index: gradient / scale for index, gradient in found.items()}
