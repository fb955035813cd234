"""Channels that operations sum over: attention and products that users write themselves, norms, sums."""

import channel_graphs
import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_sparse as ks

RNG = np.random.default_rng(0)


def qvk(x):
    return [layers.Dense(n, name=name)(x) for name, n in (("q", 8), ("v", 12), ("k", 8))]


def attention(**kwargs):
    return lambda x: layers.Attention(**kwargs)(qvk(x))


def masked(x):
    mask = ops.any(x > 0.5, axis=-1)
    return layers.Attention()(qvk(x), mask=[mask, mask], use_causal_mask=True)


def with_scores(x):
    outputs, scores = layers.Attention()(qvk(x), return_attention_scores=True)
    return layers.Concatenate()([outputs, scores])


def of_two(x):
    """Where keys are the values."""
    q, v, _ = qvk(x)
    return layers.Attention()([q, layers.Dense(8, name="values")(v)])


def of_one(x):
    _, v, _ = qvk(x)
    return layers.Attention(use_scale=True)([v, v])


def product(x):
    q, v, k = qvk(x)
    return ops.matmul(ops.softmax(ops.matmul(q, ops.transpose(k, (0, 2, 1))) * 8**-0.5), v)


def heads(x):
    q, v, k = (layers.Reshape((6, 2, y.shape[-1] // 2))(y) for y in qvk(x))
    y = ops.einsum("bhqk,bkhd->bqhd", ops.softmax(ops.einsum("bqhd,bkhd->bhqk", q, k) / 2), v)
    return layers.Reshape((6, 12))(y)


def scaled(**kwargs):
    def build(x):
        q, _, k = qvk(x)
        q, v, k = (layers.Reshape((6, 2, 4))(y) for y in (q, layers.Dense(8, name="values")(x), k))
        return layers.Reshape((6, 8))(ops.dot_product_attention(q, k, v, **kwargs))

    return build


def dot(**kwargs):
    def build(x):
        q, v, k = qvk(x)
        return layers.Dot((2, 1))([layers.Softmax()(layers.Dot(2, **kwargs)([q, k])), v])

    return build


def distance(x):
    q, _, k = qvk(x)
    return ops.sqrt(ops.sum(ops.square(q - k), axis=-1, keepdims=True) + 1e-6)


def unit_length(x):
    return layers.UnitNormalization()(layers.Dense(8, name="q")(x))


def pooled(x):
    q, _, _ = qvk(x)
    return ops.sum(q * ops.softmax(layers.Dense(1)(q), axis=1), axis=1, keepdims=True)


def where(x):
    return ops.where(ops.any(x > 0.5, axis=-1, keepdims=True), layers.Dense(8, name="q")(x), 0.0)


@keras.saving.register_keras_serializable("channels_contracted")
class MaskedScores(layers.Layer):
    """Scores divided by the root of the width, beside what a mask puts there."""

    def __init__(self, hidden, **kwargs):
        super().__init__(**kwargs)
        self.hidden = hidden

    def get_config(self):
        return super().get_config() | {"hidden": self.hidden}

    def call(self, q, k):
        scores = ops.matmul(q, ops.transpose(k, (0, 2, 1))) / q.shape[-1] ** 0.5
        return ops.where(ops.tri(q.shape[1], dtype="bool"), scores, self.hidden)


def masked_scores(hidden):
    def build(x):
        q, v, k = qvk(x)
        return ops.matmul(ops.softmax(MaskedScores(hidden)(q, k)), v)

    return build


def mean(x):
    return ops.mean(layers.Dense(8, "relu", name="q")(x), axis=-1, keepdims=True)


def largest(x):
    return ops.max(layers.Dense(8, name="q")(x), axis=-1, keepdims=True)


def outer(x):
    q, v, k = qvk(x)
    return ops.matmul(q, ops.matmul(ops.transpose(k, (0, 2, 1)), v))


LEAVING = {
    "attention": (attention(), "qkv"),
    "attention with a scale": (attention(use_scale=True, dropout=0.1), "qkv"),
    "attention by tanh": (attention(score_mode="concat"), "qkv"),
    "masks": (masked, "qkv"),
    "scores are returned": (with_scores, "qkv"),
    "keys are values": (of_two, "qv"),
    "attention to oneself": (of_one, "v"),
    "added": (lambda x: layers.AdditiveAttention(use_scale=False)(qvk(x)), "qkv"),
    "added with a scale": (lambda x: layers.AdditiveAttention()(qvk(x)), "v"),
    "product": (product, "qkv"),
    "heads": (heads, "qkv"),
    "a scale of one's own": (scaled(scale=0.5), "qk"),
    "a scale of the width": (scaled(), ""),
    "dot": (dot(), "qkv"),
    "cosine": (dot(normalize=True), "qkv"),
    "distance": (distance, "qk"),
    "unit length": (unit_length, "q"),
    "pooled": (pooled, "q"),
    "where": (where, "q"),
    "scaled by the width and masked": (masked_scores(-1e9), "v"),
    "masked by infinity": (masked_scores(-np.inf), "v"),
    "mean": (mean, ""),
    "largest": (largest, ""),
    "product of keys and values": (outer, ""),
}


@pytest.mark.parametrize("name", LEAVING)
def test_what_is_summed_together_leaves_together(name):
    keras.utils.set_random_seed(0)
    build, leaving = LEAVING[name]
    x = keras.Input((6, 5))
    model = keras.Model(x, layers.Dense(3)(build(x)))
    channel_graphs.randomise(model, RNG)
    both = name in ("cosine", "added", "attention by tanh", "distance", "a scale of one's own")
    for layer in model.layers:  # a key that meets a query of zeros leaves as it is
        for v in layer.weights if layer.name in ("q", "v", "values", *("k" * both)) else ():
            v.assign(np.where(np.arange(v.shape[-1]) % 2, ks.graph.as_array(v), 0))
    small, report = ks.shrink(model, verbose=0, return_report=True)
    rows = [row for row in report.rows if row["channels"] in (4, 8, 12) and row["layers"][0] in ("q", "k", "v")]
    value = RNG.normal(size=(3, 6, 5)).astype("float32")
    assert channel_graphs.difference(model, small, value) < 1e-5
    widths = {
        layer.name: (layer.units, model.get_layer(layer.name).units) for layer in small.layers if layer.name in "qkv"
    }
    assert {key: 2 * less == more for key, (less, more) in widths.items()} == {key: key in leaving for key in widths}
    assert all(row["reason"] for row in rows if row["dead"] > row["removable"])
