"""Baking folds what only training needs into the weights, so that a plain Keras model is left."""

import contextlib

import keras
import numpy as np

from keras_sparse import graph, reports, selection
from keras_sparse.graph.rebuilding import complete
from keras_sparse.identity import IdentityDict
from keras_sparse.layers import L0, ChannelL0, gated_layers
from keras_sparse.layers.places import find_places

__all__ = ["add_l0", "bake"]


def add_l0(model, penalty, granularity="weight", filters=None, **arguments):
    """Return a copy of a model whose layers have hard-concrete gates; the weights are kept.

    Args:
        model: A built functional or Sequential model, nested ones included.
        penalty: The price of one weight, or a dict `{regex: price}` that is searched in the paths of a layer's weights:
            the first match wins, layers that no key matches get no gates.
        granularity: `"weight"` or `"unit"`, see `ks.layers.L0`; or `"channel"`: one gate for each channel of the model,
            in all layers that it can only leave at once, see `ks.layers.ChannelL0`. It takes one price.
        filters: Which layers: those that own a weight which `ks.selection.select(model, filters)` selects. Of channels:
            those that only such weights make.
        **arguments: Further arguments of `ks.layers.L0`, such as `open_probability` or `seed`.

    Returns:
        A new model of the same layer names; with gates on channels its only layer is the `ChannelL0`, which holds that
        model, and `ks.report` says which weights make channels without a gate, and why. It is compiled like `model`,
        with an optimizer that starts anew, if that is possible.

    Raises:
        ValueError: If the model is not built, is subclassed, has gates already, or nothing is selected; and as `L0`.
        TypeError: If the model is not a Keras 3 model.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(10, name="body"), keras.layers.Dense(2)])
    >>> gated = ks.add_l0(model, penalty=1e-6, granularity="unit", filters="body")
    >>> [type(layer).__name__ for layer in gated.layers]
    ['L0', 'Dense']
    """
    selection.check_model(model)
    if not getattr(model, "inputs", None):
        raise ValueError(
            "`add_l0` copies functional and Sequential models. In a subclassed model write "
            "`ks.layers.L0(layer, penalty)` where the layer is created. "
            f"Received: {type(model).__name__} {model.name!r}"
        )
    if gated_layers(model):
        raise ValueError(f"The model has `L0` layers already. Received: {model.name!r}")
    if granularity == "channel":
        return _with_channel_gates(model, penalty, filters, arguments)
    prices = _prices(model, penalty, filters)
    wrapped = IdentityDict()

    def clone(layer):
        copy = _copied(layer)
        # By whose weights they are, so that whole wrappers and attention layers count.
        weights = getattr(layer, "weights", [])
        price = next((prices[v] for v in weights if v in prices), None)
        if price is None:
            return copy
        wrapped.update(IdentityDict.fromkeys(weights))
        return L0(copy, price, granularity, **arguments)

    gated = _clone(model, clone)
    missed = [w.path for w in selection.weights(model) if w.variable in prices and w.variable not in wrapped]
    if missed:
        raise ValueError(f"These weights are in no layer that could be wrapped; exclude them. Received: {missed}")
    _copy_weights(model, gated)
    _copy_compilation(model, gated)
    return gated


def _with_channel_gates(model, penalty, filters, arguments):
    if isinstance(penalty, dict):
        raise ValueError(
            "Layers share the gates of channels, so that these have one price: give `penalty` as a number, and name "
            f"layers by `filters`. Received: penalty={penalty!r}, granularity='channel'"
        )
    chosen = selection.select(model, filters).chosen
    places, reasons = find_places(model, chosen)
    if not places:
        raise ValueError(
            "No channel can leave the model, so that there is nothing to put a gate on. "
            f"Received: {model.name!r}, {[f'{v.path}: {why}' for v, why in reasons.items()][:8]}"
        )
    copy = _clone(model)
    for inner in selection.layers(copy):
        if isinstance(inner, keras.Model):  # what was compiled would bring losses and metrics of its own
            inner.compiled, inner.optimizer = False, None
    _copy_weights(model, copy)
    numbers = list(dict.fromkeys(tuple(place.numbers.tolist()) for place in places))
    rows = [[p.weight, p.axis, numbers.index(tuple(p.numbers.tolist())), p.multiplies] for p in places]
    layer = ChannelL0(copy, penalty, rows, [list(one) for one in numbers], **arguments)
    inputs = _inputs(copy)
    if inputs is None:
        inputs = keras.Input(batch_shape=copy.input_shape, dtype=copy.inputs[0].dtype, name=copy.inputs[0].name)
    outputs = layer(inputs)
    flat = keras.tree.flatten(outputs)
    if len(flat) > 1:  # losses and metrics go by the names of the layers that make outputs
        named = [keras.layers.Identity(name=name)(x) for name, x in zip(model.output_names, flat, strict=True)]
        outputs = keras.tree.pack_sequence_as(outputs, named)
    gated = keras.Model(inputs, outputs, name=model.name)
    pairs = zip(model.weights, copy.weights, strict=True)
    reports.remember(gated, {id(new): reasons[old] for old, new in pairs if old in reasons})
    _copy_compilation(model, gated)
    return gated


