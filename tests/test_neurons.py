"""Neuron sparsity: against forward passes in NumPy, for every kind of model."""

import keras
import numpy as np
import pytest
from keras import layers
from measured_models import check, dense, normal, relu, sequential

import keras_sparse as ks

BACKEND = keras.backend.backend()


def table(report, *columns):
    return [tuple(row[column] for column in columns) for row in report.rows]


def kill(layer, *units):
    """Make output units of a layer dead, their biases included."""
    kernel, bias = (np.array(ks.selection.as_array(v)) for v in layer.weights[:2])
    kernel[..., list(units)] = 0
    bias[list(units)] = 0
    layer.set_weights([kernel, bias, *layer.get_weights()[2:]])


def test_mlp_against_numpy():
    model = keras.Sequential([keras.Input((6,)), layers.Dense(9, "relu"), layers.Dense(5, "relu"), layers.Dense(3)])
    kill(model.layers[0], 2, 7)
    model.layers[1].bias.assign([-100, 0, 0, 0, 0])  # Never active, though its weights are not zero.
    x = normal(70, 6)
    report = ks.neuron_sparsity(model, x)
    first = relu(dense(x, model.layers[0]))
    second = relu(dense(first, model.layers[1]))
    check(report.rows[0], first, 2)
    check(report.rows[1], second, 0)
    check(report.rows[2], dense(second, model.layers[2]), 0)
    assert table(report, "activation", "role") == [("relu", "hidden")] * 2 + [("linear", "output")]
    assert [row["layer"] for row in report.rows] == [layer.path for layer in model.layers]
    a, b, c = report.rows
    totals = report.totals
    assert (totals["samples"], totals["units"], totals["dead_units"]) == (70, 17, 2)
    assert totals["inactive"] == pytest.approx((9 * a["inactive"] + 5 * b["inactive"] + 3 * c["inactive"]) / 17)
    assert totals["neuron_sparsity"] == pytest.approx((9 * a["inactive"] + 5 * b["inactive"]) / 14)
    assert totals["dead_neurons"] == pytest.approx((9 * a["never_active"] + 5 * b["never_active"]) / 14)
    assert a["never_active"] == pytest.approx(2 / 9) and b["never_active"] >= 1 / 5
    assert f"neuron sparsity {totals['neuron_sparsity']:.1%}" in str(report)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_cnn_against_numpy(data_format):
    first = data_format == "channels_first"
    shape, axis = ((2, 5, 5), 1) if first else ((5, 5, 2), -1)
    inputs = keras.Input(shape)
    conv = layers.Conv2D(6, 3, data_format=data_format)
    norm = layers.BatchNormalization(axis=axis, epsilon=0)
    x = layers.ReLU(name="act")(norm(conv(inputs)))
    x = layers.MaxPooling2D(3, data_format=data_format)(x)
    x = layers.ReLU(max_value=0.01, name="clip")(layers.Concatenate(axis=axis)([x, x]))
    model = keras.Model(inputs, layers.Dense(1)(layers.Flatten()(x)))
    # TensorFlow needs XLA for channels first on a CPU.
    model.compile("sgd", "mse", jit_compile=(first and BACKEND == "tensorflow") or "auto")
    kill(conv, 4)
    shift = np.float32([-2.5, 0, -1.8, -50, 0, 3])
    norm.set_weights([np.ones(6, "float32"), shift, np.zeros(6, "float32"), np.ones(6, "float32")])
    x = normal(40, *shape)
    report = ks.neuron_sparsity(model, x, batch_size=16)
    last = x.transpose(0, 2, 3, 1) if first else x
    windows = np.lib.stride_tricks.sliding_window_view(last, (3, 3), axis=(1, 2))  # [n, 3, 3, channels, 3, 3]
    values = np.einsum("nxychw,hwcf->nxyf", windows, conv.get_weights()[0]) + shift
    check(report.rows[0], relu(values), 1)
    assert report.rows[0]["never_active"] >= 2 / 6  # The dead filter's output is its shift, which is 0, and -50.
    check(report.rows[1], np.tile(relu(values).max(axis=(1, 2)), 2))
    assert table(report, "activation", "role", "units")[:2] == [("act", "hidden", 6), ("clip", "hidden", 12)]


# Kinds of models: all are Dense - BatchNorm - ReLU - Dense with the same numbers.


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.parts = {"dense": layers.Dense(7), "norm": layers.BatchNormalization()}
        self.rest = [layers.ReLU(), layers.Dropout(0.5), layers.Dense(2)]

    def call(self, x):
        x = self.parts["norm"](self.parts["dense"](x))
        for layer in self.rest:
            x = layer(x)
        return x


class Square(layers.Layer):
    def call(self, x):
        return keras.ops.square(keras.ops.relu(x))


def functional_operation():
    inputs = keras.Input((4,))
    return keras.Model(inputs, layers.Dense(2)(keras.ops.relu(layers.BatchNormalization()(layers.Dense(7)(inputs)))))


def nested():
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(7), layers.BatchNormalization()])
    act = keras.Sequential([keras.Input((7,)), layers.Activation("relu")])
    inputs = keras.Input((4,))
    return keras.Sequential([inputs, keras.Model(inputs, act(inner(inputs))), layers.Dense(2)])


