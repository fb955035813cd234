"""Copies and measures: what a candidate is scored on, against plain pruning and NumPy."""

import keras
import numpy as np
import pytest

import keras_sparse as ks
from keras_sparse.graph import uses
from keras_sparse.search.evaluation import Evaluation, arrays

layers = keras.layers


def data(n=96, shape=(6,), classes=3, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, *shape)).astype("float32")
    return x, (x.reshape(n, -1)[:, :classes]).argmax(axis=1)


def network(*body, shape=(6,), optimizer="adam"):
    model = keras.Sequential([keras.Input(shape), *body])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    return model


def mlp(*more):
    return network(layers.Dense(12, activation="relu"), *more, layers.Dense(3))


@pytest.fixture
def scored(tmp_path):
    """A function that scores allocations of a model."""
    made = []

    def score(model, allocations, train=None, test=None, seed=0, **options):
        test = data() if test is None else test
        evaluation = Evaluation(tmp_path, [p.index for p in ks.search.Space(model).parts], **options)
        evaluation.prepare(model, None if train is None else arrays(train), arrays(test))
        made.append(evaluation)
        found = [evaluation(allocation, seed) for allocation in allocations]
        assert not any("error" in values for values in found), found
        return [{k: v for k, v in values.items() if k != "seconds"} for values in found]

    yield score
    for evaluation in made:
        evaluation.forget()


