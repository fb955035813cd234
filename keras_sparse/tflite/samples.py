"""Samples are inputs as a model will meet them, in whatever form people have them: for comparisons and calibrations."""

import itertools

import keras
import numpy as np

from keras_sparse.batches import parts
from keras_sparse.tflite.signatures import HALF

__all__ = ["MOST", "in_batches_of", "representative_batches"]

MOST = 128  # samples of representative data that are used: a check, not an evaluation


def in_batches_of(size, batches):
    """The same samples in batches of another size; what is left over is dropped.

    Example:

    >>> import numpy as np
    >>> [batch[0].shape for batch in in_batches_of(1, [[np.ones((2, 4))], [np.ones((1, 4))]])]
    [(1, 4), (1, 4), (1, 4)]
    """
    arrays = [np.concatenate(column) for column in zip(*batches, strict=True)]
    return [[array[start : start + size] for array in arrays] for start in range(0, len(arrays[0]) - size + 1, size)]


def representative_batches(data, signature):
    """Turn representative data, in any of the forms that `fit` takes, into batches of flat lists of arrays.

    Args:
        data: An array; a list, tuple or dict of arrays for several inputs; a `tf.data.Dataset`, a `PyDataset`, a
            generator or other iterable of batches, or a function that returns one. Batches may be `(inputs, targets)`.
        signature: The model's `Signature`.

    Returns:
        List of flat lists of arrays, of 128 samples at most; if the model's batch size is fixed, in batches of it.

    Raises:
        ValueError: If the data are empty, no finite numbers, do not fit the model's inputs, or do not fill a batch of
            fixed size.

    Example:

    >>> import keras, numpy as np
    >>> from keras_sparse.tflite.signatures import signature
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> [len(batch[0]) for batch in representative_batches(np.ones((200, 4)), signature(model))]
    [128]
    """
    batches, left = [], max(MOST, signature.inputs[0].shape[0] or 0)
    for number, element in enumerate(_elements(data, signature)):
        try:
            arrays = _batch(element, signature)
        except ValueError as error:
            if number and isinstance(data, list) and len(data) <= 3:
                raise ValueError(
                    "A list as `representative_data` holds the inputs, or one batch after another: give inputs with "
                    f"their targets as a tuple, `(x, y)`. Received: a list of {len(data)} (of number {number}: {error})"
                ) from None
            raise
        if len(arrays[0]):
            batches.append([array[:left] for array in arrays])
            left -= len(arrays[0])
        if left <= 0:
            break
    if not batches:
        raise ValueError("`representative_data` must hold at least one sample. Received: no data")
    leaf = signature.inputs[0]
    return batches if leaf.shape[0] is None else _filled(leaf, batches)


def _batch(element, signature):
    arrays = [_fitting(array, leaf) for array, leaf in zip(_leaves(element, signature), signature.inputs, strict=True)]
    if len({len(array) for array in arrays}) > 1:
        sizes = [array.shape for array in arrays]
        raise ValueError(f"The inputs in `representative_data` must have the same batch size. Received: {sizes}")
    return arrays


def _filled(leaf, batches):
    filled = in_batches_of(leaf.shape[0], batches)
    if not filled:
        raise ValueError(
            f"`representative_data` must hold at least one batch of the model's fixed size of {leaf.shape[0]} for the "
            f"input {leaf.name!r}. Received: fewer samples"
        )
    return filled


def _elements(data, signature):
    """The batches in `data`: one, if it is a structure of arrays like the model's inputs."""
    if not isinstance(data, tuple):  # which may be inputs here, as the converter takes them
        given = parts(data)
        data = given[0] if len(given) == 1 else tuple(given)
    if isinstance(data, keras.utils.PyDataset):
        return (data[i] for i in range(MOST if data.num_batches is None else data.num_batches))
    if isinstance(data, (dict, np.ndarray)) or hasattr(data, "__array__"):
        return [data]
    if isinstance(data, (list, tuple)):
        # A tuple may be (inputs, targets), as for `fit`; a list is either all inputs or one batch after another.
        for structure in (data, *data[:1]) if isinstance(data, tuple) else (data,):
            arrays = keras.tree.flatten(structure)
            if len(arrays) == len(signature.inputs) and all(
                np.ndim(array) == len(leaf.shape) - _lacks_last(np.shape(array), leaf)
                for array, leaf in zip(arrays, signature.inputs, strict=True)
            ):
                return [structure]
        return data
    if hasattr(data, "__iter__"):
        return itertools.islice(data, MOST)
    raise ValueError(
        "`representative_data` must be an array, a list, tuple or dict of arrays, a dataset, a generator or a function "
        f"that returns one. Received: {type(data).__name__}"
    )