def subclassed():
    model = Subclassed()
    model(np.zeros((1, 4), "float32"))
    return model


def built_in():
    return keras.Sequential([keras.Input((4,)), layers.Dense(7, activation=layers.ReLU()), layers.Dense(2)])


def rematerialized():
    with keras.RematScope(mode="full"):
        return sequential()


MODELS = {
    "Sequential": sequential,
    "subclassed": subclassed,
    "nested": nested,
    "operation": functional_operation,
    "Activation": lambda: sequential(lambda: layers.Activation("relu")),
    "Lambda": lambda: sequential(lambda: layers.Lambda(keras.ops.relu)),
    "custom": lambda: sequential(Square),
    "a layer as activation": built_in,
    "rematerialized": rematerialized,
}


@pytest.mark.parametrize("kind", MODELS)
def test_kinds_of_models(kind):
    model = MODELS[kind]()
    kernels = [normal(4, 7), normal(7, 2)]
    kernels[0][:, 3] = 0
    for weight, value in zip((w for w in ks.selection.weights(model) if w.kernel), kernels, strict=True):
        weight.variable.assign(value)
    x = normal(20, 4)
    report = ks.neuron_sparsity(model, x)
    assert table(report, "role", "units") == [("hidden", 7), ("output", 2)]
    check(report.rows[0], relu(x @ kernels[0]), 1)


def test_units_that_gates_of_l0_close_are_inactive():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(6, "relu"), layers.Dense(2)])
    gated = ks.add_l0(model, 1e-3, granularity="unit")
    x = normal(20, 4)
    before = ks.neuron_sparsity(gated, x)
    assert table(before, "role", "units") == [("hidden", 6), ("output", 2)]
    first = gated.layers[0].log_alphas[0]
    first.assign(np.full(first.shape, -100.0))  # No input of the first layer passes: its units put out the bias, 0.
    after = ks.neuron_sparsity(gated, x)
    assert before.totals["neuron_sparsity"] < 1 and after.totals["neuron_sparsity"] == 1
    assert after.rows[0]["dead_units"] == 0  # The weights behind the gates are there until `bake`.
    assert ks.neuron_sparsity(ks.bake(gated), x).rows[0]["dead_units"] == 6


class SharedActivation(keras.Model):
    """One ReLU used everywhere, as is the custom elsewhere: behind a layer, and twice behind a sum."""

    def __init__(self):
        super().__init__()
        self.relu, self.add = layers.ReLU(), layers.Add()
        self.a, self.b, self.head = layers.Dense(5), layers.Dense(5), layers.Dense(1)

    def call(self, x):
        y = self.relu(self.a(x))
        z = self.relu(self.add([y, self.b(y)]))
        return self.head(self.relu(self.add([z, z])))


def test_activation_behind_a_sum_has_a_row_for_each_use():
    model = SharedActivation()
    x = normal(30, 4)
    model(x)
    report = ks.neuron_sparsity(model, x)
    first = relu(dense(x, model.a))
    second = relu(first + dense(first, model.b))
    rows = {row["layer"]: row for row in report.rows}
    name = next(name for name in rows if name.endswith("re_lu"))
    assert table(report, "role") == [("hidden",), ("linear",), ("hidden",), ("hidden",), ("output",)]
    check(report.rows[0], first, 0)
    check(rows[name], second)
    check(rows[f"{name} (use 2)"], 2 * second)


def test_shared_layer_counts_each_use_as_samples():
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    shared = layers.Dense(6, "relu")
    model = keras.Model({"a": a, "b": b}, [layers.Dense(1)(shared(a)), layers.Dense(2)(shared(b))])
    data = {"b": normal(25, 4), "a": normal(25, 4)}
    report = ks.neuron_sparsity(model, data, batch_size=10)
    assert report.totals["samples"] == 25
    assert sorted(table(report, "role", "units")) == [("hidden", 6), ("output", 1), ("output", 2)]
    check(report.rows[0], relu(dense(np.concatenate([data["a"], data["b"]]), shared)), 0)


def test_what_is_returned_and_used_is_hidden():
    inputs = keras.Input((4,))
    features = layers.Dense(3, "relu")(inputs)
    model = keras.Model(inputs, [features, layers.Dropout(0.1)(layers.Dense(2, "relu")(features))])
    assert table(ks.neuron_sparsity(model, normal(8, 4)), "role") == [("hidden",), ("output",)]


def attention():
    inputs = keras.Input((5, 4))
    x = layers.Add()([inputs, layers.MultiHeadAttention(2, 3, name="mha")(inputs, inputs)])
    return keras.Model(inputs, layers.Dense(1)(layers.Dense(8, "gelu")(layers.LayerNormalization()(x))))


def recurrent():
    stacked = layers.RNN([layers.LSTMCell(4), layers.SimpleRNNCell(6, activation="relu")], return_sequences=True)
    both = layers.Bidirectional(layers.GRU(3, return_sequences=True))
    return keras.Sequential([keras.Input((5, 4)), both, stacked, layers.LSTM(7), layers.Dense(1)])


