"""A compiled step is an optimizer's step and what its parts do around it as one XLA function, on TensorFlow.

On a CPU, Keras's TensorFlow trainer runs an optimizer operation by operation: a dozen passes over all weights. XLA
fuses them, and the masks with them, into one or two. On the replicas of a `MirroredStrategy` a step is not one
function: there each weight's update is compiled by itself.
"""

import keras
import numpy as np

__all__ = ["run_compiled", "run_update"]

# Compiling takes about a second; with fewer weights than this, a short training does not earn it back.
_LEAST_WEIGHTS = 2**17


def run_compiled(optimizer, key, function, tensors, known=True):
    """Run `function(tensors)`, which assigns to variables, compiled where that is possible and pays.

    It runs as it is on other backends, eagerly, under `tf.distribute`, with sparse gradients, and where XLA refuses it.

    Args:
        optimizer: The sparse optimizer.
        key: Tuple that tells `function` from others of this optimizer, and what it reads beside `tensors`; `None` if
            it must not be compiled.
        function: Function of a list of tensors and `None`.
        tensors: That list.
        known: Whether XLA can compile the function for sure; it is asked otherwise.

    Example:

    >>> import keras, keras_sparse as ks
    >>> optimizer = ks.optimizers.SparseOptimizer("sgd")
    >>> ks.optimizers.compiled.run_compiled(optimizer, ("show",), print, [None])
    [None]
    """
    if key is None or not _can_compile(optimizer, tensors):
        function(tensors)
        return
    import tensorflow as tf

    present = tuple(position for position, tensor in enumerate(tensors) if tensor is not None)
    key = *key, present
    compiled = optimizer.sparse_parts.compiled
    if key not in compiled:

        def with_all(*found):
            every = dict(zip(present, found, strict=True))
            function([every.get(position) for position in range(len(tensors))])

        candidate = tf.function(with_all, jit_compile=True, autograph=False)
        compiled[key] = candidate if known or _accepts(candidate, [tensors[p] for p in present]) else None
    if compiled[key] is None:
        function(tensors)
    else:
        compiled[key](*(tensors[position] for position in present))


def run_update(optimizer, update, gradient, variable, learning_rate):
    """Run `update(gradient, variable, learning_rate)`, an optimizer's for one weight, compiled in a mirrored replica.

    Args:
        optimizer: The sparse optimizer.
        update: The `update_step` of its class.
        gradient: Gradient of the weight, reduced over replicas.
        variable: The weight; under `tf.distribute` the copy of one replica.
        learning_rate: Number or tensor.

    Example:

    >>> import keras, keras_sparse as ks
    >>> optimizer = ks.optimizers.SparseOptimizer("sgd")
    >>> ks.optimizers.compiled.run_update(optimizer, print, 0.5, "kernel", 0.1)
    0.5 kernel 0.1
    """
    if not _can_compile_update(gradient, variable):
        update(gradient, variable, learning_rate)
        return
    import tensorflow as tf

    key = "update", variable.device, variable.name, id(variable)
    compiled = optimizer.sparse_parts.compiled
    if key not in compiled:
        compiled[key] = tf.function(lambda g, rate: update(g, variable, rate), jit_compile=True, autograph=False)
    compiled[key](tf.convert_to_tensor(gradient), tf.convert_to_tensor(learning_rate))


def _can_compile_update(gradient, variable):
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return (
        not tf.executing_eagerly()
        and isinstance(tf.distribute.get_strategy(), tf.distribute.MirroredStrategy)
        and isinstance(variable, tf.Variable)
        and tf.is_tensor(gradient)
        and not isinstance(gradient, tf.IndexedSlices)
        and int(np.prod(variable.shape)) >= _LEAST_WEIGHTS
    )


def _can_compile(optimizer, tensors):
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    if tf.executing_eagerly() or tf.distribute.has_strategy():
        return False
    if not optimizer.built or not all(tensor is None or tf.is_tensor(tensor) for tensor in tensors):
        return False
    if any(isinstance(tensor, tf.IndexedSlices) for tensor in tensors):
        return False
    weights = optimizer.sparse_parts.trainable
    return sum(int(np.prod(variable.shape)) for variable in weights) >= _LEAST_WEIGHTS


def _accepts(function, tensors):
    """Whether XLA can compile a `tf.function`."""
    import tensorflow as tf

    with tf.init_scope():
        specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in tensors]
        try:
            function.experimental_get_compiler_ir(*specs)(stage="hlo")
        except Exception:  # Whatever stands in the way: the operations run as they are.
            return False
    return True
