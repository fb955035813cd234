"""Gradient statistics, kept by the optimizer while it trains: what criteria know about a weight beyond its value.

They are taken from the gradients that the optimizer receives anyway, one micro-step at a time: before they are
accumulated or clipped, and free of the loss scale. Under `tf.distribute` those are the gradients summed over replicas.
"""

import json
import math

import keras
from keras import ops

from keras_sparse import criteria
from keras_sparse.optimizers.compiled import run_compiled
from keras_sparse.optimizers.parts import Part, as_numpy, variable_like

__all__ = ["Statistics", "dense_gradients"]

# Means are plain over this many micro-steps, then exponential with this time constant: old gradients are forgotten.
WINDOW = 100

# So many weights have a compiled function of their own, which runs as soon as their gradients are there, while those of
# other layers are computed: they are in the processor's cache still, and as one function all would wait for the last.
_LEAST_WEIGHTS = 2**18


class Statistics(Part):
    """The statistics of an optimizer, under pairs of a statistic's config and the index of a weight.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, kernel_initializer="ones")])
    >>> optimizer = ks.optimizers.SparseOptimizer(keras.optimizers.SGD(0.5))
    >>> optimizer.build(model.trainable_variables)
    >>> kernel, statistics = model.layers[0].kernel, optimizer.sparse_parts.statistics
    >>> statistics.add("movement", [kernel])
    >>> optimizer.apply([keras.ops.convert_to_tensor([[3.0], [-1.0]]), keras.ops.zeros((1,))])
    >>> keras.ops.convert_to_numpy(statistics.of(kernel, "movement").value).tolist()
    [[-3.0], [1.0]]
    """

    name = "statistics"
    ahead = True

    def __init__(self, parts):
        super().__init__(parts)
        self._statistics = {}

    def add(self, statistic, variables):
        """Keep a statistic of the gradients of each of `variables` from now on, unless that is done already.

        Args:
            statistic: A `ks.criteria.Statistic` or its name.
            variables: Variables that the optimizer was built with.
        """
        kind = self._kind(statistic)
        fresh = False
        for index in self.parts.indices(variables):
            weight = self.parts.trainable[index]
            # Sums need more digits than half-precision weights have.
            dtype = keras.backend.result_type(weight.dtype, "float32")
            name = type(self._statistics[kind]).__name__
            # Every replica computes the same value, from reduced gradients.
            value, first = self.claim(
                (kind, index),
                lambda w=weight, d=dtype, n=name: variable_like(w, n, d, aggregation="only_first_replica"),
            )
            if first:
                value.assign(ops.zeros(value.shape, value.dtype))
            fresh |= first
        if fresh:  # All weights' means have the same length.
            for position in (-2, -1):
                counter, _ = self.claim((kind, position), _counter)
                counter.assign(position + 1)  # -1: no step; 0: none counted.

    def of(self, variable, statistic):
        """The statistic of `variable` as a variable of its shape, or `None`."""
        key = self._kind(statistic), self.parts.index(variable)
        return self.variables[key] if key in self.claimed else None

    def count_of(self, statistic):
        """How many micro-steps the statistic has seen, as an integer variable."""
        return self.variables[self._kind(statistic), -1]

    def snapshot(self):
        """The statistics as a list of `(kind, variable or counter, array)`, for `put`."""
        return [
            (kind, index if index < 0 else self.parts.trainable[index], as_numpy(self.variables[kind, index]))
            for kind, index in sorted(self.claimed)
        ]

    def put(self, snapshot):
        """Go on with what `snapshot` took, as far as it is kept now."""
        for kind, of, value in snapshot:
            key = kind, of if isinstance(of, int) else self.parts.index(of)
            if key in self.claimed:
                self.variables[key].assign(value)

    def _kind(self, statistic):
        statistic = criteria.get_statistic(statistic)
        kind = json.dumps(keras.saving.serialize_keras_object(statistic), sort_keys=True)
        self._statistics.setdefault(kind, statistic)
        return kind

    def before(self, gradients):
        wanted = {index for _, index in self.claimed if index >= 0}
        optimizer = self.parts.optimizer
        found = dense_gradients({i: g for i, g in gradients.items() if i in wanted}, optimizer.loss_scale_factor)
        for kind in sorted({kind for kind, _ in self.claimed}):
            self._update(kind, self._statistics[kind], found, optimizer.iterations)
        return gradients  # As they are: the optimizer unscales and reduces by itself.

    def _update(self, kind, statistic, gradients, step):
        counter, latest = self.variables[kind, -1], self.variables[kind, -2]
        counter.assign_add(1)
        count = ops.minimum(ops.cast(counter, "float32"), float(WINDOW))
        # Without accumulation every call is a step of its own.
        again = ops.equal(latest, step) if self.parts.optimizer.gradient_accumulation_steps else None
        keys = sorted(key for key in self.claimed if key[0] == kind and key[1] in gradients)
        known = type(statistic).__module__ == criteria.__name__
        for group in self._together(keys):

            def update(tensors, group=group):
                count, again, *found = tensors
                for key, gradient in zip(group, found, strict=True):
                    self._update_one(key, statistic, gradient, count, again)

            tensors = [count, again, *(gradients[index] for _, index in group)]
            run_compiled(self.parts.optimizer, ("statistic", *group), update, tensors, known)
        if statistic.every_step:
            latest.assign(ops.cast(step, latest.dtype))

    def _together(self, keys):
        """Groups of keys whose weights are many together, in their order; the last may have few."""
        groups, size = [], _LEAST_WEIGHTS
        for key in keys:
            if size >= _LEAST_WEIGHTS:
                groups.append([])
                size = 0
            groups[-1].append(key)
            size += math.prod(self.variables[key].shape)
        return groups

    def _update_one(self, key, statistic, gradient, count, again):
        variable = self.variables[key]
        value = ops.convert_to_tensor(variable)
        if statistic.every_step:
            fresh = ops.zeros_like(value)
            value = fresh if again is None else ops.where(again, value, fresh)
        weight = ops.cast(ops.convert_to_tensor(self.parts.trainable[key[1]]), value.dtype)
        gradient = ops.cast(gradient, value.dtype)
        variable.assign(statistic.update(value, weight, gradient, ops.cast(count, value.dtype)))

    def restore(self, config):
        for kind, index in config:
            if index >= 0:
                self.add(keras.saving.deserialize_keras_object(json.loads(kind)), [self.parts.trainable[index]])


