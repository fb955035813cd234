"""A substitution puts functions in the place of methods of layers, for a while."""

import contextlib

__all__ = ["substituted"]


@contextlib.contextmanager
def substituted(functions):
    """Put functions in the place of methods of layers, or values of attributes, for as long as the block lasts.

    Args:
        functions: List of `(layer, name of the method, function)`.

    Example:

    >>> import keras
    >>> from keras_sparse.graph.substitution import substituted
    >>> layer, x = keras.layers.ReLU(), keras.ops.ones((1, 2))
    >>> with substituted([(layer, "call", lambda inputs: 2 * inputs)]):
    ...     float(layer(x)[0, 0])
    2.0
    >>> float(layer(x)[0, 0])
    1.0
    """
    before = [vars(layer).get(name) for layer, name, _ in functions]
    try:
        for layer, name, function in functions:
            vars(layer)[name] = function
        yield
    finally:
        for (layer, name, _), own in zip(functions, before, strict=True):
            if own is None:
                vars(layer).pop(name, None)
            else:
                vars(layer)[name] = own
