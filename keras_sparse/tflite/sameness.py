"""Two Keras models are the same if their outputs differ by rounding alone, which a deep network may blow up."""

import keras
import numpy as np

from keras_sparse import selection
from keras_sparse.tflite.inputs import random_batches
from keras_sparse.tflite.signatures import HALF, signature

__all__ = ["difference", "of_rounding"]

_NUDGE = 2**-21  # relative change of the inputs by which a network's own sensitivity to rounding is measured
_TIMES = 30  # what the rounding in all layers may do, in times of what that change does
_MOST = 1e-2  # networks that compute something else differ by more


def difference(model, other, inputs=None):
    """The largest difference of an output of two models, relative to its magnitude.

    Args:
        model: A built Keras model.
        other: Another with the same inputs and outputs.
        inputs: Flat lists of arrays for the two; `None`: the same random ones.

    Example:

    >>> import keras
    >>> from keras_sparse.tflite.sameness import difference
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> difference(model, keras.models.clone_model(model)) > 0.01
    True
    """
    if inputs is None:
        inputs = [random_batches(model, signature(model))[1]] * 2
    found = []
    for one, x in zip((model, other), inputs, strict=True):
        outputs = keras.tree.flatten(signature(one).call(one, x))
        found.append([np.asarray(keras.ops.convert_to_numpy(y), "float64") for y in outputs])
    return max(
        float(np.where(np.isnan(a) & np.isnan(b), 0, np.abs(a - b)).max() / np.abs(a[np.isfinite(a)]).max(initial=1e-6))
        for a, b in zip(*found, strict=True)
    )


def of_rounding(model):
    """The largest `difference` from a model of the same function that rounding explains, 1e-4 to 1e-2.

    Example:

    >>> import keras
    >>> from keras_sparse.tflite.sameness import of_rounding
    >>> of_rounding(keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)]))
    0.0001
    """
    if any(layer.compute_dtype in HALF for layer in selection.layers(model)):
        return _MOST
    x, rng = random_batches(model, signature(model))[1], np.random.default_rng(0)
    nudged = [v * (1 + _NUDGE * rng.uniform(-1, 1, v.shape)).astype(v.dtype) if v.dtype.kind == "f" else v for v in x]
    return float(np.clip(_TIMES * difference(model, model, [x, nudged]), 1e-4, _MOST))
