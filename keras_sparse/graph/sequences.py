"""Layers for sequences, recurrent ones and attention, have channels inside: units, heads, the width of keys and values.

Also here: wrappers that run other layers along a sequence.
"""

import inspect

import keras
import numpy as np

from keras_sparse.graph.calls import Call, Condition, Part, Tensor
from keras_sparse.graph.contractions import Contraction
from keras_sparse.graph.kinds import kind_of
from keras_sparse.graph.mixing import Linear, Refused, array, rule_of
from keras_sparse.graph.probing import channelwise
from keras_sparse.graph.weights import layers as layers_of

__all__ = ["rules"]

_CELLS = (keras.layers.LSTMCell, keras.layers.GRUCell, keras.layers.SimpleRNNCell)


def rules():
    """The rules of this module, `{class, or classes, of layers: class of calls}`.

    Example:

    >>> import keras
    >>> from keras_sparse.graph.sequences import rules
    >>> rules()[keras.layers.TimeDistributed].__name__
    'EachStep'
    """
    return {
        keras.layers.RNN: Recurrent,
        keras.layers.Bidirectional: BothWays,
        keras.layers.TimeDistributed: EachStep,
        keras.layers.ReversibleEmbedding: Reversible,
        keras.layers.Attention: Contraction,  # if its scores have a scale; else it has no weights
        (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention): Attention,
    }


class Recurrent(Call):
    """A recurrent layer of one cell: a unit leaves with its columns of all gates and its row of states."""

    def label(self):
        layer = self.operation
        self.cell = cell = layer.cell
        spatial = hasattr(cell, "filters")
        if not (isinstance(cell, _CELLS) or spatial) or kind_of(layer).holder is None:
            self.stay(f"{layer.name} has a cell of the class {type(cell).__name__}, which is not known")
            return
        functions = (getattr(cell, name, None) for name in ("activation", "recurrent_activation"))
        if not all(function is None or channelwise(function) for function in functions):
            self.stay(f"the activation of {layer.name} looks at all channels")
            return
        units = self.units = cell.filters if spatial else cell.units
        self.made = self.classes.new(units)
        x, *states = self.inputs
        positions = len(cell.kernel_size) if spatial and getattr(cell, "data_format", None) == "channels_first" else 0
        for tensor in (*self.outputs, *states):
            rank = len(tensor.shape)
            axis = rank - 1 - positions
            shape = [1] * rank
            shape[axis] = units
            if tensor.full[axis] != units:
                self.stay(f"{layer.name} is called with more than states")
                return
            if tensor.labels is None:
                tensor.labels = self.made.reshape(shape)
            else:
                self.classes.join(self.classes.join_along(tensor.labels, axis), self.made)
        width = cell.kernel.shape[-2]
        self.axis = len(x.shape) - 1 - positions
        self.state_axis = -1 - positions
        self.read = np.broadcast_to(self.classes.join_along(x.labels, self.axis), width)
        self.gates = cell.kernel.shape[-1] // units
        rank, every = len(cell.kernel.shape), np.tile(self.made, self.gates)
        self.parts = [
            Part(cell.kernel, {rank - 2: self.read, rank - 1: every}, (rank - 1,)),
            Part(cell.recurrent_kernel, {rank - 2: self.made, rank - 1: every}, (rank - 1,)),
        ]
        if cell.bias is not None:
            self.parts.append(Part(cell.bias, {len(cell.bias.shape) - 1: every}, (len(cell.bias.shape) - 1,)))
        self.conditions = [
            Condition(self.read, self._can_lose_input, f"{layer.name} reads it"),
            Condition(self.made, self._can_lose_unit, f"{layer.name} reads it"),
        ]

    def _rows(self, variable):
        """A kernel as (positions, rows, gates, units)."""
        value = array(variable)
        return value.reshape(-1, value.shape[-2], self.gates, self.units)

    def _known(self):
        return self.inputs[0].constants_along(self.axis, len(self.read))

    def _can_lose_input(self, kept):
        used = (self._rows(self.cell.kernel)[..., kept(self.made)] != 0).any(axis=(0, 2, 3))
        return ~used | (self._known() == 0)

    def _can_lose_unit(self, kept):
        rows = self._rows(self.cell.recurrent_kernel)[..., kept(self.made)]
        return ~(rows != 0).any(axis=(0, 2, 3)) | self._zero()

    def _zero(self):
        """Which units are zero at all steps: those whose candidate values are."""
        cell, gate = self.cell, min(2, self.gates - 1)
        if float(keras.ops.convert_to_numpy(cell.activation(keras.ops.zeros((1,))))[0]) != 0:
            return np.zeros(self.units, bool)
        kernel, recurrent = (self._rows(v)[:, :, gate] != 0 for v in (cell.kernel, cell.recurrent_kernel))
        found = ~kernel[:, self._known() != 0].any(axis=(0, 1))
        if cell.bias is not None:
            found &= ~(array(cell.bias).reshape(-1, self.gates, self.units)[:, gate] != 0).any(axis=0)
        for state in self.inputs[1:]:
            found &= state.constants_along(self.state_axis, self.units) == 0
        while True:  # a unit that reads units of zeros
            smaller = found & ~recurrent[:, ~found].any(axis=(0, 1))
            if np.array_equal(smaller, found):
                return found
            found = smaller

    def find_constants(self):
        zero = np.zeros(0) if self.fixed else self._zero()
        if zero.any():
            for output in self.outputs:
                output.constant = np.where(zero, 0.0, np.nan).reshape(output.labels.shape)

    def changed(self, kept):
        count, layer = int(kept(self.made).sum()), self.operation
        if count == self.units:
            return {}
        width = "filters" if hasattr(self.cell, "filters") else "units"
        config = layer.get_config()
        return {width: count} if width in config else {"cell": _changed(config["cell"], {width: count})}


