"""An adaptation is the same network in a form that a target's sparse kernels take: the same weights, the same function.

XNNPACK runs 1x1 convolutions sparse if the whole network fits (`keras_sparse.tflite.xnnpack`). Most networks miss that
by their form, not by what they compute:

* Padding. "same" at stride 2 adds its one row and column at the bottom and right of an even image; XNNPACK's sparse
  kernels want one on each side, and never read the last ones. So they want a padding at the top and left. A network of
  convolutions that looks at the image upside down, with every kernel upside down as well, pads just there, and computes
  the very same; global pooling at its end does not care. So the image is flipped once, before the first convolution.
* Heads. Global average pooling with `keepdims=True` and 1x1 convolutions behind it become pooling and Dense layers.
* Squeeze-and-excite branches pool with `keepdims=True` in place of a `Reshape`.
"""

import keras
import numpy as np
from keras import layers

from keras_sparse import graph, selection
from keras_sparse.graph.rebuilding import packed
from keras_sparse.reports import Report
from keras_sparse.tflite.padding import same, wanted_padding, windows
from keras_sparse.tflite.rewriting import REWRITES, Rewriting
from keras_sparse.tflite.sameness import difference, of_rounding
from keras_sparse.tflite.targets import TARGETS, get

__all__ = ["adapt"]

_CONSTANTS = ("scale", "offset", "mean", "variance")  # arrays in these layers
_DENSE_ARGUMENTS = (
    "name", "trainable", "dtype", "activation", "use_bias", "kernel_initializer", "bias_initializer",
    "kernel_regularizer", "bias_regularizer", "activity_regularizer", "kernel_constraint", "bias_constraint",
)  # fmt: skip


def adapt(model, target="xnnpack"):
    """Build a model of the same weights in a form that `target` runs sparse, or right.

    Changes for XNNPACK, where zeros are to be skipped:

    * Convolutions of three channels at the input and depthwise convolutions, 3x3 or 5x5 with stride 2, get a
      `ZeroPadding2D` of half the kernel on each side. Where they padded at the bottom and right ("same" at even sizes;
      what `keras.applications` does by `ZeroPadding2D`), the image is flipped before the first convolution and all
      kernels with it, which computes the same. Where a network pads on both sides in some layers and at the bottom in
      others, the latter are shifted by one pixel: train such a model a little more.
    * `GlobalAveragePooling2D(keepdims=True)` and 1x1 convolutions behind it become pooling and `Dense` layers.
    * `GlobalAveragePooling2D` and a `Reshape` to 1x1 in squeeze-and-excite branches become one pooling.
    * Nested models are laid out flat.

    Changes for `"gpu"`, all of them exact, of what LiteRT's accelerator would compute wrong without an error
    (`keras_sparse.tflite.faults`):

    * A transposed convolution with padding "same", where the GPU would shift it, becomes one with "valid" and a
      cropping.
    * A convolution in groups whose channels four does not divide becomes one for each group, with a number behind its
      name.

    Args:
        model: A built functional or Sequential model, channels last; for XNNPACK with images of known, even size.
        target: `"xnnpack"` or `"xnnpack-wasm"`, which want the same, or `"gpu"`.

    Returns:
        `(adapted, report)`: a functional `keras.Model` that is not compiled and shares nothing with `model`, whose
        layers keep their names; and a `Report` with a row for each change, with `layer`, `change` and `exact`; totals:
        `changes`, `exact`, and `difference`, the largest difference of an output on random inputs, relative to its
        magnitude.

    Raises:
        ValueError: If `target` wants no other form, or the model is not of a kind that can be rebuilt.
        TypeError: If `model` is no Keras 3 model.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.applications.MobileNet((96, 96, 3), alpha=0.25, weights=None, classes=10)
    >>> adapted, report = ks.tflite.adapt(model)
    >>> report.totals["exact"], report.totals["difference"] < 1e-4
    (True, True)
    """
    wanted = get(target)
    if not _wants_a_form(wanted):
        names = ", ".join(repr(one.name) for one in TARGETS if _wants_a_form(one))
        raise ValueError(
            f"`target` must be one that wants another form of some networks: {names}. Others run a network as it is; "
            f"fewer channels (`ks.shrink`) make it faster there. Received: target={target!r}"
        )
    selection.check_model(model)
    _check(model)
    trials = [Rewriting(model, wanted.faults)] if wanted.form is None else _adaptations(model, wanted.form)
    tolerance = of_rounding(model)
    # Upside down or not: what changes less of what the network computes, and then what changes less.
    for best in sorted(trials, key=lambda trial: (sum(not row["exact"] for row in trial.rows), trial.flipped)):
        adapted = best.model()
        totals = {"changes": len(best.rows), "exact": all(row["exact"] for row in best.rows)}
        totals["difference"] = difference(model, adapted)
        if totals["difference"] < tolerance or not totals["exact"]:
            break
    else:
        raise ValueError(
            "The adapted model does not compute what the model computes, so it is not returned. Report this model to "
            f"keras_sparse if it has no random layer that is active in inference. Received: {model.name!r}, outputs "
            f"differ by {totals['difference']:.1e} of their magnitude"
        )
    title = f"Adaptation of {model.name} to {target}"
    return adapted, Report(title, best.rows, totals, best.notes, {"difference": ".1e"})


