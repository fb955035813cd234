"""Layers of layers with a `call` of their own, as KerasHub's blocks are: their channels are seen and removed."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_sparse as ks
from keras_sparse.graph.resizing import resized

WIDTH, HEADS, INNER = 8, 2, 12


def randomized(model, seed=0):
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        if "float" in variable.dtype:
            variable.assign(rng.normal(0.2, 0.5, variable.shape))
    return model


class Base(layers.Layer):
    """What all blocks have: a feed-forward network of `inner` channels, made in `build`."""

    def __init__(self, inner=INNER, **kwargs):
        super().__init__(**kwargs)
        self.inner = inner
        self.supports_masking = True

    def build(self, shape):
        self.wide = layers.Dense(self.inner, "relu", name="wide", dtype=self.dtype_policy)
        self.wide.build(shape)
        self.narrow = layers.Dense(shape[-1], name="narrow", dtype=self.dtype_policy)
        self.narrow.build((*shape[:-1], self.inner))
        self.built = True

    def call(self, x):
        return x + self.narrow(self.wide(x))

    def compute_output_shape(self, shape):
        return shape

    def get_config(self):
        return super().get_config() | {"inner": self.inner}


@keras.saving.register_keras_serializable("composites")
class Feed(Base):
    pass


@keras.saving.register_keras_serializable("composites")
class Encoder(Base):
    """Attention and a feed-forward network, which work on open lengths."""

    def build(self, shape):
        super().build(shape)
        self.attention = layers.MultiHeadAttention(HEADS, WIDTH // HEADS, name="attention")
        self.attention.build(shape, shape)
        self.normalization = layers.LayerNormalization(name="normalization")
        self.normalization.build(shape)

    def call(self, x, training=None):
        y = self.normalization(x)
        return super().call(x + self.attend(y))

    def attend(self, y):
        return self.attention(query=y, value=y)


@keras.saving.register_keras_serializable("composites")
class Decoder(Encoder):
    """A mask is made of the length, which must be a number for that."""

    def attend(self, y):
        places = ops.arange(ops.shape(y)[1])
        mask = ops.expand_dims(ops.expand_dims(places, 1) >= places, 0)
        return self.attention(query=y, value=y, attention_mask=mask)


@keras.saving.register_keras_serializable("composites")
class Gated(Base):
    """The number in the config is twice that of the channels."""

    def build(self, shape):
        self.wide = layers.Dense(self.inner // 2, name="wide")
        self.wide.build(shape)
        self.gate = layers.Dense(self.inner // 2, "silu", name="gate")
        self.gate.build(shape)
        self.narrow = layers.Dense(shape[-1], name="narrow")
        self.narrow.build((*shape[:-1], self.inner // 2))
        self.built = True

    def call(self, x):
        # A length that must be known: no graph of the layers inside can stand for it.
        return ops.concatenate([x[:, :1], x[:, 1:] * ops.ones((ops.shape(x)[1] - 1, 1))], 1) + self.narrow(
            self.wide(x) * self.gate(x)
        )


class Unsaved(Decoder):
    """Its `get_config` has a fault, as that of KerasHub's Llama has in 0.32."""

    def get_config(self):
        raise AttributeError("no attribute 'width'")


@keras.saving.register_keras_serializable("composites")
class Scaled(Base):
    """A weight of its own, which `call` uses by itself."""

    def build(self, shape):
        super().build(shape)
        self.scale = self.add_weight(shape=(shape[-1],), name="scale")

    def call(self, x):
        return super().call(x) * self.scale


class Cached(layers.MultiHeadAttention):
    """Other arguments than its base class tells the shapes of, and something beside a tensor is returned."""

    def call(self, query, value, cache=None):
        return super().call(query, value), cache


