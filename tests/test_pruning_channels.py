"""`ks.prune(pattern="channel", repair=True)` against `numpy.linalg.lstsq` on what is left of the inputs."""

import itertools

import channel_graphs
import keras
import numpy as np
import pytest

import keras_sparse as ks

L = keras.layers
RNG = np.random.default_rng(0)


def outputs(model, x):
    return keras.ops.convert_to_numpy(model(x, training=False)).astype(float)


def correlated(*shape):
    few = RNG.normal(size=(*shape[:-1], 3)) @ RNG.normal(size=(3, shape[-1]))
    return (few + 0.5 * RNG.normal(size=shape)).astype("float32")


def model_of(shape, *layers):
    model = keras.Sequential([keras.Input(shape), *layers])
    channel_graphs.randomise(model, np.random.default_rng(1))
    return model


def best_fit(layer, x, wanted, bias=True):
    """The outputs of a linear layer with the kernel (and bias) of which they are nearest to the wanted ones.

    One number of the kernel after the other is 1 and all else is 0: so every kind of layer is a plain regression.
    """
    columns = []
    last = next(v for v in layer.weights if v.name in ("kernel", "pointwise_kernel"))
    for variable in (last, layer.bias) if bias else (last,):
        for i in range(int(np.prod(variable.shape))):
            values = [
                np.zeros(v.shape) if v is last or v is layer.bias else ks.graph.as_array(v) for v in layer.weights
            ]
            index = next(n for n, v in enumerate(layer.weights) if v is variable)
            values[index].reshape(-1)[i] = 1
            values = [value.astype("float32") for value in values]
            columns.append(keras.ops.convert_to_numpy(layer.stateless_call(values, [], x)[0]).reshape(-1))
    design = np.stack(columns, axis=1).astype(float)
    return (design @ np.linalg.lstsq(design, wanted.reshape(-1), rcond=None)[0]).reshape(wanted.shape)


READERS = {
    "dense": ((), lambda: L.Dense(4)),
    "dense, three axes": ((5,), lambda: L.Dense(3, use_bias=False)),
    "conv1d": ((7,), lambda: L.Conv1D(3, 2, padding="causal", dilation_rate=2)),
    "conv2d": ((5, 4), lambda: L.Conv2D(3, 3, strides=2, padding="same")),
    "conv2d, groups": ((5, 4), lambda: L.Conv2D(4, 2, groups=2)),
    "conv3d": ((3, 3, 2), lambda: L.Conv3D(2, 2, padding="same", use_bias=False)),
    "transposed": ((4,), lambda: L.Conv1DTranspose(3, 3, strides=2)),
    "separable": ((5, 4), lambda: L.SeparableConv2D(3, 2, depth_multiplier=2)),
    "einsum": ((5,), lambda: L.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="de")),
    "einsum, blocks": ((4,), lambda: L.EinsumDense("abc,bcd->abd", (4, 3), bias_axes="d")),
}


@pytest.mark.thorough(5)
@pytest.mark.parametrize("name", READERS)
@pytest.mark.lengthy(1)
def test_readers_are_solved_for_by_least_squares(name):
    inner, make = READERS[name]
    model = model_of((*inner, 5), L.Dense(6, "relu", name="maker"), make())
    maker, reader = model.layers
    x = correlated(40, *inner, 5)
    wanted = outputs(model, x)
    ks.prune(model, 0.5, pattern="channel", filters="maker", data=x, repair=True, batch_size=16)
    after = outputs(model, x)
    bias = reader.use_bias if hasattr(reader, "use_bias") else reader.bias is not None
    # The blocks of the last one have a bias together, which stays as it is.
    if name == "einsum, blocks":
        wanted, after, bias = (v if v is False else v - ks.graph.as_array(reader.bias) for v in (wanted, after, False))
        reader.bias.assign(0 * reader.bias)
    best = best_fit(reader, outputs(maker, x).astype("float32"), wanted, bias)
    # Near the minimum the damping of the equations shows in the square only.
    least, found = (np.mean((values - wanted) ** 2) for values in (best, after))
    assert least * (1 - 1e-6) <= found <= 1.002 * least
    np.testing.assert_allclose(after, best, atol=0.1 * np.abs(wanted - best).max())
    small = ks.shrink(model, verbose=0)
    np.testing.assert_allclose(outputs(small, x), outputs(model, x), atol=1e-4)
    assert small.count_params() < model.count_params()