def _counter():
    return keras.Variable(
        "zeros", (), "int32", trainable=False, aggregation="only_first_replica", name="statistics_count"
    )


def dense_gradients(gradients, scale):
    """Return gradients by index as whole tensors: without the loss scale, summed over replicas.

    Args:
        gradients: Dict from an index to a gradient, a tensor or `tf.IndexedSlices`.
        scale: The factor that the loss was multiplied with, or `None`.

    Example:

    >>> import keras, keras_sparse as ks
    >>> found = ks.optimizers.statistics.dense_gradients({2: keras.ops.ones((2,))}, scale=4.0)
    >>> {index: keras.ops.convert_to_numpy(gradient).tolist() for index, gradient in found.items()}
    {2: [0.25, 0.25]}
    """
    found = dict(gradients)
    if keras.backend.backend() == "tensorflow" and found:
        import tensorflow as tf

        # Rows that occur twice in `IndexedSlices` add up.
        found = {index: tf.convert_to_tensor(gradient) for index, gradient in found.items()}
        replica = tf.distribute.get_replica_context()
        if replica is not None and replica.num_replicas_in_sync > 1:
            reduced = replica.all_reduce(tf.distribute.ReduceOp.SUM, list(found.values()))
            found = dict(zip(found, reduced, strict=True))
    return found if scale is None else {index: gradient / scale for index, gradient in found.items()}
