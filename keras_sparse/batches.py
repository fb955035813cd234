"""Batches of a model's inputs, from any data that `predict` takes."""

import numbers

import keras
import numpy as np

__all__ = ["check", "of"]


def check(data, batch_size=32):
    """Raise unless `data` are a model's inputs, as for `predict`, and can be read to an end.

    Args:
        data: An array, a list or dict of them for several inputs, or what yields batches of `x`, `(x, y)` or
            `(x, y, sample_weight)`: a `tf.data.Dataset`, a `keras.utils.PyDataset`, a torch `DataLoader`, a generator
            that ends.
        batch_size: Samples in a batch if `data` are arrays.

    Raises:
        ValueError: If `data` are a tuple, of different lengths or endless, or if `batch_size` is not at least 1.
        TypeError: If `data` are none of the above.

    Example:

    >>> from keras_sparse import batches
    >>> batches.check(([1.0], [2.0]))
    Traceback (most recent call last):
    ...
    ValueError: `data` are inputs only: pass `x`, not `(x, y)`, and several inputs as a list or dict. Received: ...
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, numbers.Integral) or batch_size < 1:
        raise ValueError(f"`batch_size` must be a whole number of at least 1. Received: batch_size={batch_size!r}")
    if isinstance(data, tuple):
        raise ValueError(
            "`data` are inputs only: pass `x`, not `(x, y)`, and several inputs as a list or dict. "
            f"Received: a tuple of {len(data)}"
        )
    if _are_arrays(data):
        arrays = keras.tree.flatten(data)
        bare = [array for array in arrays if not getattr(array, "shape", ())]
        if bare:
            raise TypeError(
                "`data` must be an array, or a list or dict of arrays for several inputs, each with the samples along "
                f"its first axis. Received: {type(data).__name__} with {bare[0]!r} of type {type(bare[0]).__name__}"
            )
        lengths = {int(array.shape[0]) for array in arrays}
        if len(lengths) > 1:
            raise ValueError(f"All inputs must have the same number of samples. Received: {sorted(lengths)}")
    elif isinstance(data, str) or not (hasattr(data, "__iter__") or isinstance(data, keras.utils.PyDataset)):
        raise TypeError(
            "`data` must be an array, a list or dict of arrays, or yield batches: a `tf.data.Dataset`, a "
            f"`keras.utils.PyDataset`, a generator. Received: {data!r} of type {type(data).__name__}"
        )
    elif hasattr(data, "cardinality") and int(data.cardinality()) == -1:
        raise ValueError(f"`data` never end: pass `data.take(n)`. Received: {data!r}")
    elif isinstance(data, keras.utils.PyDataset) and data.num_batches is None:
        raise ValueError(f"`data` never end: `num_batches` is None. Received: {data!r}")


def _are_arrays(data):
    return isinstance(data, (list, dict)) or hasattr(data, "shape")


def of(data, batch_size=32):
    """Yield the batches of `data` that passed `check`, as structures of NumPy arrays, without targets.

    Example:

    >>> import numpy as np
    >>> from keras_sparse import batches
    >>> [batch.shape for batch in batches.of(np.zeros((5, 3)), batch_size=2)]
    [(2, 3), (2, 3), (1, 3)]
    """
    if _are_arrays(data):
        arrays = keras.tree.flatten(data)
        for start in range(0, int(arrays[0].shape[0]) if arrays else 0, batch_size):
            yield keras.tree.map_structure(lambda array, at=start: _as_array(array[at : at + batch_size]), data)
        return
    parts = data
    if isinstance(data, keras.utils.PyDataset):
        parts = (data[index] for index in range(data.num_batches))
    for batch in parts:
        yield keras.tree.map_structure(_as_array, keras.utils.unpack_x_y_sample_weight(batch)[0])


def _as_array(value):
    array = keras.ops.convert_to_numpy(value) if keras.ops.is_tensor(value) else np.asarray(value)
    return array.astype(keras.config.floatx()) if array.dtype == np.float64 else array
