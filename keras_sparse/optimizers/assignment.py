"""An assignment in a step gives variables new values inside of a compiled training step, on every backend."""

import keras
from keras import ops

__all__ = ["assign_in_step", "mask_gradient", "mask_in_step", "mask_off", "masked_value"]


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


def mask_gradient(gradient, variable, mask):
    """Return the gradient of a variable with 0.0 where `mask` is `False`; on torch `variable.value.grad` in place.

    Example:

    >>> import keras, keras_sparse as ks
    >>> weight = keras.Variable([1.0, 2.0])
    >>> mask = keras.Variable([True, False], trainable=False, dtype="bool")
    >>> masked = ks.optimizers.assignment.mask_gradient(keras.ops.ones(2), weight, mask)
    >>> keras.ops.convert_to_numpy(masked)
    array([1., 0.], dtype=float32)
    """
    own = keras.backend.backend() == "torch" and gradient is variable.value.grad
    if own and _zero_in_place(gradient, mask.value):
        return gradient
    return mask_off(gradient, ops.convert_to_tensor(mask))


def mask_in_step(pairs):
    """Set variables to zero where their masks are `False`, in a training step, in a replica too.

    Args:
        pairs: List of pairs `(variable, mask)`.

    Example:

    >>> import keras, keras_sparse as ks
    >>> weight = keras.Variable([1.0, 2.0])
    >>> mask = keras.Variable([True, False], trainable=False, dtype="bool")
    >>> ks.optimizers.assignment.mask_in_step([(weight, mask)])
    >>> keras.ops.convert_to_numpy(weight)
    array([1., 0.], dtype=float32)
    """
    if keras.backend.backend() == "torch":
        import torch

        # Other tensors are those of a stateless call: they are not ours to change.
        pairs = [
            (v, mask)
            for v, mask in pairs
            if not (isinstance(v.value, torch.nn.Parameter) and _zero_in_place(v.value, mask.value))
        ]
    assign_in_step([(variable, mask_off, [mask]) for variable, mask in pairs])


def _zero_in_place(tensor, mask):
    """Zero a tensor of torch where `mask` is `False`; return whether that could be done.

    `torch.where` takes ten times as long on a CPU (torch 2.13). The bits of a float, taken as an integer, times 1 are
    the float and times 0 are 0.0, whatever the float is.
    """
    import torch

    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.element_size())
    if integers is None or type(tensor.data) is not torch.Tensor or not tensor.is_floating_point():
        return False
    tensor.detach().view(integers).mul_(mask)
    return True


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