def distributed():
    frame = keras.Sequential([keras.Input((4,)), layers.Dense(6, "relu"), layers.Dense(3)])
    parts = [layers.TimeDistributed(frame), layers.TimeDistributed(layers.Dense(5, "relu"))]
    return keras.Sequential([keras.Input((5, 4)), *parts, layers.Flatten(), layers.Dense(1)])


def convolutions():
    parts = [
        layers.ConvLSTM2D(3, 2),
        layers.SeparableConv2D(4, 2, depth_multiplier=2, activation="relu"),
        layers.DepthwiseConv2D(2, depth_multiplier=2),
        layers.Conv2DTranspose(6, 2),
        layers.EinsumDense("...x,xy->...y", (5,), activation="relu"),
        layers.EinsumDense("bhwx,xyz->bzhwy", (2, None, None, 3)),
    ]
    return keras.Sequential([keras.Input((2, 8, 8, 2)), *parts])


KINDS = {
    attention: [("mha/query", 6), ("mha/key", 6), ("mha/value", 6), ("mha/attention_output", 4), ("", 8), ("", 1)],
    recurrent: [("forward_gru", 3), ("backward_gru", 3), ("rnn", 6), ("lstm", 7), ("", 1)],
    distributed: [("dense", 6), ("dense_1", 3), ("time_distributed_1", 5), ("", 1)],
    convolutions: [("", 3), ("", 4), ("", 8), ("", 6), ("", 5), ("", 6)],
}


@pytest.mark.parametrize("make", KINDS)
def test_kinds_of_layers(make):
    model = make()
    probe = ks.neurons.Probe(model)
    x = normal(4, *model.input_shape[1:])
    report = probe.measure(x)
    assert [row["units"] for row in report.rows] == [units for _, units in KINDS[make]]
    for row, (name, _) in zip(report.rows, KINDS[make], strict=True):
        assert row["layer"].endswith(name) and row["dead_units"] == 0
    # Units whose weights and biases are all zero are dead, and inactive where zero is mapped to zero.
    for variable in model.weights:
        variable.assign(np.zeros(variable.shape))
    report = probe.measure(x)
    assert all(row["dead_units"] == row["units"] for row in report.rows)
    assert all(row["inactive"] == row["never_active"] == 1 for row in report.rows)


def test_recurrent_unit_is_dead_if_all_of_its_gates_are():
    model = keras.Sequential([keras.Input((5, 4)), layers.LSTM(3), layers.Dense(1)])
    cell = model.layers[0].cell
    for variable in (cell.kernel, cell.recurrent_kernel):
        value = np.ones(variable.shape)
        value[:, [1, 4, 7, 10]] = 0  # All gates of unit 1,
        value[:, [2, 5]] = 0  # and some of unit 2.
        variable.assign(value)
    assert ks.neuron_sparsity(model, normal(2, 5, 4)).rows[0]["dead_units"] == 1


def test_unknown_number_of_steps_is_noted():
    frame = keras.Sequential([keras.Input((4,)), layers.Dense(6, "relu")])
    model = keras.Sequential([keras.Input((None, 4)), layers.TimeDistributed(frame), layers.LSTM(2)])
    generator = (normal(2, steps, 4) for steps in (3, 5, 4))
    report = ks.neuron_sparsity(model, generator)
    assert report.totals["samples"] == 6
    assert table(report, "units") == [(2,)]
    assert (
        report.notes[0] == f"the layers in {model.layers[0].path} are not seen: its number of time steps is not fixed"
    )


class Scanned(layers.Layer):
    def __init__(self):
        super().__init__()
        self.inner = layers.Dense(3, "relu")

    def build(self, shape):
        self.inner.build((shape[0], shape[2]))

    def compute_output_shape(self, shape):
        return (*shape[:2], 3)

    def call(self, x):
        steps = keras.ops.transpose(x, (1, 0, 2))
        first = keras.ops.zeros_like(steps[0, :, :3])
        _, y = keras.ops.scan(lambda carry, step: (carry, self.inner(step)), first, steps)
        return keras.ops.transpose(y, (1, 0, 2))


def test_layers_in_a_compiled_loop_are_an_error():
    model = keras.Sequential([keras.Input((5, 4)), Scanned(), layers.Dense(2)])
    if BACKEND == "torch":
        assert table(ks.neuron_sparsity(model, normal(3, 5, 4)), "units") == [(3,), (2,)]
        return
    with pytest.raises(ValueError, match="cannot all be observed.*keras.ops.scan"):
        ks.neuron_sparsity(model, normal(3, 5, 4))
    assert model.predict(normal(3, 5, 4), verbose=0).shape == (3, 5, 2)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = sequential()
    finally:
        keras.config.set_dtype_policy("float32")
    kill(model.layers[0], 0, 1)
    x = normal(50, 4)
    row = ks.neuron_sparsity(model, x).rows[0]
    assert (row["activation"], row["dead_units"]) == ("re_lu", 2)
    assert row["inactive"] == pytest.approx((relu(dense(x, model.layers[0])) == 0).mean(), abs=0.02)
