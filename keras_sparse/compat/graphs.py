"""A graph of Keras 2 is a list of layers and of their calls; here they are called again, on tensors of Keras 3."""

import keras

from keras_sparse.compat import operations, wrappers
from keras_sparse.compat.keras2 import MODELS

__all__ = ["Graph", "Node"]

_CONSTANT = "_CONSTANT_VALUE"


class Node:
    """A layer that was made, and what the file says of it.

    Args:
        name: Its name in the file, with the prefix of a wrapper.
        layer: The layer of Keras 3, or `None` for what needs none.
        around: The wrappers that stood around it.
        frozen: Whether it is not trained.
        children: The nodes of a model's layers.

    Example:

    >>> from keras_sparse.compat import graphs
    >>> [node.name for node in graphs.Node("inner", children=[graphs.Node("dense")]).leaves()]
    ['dense']
    """

    def __init__(self, name, layer=None, around=(), frozen=False, children=None):
        self.name, self.layer, self.around, self.frozen, self.children = name, layer, list(around), frozen, children

    def leaves(self):
        """List the nodes below that are no models, in order."""
        if self.children is None:
            return [self]
        return [leaf for child in self.children for leaf in child.leaves()]

    def freeze(self):
        """Make the layers untrained that were so in the file."""
        for child in self.children or []:
            child.freeze()
        if self.frozen and self.layer is not None:
            self.layer.trainable = False


class Graph:
    """Makes models from configurations.

    Args:
        factory: What makes layers, a `keras2.LayerFactory`.

    Raises:
        ValueError: If a configuration describes no model, or one that Keras 3 cannot build.

    Example:

    >>> from keras_sparse.compat import graphs, keras2
    >>> dense = {"class_name": "Dense", "config": {"name": "dense", "units": 3, "batch_input_shape": [None, 4]}}
    >>> node = graphs.Graph(keras2.LayerFactory()).model({"class_name": "Sequential", "config": {"layers": [dense]}})
    >>> node.layer.output_shape
    (None, 3)
    """

    def __init__(self, factory):
        self._factory = factory
        factory.model = self._held

    def model(self, config):
        """Return the `Node` of the model that a configuration describes."""
        if config["class_name"] not in MODELS:
            raise ValueError(
                f"The model is of the class {config['class_name']!r}: only Sequential and functional models are "
                "described in `.h5` files in full."
            )
        own = config["config"]
        own = own if isinstance(own, dict) else {"layers": own}
        name = own.get("name") or config["class_name"].lower()
        frozen = own.get("trainable", True) is False
        make = self._sequential if config["class_name"] == "Sequential" else self._functional
        model, children = make(own, name)
        return Node(name, model, (), frozen, children)

    def _held(self, config):
        """A model inside of a wrapper layer such as `TimeDistributed`, whose weights are that layer's own."""
        node = self.model(config)
        wrapped = [leaf.name for leaf in node.leaves() if leaf.around]
        if wrapped:
            raise ValueError(
                f"The model {node.name!r} is inside of a wrapper layer, where tfmot's wrappers {wrapped[:5]} cannot be "
                "read: save it after `strip_pruning`."
            )
        node.freeze()
        return node.layer

    def _node(self, config, taken):
        """The node of one layer, whose name is not to be taken already."""
        inner, around = wrappers.inner(config)
        name = (around[0][1] if around else inner["config"]).get("name") or config.get("name")
        if inner is None:
            return Node(name, None, around)
        if inner["class_name"] in MODELS:
            node = self.model(inner)
            node.name, node.around = name, around
        elif inner["class_name"] in ("TFOpLambda", "SlicingOpLambda"):
            return Node(name)
        else:
            if inner["config"].get("name") in taken:
                inner = {**inner, "config": {**inner["config"], "name": name}}
            frozen = inner["config"].get("trainable", True) is False
            node = Node(name, self._factory.make(inner), around, frozen)
        taken.add(node.layer.name)
        return node

    def _sequential(self, config, name):
        stack, children, taken = [], [], set()
        first = config["layers"][0] if config["layers"] else {"config": {}}
        if first.get("class_name") != "InputLayer":
            shape = wrappers.inner(first)[0]["config"].get("batch_input_shape") or config.get("build_input_shape")
            if not shape:
                raise ValueError(
                    f"The model {name!r} has no input shape, so it was saved before it was built: "
                    "call it on data, then save it."
                )
            stack.append(keras.Input(batch_shape=shape, dtype=_dtype(first["config"])))
        for layer in config["layers"]:
            if layer["class_name"] == "InputLayer":
                stack.append(_input(layer["config"]))
                continue
            node = self._node(layer, taken)
            children.append(node)
            if node.layer is not None:
                stack.append(node.layer)
        return keras.Sequential(stack, name=name), children

    def _functional(self, config, name):
        nodes, tensors, calls, taken = {}, {}, [], set()
        for layer in config["layers"]:
            key = layer.get("name") or layer["config"]["name"]
            tensors[key] = []
            if layer["class_name"] == "InputLayer":
                tensors[key].append([_input(layer["config"])])
                continue
            nodes[key] = self._node(layer, taken)
            if nodes[key].children is not None and _starts_with_input(layer):
                tensors[key].append([])  # Keras 2 counts the call by which an inner model was made.
            calls += [(key, layer, data) for data in layer.get("inbound_nodes", [])]
        waiting = len(calls) + 1
        while calls and len(calls) < waiting:
            waiting, later, behind = len(calls), [], set()
            for key, layer, data in calls:
                if key in behind or not all(_known(one, tensors) for one in _references(data, tensors)):
                    behind.add(key)  # Calls are numbered, so those of one layer stay in their order.
                    later.append((key, layer, data))
                else:
                    tensors[key].append(keras.tree.flatten(self._call(nodes[key], layer, data, tensors)))
            calls = later
        if calls:
            raise ValueError(f"The layer {calls[0][0]!r} of the model {name!r} is called on what no layer gives.")
        ends = [_resolve(config[end], tensors) for end in ("input_layers", "output_layers")]
        inputs, outputs = [end[0] if isinstance(end, list) and len(end) == 1 else end for end in ends]
        return keras.Model(inputs, outputs, name=name), list(nodes.values())

    def _call(self, node, layer, data, tensors):
        """Call a layer once, as the file says."""
        alone = _is_reference(data, tensors)
        entries = [data] if alone else data
        options = next((one[3] for one in _references(data, tensors) if len(one) > 3), {})
        options = {key: _resolve(value, tensors) for key, value in options.items() if value is not None}
        arguments = _resolve(entries, tensors)
        kind = layer["class_name"]
        try:
            if kind in ("TFOpLambda", "SlicingOpLambda"):
                return operations.apply(layer["config"]["function"], arguments if alone else [arguments], options)
            if isinstance(arguments, list) and len(arguments) == 1:
                (arguments,) = arguments
            if node.layer is None:
                return arguments
            if isinstance(node.layer, (keras.layers.RNN, keras.layers.Bidirectional)) and isinstance(arguments, list):
                arguments, *options["initial_state"] = arguments
                if len(options["initial_state"]) == 1:
                    (options["initial_state"],) = options["initial_state"]
            return node.layer(arguments, **options)
        except ValueError as error:
            raise ValueError(f"The layer {node.name!r} ({kind}) cannot be called: {error}") from error


