"""Sensitivity: what each weight's zeros cost, measured, and the best division of a budget by that."""

import itertools

import keras
import numpy as np
import pytest
from keras import layers

import keras_sparse as ks
from keras_sparse.pruning.sensitivities import SensitivityReport
from keras_sparse.selection import as_array, only

RNG = np.random.default_rng(0)
X = RNG.normal(size=(96, 12)).astype("float32")
Y = RNG.integers(0, 3, 96)
LEVELS = (0.25, 0.5, 0.75, 0.9)


def network():
    keras.utils.set_random_seed(3)
    x = keras.Input((12,))
    y = layers.Reshape((5, 4))(layers.Dense(20, activation="relu", bias_initializer="normal")(x))
    y = layers.Flatten()(layers.Conv1D(6, 2, activation="tanh", bias_initializer="normal")(y))
    model = keras.Model(x, layers.Dense(3, activation="softmax", bias_initializer="normal")(y))
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model


def zeros(model):
    return [int((as_array(w.variable) == 0).sum()) for w in ks.selection.select(model).chosen]


@pytest.mark.parametrize(
    ("criterion", "repair", "labelled"),
    [("magnitude", None, False), ("obs", None, False), ("magnitude", True, True), ("taylor", None, True)],
)
@pytest.mark.lengthy(1)
def test_losses_are_those_of_pruning_one_weight(criterion, repair, labelled):
    model = network()
    before = model.get_weights()
    data = (X, Y) if labelled else X
    report = ks.sensitivity(model, data, LEVELS, criterion, repair=repair)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True)), "as it was"
    outputs = model.predict(X, verbose=0).astype("float64")
    power = np.sum((outputs - outputs.mean(axis=0)) ** 2)
    looks = X if criterion == "obs" else (X, Y) if criterion == "taylor" else X if repair else None
    for i, row in enumerate(report.rows):
        for j in (1, 3):
            model.set_weights(before)
            ks.prune(model, {only(row["weight"]): LEVELS[j]}, criterion, data=looks, repair=repair)
            if labelled:
                wanted = model.evaluate(X, Y, verbose=0)
                wanted = wanted[0] if isinstance(wanted, list) else wanted
            else:
                wanted = np.sum((model.predict(X, verbose=0) - outputs) ** 2) / power
            np.testing.assert_allclose(report.losses[i, j], wanted, rtol=2e-4, atol=1e-6)
    model.set_weights(before)
    assert report.loss == pytest.approx(model.evaluate(X, Y, verbose=0) if labelled else 0, rel=1e-5)


def made(seed, levels=LEVELS):
    """A report with losses that nobody measured."""
    rng = np.random.default_rng(seed)
    weights = ks.selection.select(network()).chosen
    losses = np.sort(rng.exponential(size=(len(weights), len(levels))), axis=1)
    return SensitivityReport("made", weights, levels, 0.0, losses, rng.integers(1, 9, len(weights)).tolist(), "loss")


def total(report, shares):
    """The sum of the losses at some sparsities, interpolated."""
    grid = np.concatenate([[0.0], report.levels])
    rises = np.column_stack([np.zeros(len(report.losses)), report.losses])
    return sum(np.interp(share, grid, own) for share, own in zip(shares, rises, strict=True))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("unit", ["sparsity", "macs", "parameters", "bytes"])
@pytest.mark.thorough(12)
def test_no_combination_of_levels_is_better(unit, seed):
    report = made(seed)
    sizes = np.array([row["size"] for row in report.rows])
    each = {"macs": np.array([row["macs"] for row in report.rows]) / sizes, "bytes": np.full(len(sizes), 5.0)}
    each = each.get(unit, np.ones(len(sizes)))
    share = 0.3 + 0.08 * seed
    found = report.allocate(1 - share if unit == "sparsity" else ks.Budget(**{unit: share}))
    assert [key.path for key in found] == [row["weight"] for row in report.rows]
    limit = share * np.sum(sizes * each)
    kept = np.array([round((1 - s) * n) for s, n in zip(found.values(), sizes, strict=True)])
    assert np.sum(kept * each) <= limit + 1e-6 + 0.5 * (unit == "sparsity")
    best = min(
        total(report, levels)
        for levels in itertools.product((0.0, *LEVELS), repeat=len(sizes))
        if sum((n - round(level * n)) * c for level, n, c in zip(levels, sizes, each, strict=True)) <= limit + 1e-6
    )
    assert total(report, found.values()) <= best + 1e-9


