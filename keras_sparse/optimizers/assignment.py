"""An assignment in a step gives variables new values inside of a compiled training step, on every backend."""

import keras
from keras import ops

__all__ = ["assign_in_step", "mask_off", "masked_value"]


def masked_value(variable, mask):
    """Return a variable's value with 0.0 where `mask` is `False`.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> value = ks.optimizers.masked_value(keras.Variable([1.0, 2.0]), np.array([True, False]))
    >>> keras.ops.convert_to_numpy(value)
    array([1., 0.], dtype=float32)
    """
    value = ops.convert_to_tensor(variable)
    return ops.where(ops.convert_to_tensor(mask), value, ops.zeros_like(value))


def mask_off(value, mask):
    """`masked_value` for tensors; a scalar zero costs less memory traffic.

    Example:

    >>> import keras, keras_sparse as ks
    >>> value = ks.optimizers.assignment.mask_off(keras.ops.ones(2), keras.ops.array([True, False]))
    >>> keras.ops.convert_to_numpy(value)
    array([1., 0.], dtype=float32)
    """
    return ops.where(mask, value, ops.zeros((), value.dtype))


def assign_in_step(changes):
    """Assign `function(value, *arguments)` to each variable, in a training step, in a replica too.

    Args:
        changes: List of triples `(variable, function, arguments)`; arguments are variables and tensors.

    Example:

    >>> import keras, keras_sparse as ks
    >>> variable = keras.Variable([1.0, 2.0])
    >>> ks.optimizers.assignment.assign_in_step([(variable, keras.ops.multiply, [2.0])])
    >>> keras.ops.convert_to_numpy(variable.value)
    array([2., 4.], dtype=float32)
    """
    if keras.backend.backend() != "tensorflow" or not changes:
        for variable, function, arguments in changes:
            variable.assign(function(*map(ops.convert_to_tensor, [variable, *arguments])))
        return
    import tensorflow as tf

    functions = [function for _, function, _ in changes]

    # In a replica, a mirrored variable takes assignments only through its strategy. `maybe_merge_call` is how the
    # Keras optimizers do it; public `merge_call` fails in strategies that run replicas without merging (TPU, NCCL).
    def update(strategy, variables, arguments):
        for variable, function, values in zip(variables, functions, arguments, strict=True):

            def assign(v, *values, function=function):
                return v.assign(function(tf.convert_to_tensor(v), *values))

            strategy.extended.update(variable, assign, args=tuple(values), group=False)

    tf.__internal__.distribute.interim.maybe_merge_call(
        update,
        tf.distribute.get_strategy(),
        [variable.value for variable, _, _ in changes],
        [[tf.convert_to_tensor(a.value if isinstance(a, keras.Variable) else a) for a in args] for *_, args in changes],
    )