def _starts_with_input(config):
    inner = wrappers.inner(config)[0]["config"]
    layers = inner["layers"] if isinstance(inner, dict) else inner
    return bool(layers) and layers[0]["class_name"] == "InputLayer"


def _dtype(config):
    dtype = config.get("dtype")
    return dtype if isinstance(dtype, str) and not dtype.startswith("mixed") else None


def _input(config):
    if config.get("ragged"):
        raise ValueError(f"The input {config.get('name')!r} is ragged, which this does not read.")
    shape = config.get("batch_input_shape", config.get("batch_shape"))
    if shape is None:
        raise ValueError(f"The input {config.get('name')!r} has no shape.")
    return keras.Input(
        batch_shape=shape, dtype=_dtype(config), sparse=bool(config.get("sparse")) or None, name=config.get("name")
    )


def _is_reference(value, tensors):
    """Whether this is `[layer, call, output]` or `[layer, call, output, options]`, or a constant in that place."""
    return (
        isinstance(value, (list, tuple))
        and len(value) in (3, 4)
        and isinstance(value[0], str)
        and isinstance(value[1], int)
        and (value[0] == _CONSTANT or (value[0] in tensors and isinstance(value[2], int)))
    )


def _references(value, tensors):
    """All references in a structure, those in the options of others too."""
    if _is_reference(value, tensors):
        return [value, *(_references(value[3], tensors) if len(value) > 3 else [])]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [reference for part in parts for reference in _references(part, tensors)]


def _known(reference, tensors):
    return reference[0] == _CONSTANT or 0 <= reference[1] < len(tensors[reference[0]])


def _resolve(value, tensors):
    """A structure with the tensors in place of the references to them."""
    if _is_reference(value, tensors):
        if value[0] == _CONSTANT:
            return value[2]
        return tensors[value[0]][value[1]][value[2]]
    if isinstance(value, dict):
        return {key: _resolve(one, tensors) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_resolve(one, tensors) for one in value]
    return value
