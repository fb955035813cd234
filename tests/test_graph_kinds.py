"""The table of layer kinds says what the layers do, Keras's and a user's own, and everything asks it."""

import math

import keras
import numpy as np
import pytest
from keras import layers

import keras_sparse as ks
from keras_sparse.graph.kinds import JOINS, KEEPS, Equation, Kernel, Kind, kind_of, kinds, register_kind

ARGUMENTS = {
    **{getattr(layers, f"Conv{n}D"): {"filters": 4, "kernel_size": 2} for n in (1, 2, 3)},
    **{getattr(layers, f"Conv{n}DTranspose"): {"filters": 4, "kernel_size": 2} for n in (1, 2, 3)},
    **{getattr(layers, f"SeparableConv{n}D"): {"filters": 4, "kernel_size": 2} for n in (1, 2)},
    **{getattr(layers, f"DepthwiseConv{n}D"): {"kernel_size": 2} for n in (1, 2)},
    **{getattr(layers, f"ConvLSTM{n}D"): {"filters": 4, "kernel_size": 2} for n in (1, 2, 3)},
    **{getattr(layers, f"AveragePooling{n}D"): {"pool_size": 2} for n in (1, 2, 3)},
    **{each: {"units": 4} for each in (layers.Dense, layers.SimpleRNN, layers.GRU, layers.LSTM)},
    **{each: {"input_dim": 5, "output_dim": 4} for each in (layers.Embedding, layers.ReversibleEmbedding)},
    **{
        getattr(layers, f"Adaptive{name}Pooling{n}D"): {"output_size": 2}
        for name in ("Average", "Max")
        for n in (1, 2, 3)
    },
    layers.EinsumDense: {"equation": "abc,cd->abd", "output_shape": (None, 4)},
    layers.Activation: {"activation": "tanh"},
    layers.Dropout: {"rate": 0.5},
    layers.AlphaDropout: {"rate": 0.5},
    layers.GaussianDropout: {"rate": 0.5},
    layers.GaussianNoise: {"stddev": 0.5},
    layers.PReLU: {"alpha_initializer": "ones"},
    layers.Rescaling: {"scale": 2.0, "offset": 1.0},
}
ROWS = kinds()
IDS = {one: one.__name__ for one in ROWS}


def rows(condition):
    return pytest.mark.parametrize("layer_class", [one for one, kind in ROWS.items() if condition(kind)], ids=IDS.get)


def made(layer_class):
    return layer_class(**ARGUMENTS.get(layer_class, {}))


def inputs(layer_class, channels=3):
    """Inputs of a shape that the layer takes, channels last, without a value that is the same for all."""
    name = layer_class.__name__
    positions = next((n for n in (1, 2, 3) if f"{n}D" in name), 2)
    shape = (2, *(4 for _ in range(positions)), channels)
    if "LSTM" in name and name.startswith("Conv"):
        shape = (2, 3, *shape[1:])
    elif name in ("SimpleRNN", "GRU", "LSTM", "EinsumDense"):
        shape = (2, 4, channels)
    values = np.random.default_rng(0).normal(size=shape).astype("float32")
    return np.abs(values).astype("int32") if "Embedding" in name else values


def run(layer, *x):
    return keras.ops.convert_to_numpy(layer(*x))


@rows(lambda kind: kind.width)
def test_the_width_is_the_number_of_output_channels(layer_class):
    if layer_class is layers.RNN or layer_class.__name__.endswith("Cell"):
        layer = layers.LSTMCell(4) if layer_class is layers.RNN else layer_class(4)
        assert layer.get_config()["units"] == 4 == layer.output_size
        return
    layer = made(layer_class)
    assert layer.get_config()[kind_of(layer).width] == run(layer, inputs(layer_class)).shape[-1] == 4


@rows(lambda kind: kind.linear)
def test_units_of_linear_layers_are_their_slice_of_the_kernel_and_their_bias(layer_class):
    layer, x = made(layer_class), inputs(layer_class)
    before = run(layer, x)
    weight = [w for w in ks.graph.weights(layer) if w.kernel][-1]
    value = weight.numpy()
    matrix = ks.patterns.to_matrix(value, weight.output_axes).copy()
    matrix[1] = 0
    value = ks.patterns.from_matrix(matrix, value.shape, weight.output_axes)
    weight.variable.assign(value)
    after = run(layer, x)
    assert matrix.shape[0] == before.shape[-1]
    assert (after[..., 1] == 0).all() and (before[..., 1] != 0).any()
    others = [i for i in range(before.shape[-1]) if i != 1]
    np.testing.assert_allclose(after[..., others], before[..., others], atol=1e-5)