def network():
    x = keras.Input((8, 8, 3))
    y = stem = L.ReLU()(L.BatchNormalization()(L.Conv2D(6, 3, padding="same", use_bias=False, name="stem")(x)))
    y = L.Conv2D(8, 3, padding="same", use_bias=False, name="body")(y)
    y = L.DepthwiseConv2D(3, padding="same", name="depthwise")(L.ReLU()(L.BatchNormalization(name="inner")(y)))
    y = L.BatchNormalization(name="norm")(L.Conv2D(6, 1, use_bias=False, name="project")(L.ReLU()(y)))
    y = L.Conv2D(6, 3, name="last", activation="relu")(L.Add()([stem, y]))
    model = keras.Model(x, L.Dense(3, name="head")(L.GlobalAveragePooling2D()(y)))
    channel_graphs.randomise(model, np.random.default_rng(0))
    return model


IMAGES = correlated(32, 8, 8, 3)


def test_networks_lose_less_and_statistics_are_those_of_the_new_inputs():
    errors = {False: 0.0, True: 0.0}
    for seed, repair in itertools.product(range(4), errors):
        model, rng = network(), np.random.default_rng(seed)
        for v in model.weights:  # the same on every backend: what there is to repair depends on it
            if "kernel" in v.path:
                v.assign(rng.normal(0, np.prod(v.shape[:-1]) ** -0.5, v.shape))
        ks.reestimate_batch_norm(model, IMAGES)
        dense, before = outputs(model, IMAGES), [np.array(ks.graph.as_array(v)) for v in model.weights]
        ks.prune(model, {"body": 0.5}, pattern="channel", data=IMAGES if repair else None, repair=repair, batch_size=8)
        errors[repair] += np.mean((outputs(model, IMAGES) - dense) ** 2)
    assert errors[True] < 0.3 * errors[False]
    changed = {
        v.path.split("/")[0]
        for v, old in zip(model.weights, before, strict=True)
        if not np.allclose(ks.graph.as_array(v), old, rtol=1e-3, atol=1e-5)
    }
    # The stem reads what it read before, and so do those that read all channels of what is behind `project`.
    assert {"body", "inner", "depthwise", "project", "norm"} >= changed >= {"body", "inner", "project", "norm"}
    norm = model.get_layer("norm")
    inside = keras.Model(model.input, norm.input)
    x = outputs(inside, IMAGES)
    np.testing.assert_allclose(ks.graph.as_array(norm.moving_mean), x.mean(axis=(0, 1, 2)), atol=1e-3)
    np.testing.assert_allclose(ks.graph.as_array(norm.moving_variance), x.var(axis=(0, 1, 2)), rtol=1e-3)
    # What a normalization takes off need not be right: each channel's variation is fitted, not its mean.
    small = ks.shrink(model, verbose=0)
    np.testing.assert_allclose(outputs(small, IMAGES), outputs(model, IMAGES), atol=1e-4)
    assert small.get_layer("body").filters == 4


@pytest.mark.parametrize("arguments", [{"allocation": "global"}, {"criterion": "obs"}, {"criterion": "wanda"}])
def test_budgets(arguments):
    errors = []
    for repair in (False, True):
        keras.utils.set_random_seed(1)  # a network in which those that go matter
        model = network()
        ks.reestimate_batch_norm(model, IMAGES)
        dense = outputs(model, IMAGES)
        data = IMAGES if repair or "criterion" in arguments else None
        ks.prune(model, ks.Budget(macs=0.5), pattern="channel", data=data, repair=repair, **arguments)
        errors.append(np.mean((outputs(model, IMAGES) - dense) ** 2))
        report = ks.channel_groups(model)
        assert report.totals["macs_left"] <= 0.5 * report.totals["macs"]
    assert errors[1] < 0.5 * errors[0]


def attention():
    x = keras.Input((5, 6))
    y = L.MultiHeadAttention(4, 6, name="attention")(x, x)
    return keras.Model(x, L.Dense(2)(L.Add()([x, y]))), "attention"


def recurrent():
    x = keras.Input((5, 6))
    return keras.Model(x, L.Dense(2)(L.GRU(8, name="gru")(L.LSTM(8, return_sequences=True, name="lstm")(x)))), "lstm"


def shared():
    dense, head, a, b = L.Dense(8, "tanh", name="a"), L.Dense(3), keras.Input((5, 6)), keras.Input((5, 6))
    return keras.Model([a, b], L.Dense(2)(L.Concatenate()([head(dense(a)), head(dense(b))]))), "a/"


def nested():
    inner = keras.Sequential([keras.Input((5, 6)), L.Dense(8, "relu", name="a"), L.BatchNormalization(), L.Dense(6)])
    x = keras.Input((5, 6))
    return keras.Model(x, L.TimeDistributed(L.Dense(3))(L.Add()([inner(x), x]))), "a/"


class Net(keras.Model):
    def __init__(self):
        super().__init__()
        self.a, self.head = L.Dense(8, "relu", name="a"), L.Dense(3)

    def call(self, x):
        return self.head(self.a(x))