@pytest.mark.parametrize("sparsity", [0.0, 0.31, 0.5, 0.777, 0.89])
def test_counts_are_exact(sparsity):
    model = network()
    report = ks.sensitivity(model, X, LEVELS)
    assert ks.prune(model, report.allocate(sparsity)).totals["zeros"] == round(sparsity * sum(zeros_of(model)))


def zeros_of(model):
    return [w.size for w in ks.selection.select(model).chosen]


@pytest.mark.parametrize("pattern", [None, "block_1x4"])
def test_the_allocation_is_the_report_in_one_call(pattern):
    model, other = network(), network()
    target = ks.sensitivity(other, X, criterion="obs", pattern=pattern, batch_size=32).allocate(0.7)
    ks.prune(other, target, "obs", pattern, data=X)
    ks.prune(model, 0.7, "obs", pattern, allocation="dynamic", data=X)
    assert zeros(model) == zeros(other)


def test_levels_are_in_the_config():
    allocation = ks.pruning.DynamicProgramming((0.5, 0.9))
    assert ks.pruning.allocation.get(keras.saving.serialize_keras_object(allocation)).levels == (0.5, 0.9)


def test_a_target_for_training():
    model = network()
    target = ks.sensitivity(model, (X, Y), LEVELS).allocate(0.8)
    model.fit(X, Y, epochs=1, verbose=0, callbacks=[ks.callbacks.Pruning(target)])
    sizes = zeros_of(model)
    assert zeros(model) == [round(s * n) for s, n in zip(target.values(), sizes, strict=True)]
    assert sum(zeros(model)) == round(0.8 * sum(sizes))


def test_the_report_is_shown(tmp_path):
    report = ks.sensitivity(network(), X)
    assert max(map(len, str(report).splitlines())) <= 120 and "0.99" in str(report)
    figure = report.plot()
    assert len(figure.axes[0].lines) == 4
    assert report.to_dict()["rows"][0]["0.5"] == report.losses[0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"levels": (0.5, 0.2)}, "`levels` must be sparsities in .0, 1., rising. Received"),
        ({"levels": ()}, "at least one"),
        ({"levels": (0.0, 0.5)}, "rising. Received"),
        ({"levels": "0.5"}, "rising. Received"),
        ({"pattern": "channel"}, "channels concern several weights"),
        ({"pattern": "2:4"}, "a sparsity of its own"),
        ({"data": X[:1]}, "at least two samples"),
        ({"data": (X, Y[:5])}, "same number of samples"),
        ({"data": (X,) * 4}, "a tuple of 4"),
        ({"data": np.full_like(X, np.nan)}, "must be finite"),
        ({"data": X[:, :3]}, "cannot run|takes inputs|incompatible|expected"),
        ({"criterion": "taylor"}, "Received|targets"),
        ({"filters": "nothing_of_that_name"}, "nothing_of_that_name"),
    ],
)
def test_errors_leave_the_model_untouched(arguments, message):
    model = network()
    before = model.get_weights()
    with pytest.raises(ValueError, match=message):
        ks.sensitivity(model, **{"data": X, **arguments})
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))