def test_scores_are_those_of_the_pruned_model(scored):
    model = mlp()
    before = [np.array(w) for w in model.get_weights()]
    first, again, dense = scored(model, [{0: (0.5, "unstructured"), 2: (0.25, "block_1x4")}] * 2 + [None])
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    assert first == again
    x, y = data()
    expected = model.evaluate(x, y, verbose=0, return_dict=True)
    assert dense == pytest.approx(expected | {"sparsity": 0.0}, rel=1e-5)
    ks.prune(
        model,
        {"kernel": 0.0, model.layers[0].kernel.path: 0.5} if False else {r"dense/": 0.5, r"_1/": (0.25, "block_1x4")},
    )
    expected = model.evaluate(x, y, verbose=0, return_dict=True)
    zeros = sum(int(np.sum(layer.kernel.numpy() == 0)) for layer in model.layers)
    assert first == pytest.approx(expected | {"sparsity": zeros / (6 * 12 + 12 * 3)}, rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adam", keras.optimizers.SGD(0.1, momentum=0.9)])
@pytest.mark.thorough(1)
@pytest.mark.lengthy(0)
def test_training_keeps_zeros_and_starts_anew_each_time(scored, optimizer):
    model = network(layers.Dense(12, activation="relu"), layers.Dropout(0.3), layers.Dense(3), optimizer=optimizer)
    model.fit(*data(seed=1), epochs=2, verbose=0)  # the optimizer has a history
    sparse, dense = {0: (0.75, "unstructured"), 2: (0.5, "unstructured")}, {0: (0.0, "unstructured")}
    found = scored(model, [sparse, dense, sparse], data(seed=1), epochs=4)
    assert found[0] == found[2] != found[1]
    assert found[0]["sparsity"] == pytest.approx((54 + 18) / 108)
    assert found[1]["sparsity"] == 0.0
    assert found[1]["loss"] < scored(model, [dense])[0]["loss"]


@pytest.mark.parametrize("epochs", [0, 1])
@pytest.mark.lengthy(1)
def test_scores_do_not_depend_on_what_the_process_has_drawn(scored, epochs):
    model, found = mlp(layers.Dropout(0.5), layers.BatchNormalization()), []
    for seed in (1, 2):
        keras.utils.set_random_seed(seed)
        found += scored(model, [{0: (0.5, "unstructured")}], data(seed=1), epochs=epochs)
    assert found[0] == found[1]


def test_training_is_that_of_fit_with_kept_zeros(scored):
    model = mlp()
    train = data(seed=1)
    allocation = {0: (0.75, "unstructured"), 2: (0.5, "unstructured")}
    (found,) = scored(model, [allocation], train, epochs=2, batch_size=32, seed=5)
    ks.prune(model, {"dense/": 0.75, "_1/": 0.5})
    rng = np.random.default_rng(5)
    for _ in range(2):
        order = rng.permutation(96)
        keep = [ks.callbacks.KeepSparsity()]
        model.fit(train[0][order], train[1][order], batch_size=32, shuffle=False, verbose=0, callbacks=keep)
    assert found["loss"] == pytest.approx(model.evaluate(*data(), verbose=0)[0], rel=1e-4)


def test_dead_units_stay_dead_in_training(scored):
    model = network(layers.Dense(8), layers.BatchNormalization(), layers.ReLU(), layers.Dense(3))
    allocations = [{0: (0.5, "channel")}, {0: (0.5, "unstructured")}, {0: (0.5, "channel")}]
    found = scored(model, allocations, data(seed=1), epochs=2)
    assert found[0] == found[2] != found[1]
    assert found[0]["sparsity"] == pytest.approx(24 / (48 + 24))
    copy = next(iter(ks.search.evaluation._COPIES.known.values())).model
    kernel, bias, gamma, beta = (np.array(w) for w in copy.get_weights()[:4])
    dead = ~kernel.any(axis=0)
    assert dead.sum() == 4
    for values in (bias, gamma, beta):
        assert not values[dead].any()


def test_normalizations_are_estimated_anew(scored):
    model = network(layers.Dense(8, name="a"), layers.BatchNormalization(), layers.Dense(3))
    model.layers[1].moving_mean.assign(np.full(8, 100.0))  # from weights that are no more
    train = data(128, seed=1)
    (found,) = scored(model, [{0: (0.5, "unstructured")}], train, batch_size=64)
    ks.prune(model, 0.5, filters="a/")
    inner = train[0] @ model.layers[0].kernel.numpy()
    halves = inner[:64], inner[64:]
    model.layers[1].moving_mean.assign(np.mean([half.mean(axis=0) for half in halves], axis=0))
    model.layers[1].moving_variance.assign(np.mean([half.var(axis=0) for half in halves], axis=0))
    assert found["loss"] == pytest.approx(model.evaluate(*data(), verbose=0)[0], rel=1e-4)


def test_sample_weights_count(scored):
    x, y = data()
    weight = np.arange(96, dtype="float32")
    model = mlp()
    (plain,) = scored(model, [None])
    (weighted,) = scored(model, [None], test=(x, y, weight))
    assert weighted["loss"] == pytest.approx(model.evaluate(x, y, 128, 0, weight)[0], rel=1e-5)
    assert weighted["loss"] != plain["loss"]


BODIES = {
    "dense": (lambda: [layers.Dense(4)], (6,), {"kernel": 1}),
    "dense of a sequence": (lambda: [layers.Dense(4)], (5, 6), {"kernel": 5}),
    "valid convolution": (lambda: [layers.Conv2D(4, 3)], (8, 6, 2), {"kernel": 24}),
    "stride": (lambda: [layers.Conv2D(4, 3, strides=2, padding="same")], (8, 6, 2), {"kernel": 12}),
    "groups": (lambda: [layers.Conv2D(4, 3, groups=2)], (8, 6, 2), {"kernel": 24}),
    "one dimension": (lambda: [layers.Conv1D(4, 3)], (9, 2), {"kernel": 7}),
    "transposed": (lambda: [layers.Conv2DTranspose(4, 3, strides=2)], (4, 5, 2), {"kernel": 20}),
    "depthwise": (lambda: [layers.DepthwiseConv2D(3, depth_multiplier=2)], (8, 6, 2), {"kernel": 24}),
    "separable": (lambda: [layers.SeparableConv2D(4, 3)], (8, 6, 2), {"depthwise_kernel": 24, "pointwise_kernel": 24}),
    "einsum": (lambda: [layers.EinsumDense("abc,cd->abd", (None, 4))], (5, 6), {"kernel": 5}),
    "recurrent": (lambda: [layers.LSTM(4)], (7, 3), {"kernel": 7, "recurrent_kernel": 7}),
    "recurrent sequence": (
        lambda: [layers.GRU(4, return_sequences=True)],
        (7, 3),
        {"kernel": 7, "recurrent_kernel": 7},
    ),
    "each step": (lambda: [layers.TimeDistributed(layers.Conv1D(4, 2))], (7, 5, 3), {"kernel": 28}),
    "embedding": (lambda: [layers.Embedding(9, 4)], (5,), {}),
}


@pytest.mark.parametrize("name", BODIES)
def test_how_often_weights_are_multiplied(name):
    make, shape, expected = BODIES[name]
    model = keras.Sequential([keras.Input(shape), *make()])
    found = uses(model, np.ones((1, *shape), "float32"))
    own = {w.variable.name: found[w.variable] for w in ks.selection.weights(model) if w.variable in found}
    assert own == expected


def test_layers_in_wrappers_and_shared_layers_are_counted_each_time():
    shared = layers.Dense(6, name="shared")
    inputs = keras.Input((5, 6))
    x = layers.Bidirectional(layers.SimpleRNN(3, return_sequences=True))(shared(shared(inputs)))
    attention = layers.MultiHeadAttention(2, 3)
    model = keras.Model(inputs, attention(x, x))
    found = uses(model, np.ones((1, 5, 6), "float32"))
    counts = {w.path: found[w.variable] for w in ks.selection.weights(model) if w.kernel}
    assert counts.pop(next(path for path in counts if "shared" in path)) == 10
    assert len(counts) == 4 + 4  # two directions, and query, key, value, output
    assert set(counts.values()) == {5}


def test_counting_leaves_the_model_as_it_is():
    model = mlp()
    before = [dict(vars(layer)) for layer in model.layers]
    uses(model, np.ones((1, 6), "float32"))
    assert [set(vars(layer)) for layer in model.layers] == [set(each) for each in before]


def test_macs_of_a_candidate_are_its_live_weights_times_their_uses(scored):
    model = network(layers.Conv2D(4, 3), layers.Flatten(), layers.Dense(3), shape=(8, 6, 2))
    (found,) = scored(
        model, [{0: (0.5, "unstructured"), 2: (0.75, "unstructured")}], test=data(shape=(8, 6, 2)), measures=["macs"]
    )
    assert found["macs"] == 36 * 24 + 24 * 4 * 3 / 4


@pytest.mark.slow
@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="the conversion takes long on other backends")
def test_bytes_are_those_of_an_exported_file(scored, tmp_path):
    model = network(layers.Dense(64, activation="relu"), layers.Dense(3), shape=(64,))
    test = data(shape=(64,))
    sparse, dense = scored(model, [{0: (0.9, "unstructured")}, None], test=test, measures=["bytes", "latency_ms"])
    assert dense["latency_ms"] > 0
    ks.tflite.export(model, tmp_path / "d.tflite", sparse=False)
    ks.prune(model, 0.9, filters="dense/")
    ks.tflite.export(model, tmp_path / "s.tflite", target="xnnpack")
    # As exported, but for what the names of tensors take.
    assert dense["bytes"] == pytest.approx((tmp_path / "d.tflite").stat().st_size, rel=0.02)
    assert sparse["bytes"] == pytest.approx((tmp_path / "s.tflite").stat().st_size, rel=0.02)
    assert sparse["bytes"] < dense["bytes"] / 2


