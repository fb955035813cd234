"""Regularizers against NumPy and finite differences, on every kind of model."""

import keras
import numpy as np
import pytest

import keras_sparse as ks

layers = keras.layers


def group_lasso(weight, groups):
    """The oracle: one group at a time."""
    total = 0.0
    for g in range(groups.max() + 1):
        members = weight[groups == g].astype("float64")
        total += np.sqrt(members.size) * np.sqrt((members**2).sum())
    return total


def penalty(model):
    return float(keras.ops.convert_to_numpy(sum(model.losses)))


KERNELS = {
    "dense": (lambda: layers.Dense(4), (8,)),
    "conv": (lambda: layers.Conv2D(4, 3), (6, 6, 4)),
    "transposed": (lambda: layers.Conv2DTranspose(4, 3), (6, 6, 2)),
    "einsum": (lambda: layers.EinsumDense("ab,bcd->acd", (2, 4)), (8,)),
    "depthwise": (lambda: layers.DepthwiseConv2D(2), (6, 6, 4)),
    "embedding": (lambda: layers.Embedding(8, 4), (3,)),
    "lstm": (lambda: layers.LSTM(4), (5, 4)),
}


def model_of(name):
    layer, shape = KERNELS[name]
    return keras.Sequential([keras.Input(shape), layer()])


@pytest.mark.parametrize("name", ["dense", "conv", "transposed", "einsum"])
@pytest.mark.parametrize("group", ["channel", "block_2x2"])
def test_group_lasso_is_numpys(name, group):
    model = model_of(name)
    ks.regularize(model, ks.regularizers.GroupLasso(0.3, group))
    weight = ks.selection.select(model).chosen[0]
    groups = ks.patterns.get(group).groups(tuple(weight.variable.shape), weight.output_axes)
    expected = 0.3 * group_lasso(weight.numpy(), groups)
    assert penalty(model) == pytest.approx(expected, rel=1e-6)


def test_channel_groups_by_hand():
    weight = np.random.default_rng(0).normal(size=(5, 3)).astype("float32")
    expected = sum(5**0.5 * np.linalg.norm(weight[:, unit]) for unit in range(3))
    assert float(keras.ops.convert_to_numpy(ks.regularizers.GroupLasso(1.0)(weight))) == pytest.approx(
        expected, rel=1e-6
    )


@pytest.mark.parametrize("regularizer", [ks.regularizers.L1(0.1), ks.regularizers.GroupLasso(0.1)])
def test_training_step_is_the_gradient(regularizer):
    """SGD with a loss of nothing but the regularizer moves each weight by its finite difference."""
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, use_bias=False)])
    weight = np.random.default_rng(1).normal(size=(4, 3)).astype("float32")
    weight[:, 1] = 0
    model.set_weights([weight])
    ks.regularize(model, regularizer)
    model.compile(keras.optimizers.SGD(1.0), "mse")
    model.fit(np.zeros((2, 4)), np.zeros((2, 3)), verbose=0)

    def value(w):
        if isinstance(regularizer, ks.regularizers.L1):
            return 0.1 * np.abs(w).sum()
        return 0.1 * group_lasso(w, np.tile(np.arange(3), (4, 1)))

    expected = np.zeros((4, 3))
    for index in np.argwhere(weight):
        step = np.zeros((4, 3))
        step[tuple(index)] = 1e-5
        expected[tuple(index)] = (value(weight + step) - value(weight - step)) / 2e-5
    np.testing.assert_allclose(weight - model.get_weights()[0], expected, atol=1e-5)


def nested():
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(4)])
    inputs = keras.Input((4,))
    return keras.Model(inputs, inner(inner(inputs)))  # Shared, too.


class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(3)

    def call(self, x):
        return self.dense(x)


def subclassed():
    model = Subclassed()
    model(np.ones((1, 4), "float32"))
    return model


MODELS = {name: lambda name=name: model_of(name) for name in KERNELS} | {"nested": nested, "subclassed": subclassed}


@pytest.mark.filterwarnings("ignore:.*weights have the regularizer now")
@pytest.mark.parametrize("name", MODELS)
def test_loss_grows_by_exactly_the_penalty_and_back(name):
    model = MODELS[name]()
    filters = "embeddings|kernel"
    for strength in (0.5, 0.25):
        report = ks.regularize(model, ks.regularizers.L1(strength), filters)
        chosen = ks.selection.select(model, filters).chosen
        expected = strength * sum(np.abs(w.numpy().astype("float64")).sum() for w in chosen)
        assert penalty(model) == pytest.approx(expected, rel=1e-6)
        assert all(row["saved"] == (name != "subclassed") for row in report.rows)
    ks.regularize(model, None, filters)
    assert not model.losses


@pytest.mark.parametrize("name", [name for name in MODELS if name != "subclassed"])
def test_saved_and_loaded(name, tmp_path):
    model = MODELS[name]()
    ks.regularize(model, ks.regularizers.L1(0.5), "embeddings|kernel")
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    assert penalty(again) == pytest.approx(penalty(model), rel=1e-6)


def test_takes_effect_without_compiling():
    model = model_of("dense")
    model.compile(keras.optimizers.SGD(0.0), "mse")
    x, y = np.ones((8, 8)), np.ones((8, 4))
    before = model.fit(x, y, verbose=0).history["loss"][0]
    ks.regularize(model, "l1")
    assert model.fit(x, y, verbose=0).history["loss"][0] == pytest.approx(
        before + 0.01 * np.abs(model.get_weights()[0]).sum(), rel=1e-5
    )


def test_says_what_is_not_saved():
    with pytest.warns(UserWarning, match="1 of 1 weights have the regularizer now"):
        report = ks.regularize(subclassed(), "l1")
    assert "config of Subclassed" in report.rows[0]["reason"]
    inputs = keras.Input((3, 4))
    model = keras.Model(inputs, layers.MultiHeadAttention(2, 2)(inputs, inputs))
    with pytest.warns(UserWarning, match="4 of 4"):
        ks.regularize(model, "l1")


def test_errors():
    with pytest.raises(ValueError, match="is not built"):
        ks.regularize(keras.Sequential([layers.Dense(3)]), "l1")
    for bad in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="at least 0 and finite"):
            ks.regularizers.L1(bad)
    with pytest.raises(TypeError, match="must be a number"):
        ks.regularizers.GroupLasso("0.1")
    model = model_of("dense")
    with pytest.raises(ValueError, match=r"do not divide.*shape=\(8, 4\).*Block"):
        ks.regularize(model, ks.regularizers.GroupLasso(0.1, "block_1x3"))
    assert not model.losses