def bake(model):
    """Return a plain Keras model that computes what `model` computes in inference, without `L0` layers.

    Each kernel is multiplied by its gates, which leaves exact zeros where a gate is closed. Units that only closed
    gates of a dense layer listen to are set to zero as well, weights and bias, in chains of layers that keep units
    apart (activations, dropout, normalization, pooling, Flatten).

    Args:
        model: A built model with `L0` layers, functional or Sequential, or one that Keras can rebuild from its config.

    Returns:
        A new model of the same layer names, which loads where `keras_sparse` is not installed. It is compiled like
        `model`, with an optimizer that starts anew, if that is possible. `model` stays as it is.

    Raises:
        ValueError: If the model is not built, has no gates, or its class makes `L0` layers by itself.
        TypeError: If it is not a Keras 3 model.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> layer = ks.layers.L0(keras.layers.Dense(10), penalty=1e-6)
    >>> model = keras.Sequential([keras.Input((20,)), layer])
    >>> layer.log_alphas[0].assign(np.where(np.arange(200).reshape(20, 10) < 150, -4.6, 4.6)) is None
    False
    >>> ks.report(ks.bake(model)).totals["zeros"]
    150
    """
    selection.check_model(model)
    if not gated_layers(model):
        raise ValueError(
            "There is nothing to bake: the model has no `ks.layers.L0`. "
            f"Received: {type(model).__name__} {model.name!r}"
        )
    source = _inside(model)
    plain = _plain(model) if source is model else _clone(source)
    gated = _copy_weights(source, plain, gated_layers(model))
    _zero_unread_units(plain)
    others = [w for w in selection.weights(plain) if w.variable not in gated]
    reports.remember(plain, {id(w.variable): w.skipped or "had no gates" for w in others})
    _copy_compilation(model, plain)
    return plain


def _plain(model):
    """A copy without gates, whose weights are not set yet."""
    config = _without_gates(keras.saving.serialize_keras_object(model))
    config.pop("compile_config", None)
    try:
        # Not Keras's own: `Add` is a layer and an operation.
        custom = {type(x).__name__: type(x) for x in selection.layers(model) if type(x).__module__[:6] != "keras."}
        with keras.saving.custom_object_scope(custom):
            plain = keras.saving.deserialize_keras_object(config, safe_mode=False)
    except Exception as error:
        raise ValueError(
            "The model cannot be rebuilt from its config, which `bake` needs: custom layers and models must implement "
            f"`get_config`. Received: {type(model).__name__} {model.name!r} ({type(error).__name__}: {error})"
        ) from error
    if gated_layers(plain):
        raise ValueError(
            f"The class {type(model).__name__} makes `L0` layers by itself, so that a copy has them too. Let it take "
            f"its layers as arguments that `get_config` returns, or use the functional API. Received: {model.name!r}"
        )
    return plain


def _inside(model):
    """The model in the one layer with gates, if there is nothing around it; else the model itself."""
    passive = (keras.layers.InputLayer, keras.layers.Identity)
    around = [x for x in getattr(model, "operations", ()) if not isinstance(x, passive)]
    if len(around) != 1 or not getattr(around[0], "of_model", False):
        return model
    passed_on = {id(x.output): x.input for x in model.operations if isinstance(x, keras.layers.Identity)}
    outputs = [passed_on.get(id(x), x) for x in model.outputs]
    own = keras.tree.flatten(around[0].output)
    whole = len(outputs) == len(own) and all(x is y for x, y in zip(outputs, own, strict=True))
    return around[0].layer if whole else model


