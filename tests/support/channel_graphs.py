"""Random graphs of all operations that channels pass, random biases and statistics, and channels killed at random.

Run as a program it tries many: `python tests/support/channel_graphs.py 0 1000`.
"""

import sys

import keras
import numpy as np
from keras import layers, ops

from keras_sparse import graph


@keras.saving.register_keras_serializable("channel_graphs")
class Scale(layers.Layer):
    """A custom layer with a row in the table of kinds: a factor for each channel."""

    def build(self, shape):
        self.factor = self.add_weight(shape=(shape[-1],), initializer="ones", name="factor")

    def call(self, x):
        return x * self.factor


graph.register_kind(Scale, graph.Kind("keeps", per_channel=("factor",)))


class Builder:
    """Draws a graph: `images`, `sequences` or `vectors` go through random blocks and are joined again."""

    def __init__(self, seed, first=False):
        self.rng = np.random.default_rng(seed)
        self.first = first  # channels_first
        self.format = {"data_format": "channels_first"} if first else {}
        self.shared = {}

    def pick(self, *choices):
        return choices[self.rng.integers(len(choices))]

    def channels(self, x):
        return x.shape[1 if self.first and len(x.shape) == 4 else -1]

    @property
    def axis(self):
        return 1 if self.first else -1

    # Images

    def activation(self, x):
        kind = self.pick("relu", "sigmoid", "layer", "leaky", "prelu", "softplus", "gelu", "relu6", "none")
        if kind == "layer":
            return layers.Activation(self.pick("tanh", "elu", "swish"))(x)
        if kind == "leaky":
            return layers.LeakyReLU()(x)
        if kind == "prelu":
            shared = (
                [] if len(x.shape) == 2 else [2, 3][: len(x.shape) - 2] if self.first else [1, 2][: len(x.shape) - 2]
            )
            return layers.PReLU("random_normal", shared_axes=shared or None)(x)
        if kind == "relu6":
            return ops.relu6(x)
        return x if kind == "none" else layers.Activation(kind)(x)

    def conv(self, x, filters=None, size=None, **kwargs):
        size = size or self.pick(1, 3)
        arguments = {"padding": "same", "use_bias": bool(self.rng.random() < 0.7)} | self.format | kwargs
        return layers.Conv2D(filters or int(self.pick(4, 6, 8)), size, **arguments)(x)

    def norm(self, x):
        axis = self.axis if len(x.shape) == 4 else -1
        kind = self.rng.random()
        if kind < 0.7:
            return layers.BatchNormalization(axis=axis, scale=bool(kind < 0.6))(x)
        if kind < 0.8 and self.channels(x) % 2 == 0:
            return layers.GroupNormalization(2, axis=axis)(x)
        if axis == 1:  # which Keras 3.15 runs on no backend, or not on torch
            return layers.BatchNormalization(axis=axis, center=False)(x)
        return layers.RMSNormalization()(x) if kind < 0.9 else layers.LayerNormalization()(x)

    def image_block(self, x):
        channels, axis = self.channels(x), self.axis
        last = not self.first
        name = self.pick(
            "conv", "conv", "residual", "residual", "concat", "split", "depthwise", "separable", "grouped",
            "transposed", "excite", "pool", "pad", "upsample", "shuffle", "space", "lambda", "slice", "scale", "shared",
            "permute", "nested", "conv3d", "dense",
        )  # fmt: skip
        if name == "conv":
            return self.activation(
                self.norm(self.conv(x, padding=self.pick("same", "valid") if x.shape[2] > 3 else "same"))
            )
        if name == "residual":
            y = self.activation(self.norm(self.conv(x)))
            return self.pick(layers.add, layers.subtract, layers.maximum, layers.average)([x, self.conv(y, channels)])
        if name == "concat":
            a = self.activation(self.conv(x))
            b = layers.Concatenate(axis=axis)([a, x])
            return layers.Concatenate(axis=axis)([self.conv(b), b])
        if name == "split" and last:
            if channels % 2 == 0 and self.rng.random() < 0.5:
                a, b = ops.split(x, 2, axis=axis)
                return layers.Concatenate(axis=axis)([b, self.conv(a)])
            offset = int(self.rng.integers(1, channels))
            return layers.Concatenate(axis=axis)([x[..., :offset], self.activation(self.conv(x[..., offset:]))])
        if name == "depthwise":
            y = layers.DepthwiseConv2D(3, padding="same", depth_multiplier=int(self.pick(1, 1, 2)), **self.format)(x)
            return self.conv(self.activation(self.norm(y)), size=1)
        if name == "separable":
            return layers.SeparableConv2D(6, 3, padding="same", depth_multiplier=int(self.pick(1, 2)), **self.format)(x)
        if name == "grouped" and channels % 2 == 0:
            groups = int(self.pick(2, channels))
            y = layers.Conv2D(channels * int(self.pick(1, 2)), 3, padding="same", groups=groups, **self.format)(x)
            return self.conv(self.activation(y))
        if name == "transposed":
            return layers.Conv2DTranspose(6, 3, padding="same", strides=int(self.pick(1, 2)), **self.format)(x)
        if name == "excite":
            y = layers.GlobalAveragePooling2D(keepdims=bool(self.rng.random() < 0.5), **self.format)(x)
            if len(y.shape) == 2:
                y = layers.Dense(channels, "sigmoid")(layers.Dense(3, "relu")(y))
                y = layers.Reshape((channels, 1, 1) if self.first else (1, 1, channels))(y)
            else:
                y = self.conv(self.conv(y, 3, 1, activation="relu"), channels, 1, activation="sigmoid")
            return layers.multiply([x, y])
        if name == "pool" and x.shape[2] > 3:
            kind = self.pick(layers.MaxPooling2D, layers.AveragePooling2D)
            return kind(2, padding=self.pick("same", "valid"), **self.format)(x)
        if name == "pad":
            y = layers.ZeroPadding2D(1, **self.format)(x)
            return self.conv(y, padding="valid")
        if name == "upsample" and x.shape[2] < 8:
            return layers.UpSampling2D(interpolation=self.pick("nearest", "bilinear"), **self.format)(x)
        if name == "shuffle" and channels % 2 == 0 and last:
            h, w = x.shape[1:3]
            y = layers.Permute((1, 2, 4, 3))(layers.Reshape((h, w, 2, channels // 2))(x))
            return layers.Reshape((h, w, channels))(y)
        if name == "space" and last:
            y = self.conv(x, 8)
            return layers.Lambda(_depth_to_space)(y)
        if name == "lambda":
            return layers.Lambda(self.pick(_double, _shifted))(x)
        if name == "slice":
            y = self.conv(x, 9)
            return y[..., ::2] if last else y[:, 1:]
        if name == "scale" and last:
            return Scale()(x)
        if name == "shared":
            layer = self.shared.setdefault(channels, layers.Conv2D(channels, 3, padding="same", **self.format))
            return self.activation(layer(self.activation(layer(x))))
        if name == "permute":
            return layers.Permute((1, 3, 2) if self.first else (2, 1, 3))(x)
        if name == "nested":
            inputs = keras.Input(x.shape[1:])
            inner = keras.Model(inputs, self.activation(self.norm(self.conv(inputs, channels))))
            return inner(inner(x)) if self.rng.random() < 0.5 else layers.add([x, inner(x)])
        if name == "conv3d" and last:
            y = layers.Reshape((*x.shape[1:3], channels, 1))(x)
            return layers.Reshape((*x.shape[1:3], channels * 2))(layers.Conv3D(2, 1, activation="relu")(y))
        if name == "dense" and last:
            return layers.EinsumDense("abcd,de->abce", (*x.shape[1:3], 6), bias_axes=self.pick("e", None))(x)
        return self.conv(x)

    # Sequences

    def sequence_block(self, x):
        steps, channels = x.shape[1:]
        name = self.pick(
            "conv", "lstm", "gru", "simple", "both", "time", "attention", "grouped", "feed", "norm", "pool", "residual",
            "repeat", "einsum", "cross", "state", "cell", "scores", "scores", "heads", "energy", "unit",
        )  # fmt: skip
        bias = {"bias_initializer": "random_normal"}
        if name == "conv":
            return self.activation(layers.Conv1D(6, 3, padding=self.pick("same", "causal"))(x))
        if name in ("lstm", "gru", "simple"):
            kind = {"lstm": layers.LSTM, "gru": layers.GRU, "simple": layers.SimpleRNN}[name]
            more = {"reset_after": bool(self.rng.random() < 0.5)} if name == "gru" else {}
            return kind(5, return_sequences=True, **more)(x)
        if name == "both":
            kind = self.pick(layers.LSTM, layers.GRU)
            return layers.Bidirectional(kind(4, return_sequences=True), merge_mode=self.pick("concat", "sum", "mul"))(x)
        if name == "time":
            return layers.TimeDistributed(layers.Dense(6, self.pick("relu", "sigmoid")))(x)
        if name == "attention":
            width = int(self.pick(4, 3))
            if keras.backend.backend() == "jax":
                width = 4  # Keras on JAX computes no attention with values of another width than its keys
            layer = layers.MultiHeadAttention(3, 4, value_dim=width, use_bias=bool(self.rng.random() < 0.7), **bias)
            return layers.add([x, layer(x, x)])
        if name == "grouped":
            return layers.GroupQueryAttention(4, 4, int(self.pick(2, 4)), **bias)(x, x)
        if name == "cross":
            y = layers.Dense(6, "relu")(x)
            return layers.MultiHeadAttention(2, 3, output_shape=6, **bias)(x, y)
        if name == "feed":
            y = layers.Dense(8, self.pick("gelu", "relu", "sigmoid"))(x)
            return layers.add([x, layers.Dense(channels)(y)])
        if name == "norm":
            return self.pick(layers.LayerNormalization, layers.RMSNormalization, layers.BatchNormalization)()(x)
        if name == "pool" and steps > 3:
            return layers.MaxPooling1D(2)(x)
        if name == "residual":
            return layers.add([x, layers.Conv1D(channels, 3, padding="same")(self.activation(layers.Dense(5)(x)))])
        if name == "repeat":
            return ops.repeat(x, 2, axis=-1) if self.rng.random() < 0.5 else layers.Dense(6)(ops.repeat(x, 2, axis=1))
        if name == "einsum":
            y = layers.EinsumDense("abc,cde->abde", (steps, 2, 3), bias_axes=self.pick("de", "e", None))(x)
            return layers.EinsumDense("abde,def->abf", (steps, channels), bias_axes="f")(layers.Activation("relu")(y))
        if name == "state":
            y, state = layers.GRU(5, return_sequences=True, return_state=True)(x)
            return layers.SimpleRNN(5, return_sequences=True)(y, initial_state=state)
        if name == "cell":
            return layers.RNN(layers.LSTMCell(4), return_sequences=True)(x)
        if name == "scores":
            q, v, k = (self.activation(layers.Dense(n)(x)) for n in (5, 6, 5))
            kind = self.pick("layer", "oneself", "added", "dot", "linear")
            if kind == "layer":
                return layers.Attention(self.pick(True, False))([q, v, k])
            if kind == "oneself":
                return layers.Attention(self.pick(True, False))([v, v])
            if kind == "added":
                return layers.AdditiveAttention(use_scale=self.pick(True, False))([q, v, k])
            if kind == "linear":
                return ops.matmul(q, ops.matmul(ops.transpose(k, (0, 2, 1)), v))
            return layers.Dot((2, 1))([layers.Softmax()(layers.Dot(2, normalize=self.pick(True, False))([q, k])), v])
        if name == "heads":
            q, k, v = (layers.Reshape((steps, 2, 3))(y) for y in ops.split(layers.Dense(18)(x), 3, axis=-1))
            y = ops.einsum("bhqk,bkhd->bqhd", ops.softmax(ops.einsum("bqhd,bkhd->bhqk", q, k) / 1.7), v)
            return layers.add([x, layers.Dense(channels)(layers.Reshape((steps, 6))(y))])
        if name == "energy":
            y = self.activation(layers.Dense(5)(x))
            return x * ops.sigmoid(ops.sum(y * layers.Dense(5)(x), axis=-1, keepdims=True))
        if name == "unit":
            return layers.UnitNormalization()(self.activation(layers.Dense(5)(x)))
        return layers.Dense(6)(x)

    def vector(self, x):
        if len(x.shape) == 4:
            kind = self.pick("flatten", "average", "max")
            if kind == "flatten":
                return layers.Flatten(**self.format)(x)
            return (layers.GlobalAveragePooling2D if kind == "average" else layers.GlobalMaxPooling2D)(**self.format)(x)
        if len(x.shape) == 3:
            return self.pick(layers.Flatten(), layers.GlobalAveragePooling1D(), layers.LSTM(4))(x)
        return x

    def model(self, size):
        kind = self.pick("image", "image", "sequence", "words", "film")
        images = (3, 8, 8) if self.first else (8, 8, 3)
        inputs = keras.Input({"image": images, "sequence": (6, 4), "words": (6,), "film": (3, 6, 6, 2)}[kind])
        x = inputs
        if kind == "words":
            x = layers.Embedding(11, 6)(x)
        if kind == "film":
            if self.first:
                x = layers.Permute((1, 4, 2, 3))(x)
            x = layers.ConvLSTM2D(4, 3, padding="same", **self.format)(x)
        inner = None
        for _ in range(size):
            x = self.image_block(x) if len(x.shape) == 4 else self.sequence_block(x)
            if self.rng.random() < 0.1:
                inner = x
        more = []
        if self.rng.random() < 0.3:
            more = [keras.Input((5,))]
        y = self.vector(x)
        for extra in more:
            y = layers.concatenate([y, layers.Dense(4, "relu")(extra)])
        y = self.activation(layers.Dense(8)(y))
        if self.rng.random() < 0.2:
            y = layers.Reshape((2, 2, 2))(y)
            y = layers.Flatten()(layers.Conv2DTranspose(3, 2, data_format="channels_last")(y))
        outputs = [layers.Dense(3, self.pick("softmax", None))(y)]
        if inner is not None and self.rng.random() < 0.5:
            outputs.append(inner)
        return keras.Model([inputs, *more] if more else inputs, outputs if len(outputs) > 1 else outputs[0])


def _double(x):
    return 2 * x + 1


def _shifted(x):
    return ops.concatenate([x[:, 1:], x[:, :1]], axis=1)


def _depth_to_space(x):
    h, w, c = x.shape[1:]
    x = ops.reshape(x, (-1, h, w, 2, 2, c // 4))
    return ops.reshape(ops.transpose(x, (0, 1, 3, 2, 4, 5)), (-1, 2 * h, 2 * w, c // 4))


def randomise(model, rng):
    """Random biases, scales and statistics: zeros prove nothing."""
    for v in model.weights:
        if v.name == "moving_variance":
            v.assign(rng.uniform(0.5, 2, v.shape))
        elif v.name in ("gamma", "scale", "factor"):
            v.assign(rng.uniform(0.5, 1.5, v.shape))
        elif v.name in ("bias", "beta", "moving_mean"):
            v.assign(rng.normal(0, 0.4, v.shape))


def randomise_live(model, rng):
    """Other values for all that is not zero, and random statistics."""
    for v in model.weights:
        value = graph.as_array(v)
        if v.name.startswith("moving_"):
            v.assign(rng.uniform(0.5, 2, v.shape))
        elif v.name != "seed_generator_state":
            v.assign(value * rng.uniform(0.5, 1.5, v.shape))


def kill(model, rng, share=0.4):
    """Zero what makes some channels, biases with it or not, and what reads others; return how many."""
    channels = graph.Channels(model)
    free = [c for group in channels.groups for c in group.channels.tolist() if c not in channels.reasons]
    made, constant, unread = ({c for c in free if rng.random() < share / 3} for _ in range(3))
    for _, part in channels.parts():
        value = graph.as_array(part.variable)
        for axis, labels in part.axes.items():
            roots = channels.roots[labels]
            gone = np.isin(roots, list(made)) if axis in part.made else np.zeros(len(roots), bool)
            if axis in part.made and value.ndim > 1:
                gone |= np.isin(roots, list(constant))
            if axis not in part.made and value.ndim > 1:
                gone |= np.isin(roots, list(unread))
            value = np.where(gone.reshape([-1 if i == axis else 1 for i in range(value.ndim)]), 0, value)
        part.variable.assign(value)
    return len(made | constant | unread)


def inputs_of(model, rng, count=2):
    """Random inputs."""
    embeds = any(isinstance(layer, layers.Embedding) for layer in model.layers)
    found = []
    for x in model.inputs:
        whole = embeds and len(x.shape) == 2 and x.shape[1] == 6
        shape = (count, *x.shape[1:])
        found.append((rng.integers(0, 11, shape) if whole else rng.normal(size=shape)).astype("float32"))
    return found if len(found) > 1 else found[0]


def graph_of(seed, size=4):
    """A model and inputs for it."""
    first = seed % 5 == 4 and keras.backend.backend() != "tensorflow"
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(seed)
    rng = np.random.default_rng(seed)
    while True:
        model = Builder(rng.integers(1 << 31), first).model(size)
        if model.count_params() < 200_000:
            break
    randomise(model, rng)
    kill(model, rng)
    return model, inputs_of(model, rng)


def difference(model, small, x):
    """The largest difference of outputs, relative to the largest output."""
    pairs = zip(*(keras.tree.flatten(each(x, training=False)) for each in (model, small)), strict=True)
    found = 0.0
    for one, other in pairs:
        one, other = keras.ops.convert_to_numpy(one), keras.ops.convert_to_numpy(other)
        assert one.shape == other.shape
        found = max(found, float(np.max(np.abs(one - other)) / max(1e-3, np.max(np.abs(one)))))
    return found


def check_shrunk(seed, size=4):
    """Shrink the model of a seed, and check all that is promised; return `(removed, dead, channels)`."""
    import keras_sparse as ks

    model, x = graph_of(seed, size)
    before = [graph.as_array(v).copy() for v in model.weights]
    promised = ks.channel_groups(model).totals
    small, report = ks.shrink(model, verbose=0, return_report=True)
    assert all(np.array_equal(a, graph.as_array(v)) for a, v in zip(before, model.weights, strict=True))
    assert difference(model, small, x) < 1e-5
    again = ks.channel_groups(small).totals
    assert (again["parameters"], again["macs"]) == (promised["parameters_left"], promised["macs_left"])
    assert small.count_params() == promised["parameters_left"]
    assert again["removable"] == 0
    return report.totals["removable"], report.totals["dead"], report.totals["channels"]


if __name__ == "__main__":
    totals = np.zeros(3, int)
    for number in range(int(sys.argv[1]), int(sys.argv[2])):
        try:
            totals += check_shrunk(number, int(sys.argv[3]) if len(sys.argv) > 3 else 4)
        except Exception as error:
            import traceback

            print(number, type(error).__name__, str(error)[:200], traceback.format_exc().splitlines()[-4:-1])
    print(totals)