class BothWays(Call):
    """Bidirectional: two recurrent layers, whose outputs lie beside each other or are joined."""

    def label(self):
        layer = self.operation
        (x, *states), every = self.inputs, self.outputs
        both = layer.forward_layer, layer.backward_layer
        if any(rule_of(one) is not Recurrent for one in both) or states:
            self.stay(f"{layer.name} runs layers that are not known, or begins with states")
            return
        mode = layer.merge_mode
        merged = 2 if mode is None else 1
        inner = (len(every) - merged) // 2
        self.ways, self.merged = [], merged
        for i, one in enumerate(both):
            main = every[i if mode is None else 0]
            shape = main.shape if mode != "concat" else (*main.shape[:-1], main.full[-1] // 2)
            own = [Tensor(shape, main.dtype), *every[merged + i * inner : merged + (i + 1) * inner]]
            way = Recurrent(one, [x], {}, [x], own, self.classes)
            way.label()
            self.ways.append(way)
        if any(way.fixed for way in self.ways):
            self.stay(f"{layer.name} runs layers that are not known")
            return
        left, right = (way.outputs[0].labels for way in self.ways)
        self.classes.join(left, right)  # Keras takes the width of the one way for that of the other
        if mode is None:
            every[0].labels, every[1].labels = left, right
        elif mode == "concat" and not self._along_positions:
            every[0].labels = np.concatenate([left, right], axis=-1)
        else:
            every[0].labels = left
        self.parts = [part for way in self.ways for part in way.parts]
        self.conditions = [condition for way in self.ways for condition in way.conditions]

    @property
    def _along_positions(self):
        """Whether Keras puts both ways beside each other along the last axis, and channels lie along another one."""
        return self.ways[0].state_axis != -1

    def find_constants(self):
        if self.fixed:
            return
        for way in self.ways:
            way.update_constants()
        left, right = (way.outputs[0].constants for way in self.ways)
        mode = self.operation.merge_mode
        if mode is None:
            values = [left, right]
        elif mode == "concat" and self._along_positions:
            values = [np.where(left == right, left, np.nan)]
        elif mode == "concat":
            values = [np.concatenate([left, right], axis=-1)]
        else:
            zero = (left == 0) | (right == 0) if mode == "mul" else (left == 0) & (right == 0)
            values = [np.where(zero, 0.0, np.nan)]
        for output, value in zip(self.outputs, values, strict=False):
            output.constant = None if np.isnan(value).all() else value

    def changed(self, kept):
        forward, backward = (way.changes(kept) for way in self.ways)
        if not forward and not backward:
            return {}
        config = self.operation.get_config()
        changed = {"layer": _changed(config["layer"], forward)}
        if forward != backward or config.get("backward_layer"):
            own = keras.saving.serialize_keras_object(self.operation.backward_layer)
            changed["backward_layer"] = _changed(own, backward)
        return changed


class EachStep(Call):
    """TimeDistributed: one layer on each step."""

    def label(self):
        layer = self.operation.layer
        (x,), (y,) = self.inputs, self.outputs
        rule = rule_of(layer)
        if isinstance(layer, keras.Model) or rule is Refused or x.labels.shape[1] != 1:
            self.stay(f"{self.operation.name} repeats {layer.name} ({type(layer).__name__}), which is not known")
            return
        self.before, self.after = (Tensor((t.shape[0], *t.shape[2:]), t.dtype) for t in (x, y))
        self.before.labels = x.labels[:, 0]
        self.inner = rule(layer, [self.before], {}, [self.before], [self.after], self.classes)
        self.inner.label()
        if self.inner.fixed:
            self.stay(f"{layer.name} in {self.operation.name} is not known")
            return
        y.labels = self.after.labels[:, None]
        self.parts, self.conditions = self.inner.parts, self.inner.conditions

    def find_constants(self):
        if self.fixed:
            return
        value = self.inputs[0].constant
        self.before.constant = None if value is None else value[:, 0]
        self.inner.shared = self.shared
        self.inner.update_constants()
        found = self.after.constant
        self.outputs[0].constant = None if found is None else found[:, None]

    def changed(self, kept):
        changes = self.inner.changes(kept)
        return {"layer": _changed(self.operation.get_config()["layer"], changes)} if changes else {}

    def weights(self, kept):
        return super().weights(kept) if self.fixed else self.inner.weights(kept)


def _changed(serialized, changes):
    """A serialized layer with changes in its config."""
    return {key: value for key, value in serialized.items() if key != "build_config"} | {
        "config": serialized["config"] | changes
    }


class Reversible(Call):
    """An embedding that also multiplies by its table, to score the words."""

    def label(self):
        layer = self.operation
        self.reverse = bool(self.kwargs.get("reverse", len(self.args) > 1 and self.args[1]))
        (x,), (y,) = self.inputs, self.outputs
        width = layer.embeddings.shape[-1]
        self.table = layer.embeddings
        if self.reverse:
            self.made = np.broadcast_to(self.classes.join_along(x.labels, len(x.shape) - 1), width)
            y.labels = self.classes.new(1).reshape([1] * len(y.shape))
            self.classes.fix(y.labels, f"{layer.name} scores words")
            self.table = layer.embeddings if layer.tie_weights else layer.reverse_embeddings
            self.conditions = [Condition(self.made, self._can_lose, f"{layer.name} reads it")]
        else:
            self.made = self.classes.new(width)
            self.classes.fix(x.labels, f"{layer.name} looks it up")
            y.labels = self.made.reshape((1,) * (len(y.shape) - 1) + (-1,))
        self.parts = [Part(layer.embeddings, {1: self.made}, (1,))]
        if not layer.tie_weights:
            self.parts.append(Part(layer.reverse_embeddings, {0: self.made}))

    def _can_lose(self, kept):
        axis = 0 if self.operation.tie_weights else 1
        known = self.inputs[0].constants_along(-1, len(self.made))
        return ~(array(self.table) != 0).any(axis=axis) | (known == 0)

    def find_constants(self):
        if not self.fixed and not self.reverse:
            zero = ~(array(self.table) != 0).any(axis=0)
            self.outputs[0].constant = np.where(zero, 0.0, np.nan).reshape(self.outputs[0].labels.shape)

    def changed(self, kept):
        count = int(kept(self.made).sum())
        return {} if count == len(self.made) else {"output_dim": count}


class Attention(Call):
    """Attention of several heads: whole heads leave, and the width of keys and of values, the same in all heads."""

    def label(self):
        layer, classes = self.operation, self.classes
        own = {inner.name: inner for inner in layers_of(layer) if isinstance(inner, keras.layers.EinsumDense)}
        names = {"query", "key", "value", "attention_output"}
        known = own.keys() - {"gate"} == names and all(rule_of(inner) is Linear for inner in own.values())
        if not known or len(layer.weights) != sum(len(inner.weights) for inner in own.values()):
            self.stay(f"{layer.name} ({type(layer).__name__}) has other weights than those of queries, keys and values")
            return
        bound = inspect.signature(layer.call).bind(*self.args, **self.kwargs).arguments
        query, value = bound["query"], bound["value"]
        key = bound.get("key")
        self.sources = {"query": query, "value": value, "key": value if key is None else key, "gate": query}
        for tensor in self.inputs:
            if all(tensor is not source for source in self.sources.values()):
                classes.fix(tensor.labels, f"{layer.name} takes it as a mask")
        self.own = own
        shape = {name: tuple(inner.kernel.shape) for name, inner in own.items()}
        grouped = isinstance(layer, keras.layers.GroupQueryAttention)
        self.kv_heads = classes.new(shape["key"][1])
        self.heads = np.repeat(self.kv_heads, shape["query"][1] // shape["key"][1])
        self.key_width = classes.new(shape["key"][2])
        # JAX computes attention only with keys and values of one width.
        same = grouped or (keras.backend.backend() == "jax" and shape["key"][2] == shape["value"][2])
        self.value_width = self.key_width if same else classes.new(shape["value"][2])
        out = self.outputs[0]
        self.made = classes.new(out.full[-1])
        if grouped:  # it returns as many channels as its query has
            classes.join(classes.join_along(query.labels, len(query.shape) - 1), self.made)
        out.labels = self.made.reshape((1,) * (len(out.shape) - 1) + (-1,))
        for scores in self.outputs[1:]:
            scores.labels = classes.new(1).reshape([1] * len(scores.shape))
            classes.fix(scores.labels, f"{layer.name} returns the scores of its heads")
            classes.fix(self.kv_heads, f"{layer.name} returns the scores of its heads")
        self.read = {}
        for name, tensor in self.sources.items():
            if name not in own:
                continue
            labels = classes.join_along(tensor.labels, len(tensor.shape) - 1)
            self.read[name] = np.broadcast_to(labels, shape[name][0])
            heads, width = self._inner(name)
            self.parts.append(Part(own[name].kernel, {0: self.read[name], 1: heads, 2: width}, made=(2,)))
            if own[name].bias is not None:
                self.parts.append(Part(own[name].bias, {0: heads, 1: width}, made=(1,)))
            self.conditions.append(Condition(self.read[name], self._loses_input(name), f"{layer.name} reads it"))
        last = own["attention_output"]
        axes = {0: self.heads, 1: self.value_width, len(last.kernel.shape) - 1: self.made}
        self.parts.append(Part(last.kernel, axes, (0, len(last.kernel.shape) - 1)))
        if last.bias is not None:
            self.parts.append(Part(last.bias, {len(last.bias.shape) - 1: self.made}, (len(last.bias.shape) - 1,)))
        self.conditions += [
            Condition(self.heads, self._loses_head, f"{layer.name} reads it"),
            Condition(self.key_width, self._loses_key, f"{layer.name} reads it"),
            Condition(self.value_width, self._loses_value, f"{layer.name} reads it"),
        ]

    def _inner(self, name):
        heads = self.heads if name in ("query", "gate") else self.kv_heads
        return heads, self.key_width if name in ("query", "key") else self.value_width

    def _live(self, name):
        """Which (head, channel) of queries, keys or values is not zero, of all heads of queries."""
        inner = self.own[name]
        known = self.sources[name].constants_along(-1, len(self.read[name]))
        live = (array(inner.kernel)[known != 0] != 0).any(axis=0)
        if inner.bias is not None:
            live |= array(inner.bias) != 0
        return np.repeat(live, len(self.heads) // len(live), axis=0)

    def _carried(self, kept):
        """Which (head, channel) of the heads' outputs is not zero and read by what stays."""
        value = array(self.own["attention_output"].kernel)[..., kept(self.made)]
        return (value.reshape(*value.shape[:2], -1) != 0).any(axis=-1) & self._live("value")

    def _loses_input(self, name):
        def test(kept):
            heads, width = self._inner(name)
            value = array(self.own[name].kernel)[:, kept(heads)][:, :, kept(width)]
            known = self.sources[name].constants_along(-1, len(self.read[name]))
            return ~(value != 0).any(axis=(1, 2)) | (known == 0)

        return test

    # Of both axes all are looked at: what carries something keeps its head and its place.

    def _loses_head(self, kept):
        return ~self._carried(kept).any(axis=1)

    def _loses_key(self, kept):
        return ~(self._live("query") & self._live("key"))[kept(self.heads)].any(axis=0)

    def _loses_value(self, kept):
        return ~self._carried(kept).any(axis=0)

    def find_constants(self):
        if self.fixed:
            return
        last = self.own["attention_output"]
        value = array(last.kernel)
        off = ~(value != 0).any(axis=tuple(range(value.ndim - 1)))
        if off.any() and value.ndim == 3:
            bias = np.zeros(len(self.made)) if last.bias is None else array(last.bias)
            self.outputs[0].constant = np.where(off, bias, np.nan).reshape(self.outputs[0].labels.shape)

    def changed(self, kept):
        heads, kv, key, value, out = (
            int(kept(x).sum()) for x in (self.heads, self.kv_heads, self.key_width, self.value_width, self.made)
        )
        if isinstance(self.operation, keras.layers.GroupQueryAttention):
            return self._different({"num_query_heads": heads, "num_key_value_heads": kv, "head_dim": key})
        changes = self._different({"num_heads": heads, "key_dim": key, "value_dim": value})
        shape = self.operation.get_config().get("output_shape")
        if out != len(self.made):
            changes["output_shape"] = (*(shape or [out])[:-1], out)
        elif shape is None and len(self.made) != int(kept(self.read["query"]).sum()):
            changes["output_shape"] = (out,)
        return changes

    def _different(self, changes):
        config = self.operation.get_config()
        return {key: value for key, value in changes.items() if config[key] != value}

    def weights(self, kept):
        values = super().weights(kept)
        if self.fixed:
            return values
        # Scores are divided by the root of the width of keys, which is another one now.
        factor = (max(1, int(kept(self.key_width).sum())) / len(self.key_width)) ** 0.5
        if factor != 1:
            query = {id(v) for v in self.own["query"].weights}
            pairs = zip(self.operation.weights, values, strict=True)
            values = [(x * factor).astype(x.dtype) if id(v) in query else x for v, x in pairs]
        return values
