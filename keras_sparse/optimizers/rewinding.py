"""A rewind point is a copy of the weights at one step, from which a later round of training starts again."""

from keras import ops

from keras_sparse.optimizers.parts import Part, variable_like

__all__ = ["RewindPoint"]


class RewindPoint(Part):
    """Copies of an optimizer's trainable variables.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, kernel_initializer="ones")])
    >>> model.compile(ks.optimizers.SparseOptimizer("adam"), "mse")
    >>> model.optimizer.build(model.trainable_variables)
    >>> point = model.optimizer.sparse_parts.rewind_point
    >>> point.add()
    >>> point.keep()
    >>> loss = model.train_on_batch(np.ones((4, 2)), np.zeros((4, 1)))
    >>> point.put_back()
    >>> model.layers[0].kernel.numpy().tolist()
    [[1.0], [1.0]]
    """

    name = "rewind_point"

    def add(self):
        """Make room for the copies, unless there is."""
        for index, weight in enumerate(self.parts.trainable):
            self.claim(index, lambda w=weight: variable_like(w, "rewind_point"))

    @property
    def active(self):
        return False

    def keep(self):
        """Copy the variables as they are now. To be called outside of compiled functions."""
        self._copy(self.parts.trainable, self.saved_variables())

    def put_back(self):
        """Give the variables the values that were kept."""
        self._copy(self.saved_variables(), self.parts.trainable)

    @staticmethod
    def _copy(sources, targets):
        for source, target in zip(sources, targets, strict=True):
            target.assign(ops.copy(source))  # Two variables of one buffer break JAX, which gives buffers away.

    def adopt(self, other):
        """Take over the copies of another optimizer's weights, as far as they are the same weights."""
        self.add()
        self.keep()
        for index, kept in zip(sorted(other.claimed), other.saved_variables(), strict=True):
            mine = self.parts.index(other.parts.trainable[index])
            if mine is not None:
                self.variables[mine].assign(ops.copy(kept))

    def restore(self, config):
        self.add()