def _clone(model, of_layer=None):
    """A copy of a model, its layers made by a function, `_copied` by default; the weights are new."""
    return keras.models.clone_model(model, _inputs(model), clone_function=of_layer or _copied, recursive=True)


def _copied(layer):
    # A function without a name cannot be found again from a config, and has no state.
    return layer if isinstance(layer, keras.layers.Lambda) else type(layer).from_config(layer.get_config())


def _inputs(model):
    """New inputs of the same names for a copy; Keras names them after tensors, not layers (3.15)."""
    if isinstance(model, keras.Sequential):
        return None
    names = {id(layer.output): layer.name for layer in model.layers if isinstance(layer, keras.layers.InputLayer)}
    return keras.tree.map_structure(
        lambda x: keras.Input(batch_shape=x.shape, dtype=x.dtype, sparse=x.sparse, name=names[id(x)]), model.input
    )


def _prices(model, penalty, filters):
    """The price of each selected weight, by its variable."""
    selected = selection.select(model, filters).chosen
    if not isinstance(penalty, dict):
        return IdentityDict.fromkeys((w.variable for w in selected), penalty)
    prices = IdentityDict()
    for regex, price in penalty.items():
        for weight in selection.matching(regex, selected):
            prices.setdefault(weight.variable, price)
    return prices


def _without_gates(config):
    """A serialized object with each `L0` in it replaced by the layer that it wraps."""
    if isinstance(config, (list, tuple)):
        return [_without_gates(item) for item in config]
    if not isinstance(config, dict):
        return config
    if config.get("registered_name") in map(keras.saving.get_registered_name, (L0, ChannelL0)):
        layer = config["config"]["layer"]
        # What a functional model says about a layer from outside (its calls) stays; the name is how others refer to it.
        inner = layer["config"] | {"name": config["config"]["name"]}
        config = {k: v for k, v in config.items() if k != "build_config"} | layer | {"config": inner}
    return {key: _without_gates(value) for key, value in config.items()}


def _copy_weights(source, target, baked=()):
    """Give `target` the weights of `source`, with the gates of some layers folded in; return what these changed."""
    with_gates = [*gated_layers(target), *baked]
    gates = IdentityDict.fromkeys(v for layer in with_gates for v in [*layer.log_alphas, layer.penalty])
    folded, changed = IdentityDict(), IdentityDict()
    for layer in baked:
        folded.update(layer.baked())
    # Both walk the same layers in the same order, but for the weights of gates.
    pairs = ([v for v in model.weights if v not in gates] for model in (source, target))
    for old, new in zip(*pairs, strict=True):
        value = selection.as_array(folded.get(old, old))
        new.assign(np.where(value == 0, 0, value))  # A gate of 0 makes -0.0 of a negative weight.
        if old in folded:
            changed[new] = True
    layers = (
        [one for one in selection.layers(model) if not getattr(one, "has_gates", False)] for model in (source, target)
    )
    for old, new in zip(*layers, strict=True):
        complete(old, new)
    return changed


def _copy_compilation(source, target):
    """Compile `target` as `source`, with a new optimizer, unless an optimizer, loss or metric has no config."""
    if source.compiled:
        with contextlib.suppress(Exception):
            target.compile_from_config(source.get_compile_config())


def _zero_unread_units(model):
    """Set units to zero whose outputs nobody uses, because all kernels that they reach are zero there."""
    if not getattr(model, "inputs", None):
        return
    unread = graph.unread_channels(model)
    for layer in reversed(model.layers):  # A unit that is removed takes those with it that only it read.
        made = graph.unit_kernel(layer)
        dead = unread(layer.name) if made is not None else None
        if dead is None or not dead.any():
            continue
        kernel, axis, bias = made
        value = selection.as_array(kernel)
        kernel.assign(np.where(np.expand_dims(dead, [i for i in range(value.ndim) if i != axis]), 0, value))
        if bias is not None:
            bias.assign(np.where(dead, 0, selection.as_array(bias)))