def test_targets_that_cannot_be_reached():
    report = made(0)
    with pytest.raises(ValueError, match=r"Levels of up to 0.9 leave \d+ at least, more than \d+.*Received: 0.95"):
        report.allocate(0.95)
    with pytest.raises(ValueError, match="below 1"):
        report.allocate(1.5)
    with pytest.raises(TypeError, match="a sparsity or a `ks.Budget`"):
        report.allocate("0.5")
    with pytest.raises(ValueError, match="in one unit"):
        report.allocate(ks.Budget(macs=0.5, bytes=0.5))
    with pytest.raises(ValueError, match="pass `data=x`"):
        ks.prune(network(), 0.5, allocation="dynamic")
    for use in (ks.callbacks.Pruning, lambda *a, **k: ks.pruning.Plan(network(), *a, **k)):
        with pytest.raises(ValueError, match=r"sensitivity\(model, x\).allocate"):
            use(0.5, allocation="dynamic")


@pytest.mark.parametrize("loss", [np.nan, np.inf])
def test_a_level_whose_loss_overflows_is_the_last_choice(loss):
    report, wanted = made(0), made(0)
    report.losses[1, 1:], wanted.losses[1, 1:] = loss, 1e9
    assert [*report.allocate(0.6).values()] == [*wanted.allocate(0.6).values()]


def test_a_model_whose_loss_overflows_is_refused():
    model = network()
    model.compile("sgd", lambda y, p: keras.ops.log(-1.0 - keras.ops.sum(p)))
    with pytest.raises(ValueError, match="as it is must be finite.* Received: nan"):
        ks.sensitivity(model, (X, Y), LEVELS)


def test_a_budget_of_time_is_none_of_single_weights():
    with pytest.raises(ValueError, match="give one of 'parameters', 'macs', 'bytes'. Received: .*milliseconds"):
        made(0).allocate(ks.Budget(milliseconds=1.0))


class Column:
    """As of a table: it has a shape, is no array, and has labels instead of places."""

    def __init__(self, values):
        self._values, self.shape, self.dtype = np.asarray(values), np.shape(values), np.asarray(values).dtype

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self._values, dtype)

    def __getitem__(self, index):
        return Column(self._values[index])


@pytest.mark.parametrize("kind", [list, Column])
def test_targets_that_are_no_array(kind):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(8, "relu"), layers.Dense(3, "softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy")
    x, y = np.random.default_rng(0).normal(size=(40, 4)), np.arange(40) % 3
    expected = [ks.sensitivity(model, (x, y), 0.5, criterion=name).rows for name in ("magnitude", "snip")]
    given = (x, kind(y.tolist()))
    assert [ks.sensitivity(model, given, 0.5, criterion=name).rows for name in ("magnitude", "snip")] == expected


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="strings are TensorFlow's")
def test_words_and_numbers_in_columns():
    lookup = layers.StringLookup()
    lookup.adapt(["Lyon", "Ghent"])
    inputs = {"city": keras.Input((1,), dtype="string", name="city"), "area": keras.Input((1,), name="area")}
    x = layers.Concatenate()([layers.Flatten()(layers.Embedding(4, 4)(lookup(inputs["city"]))), inputs["area"]])
    model = keras.Model(inputs, layers.Dense(1, "sigmoid")(layers.Dense(8, "relu")(x)))
    model.compile("sgd", "binary_crossentropy")
    data = {"city": np.array(["Lyon", "Ghent"] * 10), "area": np.linspace(0, 1, 20)}, np.arange(20) % 2
    words = {"city": data[0]["city"].astype(object), "area": data[0]["area"]}, data[1]
    loss = ks.sensitivity(model, data, 0.5, criterion="snip").totals["loss"]
    assert ks.sensitivity(model, words, 0.5).totals["loss"] == pytest.approx(loss)
    assert ks.prune(model, 0.5, criterion="snip", data=data).totals["zeros"] == 24


def test_inputs_of_another_type():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    for data, kind in (np.full((5, 4), "a"), "<U1"), (np.full((5, 4), "a", object), "object"):
        with pytest.raises(ValueError, match=rf"Received a batch of shape \(5, 4\) of {kind}"):
            ks.prune(model, 0.5, criterion="obs", data=data)
