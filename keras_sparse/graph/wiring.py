"""The wiring of a model says which layers and operations each layer's output goes to, as its config tells it."""

import keras

from keras_sparse.graph.substitution import substituted

__all__ = ["consumers", "filled", "histories", "references", "wiring"]


def consumers(model):
    """The names of the layers that each layer's output goes to, `{name: [name or None]}`; `None` stands for others.

    Layers that are called more than once are others, and so is the outside of the model.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="a"), keras.layers.Dense(2, name="b")])
    >>> ks.graph.consumers(model)
    {'a': ['b'], 'b': [None]}
    """
    if isinstance(model, keras.Sequential):
        names = [layer.name for layer in model.layers]
        return dict(zip(names, [[name] for name in [*names[1:], None]], strict=True))
    config = wiring(model)
    found = {}
    for layer in config["layers"]:
        nodes = layer["inbound_nodes"]
        for source in references(nodes):
            found.setdefault(source, []).append(layer["name"] if len(nodes) == 1 else None)
        if len(nodes) > 1:
            found.setdefault(layer["name"], []).append(None)
    for source in references(config["output_layers"]):
        found.setdefault(source, []).append(None)
    return found


def wiring(model):
    """The config of a functional model's graph: of the same graph as a plain `keras.Model`.

    Example:

    >>> import keras, keras_sparse as ks
    >>> inputs = keras.Input((4,), name="x")
    >>> model = keras.Model(inputs, keras.layers.Dense(3, name="a")(inputs))
    >>> [layer["name"] for layer in ks.graph.wiring(model)["layers"]]
    ['x', 'a']
    """
    # Of the same graph as a plain model: a class of the user's may have no config, or one without layers. What the
    # layers are is not asked: some have a `get_config` that fails, and those of nested models are long.
    silent = [(operation, "get_config", dict) for operation in model.operations]
    with substituted(silent):
        return keras.Model(model.inputs, model.outputs).get_config()


def references(value):
    """The names of layers in the part of a config that says whose outputs are meant.

    Example:

    >>> import keras_sparse as ks
    >>> ks.graph.references({"a": ["dense", 0, 0]})
    ['dense']
    """
    return [name for name, _, _ in histories(value)]


def histories(value):
    """The outputs that a part of a config means, as `(name of a layer, number of its call, number of the output)`.

    Example:

    >>> import keras_sparse as ks
    >>> from keras_sparse.graph.wiring import histories
    >>> histories({"a": ["dense", 0, 0]})
    [('dense', 0, 0)]
    """
    if isinstance(value, (list, tuple)) and len(value) == 3 and [type(v) for v in value] == [str, int, int]:
        return [tuple(value)]
    if isinstance(value, dict):
        value = list(value.values())
    return [key for item in value for key in histories(item)] if isinstance(value, (list, tuple)) else []


def filled(value, make):
    """Part of a call as a config or a layer tells it, with `make(config)` in place of each symbolic tensor.

    Args:
        value: Arguments of a call: `inbound_nodes` of a config, or a structure with symbolic tensors.
        make: Function of the tensor's config, which has its `shape` and, in a config, its `keras_history`.

    Example:

    >>> import keras, keras_sparse as ks
    >>> from keras_sparse.graph.wiring import filled
    >>> filled([keras.KerasTensor((None, 4)), 2.0], lambda config: config["shape"])
    [(None, 4), 2.0]
    """
    if isinstance(value, keras.KerasTensor):
        return make({"shape": value.shape})
    if isinstance(value, dict) and value.get("class_name") == "__keras_tensor__":
        return make(value["config"])
    if isinstance(value, dict) and "class_name" in value:
        return keras.saving.deserialize_keras_object(value)
    if isinstance(value, dict):
        return {key: filled(item, make) for key, item in value.items()}
    return type(value)(filled(item, make) for item in value) if isinstance(value, (list, tuple)) else value
