"""State is what a model keeps from one call to the next: of stateful recurrent layers, random layers, and others."""

import contextlib

import keras
import numpy as np

from keras_sparse import selection

__all__ = ["memory", "put_back", "recurrent", "rewound"]


def recurrent(model):
    """The stateful recurrent layers of a model.

    Example:

    >>> import keras
    >>> from keras_sparse import states
    >>> inputs = keras.Input((5, 4), batch_size=1)
    >>> model = keras.Model(inputs, keras.layers.GRU(3, stateful=True, name="memory")(inputs))
    >>> [layer.name for layer in states.recurrent(model)]
    ['memory']
    """
    layers = [layer for layer in selection.layers(model) if getattr(layer, "stateful", False)]
    return [layer for layer in layers if isinstance(layer, keras.layers.RNN)]


def memory(model):
    """The states of these layers, which Keras does not count as variables of theirs; one never called has none.

    Args:
        model: A model or layer.

    Example:

    >>> import keras
    >>> from keras_sparse import states
    >>> inputs = keras.Input((5, 4), batch_size=1)
    >>> model = keras.Model(inputs, keras.layers.GRU(3, stateful=True)(inputs))
    >>> [tuple(state.shape) for state in states.memory(model)]
    [(1, 3)]
    """
    states = keras.tree.flatten([layer.states for layer in recurrent(model)])
    return [state for state in states if state is not None]


@contextlib.contextmanager
def rewound(model):
    """Leave these states as they were, so that the next run over data begins with them, too.

    Args:
        model: A model or layer.

    Example:

    >>> import keras
    >>> from keras_sparse import states
    >>> inputs = keras.Input((5, 4), batch_size=1)
    >>> layer = keras.layers.GRU(3, stateful=True)
    >>> model = keras.Model(inputs, layer(inputs))
    >>> with states.rewound(model):
    ...     _ = model(keras.ops.ones((1, 5, 4)))
    >>> float(abs(keras.ops.convert_to_numpy(layer.states[0])).max())
    0.0
    """
    with _as_they_are(memory(model)):
        yield


@contextlib.contextmanager
def put_back(model, begin=False):
    """Leave the state of a model as it was, whatever runs inside.

    Args:
        model: A built Keras model.
        begin: Whether recurrent layers begin with their initial states, as those of a model that was just loaded do.

    Yields:
        A function that says whether the state has changed.

    Example:

    >>> import keras
    >>> from keras_sparse import states
    >>> inputs = keras.Input((5, 4), batch_size=1)
    >>> layer = keras.layers.GRU(3, stateful=True)
    >>> model = keras.Model(inputs, layer(inputs))
    >>> with states.put_back(model) as changed:
    ...     _ = model(keras.ops.ones((1, 5, 4)))
    ...     print(changed())
    True
    >>> float(abs(keras.ops.convert_to_numpy(layer.states[0])).max())
    0.0
    """
    kernels = {id(weight.variable) for weight in selection.weights(model) if weight.kernel}
    kept = memory(model)
    variables = [v for v in model.non_trainable_variables if id(v) not in kernels] + kept
    with _as_they_are(variables) as changed:
        for variable in kept if begin else ():  # `reset_state` fails on stacked cells (Keras 3.15)
            variable.assign(np.zeros(variable.shape))
        yield changed


@contextlib.contextmanager
def _as_they_are(variables):
    before = [np.array(selection.as_array(variable)) for variable in variables]
    try:
        yield lambda: any(_differs(*pair) for pair in zip(variables, before, strict=True))
    finally:
        for variable, value in zip(variables, before, strict=True):
            if _differs(variable, value):
                variable.assign(value)


def _differs(variable, value):
    return not np.array_equal(selection.as_array(variable), value)