def mean_output(y, outputs):
    return keras.ops.mean(outputs)


class Halving(keras.regularizers.Regularizer):
    def __call__(self, weight):
        return 0.5 * keras.ops.sum(weight**2)

    def get_config(self):
        return {}


class Doubling(keras.initializers.Initializer):
    def __call__(self, shape, dtype=None, **kwargs):
        return 2 * keras.ops.ones(shape, dtype)


class Bounded(keras.constraints.Constraint):
    def __call__(self, weight):
        return keras.ops.clip(weight, -1, 1)


class Accuracy(keras.metrics.SparseCategoricalAccuracy):
    pass


def test_parts_of_a_model_need_not_be_registered(scored):
    def activation(x):
        return keras.ops.maximum(x, 0.1)

    own = layers.Dense(
        3,
        activation=activation,
        kernel_regularizer=Halving(),
        kernel_constraint=Bounded(),
        bias_initializer=Doubling(),
    )
    model = network(own)
    model.compile("adam", model.loss, metrics=[Accuracy(name="own"), mean_output])
    (found,) = scored(model, [None])
    assert set(found) == {"loss", "own", "mean_output", "sparsity"}
    assert found["loss"] == pytest.approx(model.evaluate(*data(), verbose=0)[0], rel=1e-5)


def test_metrics_of_several_numbers_are_left_out(scored):
    x, y = data()
    model = mlp()
    model.compile("adam", "categorical_crossentropy", metrics=[keras.metrics.F1Score(average=None), "accuracy"])
    (found,) = scored(model, [None], test=(x, np.eye(3, dtype="float32")[y]))
    assert set(found) == {"loss", "accuracy", "sparsity"}