def _wants_a_form(target):
    return target.form is not None or any(fault in REWRITES for fault in target.faults)


def _adaptations(model, form):
    """The ways to lay a model out for sparse kernels, upside down or not."""
    found = []
    for flipped in (False, True):
        try:
            found.append(_Adaptation(model, form, flipped))
        except ValueError as error:
            refusal = error
    if not found:
        raise refusal
    return found


def _check(model):
    if not getattr(model, "inputs", None) or not isinstance(model, keras.Model):
        raise ValueError(
            "`model` must be a functional or Sequential model: of a subclassed one the graph is not known. Rebuild it "
            f"with `keras.Model(inputs, outputs)`. Received: {type(model).__name__}"
        )
    for layer in selection.layers(model):
        if getattr(layer, "data_format", None) == "channels_first":
            raise ValueError(f"`model` must have the channels last. Received: {layer.name!r} has them first")


class _Adaptation:
    """A model is built anew, with the image upside down or not; tensors carry what is known of them."""

    def __init__(self, model, form, flipped):
        self.flipped, self.rows, self.notes = flipped, [], []
        self._form = form
        self._new = graph.Rebuilding(model)
        self._excited = {id(layer) for layer in _excitations(model)}
        self._upside_down = set()  # ids of tensors
        self._padded = {}  # id of a padded tensor -> (tensor before, padding of rows, padding of columns)
        self._vectors = {}  # id of a tensor (n, 1, 1, c) -> the same as (n, c)
        self._alive = []  # ids are of objects that must live on
        # id of a tensor before the first convolution -> the same upside down, or None
        self._before = dict.fromkeys(map(id, self._new.inputs)) if flipped else {}
        self._outputs = [self._upright(y) for y in graph.replay(model, self._new.inputs, self._call)]

    def model(self):
        """The new model, with the weights."""
        return self._new.model(self._outputs)

    def _call(self, operation, args, kwargs):
        if isinstance(operation, keras.Model):
            return packed(operation, graph.replay(operation, keras.tree.flatten(args), self._call))
        first = args[0] if args and isinstance(args[0], keras.KerasTensor) else None
        kind = type(operation).__name__
        if kind == "ZeroPadding2D" and first is not None:
            return self._pad(operation, self._turned(first))
        if type(operation) in (layers.Conv2D, layers.DepthwiseConv2D) and first is not None:
            return self._convolve(operation, self._turned(first))
        if kind == "GlobalAveragePooling2D" and first is not None:
            return self._pool(operation, first, id(operation) in self._excited)
        if kind in ("Reshape", "Flatten") and id(first) in self._vectors:
            return self._reshape(operation, first)
        if id(first) in self._vectors and not kwargs.get("mask") and _on_vectors(operation):
            return self._as_image(self._new.copy(operation)(self._vectors[id(first)]))
        if kind == "GlobalMaxPooling2D":
            return self._new.copy(operation)(*args, **kwargs)
        tensors = keras.tree.flatten([args, kwargs])
        turned = any(id(t) in self._upside_down for t in tensors)
        if turned:
            others = [t for t in tensors if not self._can_turn(t)] + [getattr(operation, n, 0) for n in _CONSTANTS]
            pointwise = graph.kind_of(operation).pointwise
            turned = pointwise and _alike(operation) and not any(_is_spatial(other) for other in others)
            args, kwargs = keras.tree.map_structure(self._turned if turned else self._upright, [args, kwargs])
        outputs = self._new.copy(operation)(*args, **kwargs)
        if turned:
            self._mark(outputs)
        elif all(id(t) in self._before for t in tensors if isinstance(t, keras.KerasTensor)):
            self._alive += keras.tree.flatten(outputs)
            self._before.update((id(y), None) for y in keras.tree.flatten(outputs))
        return outputs

    # What is known of tensors

    def _mark(self, tensor):
        self._upside_down.add(id(tensor))
        self._alive.append(tensor)
        return tensor

    def _can_turn(self, tensor):
        return id(tensor) in self._upside_down or (id(tensor) in self._before and _is_image(tensor))

    def _turned(self, tensor):
        """The tensor upside down, if it is an image before the first convolution; else as it is."""
        if id(tensor) in self._upside_down or not self._can_turn(tensor):
            return tensor
        if not self._upside_down:
            self._row("input", "the image is flipped, rows and columns, and all kernels with it", True)
        if self._before[id(tensor)] is None:
            self._before[id(tensor)] = self._mark(keras.ops.flip(tensor, (1, 2)))
        return self._before[id(tensor)]

    def _upright(self, tensor):
        return keras.ops.flip(tensor, (1, 2)) if id(tensor) in self._upside_down else tensor

    def _like(self, before, after):
        return self._mark(after) if id(before) in self._upside_down else after

    def _as_image(self, vector):
        image = layers.Reshape((1, 1, vector.shape[-1]))(vector)
        self._vectors[id(image)] = vector
        self._alive.append(image)
        return image

    # Layers

    def _row(self, layer, change, exact):
        self.rows.append({"layer": layer, "change": change, "exact": exact})

    def _pad(self, layer, x):
        padding = layer.padding
        turned = id(x) in self._upside_down
        rows, columns = (tuple(reversed(p)) if turned else tuple(p) for p in padding)
        new = self._new.copy(layer, {"padding": (rows, columns)} if turned and (rows, columns) != padding else None)
        y = self._like(x, new(x))
        self._padded[id(y)] = x, rows, columns
        self._alive.append(y)
        return y

    def _convolve(self, layer, x):
        if id(x) in self._vectors and _is_pointwise(layer):
            return self._connect(layer, x)
        wanted = wanted_padding(layer, x, self._form)
        source, rows, columns = self._padded.get(id(x), (x, (0, 0), (0, 0)))
        if wanted is not None and None in source.shape[1:3]:
            self.notes.append(
                f"{layer.name}: its padding is left as it is, because the size of the image is not known."
            )
        if wanted is None or None in source.shape[1:3]:
            return self._plain(layer, x)
        if layer.padding == "valid" and rows == columns == (wanted, wanted):
            return self._plain(layer, x)
        current = self._windows(layer, x, source, (rows, columns))
        fitting = [windows(n, (wanted, wanted), layer, axis) for axis, n in enumerate(source.shape[1:3])]
        if [count for _, _, count in current] != [count for _, _, count in fitting]:
            self.notes.append(f"{layer.name}: a padding of {wanted} on each side would give it another output size.")
            return self._plain(layer, x)
        exact = all(first == wanted for first, _, _ in current)
        text = f"a padding of {wanted} on each side, by ZeroPadding2D"
        self._row(layer.name, text if exact else f"{text}: the image is shifted by {wanted - current[0][0]}", exact)
        if any(n % 2 for n in source.shape[1:3]):
            self.notes.append(
                f"{layer.name}: of an odd size, {source.shape[1:3]}, which TFLite's converter pads its way."
            )
        padded = layers.ZeroPadding2D(wanted, name=self._new.unique_name(f"{layer.name}_padding"))(source)
        new = self._new.copy(layer, {"padding": "valid"}, self._kernels(layer, x))
        return self._like(x, new(padded))

    def _windows(self, layer, x, source, paddings):
        """For rows and columns: the padding in front and behind, as this image lies, and how many windows there are."""
        turned, found = id(x) in self._upside_down, []
        for axis, (size, padding) in enumerate(zip(source.shape[1:3], paddings, strict=True)):
            first, last = reversed(padding) if turned else padding  # as the model has it
            if layer.padding == "same":
                front, behind = same(size + first + last, layer, axis)
                first, last = first + front, last + behind
            first, last, count = windows(size, (first, last), layer, axis)
            found.append((last, first, count) if turned else (first, last, count))
        return found

    def _plain(self, layer, x):
        """The layer with the padding it has; for an image upside down with the one that this asks for."""
        changes = None
        if id(x) in self._upside_down:
            sizes = [n or 64 for n in x.shape[1:3]] if max(layer.strides) == 1 else x.shape[1:3]
            if None in sizes:
                return self._new.copy(layer)(self._upright(x))
            pads = []
            for axis, size in enumerate(sizes):
                front, behind = same(size, layer, axis) if layer.padding == "same" else (0, 0)
                front, behind, _ = windows(size, (front, behind), layer, axis)
                pads.append((behind, front))
            if min(first for first, _ in pads) < 0:  # the last rows are not read, which would be the first ones now
                return self._new.copy(layer)(self._upright(x))
            own = [same(n, layer, i) if layer.padding == "same" else (0, 0) for i, n in enumerate(sizes)]
            if pads != own:
                changes = {"padding": "valid"}
                pads = [(first, max(0, last)) for first, last in pads]
                x = self._mark(layers.ZeroPadding2D(pads, name=self._new.unique_name(f"{layer.name}_padding"))(x))
        return self._like(x, self._new.copy(layer, changes, self._kernels(layer, x))(x))

    def _kernels(self, layer, x):
        values = layer.get_weights()
        if id(x) in self._upside_down:
            values[0] = values[0][::-1, ::-1]
        return values

    def _pool(self, layer, x, excites):
        keep = layer.keepdims
        if excites:
            if not keep:
                self._row(layer.name, "pools with keepdims=True, in place of a Reshape", True)
            y = self._new.copy(layer, None if keep else {"keepdims": True})(x)
            if not keep:
                self._vectors[id(y)] = y
                self._alive.append(y)
            return y
        if not keep:
            return self._new.copy(layer)(x)
        self._row(layer.name, "pools to a vector (keepdims=False)", True)
        return self._as_image(self._new.copy(layer, {"keepdims": False})(x))

    def _reshape(self, layer, x):
        vector = self._vectors[id(x)]
        if type(layer).__name__ == "Reshape" and tuple(layer.target_shape) == (1, 1, vector.shape[-1]):
            return x
        if len(vector.shape) == 2 and (type(layer).__name__ == "Flatten" or len(layer.target_shape) == 1):
            return vector
        return self._new.copy(layer)(x)

    def _connect(self, layer, x):
        vector = self._vectors[id(x)]
        if len(vector.shape) > 2:  # a squeeze-and-excite branch stays an image
            return self._new.copy(layer)(x)
        config = layer.get_config()
        values = layer.get_weights()
        values[0] = values[0].reshape(values[0].shape[-2:])
        width, old = graph.kinds()[layers.Dense].width, graph.kind_of(layer).width
        changes = {key: config[key] for key in _DENSE_ARGUMENTS} | {width: config[old]}
        self._row(layer.name, "a Dense layer in place of the 1x1 convolution", True)
        return self._as_image(self._new.copy(layer, changes, values, layers.Dense)(vector))


