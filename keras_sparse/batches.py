"""Data as all functions take them, and batches of them.

Data are inputs `x` (an array, or a list or dict of them for several inputs), a tuple `(x, y)` or
`(x, y, sample_weight)`, what yields batches of any of these (a `tf.data.Dataset`, a `keras.utils.PyDataset`, a torch
`DataLoader`, a generator that ends), or a function that returns one. A function that needs inputs alone leaves targets
out.
"""

import keras
import numpy as np

from keras_sparse.registry import check_whole

__all__ = ["are_arrays", "check", "count", "for_fit", "labelled", "misfit", "of", "parts", "whole"]


def parts(data, name="`data`"):
    """Return data as a list: `[batches]`, `[x]`, `[x, y]` or `[x, y, sample_weight]`.

    Args:
        data: As all functions take them; a function is called.
        name: What to call them in an error.

    Raises:
        ValueError: If a tuple has more than three parts, or none.

    Example:

    >>> from keras_sparse import batches
    >>> batches.parts(lambda: ([1.0], [2.0]))
    [[1.0], [2.0]]
    """
    readable = hasattr(data, "__iter__") or hasattr(data, "shape")
    if callable(data) and not readable and not isinstance(data, (type, keras.layers.Layer)):
        data = data()
    if not isinstance(data, tuple):
        return [data]
    if not 1 <= len(data) <= 3:
        raise ValueError(
            f"{name} that are a tuple must be (x, y) or (x, y, sample_weight); several inputs are a list or dict. "
            f"Received: a tuple of {len(data)}"
        )
    # To `evaluate` lists say the same as tuples.
    return [list(part) if isinstance(part, tuple) else part for part in data]


def check(data, batch_size=32):
    """Raise unless `data` are as all functions take them, and can be read to an end.

    Args:
        data: See above.
        batch_size: Samples in a batch if `data` are arrays.

    Raises:
        ValueError: If `data` are a tuple of more than three, of different lengths or endless, or if `batch_size` is not
            at least 1.
        TypeError: If `data` are none of the above.

    Example:

    >>> import numpy as np
    >>> from keras_sparse import batches
    >>> batches.check((np.zeros((3, 4)), [0, 1]))
    Traceback (most recent call last):
    ...
    ValueError: `x` and `y` must have the same number of samples. Received: [2, 3]
    """
    labelled(data, batch_size=batch_size)


def _check_inputs(data, batch_size):
    check_whole("batch_size", batch_size)
    if are_arrays(data):
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


def are_arrays(data):
    """Whether data are arrays, or a list or dict of them, and not what yields batches.

    Example:

    >>> from keras_sparse import batches
    >>> batches.are_arrays([[1.0]]), batches.are_arrays(iter([1.0]))
    (True, False)
    """
    return isinstance(data, (list, dict)) or hasattr(data, "shape")


def of(data, batch_size=32):
    """Yield the batches of `data` that passed `check`, as structures of NumPy arrays, without targets.

    Example:

    >>> import numpy as np
    >>> from keras_sparse import batches
    >>> [batch.shape for batch in batches.of(np.zeros((5, 3)), batch_size=2)]
    [(2, 3), (2, 3), (1, 3)]
    """
    x = parts(data)[0]
    if are_arrays(x):
        yield from _slices(x, batch_size)
        return
    for batch in _each(x):
        yield keras.tree.map_structure(_as_array, keras.utils.unpack_x_y_sample_weight(batch)[0])


def labelled(x, y=None, sample_weight=None, batch_size=32):
    """Yield batches `(x, y, sample_weight)` of NumPy arrays, from what `evaluate` takes; `None` for what is not there.

    Args:
        x: Inputs, or data as all functions take them: a tuple, and what yields batches, bring targets and sample
            weights themselves.
        y: Targets for arrays `x`: an array, or a list or dict of them for several outputs.
        sample_weight: An array of numbers, one for each sample.
        batch_size: Samples in a batch if `x` are arrays.

    Raises:
        ValueError: If arrays have different lengths, or `y` comes on top of data that have their own; as `check`.
        TypeError: As `check`.

    Example:

    >>> import numpy as np
    >>> from keras_sparse import batches
    >>> [y.tolist() for _, y, _ in batches.labelled(np.zeros((3, 4)), [0, 1, 1], batch_size=2)]
    [[0, 1], [1]]
    """
    given = parts(x)
    _check_inputs(given[0], batch_size)
    own = len(given) > 1 or not are_arrays(given[0])
    if own and (y is not None or sample_weight is not None):
        raise ValueError(
            "`y` and `sample_weight` go with arrays. A tuple, dataset or generator brings `(x, y)` or "
            f"`(x, y, sample_weight)` itself. Received: x of type {type(x).__name__}, and y or sample_weight"
        )
    if len(given) > 1:
        y, sample_weight = given[1], given[2] if len(given) > 2 else None
    x = given[0]
    if not are_arrays(x):
        if len(given) > 1:
            raise ValueError(f"Of a tuple (x, y), x must be arrays. Received: x of type {type(x).__name__}")
        unpacked = (keras.utils.unpack_x_y_sample_weight(batch) for batch in _each(x))
        return (tuple(keras.tree.map_structure(_as_array, part) for part in batch) for batch in unpacked)
    given = [x]
    for name, part in (("y", y), ("sample_weight", sample_weight)):
        part = part if part is None or _hold_arrays(part) else np.asarray(part)
        lengths = {int(a.shape[0]) if getattr(a, "shape", ()) else 0 for a in keras.tree.flatten([x, part])}
        if part is not None and len(lengths) > 1:
            raise ValueError(f"`x` and `{name}` must have the same number of samples. Received: {sorted(lengths)}")
        given.append(part)
    present = [part for part in given if part is not None]

    def padded(batch):
        rest = iter(batch)
        return tuple(None if part is None else next(rest) for part in given)

    return (padded(batch) for batch in _slices(present, batch_size))