@rows(lambda kind: kind.channels == KEEPS and not kind.kernels)
def test_channels_are_kept_apart(layer_class):
    layer, x = made(layer_class), inputs(layer_class)
    before = run(layer, x)
    other = x.copy()
    other[..., 1] += 3
    changed = np.any(run(layer, other) != before, axis=tuple(range(before.ndim - 1)))
    np.testing.assert_array_equal(changed, [False, True, False])


@rows(lambda kind: kind.zero)
def test_channels_of_zeros_stay_zero(layer_class):
    layer, x = made(layer_class), inputs(layer_class)
    x[..., 1] = 0
    assert (run(layer, x)[..., 1] == 0).all()


@rows(lambda kind: kind.channels == JOINS)
def test_channels_of_several_inputs_are_joined(layer_class):
    layer, x = made(layer_class), inputs(layer_class)
    y = np.random.default_rng(1).normal(size=x.shape).astype("float32")
    before = run(layer, [x, y])
    for each in (x, y):
        each[..., 1] *= -3
        changed = np.any(run(layer, [x, y]) != before, axis=(0, 1, 2))
        np.testing.assert_array_equal(changed, [False, True, False])
        each[..., 1] /= -3
    x[..., 1] = 0
    assert (run(layer, [x, y])[..., 1] == 0).all() == kind_of(layer).product


@rows(lambda kind: kind.pointwise)
def test_pointwise_layers_treat_all_positions_alike(layer_class):
    if layer_class is layers.InputLayer:
        pytest.skip("it is called on nothing")
    layer, x = made(layer_class), inputs(layer_class)
    joins = kind_of(layer).channels in (JOINS, "concatenates")
    called, flipped = ([x, x], [x[:, ::-1, ::-1]] * 2) if joins else (x, x[:, ::-1, ::-1])
    np.testing.assert_allclose(run(layer, called)[:, ::-1, ::-1], run(layer, flipped), atol=1e-6)


def test_subclasses_have_the_row_of_what_they_inherit_from():
    class Head(layers.Dense):
        pass

    class Body(Head):
        pass

    assert kind_of(Body(3)) is ROWS[layers.Dense]
    assert kind_of(layers.SpatialDropout2D(0.5)) is ROWS[layers.Dropout]
    assert kind_of(layers.Lambda(abs)).channels == "unknown"


def test_operations_have_rows():
    x = keras.Input((4,))
    model = keras.Model(x, keras.ops.reshape(keras.ops.relu6(x * 2.0), (-1, 2, 2)))
    found = [kind_of(operation).channels for operation in model.operations]
    assert found == ["unknown", "joins", "keeps", "moves"]


@pytest.mark.parametrize(
    ("equation", "shape", "kernel", "units", "outputs"),
    [
        ("ab,bc->ac", (2, 3), (3, 4), "c", (1,)),
        ("abc,cde->abde", (2, 5, 3), (3, 4, 2), "de", (2, 3)),
        ("...x,xy->...y", (2, 5, 3), (3, 4), "y", (2,)),
        ("abcd,cde->abe", (2, 5, 4, 3), (4, 3, 2), "e", (2,)),
        ("a b , b c -> a c", (2, 3), (3, 4), "c", (1,)),
    ],
)
def test_equations(equation, shape, kernel, units, outputs):
    parsed = Equation(equation)
    rank = len(shape) if "." in equation else len(parsed.outputs)
    assert parsed.units == units and parsed.output_axes(rank) == outputs
    assert [kernel[axis] for axis in parsed.kernel_outputs] == list(kernel[len(kernel) - len(units) :])


# A user's own layers


