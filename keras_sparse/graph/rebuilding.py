"""A rebuilding is a model once again, with other layers or weights."""

import collections
import functools
import inspect
import json
import os
import tempfile

import keras
import numpy as np

from keras_sparse.graph.wiring import filled, histories, wiring
from keras_sparse.identity import IdentityDict

__all__ = ["Rebuilding", "complete", "config_of", "is_loadable", "remade", "replay"]


def replay(model, tensors, call):
    """Run the operations of a functional or Sequential model once more, on other tensors, each by a function.

    Args:
        model: The model.
        tensors: Flat list of tensors in place of its inputs.
        call: Function `(operation, args, kwargs) -> outputs`, for each layer and operation as often as the model calls
            it. A model that is nested in it comes as one layer; `call` may replay that in turn.

    Returns:
        Flat list of the outputs.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.ReLU()])
    >>> seen = []
    >>> def call(layer, args, kwargs):
    ...     seen.append(type(layer).__name__)
    ...     return layer(*args, **kwargs)
    >>> ks.graph.replay(model, [keras.ops.ones((2, 4))], call)[0].shape == (2, 3), seen
    (True, ['Dense', 'ReLU'])
    """
    if isinstance(model, keras.Sequential):
        for layer in model.layers:
            tensors = keras.tree.flatten(call(layer, list(tensors), {}))
        return tensors
    config = wiring(model)
    operations = {operation.name: operation for operation in model.operations}
    values = dict(zip(histories(config["input_layers"]), tensors, strict=True))
    # Outputs count the calls of a functional model from 1, arguments (and we) from 0.
    outputs = [
        (name, number - _is_functional(operations[name]), index)
        for name, number, index in histories(config["output_layers"])
    ]
    # Tensors may be large: each is forgotten after its last use.
    uses = collections.Counter([*outputs, *histories([layer["inbound_nodes"] for layer in config["layers"]])])

    def tensor(config):
        return values[tuple(config["keras_history"])]

    nodes = [(layer["name"], i, node) for layer in config["layers"] for i, node in enumerate(layer["inbound_nodes"])]
    while nodes:  # once, unless a layer is called several times
        waiting = []
        for name, number, node in nodes:
            if not all(key in values for key in histories(node)):
                waiting.append((name, number, node))
                continue
            args, kwargs = list(filled(node["args"], tensor)), filled(node["kwargs"], tensor)
            for key in histories(node):
                uses[key] -= 1
                if not uses[key]:
                    del values[key]
            for index, output in enumerate(keras.tree.flatten(call(operations[name], args, kwargs))):
                values[name, number, index] = output
        nodes = waiting
    return [values[key] for key in outputs]


def _is_functional(operation):
    is_model = isinstance(operation, keras.Model) and not isinstance(operation, keras.Sequential)
    return is_model and hasattr(operation, "operations")


class Rebuilding:
    """A functional or Sequential model in the making, from copies of another one's layers on inputs of the same names.

    `copy` makes the layers, `replay` lays them out on `inputs`, `model` puts them together and sets the weights.

    Args:
        model: The model to rebuild; it is left as it is.
        shapes: The shapes of the new model's inputs, a flat list; `None`: as they are.
        around: The `Rebuilding` of a model that this one is nested in: a layer of both is copied once.

    Attributes:
        inputs: Flat list of the new model's symbolic inputs.

    Example:

    A model without its dropout:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dropout(0.5), keras.layers.Dense(3, name="head")])
    >>> rebuilding = ks.graph.Rebuilding(model)
    >>> def call(layer, args, kwargs):
    ...     dropout = isinstance(layer, keras.layers.Dropout)
    ...     return args[0] if dropout else rebuilding.copy(layer)(*args, **kwargs)
    >>> smaller = rebuilding.model(ks.graph.replay(model, rebuilding.inputs, call))
    >>> [layer.name for layer in smaller.layers][1:]
    ['head']
    """

    def __init__(self, model, shapes=None, around=None):
        shapes = [x.shape for x in model.inputs] if shapes is None else shapes
        pairs = zip(model.inputs, shapes, strict=True)
        self.inputs = [keras.Input(shape[1:], shape[0], x.dtype, name=x.name) for x, shape in pairs]
        self._source, self._names, self._own = model, set(), []
        self._copies = IdentityDict() if around is None else around.copies

    @property
    def copies(self):
        """An `IdentityDict` from each layer that was copied to its copy, what that was made from, and the weights."""
        return self._copies

    def copy(self, operation, changes=None, weights=None, layer_class=None):
        """Return the layer in the new model that stands for `operation`, the same each time.

        Args:
            operation: A layer of the model; an operation without state serves again as it is.
            changes: Dict of what is to be different in its config.
            weights: The copy's weights, a list of arrays; `None`: those of `operation`.
            layer_class: The class of the copy, of which `changes` are then the whole config, but for the name.

        Raises:
            ValueError: If a layer that is called several times would have to differ from call to call.
        """
        if not isinstance(operation, keras.layers.Layer):
            return operation
        weights = operation.get_weights() if weights is None else weights
        wanted = layer_class or type(operation), changes
        if operation not in self._copies:
            config = (changes or {}) | {"name": self.unique_name(operation.name)}
            try:
                new = remade(operation, config) if layer_class is None else layer_class.from_config(config)
            except Exception:
                if weights or changes or layer_class:
                    raise
                new = operation  # a `Lambda` of a function that has no name: it has no state either
            if isinstance(new, keras.layers.Lambda) and not changes:
                # By its name Keras revives another function: `keras.ops.gelu` becomes `keras.activations.gelu` (3.15).
                new = operation
            if new is operation:
                self._names.add(operation.name)
            self._copies[operation] = new, wanted, weights
        new, known, values = self._copies[operation]
        self._own.append(new)
        same = len(weights) == len(values) and all(
            map(functools.partial(np.array_equal, equal_nan=True), weights, values)
        )
        if known != wanted or not same:
            raise ValueError(
                "A layer that is called several times and would have to change in one place cannot be rebuilt. "
                f"Received: {operation.name!r}"
            )
        return new

    def unique_name(self, name):
        """A name for a new layer that no other has: `name`, or with a number behind it."""
        found, number = name, 0
        while found in self._names:
            number += 1
            found = f"{name}_{number}"
        self._names.add(found)
        return found

    def model(self, outputs):
        """Return the new model with its weights, a `keras.Model` of the flat list `outputs`."""
        source = self._source
        sequential = isinstance(source, keras.Sequential)
        inputs = self.inputs[0] if sequential else keras.tree.pack_sequence_as(source.input, self.inputs)
        model = keras.Model(inputs, packed(source, outputs), name=source.name)
        self.set_weights()
        return model

    def sequential(self):
        """Return the new model as a `keras.Sequential` of the layers that were copied, in that order.

        Nothing may have been laid out by `replay`: the model does that itself.
        """
        model = keras.Sequential([self.inputs[0], *self._own], name=self._source.name)
        self.set_weights()
        return model

    def set_weights(self):
        """Give all copies their weights."""
        for old, (new, _, values) in self._copies.items():
            new.set_weights(_with_activation(old, new, values))
            complete(old, new)


