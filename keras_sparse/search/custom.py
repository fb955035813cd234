"""Custom objects are the classes and functions of the caller's own that a model is made of: a copy needs them, too."""

import contextlib
import importlib
import operator
import types

import keras
import numpy as np

__all__ = ["imported", "objects", "places"]

# What a model is made of, with attributes that may be of the caller's own classes, or functions.
_PARTS = (
    keras.layers.Layer,
    keras.losses.Loss,
    keras.metrics.Metric,
    keras.optimizers.Optimizer,
    keras.optimizers.schedules.LearningRateSchedule,
    keras.initializers.Initializer,
    keras.regularizers.Regularizer,
    keras.constraints.Constraint,
)


def objects(model):
    """The classes and functions that a model is made of, by name: they need not be registered with Keras.

    They are in the attributes of its layers, losses and metrics, and of what these hold.

    Args:
        model: A Keras model.

    Returns:
        Dict `{name: class or function}`.

    Example:

    >>> import keras
    >>> from keras_sparse.search import custom
    >>> class Own(keras.layers.Dense):
    ...     __module__ = "mine"
    >>> list(custom.objects(keras.Sequential([keras.Input((4,)), Own(3, activation="relu")])))
    ['Own']
    """
    found, pending, seen = {}, [model], set()
    while pending:
        item = pending.pop()
        if id(item) in seen or isinstance(item, (str, np.ndarray, keras.Variable)):
            continue
        seen.add(id(item))
        if isinstance(item, (list, tuple, set, dict)):
            pending.extend(item.values() if isinstance(item, dict) else item)
            continue
        named = item if isinstance(item, (type, types.FunctionType)) else type(item)
        own = named.__module__.split(".")[0] not in ("keras", "keras_sparse")
        if own and (named is item or isinstance(item, _PARTS)):
            found.setdefault(named.__name__, named)
        if isinstance(item, _PARTS):
            pending.extend(vars(item).values())
    return found


def places(found):
    """Where what `objects` found is defined, for another process: `{name: (module, name in it)}`.

    Example:

    >>> import json
    >>> from keras_sparse.search import custom
    >>> custom.places({"dumps": json.dumps})
    {'dumps': ('json', 'dumps')}
    """
    return {name: (own.__module__, own.__qualname__) for name, own in found.items()}


def imported(places):
    """What can be imported of `{name: (module, name in it)}`; whether the rest is missed, loading the model shows.

    Example:

    >>> from keras_sparse.search import custom
    >>> custom.imported({"dumps": ("json", "dumps"), "missing": ("no_such_module", "missing")}).keys()
    dict_keys(['dumps'])
    """
    found = {}
    for name, (module, inside) in places.items():
        with contextlib.suppress(ImportError, AttributeError):
            found[name] = operator.attrgetter(inside)(importlib.import_module(module))
    return found