@keras.saving.register_keras_serializable("composites")
class WithCache(Encoder):
    def build(self, shape):
        super().build(shape)
        self.attention = Cached(HEADS, WIDTH // HEADS, name="attention")
        self.attention.build(shape, shape)

    def attend(self, y):
        return self.attention(y, y, cache=None)[0]

    def call(self, x, training=None):
        return super().call(x) * ops.ones((ops.shape(x)[1], 1))


class Opaque(Base):
    """No symbolic input passes its `call`."""

    def call(self, x):
        return super().call(x + 0 * len(list(x)))


def text(*blocks, **embedding):
    x = keras.Input((None,), dtype="int32")
    y = layers.Embedding(9, WIDTH, name="table", **embedding)(x)
    for block in blocks:
        y = block(y)
    return randomized(keras.Model(x, layers.Dense(2, name="head")(y)))


def tokens(length=7):
    return np.random.default_rng(1).integers(0, 9, (3, length))


def shrunk(model):
    """The shrunk model of one of which half the channels were pruned, and its report; outputs are checked."""
    ks.prune(model, 0.5, pattern="channel", filters="wide|gate|narrow|attention")
    small, report = ks.shrink(model, verbose=0, return_report=True)
    for length in (7, 4):
        expected, found = (ops.convert_to_numpy(one(tokens(length), training=False)) for one in (model, small))
        np.testing.assert_allclose(found, expected, 1e-5, 1e-5)
    return small, report


def gone(report):
    return {tuple(row["layers"]): row["removable"] for row in report.rows if row["removable"]}


@pytest.mark.parametrize("block", [Feed, Decoder, WithCache, Scaled, Unsaved])
def test_a_number_in_the_config_takes_the_channels_along(block):
    model = text(block(name="block"))
    small, report = shrunk(model)
    new = small.get_layer("block")
    assert type(new) is block
    assert new.inner == INNER // 2 == gone(report)["wide", "narrow"]
    assert [tuple(v.shape) for v in new.wide.weights] == [(WIDTH, INNER // 2), (INNER // 2,)]
    assert len(small.trainable_variables) == len(model.trainable_variables)


def test_a_multiple_in_the_config_does_too():
    small, report = shrunk(text(Gated(name="block")))
    assert small.get_layer("block").inner == INNER // 2
    assert gone(report) == {("wide", "gate", "narrow"): INNER // 4}


def test_what_no_number_says_stays_with_the_reason():
    _, report = shrunk(text(Decoder(name="block")))
    reasons = [row["reason"] for row in report.rows if row["layers"] == ["attention"] and "block" in row["reason"]]
    assert reasons
    assert all("block (Decoder) has no number in its config" in reason for reason in reasons)


def test_a_graph_stands_for_the_layer_where_heads_leave(tmp_path):
    model = text(Encoder(name="first"), Encoder(name="second"))
    small, report = shrunk(model)
    widths = 1 if keras.backend.backend() == "jax" else 2  # keys and values are as wide as each other there
    assert sum(row["removable"] for row in report.rows if row["layers"] == ["attention"]) == 2 * (1 + 2 * widths)
    first = small.get_layer("first")
    assert isinstance(first, keras.Model)
    assert [type(layer).__name__ for layer in first.layers[1:3]] == ["LayerNormalization", "MultiHeadAttention"]
    small.save(tmp_path / "small.keras")
    again = keras.saving.load_model(tmp_path / "small.keras")
    np.testing.assert_allclose(again.predict(tokens(), verbose=0), small.predict(tokens(), verbose=0), 1e-5, 1e-6)


def test_all_dead_channels_go_that_were_promised():
    model = text(Encoder(name="block"))
    ks.prune(model, 0.5, pattern="channel", filters="wide|narrow|attention")
    promised = ks.channel_groups(model).totals
    assert promised["dead"] == promised["removable"] > 0
    small = ks.shrink(model, verbose=0)
    assert small.count_params() == promised["parameters_left"] < model.count_params()
    assert ks.channel_groups(small).totals["dead"] == 0


@pytest.mark.parametrize("block", [Decoder, Encoder])
def test_a_layer_that_is_called_twice_changes_once(block):
    shared = block(name="block")
    small, report = shrunk(text(shared, shared))
    assert gone(report)["wide", "narrow"] == INNER // 2
    assert len([layer for layer in small.layers if layer.name == "block"]) == 1


def test_layers_of_layers_of_layers():
    @keras.saving.register_keras_serializable("composites")
    class Stage(layers.Layer):
        def build(self, shape):
            self.blocks = [Encoder(name="one"), Decoder(name="two")]
            for block in self.blocks:
                block.build(shape)
            self.built = True

        def call(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    small, _ = shrunk(text(Stage(name="stage")))
    one, two = (small.get_layer("stage").get_layer(name) for name in ("one", "two"))
    assert isinstance(one, keras.Model)
    assert (one.get_layer("attention").num_heads, one.get_layer("wide").units) == (HEADS // 2, INNER // 2)
    assert (type(two), two.inner, two.attention.num_heads) == (Decoder, INNER // 2, HEADS)


def test_a_weight_of_a_layer_inside_is_not_shared():
    @keras.saving.register_keras_serializable("composites")
    class Around(Base):
        """Its feed-forward network lies in a layer with a weight of its own."""

        def build(self, shape):
            self.scaled = Scaled(self.inner, name="scaled")
            self.scaled.build(shape)
            self.built = True

        def call(self, x):
            return self.scaled(x)

    small, _ = shrunk(text(Around(name="block")))
    assert small.get_layer("block").scaled.inner == INNER // 2


def test_a_mask_of_steps_keeps_the_layer_whole():
    small, _ = shrunk(text(Encoder(name="block"), mask_zero=True))
    assert type(small.get_layer("block")) is Encoder


def test_what_casts_its_inputs_keeps_its_class():
    model = text(Feed(name="block", dtype="mixed_float16"))
    ks.prune(model, 0.5, pattern="channel", filters="wide")
    small = ks.shrink(model, verbose=0)
    assert (type(small.get_layer("block")), small.get_layer("block").inner) == (Feed, INNER // 2)


def test_sequential():
    model = randomized(keras.Sequential([keras.Input((5, WIDTH)), Feed(name="block"), layers.Dense(2)]))
    ks.prune(model, 0.5, pattern="channel", filters="wide")
    small = ks.shrink(model, verbose=0)
    x = np.random.default_rng(0).normal(size=(3, 5, WIDTH))
    np.testing.assert_allclose(small.predict(x, verbose=0), model.predict(x, verbose=0), 1e-5, 1e-5)
    assert type(small) is keras.Sequential
    assert small.layers[0].inner == INNER // 2


@pytest.mark.lengthy(0)
def test_training_goes_on():
    model = text(Encoder(name="block"))
    model.compile(keras.optimizers.Adam(0.01), "mse")
    x, y = tokens(), np.zeros((3, 7, 2))
    pruning = ks.callbacks.Pruning(0.5, pattern="channel", filters="wide|attention", end=0.5)
    model.fit(x, y, epochs=4, verbose=0, callbacks=[pruning])
    small = ks.shrink(model, verbose=0)
    assert small.count_params() < model.count_params()
    assert int(small.optimizer.iterations) == int(model.optimizer.iterations) == 4
    old, new = (one.evaluate(x, y, verbose=0) for one in (model, small))
    assert new == pytest.approx(old, rel=1e-5)
    small.fit(x, y, epochs=3, verbose=0)
    assert small.evaluate(x, y, verbose=0) < new


def test_what_cannot_be_looked_into_is_named():
    model = text(Opaque(name="block"))
    with pytest.raises(ValueError, match=r"block \(Opaque\) cannot be run on symbolic inputs"):
        ks.prune(model, 0.5, pattern="channel", filters="wide")
    assert any("block (Opaque)" in row["reason"] for row in ks.channel_groups(model).rows)
    assert ks.prune(model, {"wide/kernel": 0.5}).totals["zeros"] == WIDTH * INNER // 2


def test_a_config_that_makes_no_layer_is_told():
    model = text(Unsaved(name="block"))
    _, report = shrunk(model)
    assert any("block (Unsaved) has a config of which Keras makes no layer" in note for note in report.notes)


def test_biases_and_encodings_of_other_layers_are_no_kernels():
    class Relative(layers.Layer):
        def build(self, shape):
            names = ("content_bias", "segment_encoding", "projection")
            self.own = [self.add_weight(shape=(2, 4), name=name) for name in names]

        def call(self, x):
            return x

    model = keras.Sequential([keras.Input((4,)), Relative()])
    found = {w.variable.name: w.skipped is None for w in ks.selection.weights(model)}
    assert found == {"content_bias": False, "segment_encoding": False, "projection": True}


def test_a_convolution_with_a_group_for_each_channel_is_depthwise():
    model = keras.Sequential(
        [keras.Input((5, 5, 4)), layers.Conv2D(4, 3, groups=4, name="deep"), layers.Conv2D(4, 3, groups=2, name="half")]
    )
    roles = {w.layer.name: (w.role, w.skipped is None) for w in ks.selection.weights(model) if w.kernel}
    assert roles == {"deep": ("depthwise kernel", False), "half": ("kernel", True)}
    assert ks.prune(model, 0.5, filters="deep").rows[0]["zeros"] == 18


class Table(layers.Layer):
    """A table of which each size is a number in the config, or a multiple of one."""

    def __init__(self, rows, columns, **kwargs):
        super().__init__(**kwargs)
        self.rows, self.columns = rows, columns

    def build(self, shape):
        self.table = self.add_weight(shape=(self.rows, 2 * self.columns), name="table")

    def call(self, x):
        return ops.matmul(x[..., : self.rows], self.table)

    def get_config(self):
        return super().get_config() | {"rows": self.rows, "columns": self.columns}


@pytest.mark.parametrize(
    ("wanted", "changes"),
    [
        ((4, 6), {"columns": 3}),
        ((2, 8), {"rows": 2}),
        ((2, 4), {"rows": 2, "columns": 2}),
        ((4, 7), None),  # no number of columns makes that
    ],
)
def test_numbers_of_a_config_are_found_alone_or_in_pairs(wanted, changes):
    layer = Table(4, 4)
    layer.build((3, 5))
    found = resized(layer, [wanted], [keras.KerasTensor((3, 5))], {}, [(3, wanted[1])])
    assert (found and found[0]) == changes
    assert found is None or tuple(found[1].table.shape) == wanted


def test_a_layer_that_returns_another_shape_is_none():
    layer = Table(4, 4)
    layer.build((3, 5))
    assert resized(layer, [(4, 6)], [keras.KerasTensor((3, 5))], {}, [(3, 8)]) is None
