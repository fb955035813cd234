"""A SavedModel of Keras 2 is a folder with a description of each layer and a checkpoint; its functions are not run."""

import json
import os

import numpy as np

from keras_sparse.compat.hdf5 import in_a_line

__all__ = ["read"]

_MOST = 2**28  # bytes of a description: the functions that a model was traced to stand in it, too
_MODELS = ("_tf_keras_network", "_tf_keras_sequential", "_tf_keras_model")


def read(path):
    """Return the configuration and the weights of a model that Keras 2 saved as a SavedModel.

    What Keras wrote about each layer is in `keras_metadata.pb`, before TensorFlow 2.5 in `saved_model.pb`; the tracked
    objects in `saved_model.pb` say which weights are a layer's, and in which order (TensorFlow,
    core/protobuf/saved_object_graph.proto and trackable_object_graph.proto).

    Args:
        path: Path of the folder.

    Returns:
        As `hdf5.read`: the model's configuration, a dict, and a dict that gives for each layer at the top a list of
        pairs of a name and an array, the trained ones first.

    Raises:
        ValueError: If it is no SavedModel, damaged, or describes no model of Keras 2.

    Example:

    >>> import tempfile
    >>> from keras_sparse.compat import savedmodel
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     savedmodel.read(folder)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: Expected an `.h5` file or a SavedModel folder... Received: ..., a folder without saved_model.pb
    """
    path = os.fspath(path)
    if not os.path.isfile(os.path.join(path, "saved_model.pb")):
        raise ValueError(
            "Expected an `.h5` file or a SavedModel folder of Keras 2 (`tf_keras`). "
            f"Received: {path!r}, a folder without saved_model.pb"
        )
    try:
        return _read(path)
    except Exception as error:  # Protobuf, TensorFlow and damaged numbers raise anything.
        kind = "" if isinstance(error, ValueError) else f"The folder is damaged ({type(error).__name__}): "
        raise ValueError(f"{kind}{in_a_line(error)} Received: {path!r}") from error


def _read(path):
    from tensorflow.core.protobuf import saved_model_pb2

    saved = saved_model_pb2.SavedModel()
    saved.ParseFromString(_bytes(path, "saved_model.pb"))
    nodes = saved.meta_graphs[0].object_graph_def.nodes
    about = _metadata(path, nodes)
    kind, config = about.get(0, (None, {}))
    if kind not in _MODELS or not isinstance(config.get("config"), (dict, list)):
        raise ValueError(
            "The SavedModel describes no Keras model that can be built again: it was not saved by Keras, or is a "
            "subclassed model."
        )
    values = _Checkpoint(os.path.join(path, "variables", "variables"), nodes)
    weights = {}
    for child in nodes[0].children:
        prefix, _, number = child.local_name.rpartition("-")
        if prefix == "layer" and number.isdigit() and child.node_id in about:
            name = about[child.node_id][1]["name"]
            weights[name] = [values.of(i) for i in _variables(nodes, nodes[child.node_id])]
    return {"class_name": config["class_name"], "config": config["config"]}, weights


def _bytes(path, name):
    path = os.path.join(path, name)
    if os.path.getsize(path) > _MOST:
        raise ValueError(f"{name} has {os.path.getsize(path)} bytes, more than a description of a model has.")
    with open(path, "rb") as file:
        return file.read()


def _metadata(path, nodes):
    """What Keras wrote about each node, `{node: (identifier, description)}`."""
    if os.path.isfile(os.path.join(path, "keras_metadata.pb")):
        saved = _saved_metadata()
        saved.ParseFromString(_bytes(path, "keras_metadata.pb"))
        found = [(node.node_id, node) for node in saved.nodes]
    else:
        found = [(i, node.user_object) for i, node in enumerate(nodes) if node.WhichOneof("kind") == "user_object"]
    return {
        i: (one.identifier, json.loads(one.metadata, object_hook=_plain))
        for i, one in found
        if one.identifier.startswith("_tf_keras") and one.metadata
    }


def _plain(value):
    """Shapes and tuples as lists, as they are in `.h5` files."""
    return value["items"] if value.get("class_name") in ("TensorShape", "__tuple__") and "items" in value else value


def _saved_metadata():
    """An empty message of `keras_metadata.pb` (keras/protobuf/saved_metadata.proto of Keras 2)."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="keras_sparse/saved_metadata.proto", package="keras_sparse.keras2")
    field = descriptor_pb2.FieldDescriptorProto
    node = file.message_type.add(name="SavedObject")
    for number, name, kind in ((2, "node_id", "INT32"), (4, "identifier", "STRING"), (5, "metadata", "STRING")):
        node.field.add(name=name, number=number, type=getattr(field, f"TYPE_{kind}"), label=field.LABEL_OPTIONAL)
    whole = file.message_type.add(name="SavedMetadata")
    own = f".{file.package}.SavedObject"
    whole.field.add(name="nodes", number=1, type=field.TYPE_MESSAGE, label=field.LABEL_REPEATED, type_name=own)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{file.package}.SavedMetadata"))()


def _variables(nodes, layer):
    """The nodes of a layer's variables, the trained ones first."""
    lists = {child.local_name: nodes[child.node_id].children for child in layer.children}
    if "variables" not in lists:  # Layers that Keras restores from their config, such as Normalization.
        own = [child.node_id for child in layer.children if nodes[child.node_id].WhichOneof("kind") == "variable"]
        return list(dict.fromkeys(own))
    trained, every = (
        [child.node_id for child in lists.get(name, ()) if child.local_name.isdigit()]
        for name in ("trainable_variables", "variables")
    )
    return trained + [i for i in every if i not in trained]


class _Checkpoint:
    """The values of variables, found by the names under which their owners track them."""

    def __init__(self, path, nodes):
        import tensorflow as tf
        from tensorflow.core.protobuf import trackable_object_graph_pb2

        self._reader, self._nodes, self._keys = tf.train.load_checkpoint(path), nodes, {}
        folder = os.path.dirname(path)
        self._left = sum(entry.stat().st_size for entry in os.scandir(folder) if entry.name.startswith("variables."))
        graph = trackable_object_graph_pb2.TrackableObjectGraph()
        graph.ParseFromString(self._reader.get_tensor("_CHECKPOINTABLE_OBJECT_GRAPH"))
        waiting, seen = [(0, 0)], set()
        while waiting:
            pair = waiting.pop()
            if pair in seen:
                continue
            seen.add(pair)
            own, stored = nodes[pair[0]], graph.nodes[pair[1]]
            for attribute in stored.attributes:
                self._keys[pair[0]] = attribute.checkpoint_key
            names = {child.local_name: child.node_id for child in stored.children}
            waiting += [(child.node_id, names[child.local_name]) for child in own.children if child.local_name in names]

    def of(self, node):
        """The name and the value of a variable."""
        name, key = self._nodes[node].variable.name, self._keys[node]
        shape, dtype = self._reader.get_variable_to_shape_map()[key], self._reader.get_variable_to_dtype_map()[key]
        self._left -= dtype.size * int(np.prod([float(n) for n in shape]))
        if self._left < 0:
            raise ValueError(f"The folder is damaged: it has no such amount of data for {name!r}.")
        value = np.asarray(self._reader.get_tensor(key))
        if value.dtype.kind not in "fiub":
            raise ValueError(f"The folder is damaged: {name!r} holds no numbers.")
        return name.removesuffix(":0"), value
