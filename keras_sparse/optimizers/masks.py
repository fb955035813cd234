"""Masks keep weights at zero: one boolean for each weight, `True` where it lives."""

from keras import ops

from keras_sparse.optimizers.assignment import mask_gradient, mask_in_step, mask_off, masked_value
from keras_sparse.optimizers.parts import Part, variable_like
from keras_sparse.optimizers.slots import slots

__all__ = ["Masks"]


class Masks(Part):
    """The masks of an optimizer, under the indices of their weights.

    Gradients of pruned weights are zero before the optimizer sees them, so that what it computes over whole tensors
    (clipping by norm, Muon, Lamb) is that of the sparse network; what still moves pruned weights (momentum of before,
    moving averages) is undone after its step.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, kernel_initializer="ones")])
    >>> optimizer = ks.optimizers.SparseOptimizer(keras.optimizers.SGD(1.0))
    >>> optimizer.build(model.trainable_variables)
    >>> kernel = model.layers[0].kernel
    >>> masks = optimizer.sparse_parts.masks
    >>> masks.add([kernel])
    >>> _ = masks.of(kernel).assign([[True], [False]])
    >>> masks.apply()
    >>> optimizer.apply([keras.ops.ones((2, 1)), keras.ops.ones((1,))])
    >>> kernel.numpy().tolist()
    [[0.0], [0.0]]
    """

    name = "masks"
    permanent = True

    def add(self, variables, kept=None):
        """Give each of `variables` a mask, unless it has one in this fit.

        Args:
            variables: Trainable variables of the model.
            kept: For each of them an array of booleans that its mask begins with; `None` keeps everything.
        """
        indices = self.parts.indices(variables)
        for index, own in zip(indices, [None] * len(indices) if kept is None else kept, strict=True):
            weight = self.parts.trainable[index]
            mask, first = self.claim(index, lambda w=weight: variable_like(w, "mask", "bool", "ones"))
            if first:
                mask.assign(ops.ones(mask.shape, "bool") if own is None else own)

    def remove(self, variables):
        """Take the masks of `variables` away; the weights stay as they are."""
        gone = {self.parts.index(variable) for variable in variables}
        self.claimed -= gone
        self.drop_unclaimed()

    def of(self, variable):
        """The mask of `variable`, or `None`."""
        index = self.parts.index(variable)
        return self.variables[index] if index in self.claimed else None

    @property
    def pairs(self):
        """List of pairs `(variable, mask)`."""
        return [(self.parts.trainable[index], self.variables[index]) for index in sorted(self.claimed)]

    def apply(self):
        """Set masked weights, and their moving averages, to zero now, outside of compiled functions."""
        for variable, mask in self._masked_state():
            variable.assign(masked_value(variable, mask))

    def before(self, gradients):
        return {
            index: self._masked(gradient, index) if index in self.claimed else gradient
            for index, gradient in gradients.items()
        }

    def after(self):
        mask_in_step(self._masked_state())

    def _masked(self, gradient, index):
        mask = self.variables[index]
        if hasattr(gradient, "dense_shape"):  # `tf.IndexedSlices`: the rows that a batch has looked up.
            rows = ops.take(ops.convert_to_tensor(mask), gradient.indices, axis=0)
            return type(gradient)(mask_off(gradient.values, rows), gradient.indices, gradient.dense_shape)
        return mask_gradient(gradient, self.parts.trainable[index], mask)

    def _masked_state(self):
        pairs = self.pairs
        if pairs and self.parts.optimizer.use_ema:
            states = slots(self.parts.optimizer, self.parts.trainable)
            averages = {index: state for index, kind, state in states if kind == "average"}
            pairs += [(averages[index], self.variables[index]) for index in sorted(self.claimed)]
        return pairs

    def restore(self, config):
        self.add([self.parts.trainable[index] for index in config])