def subclassed():
    model = Net()
    model(np.zeros((1, 5, 6)))
    return model, "a/"


@pytest.mark.thorough(2)
@pytest.mark.parametrize("make", [attention, nested, shared, subclassed, recurrent])
def test_all_kinds_of_models_lose_less(make):
    x, errors = correlated(40, 5, 6), []
    x = [x, x[::-1]] if make is shared else x
    for repair in (False, True):
        keras.utils.set_random_seed(0)
        model, filters = make()
        channel_graphs.randomise(model, np.random.default_rng(2))
        ks.reestimate_batch_norm(model, x)
        dense = outputs(model, x)
        ks.prune(model, 0.5, pattern="channel", filters=filters, data=x if repair else None, repair=repair)
        errors.append(np.mean((outputs(model, x) - dense) ** 2))
    assert errors[1] < 0.9 * errors[0]


def test_channels_of_a_model_without_a_graph_are_ranked_together():
    model, filters = subclassed()
    x = correlated(40, 5, 6)
    ks.prune(model, 0.5, "wanda", "channel", "global", filters, data=x, repair=True)
    assert np.sum(~ks.graph.as_array(model.a.kernel).any(axis=0)) == 4


def test_zeros_that_are_there_stay_and_other_patterns_are_repaired_beside():
    model = model_of((6,), L.Dense(12, "relu", name="a"), L.Dense(10, "relu", name="b"), L.Dense(8, name="c"))
    ks.prune(model, {"c/": 0.4})
    zeros = ks.graph.as_array(model.layers[2].kernel) == 0
    x, dense = correlated(60, 6), None
    dense = outputs(model, x)
    ks.prune(model, {"a/": (0.5, "channel"), "b/": 0.3}, data=x, repair=True)
    assert np.sum(ks.graph.as_array(model.layers[1].kernel) == 0) == 36
    assert not ks.graph.as_array(model.layers[2].kernel)[zeros].any()
    other = model_of((6,), L.Dense(12, "relu", name="a"), L.Dense(10, "relu", name="b"), L.Dense(8, name="c"))
    ks.prune(other, {"c/": 0.4})
    ks.prune(other, {"a/": (0.5, "channel"), "b/": 0.3})
    assert np.mean((outputs(model, x) - dense) ** 2) < 0.5 * np.mean((outputs(other, x) - dense) ** 2)


class Counting(L.Layer):
    """Interrupts when it is called for the nth time on numbers."""

    times, at = 0, None

    def call(self, x):
        if not isinstance(x, keras.KerasTensor):
            self.times += 1
            if self.times == self.at:
                raise KeyboardInterrupt
        return x


def test_an_interruption_leaves_the_model_as_it_was():
    counting, at = Counting(), 1
    body = [L.Dense(6, "relu", name="body"), counting, L.Dense(5, "relu"), L.Dense(3)]
    model = model_of((5,), *body)
    before, x = [np.array(ks.graph.as_array(v)) for v in model.weights], correlated(20, 5)
    while True:
        counting.times, counting.at = 0, at
        try:
            ks.prune(model, 0.5, pattern="channel", filters="body", data=x, repair=True)
        except KeyboardInterrupt:
            for v, old in zip(model.weights, before, strict=True):
                np.testing.assert_array_equal(ks.graph.as_array(v), old)
            at += 1
        else:
            break
    assert at > 1 and not (ks.graph.as_array(model.weights[0]) == before[0]).all()


@pytest.mark.parametrize("allocation", ["uniform", "global", "isomorphic"])
@pytest.mark.parametrize("share", [0.95, 0.5, 0.1])
def test_budgets_are_counted_on_multiples(allocation, share):
    widths = [64, 48, 20, 40, 6]
    model = model_of((30,), *(L.Dense(n, "relu", name=f"d{i}") for i, n in enumerate(widths)), L.Dense(3))
    ks.prune(model, ks.Budget(macs=share, round_to=8), pattern="channel", allocation=allocation)
    small, report = ks.shrink(model, verbose=0, return_report=True)
    left = [small.get_layer(f"d{i}").units for i in range(len(widths))]
    assert all(n <= 8 or n % 8 == 0 or n == most for n, most in zip(left, widths, strict=True))
    assert share - 0.2 < report.totals["macs_left"] / report.totals["macs"] <= share
    assert ks.shrink(model, round_to=8, verbose=0).count_params() >= small.count_params()


def test_multiples_of_a_budget_are_kept_in_configs_and_checked():
    callback = ks.callbacks.Pruning(ks.Budget(macs=0.5, round_to=8), pattern="channel")
    assert ks.callbacks.Pruning.from_config(callback.get_config()).target_sparsity.round_to == 8
    with pytest.raises(ValueError, match="whole number"):
        ks.Budget(macs=0.5, round_to=0)