def whole(data, name="`data`"):
    """Return `[x, y, sample_weight]` as arrays, `None` for what is not there; batches are put together.

    Raises:
        ValueError: If there are no samples, or arrays of different lengths; as `check`.
        TypeError: As `check`.

    Example:

    >>> import numpy as np
    >>> from keras_sparse import batches
    >>> x, y, sample_weight = batches.whole(iter([(np.zeros((4, 2)), np.zeros(4)), (np.zeros((3, 2)), np.zeros(3))]))
    >>> x.shape, y.shape, sample_weight
    ((7, 2), (7,), None)
    """
    given = parts(data, name)
    found = list(labelled(tuple(given) if len(given) > 1 else given[0], batch_size=1024))
    if not found:
        raise ValueError(f"{name} must have at least one sample. Received: {type(data).__name__} without samples")
    return [
        None if column[0] is None else keras.tree.map_structure(lambda *some: np.concatenate(some), *column)
        for column in zip(*found, strict=True)
    ]


def for_fit(part):
    """Return a part of arrays as Keras's `fit` and `evaluate` take it: a list of numbers as an array, words as tensors.

    Example:

    >>> from keras_sparse import batches
    >>> batches.for_fit([0, 1, 1]).shape
    (3,)
    """
    if part is None:
        return None

    def taken(leaf):
        array = _as_array(leaf)
        words = array.dtype.kind in "US" or (array.dtype.kind == "O" and isinstance(array.flat[0], (str, bytes)))
        return keras.ops.convert_to_tensor(array, "string") if words else array

    return keras.tree.map_structure(taken, part if _hold_arrays(part) else np.asarray(part))


def misfit(model, batch):
    """The error of `data` of which the model cannot run a batch, a `ValueError` to raise.

    Example:

    >>> import keras, numpy as np
    >>> from keras_sparse import batches
    >>> model = keras.Sequential([keras.Input((4,), name="x"), keras.layers.Dense(3)])
    >>> str(batches.misfit(model, np.ones((2, 5)))).endswith("Received a batch of shape (2, 5) of float64")
    True
    """
    shapes = keras.tree.map_structure(lambda array: array.shape, batch)
    types = sorted({str(array.dtype) for array in keras.tree.flatten(batch)})
    return ValueError(
        f"The model {model.name!r} cannot run on `data`, which must be batches of its inputs, without targets. It "
        f"takes inputs of shape {getattr(model, 'input_shape', '(see its `call`)')}. Received a batch of shape "
        f"{shapes} of {', '.join(types)}"
    )


def count(data, batch_size=32):
    """How many batches `of` or `labelled` will yield; `None` where nobody knows.

    Example:

    >>> import numpy as np
    >>> from keras_sparse import batches
    >>> batches.count(np.zeros((5, 3)), batch_size=2)
    3
    """
    data = parts(data)[0]
    if are_arrays(data):
        arrays = keras.tree.flatten(data)
        return -(-int(arrays[0].shape[0]) // batch_size) if arrays else 0
    if isinstance(data, keras.utils.PyDataset):
        return data.num_batches
    if hasattr(data, "cardinality"):
        size = int(data.cardinality())
        return size if size >= 0 else None
    return len(data) if hasattr(data, "__len__") else None


def _hold_arrays(data):
    return all(getattr(leaf, "shape", ()) for leaf in keras.tree.flatten(data))


def _slices(data, batch_size):
    arrays = keras.tree.flatten(data)
    for start in range(0, int(arrays[0].shape[0]) if arrays else 0, batch_size):
        yield keras.tree.map_structure(lambda array, at=start: _as_array(array[at : at + batch_size]), data)


def _each(data):
    if isinstance(data, keras.utils.PyDataset):
        return (data[index] for index in range(data.num_batches))
    return data


def _as_array(value):
    if value is None:
        return None
    if hasattr(value, "detach"):  # of torch, on any backend: it may want a gradient
        value = value.detach()
    array = keras.ops.convert_to_numpy(value) if keras.ops.is_tensor(value) else np.asarray(value)
    return array.astype(keras.config.floatx()) if array.dtype == np.float64 else array