def _leaves(element, signature):
    names = [leaf.name for leaf in signature.inputs]
    # (inputs, targets) or (inputs, targets, sample weights), as `fit` takes them
    paired = isinstance(element, (tuple, list)) and len(element) in (2, 3)
    candidates = [element, element[0]] if paired else [element]
    for candidate in candidates:
        if isinstance(candidate, dict) and set(names) <= set(candidate):
            return [candidate[name] for name in names]
        leaves = keras.tree.flatten(candidate)
        if len(leaves) == len(names):
            _check_keys(candidate, signature)
            return leaves
    count = len(keras.tree.flatten(element))
    raise ValueError(
        f"Each batch of `representative_data` must hold {len(names)} arrays, for the inputs {names}. Received: {count}"
    )


def _check_keys(element, signature):
    """What is not named as the inputs are is taken in their order, and a misspelled key would come at another place."""
    known, found = (
        [tuple(key for key in path if isinstance(key, str)) for path, _ in keras.tree.flatten_with_path(structure)]
        for structure in (signature.structure, element)
    )
    if any(found) and found != known and len(known) > 1:
        names = [leaf.name for leaf in signature.inputs]
        keys = ["/".join(path) or "an array without a key" for path in found]
        raise ValueError(
            f"A dict in `representative_data` must have the inputs' names as keys: {names}. Received: {keys}"
        )


def _lacks_last(shape, leaf):
    """Whether samples lack a last axis of 1, which Keras adds, such as a column of a table; else they may be one."""
    sample = leaf.shape[1:]
    if len(shape) != len(sample) or sample[-1:] != (1,):
        return False
    return any(want not in (None, have) for want, have in zip(sample, shape, strict=True))


def _fitting(array, leaf):
    if hasattr(array, "detach"):  # of torch, on any backend: it may want a gradient
        array = array.detach()
    given = array = np.asarray(keras.ops.convert_to_numpy(array) if keras.ops.is_tensor(array) else array)
    if _lacks_last(array.shape, leaf):
        array = array[..., None]
    elif array.ndim == len(leaf.shape) - 1:
        array = array[None]
    fits = array.ndim == len(leaf.shape) and all(
        want is None or want == have for want, have in zip(leaf.shape[1:], array.shape[1:], strict=True)
    )
    if not fits:
        raise ValueError(
            f"`representative_data` must fit the model's input {leaf.name!r} of shape {leaf.shape}. "
            f"Received: an array of shape {given.shape}"
        )
    if array.dtype.kind not in "biuf" and array.dtype.name not in HALF:
        raise ValueError(
            f"`representative_data` must hold real numbers for the input {leaf.name!r}. Received: an array of "
            f"{array.dtype}"
        )
    broken = ~np.isfinite(array.astype("float64"))
    if broken.any():
        raise ValueError(
            f"`representative_data` must be finite: leave out samples with NaN or infinity. Received: "
            f"{int(broken.sum()):,} such numbers for the input {leaf.name!r}"
        )
    _check_cast(array, leaf)
    return array


def _check_cast(array, leaf):
    """Images of 0 to 1 would all be zeros as integers, and 256 is 0 in 8 bits."""
    values = array.astype("float64")
    with np.errstate(all="ignore"):
        changed = array.astype(leaf.dtype).astype("float64")
    exact = np.dtype(leaf.dtype).kind in "biu"
    lost = changed != values if exact else ~np.isfinite(changed)
    if lost.any():
        raise ValueError(
            f"`representative_data` must hold numbers of the type {leaf.dtype} for the input {leaf.name!r}, as the "
            f"model takes them. Received: an array of {array.dtype} with {float(values[lost][0]):g}"
        )