def _is_image(tensor):
    return len(tensor.shape) == 4 and tuple(tensor.shape[1:3]) != (1, 1)


def _is_spatial(value):
    """Whether it has rows or columns when it meets an image."""
    return any(n != 1 for n in np.shape(value)[-3:-1])


def _on_vectors(operation):
    """Whether a layer does to vectors what it does to images of one pixel."""
    if not isinstance(operation, keras.layers.Layer) or operation.weights:
        return False
    on_channels = getattr(operation, "axis", -1) == -1 and getattr(operation, "noise_shape", None) is None
    return on_channels and (graph.kind_of(operation).activates or type(operation) is layers.Dropout)


def _is_pointwise(layer):
    return type(layer) is layers.Conv2D and layer.kernel_size == layer.strides == (1, 1) and layer.groups == 1


def _alike(operation):
    """Whether the axis of a layer, if it has one, is that of the channels."""
    axis = getattr(operation, "axis", None)
    axes = axis if isinstance(axis, (tuple, list)) else [axis]
    return all(one in (None, -1, 3) for one in axes)


def _excitations(model):
    """The poolings whose outcome comes back to an image, in squeeze-and-excite branches, of nested models too."""
    models = [x for x in selection.layers(model) if isinstance(x, keras.Model) and not isinstance(x, keras.Sequential)]
    return [layer for each in models if getattr(each, "inputs", None) for layer in _excitations_of(each)]


def _excitations_of(model):
    wiring, operations = graph.wiring(model), {operation.name: operation for operation in model.operations}
    sources = {layer["name"]: graph.references(layer["inbound_nodes"]) for layer in wiring["layers"]}
    found = set()
    for start in (n for n, operation in operations.items() if type(operation) is layers.GlobalAveragePooling2D):
        behind = {start}
        for name, own in sources.items():  # in the order of execution
            if behind & set(own):
                behind.add(name)
                others = [operations[other] for other in own if other not in behind]
                if any(_is_image(operation.output) for operation in others):
                    found.add(start)
                    break
    return [operations[name] for name in found]
