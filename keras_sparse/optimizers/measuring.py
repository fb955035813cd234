"""Measuring: an optimizer that moves nothing in the place of a model's own, to keep statistics of gradients."""

import contextlib

import keras
from keras import ops

from keras_sparse.optimizers import functions, wrapping
from keras_sparse.optimizers.sparse import SparseOptimizer

__all__ = ["measuring"]


@contextlib.contextmanager
def measuring(model):
    """Put an optimizer that moves nothing in the place of a compiled model's, for as long as the block lasts.

    What training changes all the same (normalization's averages, seeds, states, metrics) is put back at the end.

    Yields:
        A `SparseOptimizer`: its `sparse_parts.statistics.add` says what it measures.

    Raises:
        ValueError: As `wrap`.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> model.compile("adam", "mse")
    >>> before = model.get_weights()[0]
    >>> with ks.optimizers.measuring(model) as optimizer:
    ...     history = model.fit(np.ones((16, 8)), np.ones((16, 4)), verbose=0)
    >>> bool((model.get_weights()[0] == before).all()), type(model.optimizer).__name__
    (True, 'Adam')
    """
    wrapping.check_optimizers(model)
    previous, history = model.optimizer, getattr(model, "history", None)
    train_function = model.train_function
    values = [(variable, ops.convert_to_numpy(ops.convert_to_tensor(variable))) for variable in model.variables]
    with wrapping.scope(model):
        sparse = SparseOptimizer(keras.optimizers.SGD(0.0))
        sparse.build(model.trainable_variables)
        scaled = isinstance(previous, keras.optimizers.LossScaleOptimizer)
        model.optimizer = (
            keras.optimizers.LossScaleOptimizer(sparse, initial_scale=previous.initial_scale) if scaled else sparse
        )
    functions.drop(model)
    try:
        yield sparse
    finally:
        model.optimizer, model.history = previous, history
        model.train_function = train_function
        for variable, value in values:
            variable.assign(value)
