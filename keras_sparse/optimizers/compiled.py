"""A compiled step is an optimizer's step and what its parts do around it as one XLA function, on TensorFlow.

On a CPU, Keras's TensorFlow trainer runs an optimizer operation by operation: a dozen passes over all weights. XLA
fuses them, and the masks with them, into one or two.
"""

import keras
import numpy as np

__all__ = ["run_step"]

# Compiling takes about a second; with fewer weights than this, a short training does not earn it back.
_LEAST_WEIGHTS = 2**17


def run_step(optimizer, step, gradients, indices, parts):
    """Run `step(gradients)`, compiled where that is possible and pays.

    It runs as it is on other backends, eagerly, under `tf.distribute`, with sparse gradients, and for optimizers of
    one's own that XLA refuses.

    Args:
        optimizer: The sparse optimizer.
        step: Function of a list of gradients.
        gradients: List of tensors and `None`.
        indices: Tuple: which trainable variables they belong to.
        parts: Tuple of the names of the parts that act; `None` if the step must not be compiled.

    Example:

    >>> import keras, keras_sparse as ks
    >>> optimizer = ks.optimizers.SparseOptimizer("sgd")
    >>> ks.optimizers.compiled.run_step(optimizer, print, [None], (0,), ())
    [None]
    """
    if parts is None or not _can_compile(optimizer, gradients):
        step(gradients)
        return
    import tensorflow as tf

    present = tuple(position for position, gradient in enumerate(gradients) if gradient is not None)
    key = indices, present, parts
    compiled = optimizer.sparse_parts.compiled
    if key not in compiled:

        def with_all(*found):
            every = dict(zip(present, found, strict=True))
            step([every.get(position) for position in range(len(gradients))])

        function = tf.function(with_all, jit_compile=True, autograph=False)
        compiled[key] = function if _accepts(optimizer, function, [gradients[p] for p in present]) else None
    if compiled[key] is None:
        step(gradients)
    else:
        compiled[key](*(gradients[position] for position in present))


def _can_compile(optimizer, gradients):
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    if tf.executing_eagerly() or tf.distribute.has_strategy():
        return False
    if not optimizer.built or not all(gradient is None or tf.is_tensor(gradient) for gradient in gradients):
        return False
    if any(isinstance(gradient, tf.IndexedSlices) for gradient in gradients):
        return False
    weights = optimizer.sparse_parts.trainable
    return sum(int(np.prod(variable.shape)) for variable in weights) >= _LEAST_WEIGHTS


def _accepts(optimizer, function, gradients):
    """Whether XLA can compile the step: known of Keras's optimizers (the tests try each), asked for others."""
    import tensorflow as tf

    plain = type(optimizer).plain_class
    if plain is getattr(keras.optimizers, plain.__name__, None):
        return True
    with tf.init_scope():
        specs = [tf.TensorSpec(gradient.shape, gradient.dtype) for gradient in gradients]
        try:
            function.experimental_get_compiler_ir(*specs)(stage="hlo")
        except Exception:  # Whatever stands in the way: the operations run as they are.
            return False
    return True