@pytest.mark.parametrize("make", [ks.callbacks.DynamicSparseTraining, lambda b: ks.callbacks.ProximalL1(None, b)])
def test_what_moves_no_channels_says_what_does(make):
    with pytest.raises(ValueError, match="Pruning.*pattern='channel'"):
        make(ks.Budget(macs=0.5))


class Line:
    """Tables of time that promise a millisecond for 1,000 weights and find 20 % more."""

    def __init__(self, channels):
        self._channels, self._factor = channels, 1e-3

    def milliseconds(self, kept):
        return self._factor * self._channels.cost(kept)["parameters"]

    def measure(self, kept):
        return 1.2e-3 * self._channels.cost(kept)["parameters"]

    def correct(self, kept, measured):
        self._factor *= measured / self.milliseconds(kept)

    def measured(self):
        return 1.2e-3 * ks.shrink(self._channels.labelled.model, verbose=0).count_params()


class Milliseconds(ks.Budget):
    """A budget of milliseconds whose clock is a `Line`."""

    def times(self, channels, groups):
        return Line(channels)


def test_a_budget_of_milliseconds_is_met_as_it_is_measured():
    model = network()
    whole = model.count_params() / 1000
    with pytest.raises(ValueError, match=r"one channel of each group the model has 0\.0\d+ milliseconds"):
        ks.prune(model, Milliseconds(milliseconds=0.01), pattern="channel")
    report = ks.prune(model, Milliseconds(milliseconds=0.6 * whole), pattern="channel", allocation="global")
    asked, promised, measured = (report.totals[f"milliseconds_{k}"] for k in ("asked", "promised", "measured"))
    assert 0.5 * whole < measured <= 1.03 * asked == 1.03 * 0.6 * whole
    assert promised == pytest.approx(measured)
    assert "asked" in report.notes[-1]
    model.compile("sgd", "mse", run_eagerly=keras.backend.backend() != "jax")
    callback = ks.callbacks.Pruning(Milliseconds(milliseconds=0.4 * whole), pattern="channel", frequency=1)
    model.fit(IMAGES, np.zeros((32, 3)), batch_size=8, epochs=2, verbose=0, callbacks=[callback])
    assert callback.milliseconds["measured"] <= 1.03 * 0.4 * whole


def test_a_budget_of_milliseconds_is_kept_in_configs():
    callback = ks.callbacks.Pruning(ks.Budget(milliseconds=4.0, runtime="wasm"), pattern="channel")
    again = ks.callbacks.Pruning.from_config(callback.get_config()).target_sparsity
    assert (again.milliseconds, again.runtime) == (4.0, "wasm")


@pytest.mark.parametrize("arguments", [{"milliseconds": 0}, {"milliseconds": float("nan")}, {"milliseconds": "4"}])
def test_milliseconds_are_an_amount(arguments):
    with pytest.raises((ValueError, TypeError), match="milliseconds"):
        ks.Budget(**arguments)


def with_logits():
    return model_of((6,), L.Dense(8, "relu", name="a"), L.Dense(4, name="head"))


def test_outputs_become_zero_where_they_are_named_and_are_told_of():
    model, other = with_logits(), with_logits()
    [note] = ks.prune(model, 0.5, pattern="channel", filters="kernel").notes
    assert (
        "Outputs of the model that are zero now, whatever it gets: 2. Leave its last layer out with `filters`" in note
    )
    assert np.sum(~outputs(model, correlated(9, 6)).any(axis=0)) == 2
    assert ks.prune(other, 0.5, pattern="channel", filters="a/").notes == []


@pytest.mark.parametrize("target", [0.5, {"kernel": 0.5}])
@pytest.mark.parametrize("gradual", [False, True])
def test_outputs_stay_where_no_weight_is_named(target, gradual):
    model = with_logits()
    if gradual:
        model.compile(ks.optimizers.SparseOptimizer("sgd"), "mse")
        ks.update_masks(model, target, pattern="channel")
    else:
        ks.prune(model, target, pattern="channel")
    zero = [int(np.sum(~ks.graph.as_array(model.get_layer(name).kernel).any(axis=0))) for name in ("a", "head")]
    assert zero == [4, 2 if isinstance(target, dict) else 0]


def test_a_model_of_nothing_but_outputs_says_how_to_prune_them():
    model = model_of((6,), L.Dense(8, name="head"))
    with pytest.raises(ValueError, match=r"an output of the model.*name it in `filters`"):
        ks.prune(model, 0.5, pattern="channel")
    ks.prune(model, 0.5, pattern="channel", filters="head")
    assert np.sum(~ks.graph.as_array(model.get_layer("head").kernel).any(axis=0)) == 4
