"""An origin is a copy of the weights at one step of training, which a later round of training starts from again."""

from keras import ops

__all__ = ["Origin"]


class Origin:
    """Copies of an optimizer's trainable variables, kept among the optimizer's own variables.

    Args:
        variables: The trainable variables.
        add_variable: The optimizer's `add_variable_from_reference`.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, kernel_initializer="ones")])
    >>> model.compile(ks.optimizers.SparseOptimizer("adam"), "mse")
    >>> model.optimizer.build(model.trainable_variables)
    >>> added = model.optimizer.add_origin()
    >>> model.optimizer.origin.keep()
    >>> loss = model.train_on_batch(np.ones((4, 2)), np.zeros((4, 1)))
    >>> model.optimizer.rewind()
    >>> model.layers[0].kernel.numpy().tolist(), int(model.optimizer.iterations)
    ([[1.0], [1.0]], 0)
    """

    def __init__(self, variables, add_variable):
        self._trained = variables
        self.variables = [add_variable(variable, name="origin") for variable in variables]

    def keep(self):
        """Copy the variables as they are now. To be called outside of compiled functions."""
        _copy(self._trained, self.variables)

    def put_back(self):
        """Give the variables the values that were kept."""
        _copy(self.variables, self._trained)


def _copy(sources, targets):
    for source, target in zip(sources, targets, strict=True):
        target.assign(ops.copy(source))  # Two variables of one buffer break JAX, which gives buffers away.