def _with_activation(old, new, values):
    """The weights for a copy whose activation may be a layer with weights, which Keras builds at its first call."""
    activation = getattr(old, "activation", None)
    if not isinstance(activation, keras.layers.Layer):
        return values
    if activation.built and not new.activation.built:
        new.activation.build_from_config(activation.get_build_config())
    return [*values, *new.get_weights()[len(values) :]]  # more, if only the copy has been called


def complete(old, new):
    """Give a layer that has the weights of its like what that has beside them.

    These are the vocabulary that a `StringLookup` has learned, and what a `Normalization` computes of its weights.

    Example:

    >>> import keras
    >>> from keras_sparse.graph.rebuilding import complete
    >>> old, new = keras.layers.StringLookup(), keras.layers.StringLookup()
    >>> old.adapt(["Lyon", "Ghent"])
    >>> complete(old, new)
    >>> new.get_vocabulary() == old.get_vocabulary()
    True
    """
    if new is old:
        return
    if hasattr(old, "save_assets") and hasattr(new, "load_assets"):
        with tempfile.TemporaryDirectory() as folder:
            old.save_assets(folder)
            if os.listdir(folder):  # else it is in the config
                new.load_assets(folder)
    if isinstance(new, keras.layers.Normalization):
        new.finalize_state()


def config_of(layer):
    """The config of a layer; of one whose `get_config` fails, the arguments of its constructor, as its attributes are.

    Example:

    >>> import keras
    >>> from keras_sparse.graph.rebuilding import config_of
    >>> class Scaled(keras.layers.Layer):
    ...     def __init__(self, factor, **kwargs):
    ...         super().__init__(**kwargs)
    ...         self.factor = factor
    >>> config_of(Scaled(3, name="scaled"))["factor"]
    3
    """
    try:
        return layer.get_config()
    except Exception:  # Keras's own, if the constructor has arguments and no `get_config` was written; or a fault in it
        return _arguments(layer)


def _arguments(layer):
    """What the constructor of a layer takes, from attributes of the same names."""
    taken = inspect.signature(type(layer).__init__).parameters
    found = {name: getattr(layer, name) for name in taken if name in vars(layer)}
    own = {"name": layer.name, "dtype": layer.dtype_policy.name, "trainable": layer.trainable}
    several = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    return {key: value for key, value in own.items() if several or key in taken} | found


def remade(layer, changes):
    """A new layer of the same config but for some changes.

    Args:
        layer: The layer. If none can be made from its own config, its attributes are taken for the arguments of its
            constructor.
        changes: Dict of what is to be different.

    Raises:
        Exception: What the constructor raises.

    Example:

    >>> import keras
    >>> from keras_sparse.graph.rebuilding import remade
    >>> remade(keras.layers.Dense(3), {"units": 4}).units
    4
    """
    try:
        return type(layer).from_config(_unbuilt(config_of(layer)) | changes)
    except Exception as error:
        try:
            arguments = _arguments(layer)
            own = {key: value for key, value in changes.items() if key in arguments or key != "name"}
            return type(layer)(**arguments | own)
        except Exception:
            raise error from None


def is_loadable(layer):
    """Whether Keras makes such a layer from its config, as it does when a file is read, if it knows the class.

    Example:

    >>> import keras
    >>> from keras_sparse.graph.rebuilding import is_loadable
    >>> is_loadable(keras.layers.Dense(3)), is_loadable(type("Plain", (keras.layers.Layer,), {"__init__": None}))
    (True, False)
    """
    try:
        config = json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))
        config.pop("build_config", None)
        keras.saving.deserialize_keras_object(config, custom_objects={type(layer).__name__: type(layer)})
    except Exception:  # a fault in its `get_config`, or a constructor that takes no name
        return False
    return True


def _unbuilt(config):
    """A config in which layers inside do not know the shapes that they were built for."""
    if isinstance(config, dict):
        return {key: _unbuilt(value) for key, value in config.items() if key != "build_config"}
    return [_unbuilt(value) for value in config] if isinstance(config, list) else config


def packed(model, outputs):
    """A flat list of outputs in the structure of the model's own."""
    return outputs[0] if isinstance(model, keras.Sequential) else keras.tree.pack_sequence_as(model.output, outputs)