@pytest.mark.parametrize("name", ["sparsity", "macs", "bytes", "latency_ms", "seconds", "error"])
def test_metrics_of_the_names_of_measures_are_refused(tmp_path, name):
    model = mlp()
    model.compile("adam", model.loss, metrics=[keras.metrics.SparseCategoricalAccuracy(name=name)])
    evaluation = Evaluation(tmp_path, [0])
    evaluation.prepare(model, None, arrays(data()))
    found = evaluation(None, 0)
    evaluation.forget()
    assert f"A search itself measures ['{name}']" in found["error"]


class Failing(layers.Layer):
    def call(self, x, training=False):
        if training:
            raise OverflowError("as expected")
        return x


def test_failures_are_results(tmp_path):
    model = mlp(Failing())
    evaluation = Evaluation(tmp_path, [0], epochs=1)
    evaluation.prepare(model, arrays(data()), arrays(data()))
    found = evaluation({0: (0.5, "unstructured")}, 0)
    evaluation.forget()
    assert "Traceback" in found["error"]
    assert "OverflowError" in found["error"]
    assert "as expected" in found["error"]


def test_what_is_not_finite_is_a_failure(tmp_path):
    model = mlp()
    x, y = data()
    evaluation = Evaluation(tmp_path, [0])
    evaluation.prepare(model, None, arrays((x * np.float32("nan"), y)))
    found = evaluation({0: (0.5, "unstructured")}, 0)
    evaluation.forget()
    assert "no finite numbers: ['loss']" in found["error"]


@pytest.mark.parametrize("part", ["train", "test"])
def test_time_is_up(tmp_path, part):
    evaluation = Evaluation(tmp_path, [0], epochs=int(part == "train"), batch_size=8, timeout=1e-6)
    evaluation.prepare(mlp(), arrays(data()), arrays(data()))
    assert "error" not in evaluation(None, 0)  # the model itself has time, and to compile takes some
    found = evaluation({0: (0.5, "unstructured")}, 0)
    evaluation.forget()
    assert "TimeoutError: the candidate took longer than 1e-06 seconds" in found["error"]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((np.zeros((4, 2)), np.zeros(3)), ValueError, "same number of samples"),
        ((np.zeros((4, 2)),), ValueError, "without targets"),
        (np.zeros((4, 2)), ValueError, "without targets"),
        ((np.zeros((0, 2)), np.zeros(0)), ValueError, "without samples"),
        ((1, 2, 3, 4), ValueError, "tuple of 4"),
        ("data.npz", TypeError, "must be an array"),
    ],
)
def test_wrong_data(given, error, message):
    with pytest.raises(error, match=message):
        arrays(given)


def test_batches_become_arrays():
    x, y = data()
    found = arrays((x[i : i + 20], y[i : i + 20]) for i in range(0, 96, 20))
    assert np.array_equal(found[0], x)
    assert np.array_equal(found[1], y)
    several = {"a": x, "b": x[:, :2]}
    found = arrays((several, y))
    assert set(found[0]) == {"a", "b"}
    assert found[2] is None
    found = arrays(((x, x[:, :2]), (y, y), (y, y)))
    assert [type(part) for part in found] == [list, list, list]
    assert np.array_equal(found[0][1], x[:, :2])


def test_a_model_that_cannot_be_copied(tmp_path):
    class Own(keras.Model):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def get_config(self):
            raise NotImplementedError("no config")

        def call(self, x):
            return self.inner(x)

    model = Own(layers.Dense(3))
    model.compile("sgd", "mse")
    model(np.ones((1, 6), "float32"))
    with pytest.raises(ValueError, match="cannot be saved and loaded again"):
        Evaluation(tmp_path, [0]).prepare(model, None, arrays((np.ones((4, 6)), np.ones((4, 3)))))
