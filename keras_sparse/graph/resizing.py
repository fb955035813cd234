"""A resized layer is of the same class, with weights of other shapes, by other numbers in its config.

Which numbers these are, nobody says: those are tried that stand to the present ones as the shapes do.
"""

import itertools

import keras

from keras_sparse.graph.calls import spec_of
from keras_sparse.graph.rebuilding import config_of, remade

__all__ = ["resized"]

_MOST, _TOGETHER = 16, 2  # combinations of numbers in a config that are tried, and how many numbers are in one


def resized(layer, wanted, args, kwargs, outputs):
    """What is different in the config of a layer with weights of other shapes, and such a layer, built.

    Args:
        layer: The layer.
        wanted: The shapes of the new layer's weights, a list of tuples.
        args: The arguments of its call, with a `KerasTensor` for each tensor.
        kwargs: Likewise.
        outputs: The shapes of what it is to return, a list.

    Returns:
        `(changes, new layer)`, or `None` if no number or pair of numbers leads there.

    Example:

    >>> import keras
    >>> from keras_sparse.graph.resizing import resized
    >>> layer, x = keras.layers.Dense(8), keras.KerasTensor((2, 4))
    >>> layer.build((2, 4))
    >>> resized(layer, [(4, 6), (6,)], [x], {}, [(2, 6)])[0]
    {'units': 6}
    """
    present = [tuple(int(n) for n in v.shape) for v in layer.weights]
    sizes = {pair for old, new in zip(present, wanted, strict=True) for pair in zip(old, new, strict=True)}
    for changes in itertools.islice(_choices(config_of(layer), sizes), _MOST):
        made = _made(layer, changes, args, kwargs, outputs)
        if made is not None and [tuple(v.shape) for v in made.weights] == wanted:
            return changes, made
    return None


def _choices(config, sizes):
    """Yield dicts of other numbers: the size itself, or a multiple of it, or a part."""
    numbers = {}
    for key, value in config.items():
        if type(value) is int and value > 0:
            found = {value * new // old for old, new in sizes if old != new and value * new % old == 0}
            if found:
                numbers[key] = sorted(found - {value})
    for count in range(1, _TOGETHER + 1):
        for keys in itertools.combinations(numbers, count):
            for values in itertools.product(*(numbers[key] for key in keys)):
                yield dict(zip(keys, values, strict=True))


def _made(layer, changes, args, kwargs, outputs):
    """A layer of such a config, built; `None` if there is none."""
    try:
        new = remade(layer, changes)
        spec = spec_of(new, args, kwargs) if new.built else new(*args, **kwargs)
        found = [x for x in keras.tree.flatten(spec) if x is not None]
    except Exception:  # numbers that do not go together
        return None
    return new if [tuple(x.shape) for x in found] == outputs else None
