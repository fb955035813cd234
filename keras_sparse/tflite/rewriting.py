"""A rewriting is the same network without what an accelerator computes wrong (`keras_sparse.tflite.faults`)."""

import keras
from keras import layers

from keras_sparse import graph
from keras_sparse.graph.rebuilding import packed, remade
from keras_sparse.identity import IdentityDict
from keras_sparse.tflite.faults import differs, grouped, shifted, takes_groups

__all__ = ["REWRITES", "Rewriting"]

_GROUPED = (layers.Conv1D, layers.Conv2D)
_CROPPING = {layers.Conv1DTranspose: layers.Cropping1D, layers.Conv2DTranspose: layers.Cropping2D}


class Rewriting:
    """A model built anew, with other layers where an accelerator would compute wrong numbers.

    Args:
        model: A built functional or Sequential model, channels last.
        faults: Functions of `keras_sparse.tflite.faults`: what to write otherwise.

    Attributes:
        rows: A dict for each change, with `layer`, `change` and `exact`.
        notes: Sentences on what was left.

    Example:

    >>> import keras
    >>> from keras_sparse.tflite.faults import grouped
    >>> from keras_sparse.tflite.rewriting import Rewriting
    >>> body = keras.layers.Conv2D(4, 3, groups=2, name="halves")
    >>> rewriting = Rewriting(keras.Sequential([keras.Input((8, 8, 6)), body]), [grouped])
    >>> [layer.name for layer in rewriting.model().layers if layer.weights]
    ['halves_0', 'halves_1']
    """

    flipped = False  # as an adaptation may be

    def __init__(self, model, faults):
        self.rows, self.notes, self._parts = [], [], IdentityDict()
        self._rewrites = [REWRITES[fault] for fault in faults if fault in REWRITES]
        self._new = graph.Rebuilding(model)
        self._outputs = graph.replay(model, self._new.inputs, self._call)

    def model(self):
        """The new model, with the weights."""
        return self._new.model(self._outputs)

    def _call(self, operation, args, kwargs):
        if isinstance(operation, keras.Model):
            return packed(operation, graph.replay(operation, keras.tree.flatten(args), self._call))
        for rewrite in self._rewrites if type(operation) in (*_CROPPING, *_GROUPED) else ():
            rewritten = rewrite(self, operation, *args, *kwargs.values())  # one tensor, whatever it is called
            if rewritten is not None:
                return rewritten
        return self._new.copy(operation)(*args, **kwargs)

    def _row(self, layer, change):
        row = {"layer": layer.name, "change": change, "exact": True}
        self.rows += [] if row in self.rows else [row]  # of a layer that is called several times

    def crop(self, layer, x):
        """What a transposed convolution with padding "same" computes, by "valid" and a cropping; or `None`."""
        if type(layer) not in _CROPPING or layer.padding != "same" or max(layer.dilation_rate) > 1:
            return None
        sizes = list(zip(layer.kernel_size, layer.strides, x.shape[1:-1], strict=True))
        if not any(size is None or differs(kernel, stride, size, stride * size) for kernel, stride, size in sizes):
            return None
        if layer.output_padding is not None:
            self.notes.append(f"{layer.name}: left as it is, because of its `output_padding`.")
            return None
        surplus = [max(kernel - stride, 0) for kernel, stride, _ in sizes]
        cuts = [(n // 2, n - n // 2) for n in surplus]
        self._row(layer, f"padding='valid' and a {_CROPPING[type(layer)].__name__} of {cuts}")
        cropping = _CROPPING[type(layer)](
            cuts if len(cuts) > 1 else cuts[0], name=self._new.unique_name(f"{layer.name}_crop")
        )
        return cropping(self._new.copy(layer, {"padding": "valid"})(x))

    def split(self, layer, x):
        """What a convolution in groups computes, by one for each group; or `None`."""
        if type(layer) not in _GROUPED or takes_groups(
            layer.groups, x.shape[-1] // layer.groups, layer.filters // layer.groups
        ):
            return None
        if layer.activation is keras.activations.softmax or layer.lora_enabled:
            why = "it has LoRA weights" if layer.lora_enabled else "its activation looks at all groups"
            self.notes.append(f"{layer.name}: left as it is, because {why}.")
            return None
        many = layer.filters // layer.groups
        if layer not in self._parts:
            changes = {"groups": 1, "filters": many}
            names = [self._new.unique_name(f"{layer.name}_{number}") for number in range(layer.groups)]
            self._parts[layer] = [remade(layer, changes | {"name": name}) for name in names]
            self._row(layer, f"{layer.groups} convolutions, one for each group")
        parts = keras.ops.split(x, layer.groups, axis=-1)
        outputs = [one(part) for one, part in zip(self._parts[layer], parts, strict=True)]
        for number, one in enumerate(self._parts[layer]):
            one.set_weights([value[..., number * many : (number + 1) * many] for value in layer.get_weights()])
        return layers.Concatenate(name=self._new.unique_name(f"{layer.name}_groups"))(outputs)


REWRITES = {shifted: Rewriting.crop, grouped: Rewriting.split}  # how to write what a fault is about
