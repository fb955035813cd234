"""Tracing makes a functional model of a subclassed one, by calling it on symbolic inputs."""

import keras

from keras_sparse import selection
from keras_sparse.identity import IdentityDict

__all__ = ["functional"]


def functional(model):
    """Return a functional or Sequential model of the same layers: `model` itself, if it is one.

    Args:
        model: A built Keras model. Of a subclassed one, `call` must work on symbolic inputs.

    Raises:
        ValueError: If the model is not built, or cannot be traced.
        TypeError: If it is not a Keras 3 model.

    Example:

    >>> import keras, numpy as np
    >>> from keras_sparse.channels.tracing import functional
    >>> class Net(keras.Model):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.body = keras.layers.Dense(3, name="body")
    ...
    ...     def call(self, x):
    ...         return self.body(x)
    >>> model = Net()
    >>> outputs = model(np.zeros((1, 4), "float32"))
    >>> [layer.name for layer in functional(model).layers][1:]
    ['body']
    """
    selection.check_model(model)
    if not isinstance(model, keras.Model):
        raise TypeError(f"Expected a Keras model, not a layer. Received: {type(model).__name__} {model.name!r}")
    if getattr(model, "inputs", None):
        return model
    try:
        config = model.get_build_config() or {}
        shapes = config.get("input_shape", config.get("shapes_dict"))
        inputs = _inputs(shapes)
        traced = keras.Model(inputs, model.call(inputs), name=model.name)
    except Exception as error:
        raise ValueError(
            f"`call` of {type(model).__name__} cannot be run on symbolic inputs, so that its wiring is not known: "
            f"build the model with `keras.Model(inputs, outputs)`. Received: {model.name!r} "
            f"({type(error).__name__}: {' '.join(str(error).split())[:300]})"
        ) from error
    known = IdentityDict.fromkeys(traced.weights)
    missing = [v.path for v in model.weights if v not in known]
    if missing:
        raise ValueError(
            f"{type(model).__name__} uses weights outside of layers, or not in each call, so that it cannot be traced: "
            f"put them in a layer. Received: {model.name!r} with {missing[:5]}"
        )
    return traced


def _inputs(shapes):
    if isinstance(shapes, dict):
        found = {name: _inputs(shape) for name, shape in shapes.items()}
        return found[next(iter(found))] if len(found) == 1 else found
    if all(n is None or isinstance(n, int) for n in shapes):
        return keras.Input(tuple(shapes)[1:])
    return [_inputs(shape) for shape in shapes]
