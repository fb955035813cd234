"""What a file may differ by is measured: rounding in a few bits does little to one network, and much to another.

What is allowed for the worst network hides a missing bias, or a class in another's place, in most of the others.
"""

import keras
import numpy as np

__all__ = ["TOLERANCE", "allowed", "unexplained"]

# How far an output may be from the model's, relative to that output's largest magnitude.
# float32: two correct programs differ by the order of their sums and by the polynomials they use for exp and tanh: 1e-7
# to 1e-6 in shallow models, below 1e-5 in the deepest of keras.applications; batch normalization of a pruned network
# that was not trained on can make 1e-4 of that (MobileNetV3, random weights). A wrong layout or weight costs 1e-1 and
# more. Half precision rounds each weight or product to 2**-11 (float16) or 2**-8 (bfloat16), and layers add that up.
# int8 rounds each weight to 1/254 of its channel's range, and "int8" each activation to 1/256 of its own; random
# networks of fifty layers add that up to 0.1 and 0.3. "int16x8" rounds like "dynamic". Faults of sparse encodings are
# 0.4 and more, and `Verification.fault` compares with the dense file, too. Other runtimes round as this machine does:
# what they may differ by follows from how far the file is off here.
TOLERANCE = {"float32": 1e-3, "float16": 3e-2, "bfloat16": 1e-1, "dynamic": 2e-1, "int8": 4e-1, "int16x8": 2e-1}
# What is allowed in any case, and in times of what rounding of the model's weights does to its outputs. Right files
# were measured at up to 0.84 times of that, and 4.7 where activations are rounded to 8 bits, too.
_LEAST = {"float16": 2e-3, "dynamic": 2e-2, "int8": 1e-1, "int16x8": 2e-2}
_TIMES = {"float16": 5, "dynamic": 5, "int8": 12, "int16x8": 5}
_DRAWS = 2


def allowed(reference, quantize):
    """How far a right file may be from its model, relative to an output's largest magnitude.

    Args:
        reference: The `Reference` of the model.
        quantize: How the file stores weights, as `export` calls it; `None`: float32.

    Returns:
        A number that is `TOLERANCE` at most.

    Example:

    >>> import keras
    >>> from keras_sparse.tflite.inputs import random_batches
    >>> from keras_sparse.tflite.parity import Reference
    >>> from keras_sparse.tflite.signatures import signature
    >>> model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(3)])
    >>> reference = Reference(model, signature(model), random_batches(model, signature(model)))
    >>> allowed(reference, None), allowed(reference, "dynamic") < TOLERANCE["dynamic"] / 2
    (0.001, True)
    """
    most = TOLERANCE[quantize or "float32"]
    if quantize not in _TIMES:
        return most
    rng = np.random.default_rng(0)
    worst = max(reference.with_weights(lambda w: _rounded(w, quantize, rng)).relative for _ in range(_DRAWS))
    if not 0 < worst < np.inf:  # weights that Keras does not know of, or outputs that depend on none
        return most
    return float(min(most, max(_LEAST[quantize], _TIMES[quantize] * worst)))


def unexplained(reference, quantize, parity):
    """Why a file may be wrong that is off by less than the worst right ones are, in a sentence, or `None`.

    Args:
        reference: The `Reference` of the model.
        quantize: As for `allowed`.
        parity: The `Parity` of the file.

    Example:

    >>> from keras_sparse.tflite.parity import Parity
    >>> unexplained(None, "int8", Parity(absolute=0.1, relative=0.02, worst="y"))  # any network may be off by that
    """
    if quantize not in _TIMES or parity.relative <= _LEAST[quantize]:
        return None
    explained = allowed(reference, quantize)
    if parity.relative <= explained:
        return None
    return (
        f"Output {parity.worst!r} differs by {parity.relative:.2g} of its magnitude, where rounding the weights "
        f"explains {explained:.2g}: numbers of very different sizes may share a scale inside, or the file may be "
        "wrong. See what it gets right with `ks.compare` before you rely on it."
    )


def _rounded(weight, quantize, rng):
    """A weight's values, each off by as much as rounding may do; `None` if it is none of numbers."""
    if not keras.backend.is_float_dtype(weight.dtype):
        return None
    values = keras.ops.convert_to_numpy(keras.ops.cast(weight, "float32"))
    if quantize == "float16" or values.ndim < 2:  # biases and statistics keep their own size, and variances their sign
        return values * (1 + (2**-11 if quantize == "float16" else 2**-7) * rng.uniform(-1, 1, values.shape))
    return values + np.abs(values).max(initial=0) / 127 * rng.uniform(-0.5, 0.5, values.shape)