class Linear(layers.Layer):
    """A dense layer whose kernel has the outputs first, with weights of names that nobody else has."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units

    def build(self, shape):
        self.table = self.add_weight(shape=(self.units, shape[-1]), name="table")
        self.shift = self.add_weight(shape=(self.units,), initializer="zeros", name="shift")
        self.mixer = self.add_weight(shape=(3, 3), name="mixer")
        self.built = True

    def call(self, x):
        return keras.ops.matmul(x, keras.ops.transpose(self.table)) + self.shift + 0 * keras.ops.sum(self.mixer)

    def compute_output_shape(self, shape):
        return (*shape[:-1], self.units)

    def get_config(self):
        return super().get_config() | {"units": self.units}


class Scaled(layers.Layer):
    """One number for each channel, as a normalization has it."""

    def build(self, shape):
        self.factor = self.add_weight(shape=(shape[-1],), initializer="ones", name="factor")

    def call(self, x):
        return x * self.factor


class Cube(layers.Layer):
    """An activation with a weight."""

    def build(self, shape):
        self.power = self.add_weight(shape=(1,), initializer="ones", name="power")

    def call(self, x):
        return x * keras.ops.square(x) * self.power[0]


@pytest.fixture(scope="module", autouse=True)
def registered():
    kernel = Kernel(outputs=(0,), inputs=(1,))
    register_kind(Linear, Kind("mixes", {"table": kernel}, linear=True, bias="shift", width="units", gates="outputs"))
    register_kind(Scaled, Kind("keeps", per_channel=("factor",), inert=True))
    register_kind(Cube, Kind("keeps", zero=True, activates=True))


def model(*between, width=6):
    stack = [Linear(width, name="body"), *between, layers.Dense(2, name="head")]
    return keras.Sequential([keras.Input((5, 8)), *stack])


def test_selection_and_report_know_the_kernel():
    net = model()
    found = {w.variable.name: w for w in ks.graph.weights(net) if w.layer.name == "body"}
    assert [name for name, weight in found.items() if weight.kernel] == ["table"]
    assert found["mixer"].skipped == "mixer of Linear: not a kernel"
    assert (found["table"].output_axes, found["table"].input_axes) == ((0,), (1,))
    net.layers[0].table.assign(np.diag([1.0, 1, 1, 1, 0, 0, 0, 0])[:6])
    row = ks.report(net).rows[0]
    assert (row["dead_units"], row["dead_inputs"]) == (2, 4)


def test_whole_channels_take_the_shift_and_the_scale_along():
    net = model(Scaled(name="scaled"), Cube())
    for variable in (net.layers[0].shift, net.layers[1].factor):
        variable.assign(np.full(6, 2.0))
    kernel = next(w for w in ks.graph.weights(net) if w.variable.name == "table")
    assert [[v.name for v in found] for found in ks.graph.unit_variables(net, [kernel])] == [["shift", "factor"]]
    ks.prune(net, 0.5, pattern="channel", filters="table")
    assert all((ks.graph.as_array(v) == 0).sum() == 3 for v in (net.layers[0].shift, net.layers[1].factor))
    body = keras.Model(net.inputs[0], net.layers[2].output)
    values = run(body, np.random.default_rng(0).normal(size=(4, 5, 8)))
    assert (values == 0).all(axis=(0, 1)).sum() == 3


def test_rows_of_ones_own_are_shrunk():
    rng = np.random.default_rng(0)
    net = model(Scaled(name="scaled"), Cube())
    for variable in net.weights:
        variable.assign(rng.normal(size=variable.shape))
    x = rng.normal(size=(4, 5, 8)).astype("float32")
    ks.prune(net, 0.5, pattern="channel", filters="table")
    small = ks.shrink(net, verbose=0)
    assert [tuple(small.layers[i].weights[0].shape) for i in (0, 1, 3)] == [(3, 8), (3,), (3, 2)]
    np.testing.assert_allclose(run(small, x), run(net, x), rtol=1e-4, atol=1e-5)


def test_a_weight_for_each_channel_that_a_row_does_not_name_keeps_them():
    class Forgotten(Scaled):
        pass

    register_kind(Forgotten, Kind("keeps"))
    net = model(Forgotten())
    row = next(row for row in ks.channel_groups(net).rows if row["channels"] == 6)
    assert "per_channel" in row["reason"]


def test_macs_and_neuron_sparsity():
    net = model(Scaled(), Cube(name="cube"))
    used = ks.graph.uses(net, np.zeros((1, 5, 8)))
    assert used[net.layers[0].table] == 5
    net.layers[0].table.assign(np.diag([1.0, 1, 1, 1, 0, 0, 0, 0])[:6])
    row = ks.neuron_sparsity(net, np.ones((3, 5, 8))).rows[0]
    assert (row["layer"].split("/")[-1], row["activation"], row["role"], row["units"]) == ("body", "cube", "hidden", 6)
    assert (row["dead_units"], row["inactive"]) == (2, pytest.approx(1 / 3))


@pytest.mark.skipif(keras.backend.backend() == "tensorflow", reason="its CPU kernels want channels last")
@pytest.mark.parametrize("more", [{}, {"return_sequences": True}])
@rows(lambda kind: kind.kernels or kind.recurrent)
def test_macs_do_not_depend_on_where_channels_lie(layer_class, more):
    name = layer_class.__name__
    if "Conv" not in name or (more and "LSTM" not in name):
        pytest.skip("has no format, or returns no sequences")
    x, found = inputs(layer_class)[:1], []
    for data_format in ("channels_last", "channels_first"):
        layer = layer_class(**ARGUMENTS.get(layer_class, {}), data_format=data_format, **more)
        net = keras.Sequential([keras.Input(x.shape[1:]), layer])
        used = ks.graph.uses(net, x)
        found.append([used[v] for v in net.weights if v in used])
        x = np.moveaxis(x, -1, 2 if "LSTM" in name else 1)
    assert found[0] == found[1]
    assert min(found[0]) > 1


def test_gates_and_baking():
    net = model(Cube())
    gated = ks.add_l0(net, 1e-3, "unit", filters=["body", "head"], seed=0)
    body, head = gated.layers[0], gated.layers[-1]
    assert tuple(body.log_alphas[0].shape) == (6, 1)  # as it switches outputs off
    body.layer.shift.assign(np.ones(6))
    body.log_alphas[0].assign(np.reshape([-4.6, 4.6, 4.6, 4.6, 4.6, 4.6], (6, 1)))
    head.log_alphas[0].assign(np.reshape([4.6, 4.6, 4.6, 4.6, -4.6, -4.6], (6, 1)))
    baked = ks.bake(gated)
    np.testing.assert_array_equal(ks.graph.as_array(baked.layers[0].shift), [0, 1, 1, 1, 0, 0])
    x = np.random.default_rng(0).normal(size=(4, 5, 8)).astype("float32")
    np.testing.assert_allclose(baked.predict(x, verbose=0), gated.predict(x, verbose=0), atol=1e-5)
    assert ks.report(baked).rows[0]["dead_units"] == 3


def test_positions_of_a_layer_that_reads_each_input_several_times():
    class Twice(Linear):
        def call(self, x):
            return super().call(x) + super().call(x)

    register_kind(Twice, Kind("mixes", {"table": Kernel((0,))}, positions=lambda _, x, y: 2 * math.prod(y[1:-1])))
    net = keras.Sequential([keras.Input((5, 8)), Twice(3)])
    assert ks.graph.uses(net, np.zeros((1, 5, 8)))[net.layers[0].table] == 10


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: register_kind("Linear", Kind()), TypeError, "`layer_class` must be a subclass.*Received: 'Linear'"),
        (lambda: register_kind(Linear(3), Kind()), TypeError, "`layer_class` must be a subclass"),
        (lambda: register_kind(Linear, "mixes"), TypeError, "`kind` must be a `ks.graph.Kind`. Received: 'mixes'"),
        (lambda: Kind("mix"), ValueError, "`channels` must be one of.*Received: channels='mix'"),
        (lambda: Kind(gates="all"), ValueError, "`gates` must be one of.*Received: gates='all'"),
        (lambda: Kind(positions="all"), ValueError, "`positions` must be.*Received: positions='all'"),
        (lambda: Kind(kernels={"w": (0,)}), TypeError, "`kernels` must be a dict of `ks.graph.Kernel`. Received: 'w'"),
        (lambda: Kernel(role="bias"), ValueError, "`role` must be one of.*Received: role='bias'"),
        (lambda: Kernel(outputs=0), TypeError, "`outputs` must be a tuple of ints.*Received: 0"),
        (lambda: Kernel(inputs="all"), TypeError, "`inputs` must be a tuple of ints.*Received: 'all'"),
    ],
)
def test_bad_rows(make, error, message):
    with pytest.raises(error, match=message):
        make()
