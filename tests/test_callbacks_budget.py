"""`AccuracyBudget`: the sparsest epoch within a budget of a metric, on metrics that are scripted and on real ones."""

import keras
import numpy as np
import pytest

import keras_sparse as ks

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 10)).astype("float32")
Y = (X @ RNG.normal(size=(10, 6))).astype("float32")


def make(batch_norm=False):
    keras.utils.set_random_seed(0)
    middle = [keras.layers.BatchNormalization()] if batch_norm else []
    model = keras.Sequential([keras.Input((10,)), keras.layers.Dense(16, "relu"), *middle, keras.layers.Dense(6)])
    model.compile(keras.optimizers.SGD(0.001), "mse", run_eagerly=keras.backend.backend() != "jax")
    return model


class Scripted(keras.callbacks.Callback):
    """Puts a metric into the logs, by a function of the sparsity that the model has and of the epoch."""

    def __init__(self, quality):
        super().__init__()
        self.quality, self.weights = quality, []

    def on_epoch_end(self, epoch, logs=None):
        zeros = sum(int(np.sum(layer.get_weights()[0] == 0)) for layer in self._model.layers if layer.get_weights())
        size = sum(layer.get_weights()[0].size for layer in self._model.layers if layer.get_weights())
        logs["quality"] = self.quality(zeros / size, epoch)
        self.weights.append([np.array(v) for v in self._model.get_weights()])


def fit(budget, quality, model=None, epochs=30, **arguments):
    model, script = model or make(), Scripted(quality)
    history = model.fit(X, Y, batch_size=64, verbose=0, epochs=epochs, callbacks=[script, budget], **arguments)
    return model, history.history, script


def sparsity(model):
    return ks.report(model).totals["sparsity"]


@pytest.mark.parametrize(("limit", "mode"), [(0.83, "max"), (0.62, "min")])
def test_ends_with_the_sparsest_epoch_within_the_budget(limit, mode):
    sign = 1 if mode == "max" else -1
    budget = ks.callbacks.AccuracyBudget(0.1, "quality", mode, patience=1, tolerance=0.05)
    model, history, script = fit(budget, lambda share, epoch: sign * (1.0 if share <= limit else 0.5))
    kept = max(share for share in history["sparsity"] if share <= limit)
    failed = min(share for share in history["sparsity"] if share > limit)
    assert sparsity(model) == pytest.approx(kept)
    assert (1 - kept) / (1 - failed) < 1.08
    last = max(i for i, share in enumerate(history["sparsity"]) if share == kept)
    for value, other in zip(model.get_weights(), script.weights[last], strict=True):
        np.testing.assert_array_equal(value, other)
    report = budget.front()
    assert [row["within"] for row in report.rows] == [share <= limit for share in history["sparsity"]]
    assert report.totals["sparsity"] == pytest.approx(kept)
    assert budget.reached


@pytest.mark.parametrize(("drop", "late", "expected"), [(0.0, 6, 0.8), (0.08, 6, 0.8), (0.0, 99, 0.68)])
def test_what_failed_early_is_tried_once_more(drop, late, expected):
    """As with a learning rate that falls: 0.8 does not hold before some epoch. `drop` is lost by what holds."""

    def quality(share, epoch):
        if share == 0:
            return 1.0
        return 1.0 - drop if share < (0.82 if epoch >= late else 0.7) else 0.0

    budget = ks.callbacks.AccuracyBudget(0.1, "quality", "max", patience=1, tolerance=0.1)
    model, history, _ = fit(budget, quality)
    assert sparsity(model) == pytest.approx(expected, abs=0.03)
    assert budget.reached
    closest = min(share for share in history["sparsity"] if share > 0.7)
    assert history["sparsity"].count(closest) == 2


@pytest.mark.parametrize(
    ("missing", "holds"), [((0.5, 0.2, 0.05), True), ((0.5, 0.4, 0.05), False), ((np.inf, np.inf, 0.05), False)]
)
def test_a_sparsity_that_recovers_quickly_gets_more_epochs_than_patience(missing, holds):
    seen = {}

    def quality(share, epoch):
        tried = seen[share] = seen.get(share, 0) + 1
        return 0.9 - (missing[tried - 1] if share > 0.7 and tried <= len(missing) else 0.0)

    budget = ks.callbacks.AccuracyBudget(0.1, "quality", "max", baseline=1.0, max_sparsity=0.75, patience=2)
    _, history, _ = fit(budget, quality, epochs=6)
    assert history["sparsity"][:3] == [0.5, 0.75, 0.75]
    assert (history["sparsity"][3] == 0.75) == holds
    assert budget.front().totals["sparsity"] == (0.75 if holds else history["sparsity"][3])


def test_what_is_spent_of_the_budget_is_won_back_at_the_sparsity_that_holds():
    """At 0.7 the metric rises by 0.01 from epoch to epoch, to the third that comes after the search, and then falls."""
    seen = {}

    def quality(share, epoch):
        tried = seen[share] = seen.get(share, 0) + 1
        if share == 0:
            return 1.0
        return 0.0 if share > 0.74 else 0.9 + 0.01 * (tried if tried <= 4 else 1)

    budget = ks.callbacks.AccuracyBudget(0.12, "quality", "max", patience=2, tolerance=0.35, initial_sparsity=0.7)
    model, history, script = fit(budget, quality)
    shares, best = history["sparsity"], max(history["quality"][1:])
    kept = shares[1]
    assert shares[-9:] == [shares[-1]] * 2 + [kept] * 5 + [shares[-1]] * 2  # what failed once more, and no third time
    assert shares[-1] > 0.74 and budget.reached
    assert best == pytest.approx(0.94) and budget.front().totals["quality"] == pytest.approx(best)
    for value, other in zip(model.get_weights(), script.weights[history["quality"].index(best)], strict=True):
        np.testing.assert_array_equal(value, other)


def test_what_is_won_back_pays_for_another_try_of_what_failed():
    """At 0.7 the metric rises with each epoch; 0.75 and more hold from the tenth epoch on, up to 0.86."""

    def quality(share, epoch):
        if share == 0:
            return 1.0
        return 0.87 + 0.01 * min(epoch, 12) if share < 0.75 else 0.95 if share < 0.86 and epoch >= 10 else 0.0

    budget = ks.callbacks.AccuracyBudget(0.12, "quality", "max", patience=2, tolerance=0.35, initial_sparsity=0.7)
    model, history, _ = fit(budget, quality)
    assert sparsity(model) == pytest.approx(max(s for s in history["sparsity"] if s < 0.86))
    assert sparsity(model) > 0.77 and budget.reached and len(history["sparsity"]) < 30


def test_a_metric_that_never_falls_ends_at_the_cap_and_says_so():
    budget = ks.callbacks.AccuracyBudget(0.0, "quality", "max", max_sparsity=0.9)
    model, history, _ = fit(budget, lambda share, epoch: 1.0)
    np.testing.assert_allclose(history["sparsity"], [0, 0.5, 0.75, 0.875, 0.9], atol=0.01)
    assert sparsity(model) == pytest.approx(0.9, abs=0.01)
    assert "the limit is not the budget" in budget.front().notes[0]


def test_a_metric_that_falls_at_once_leaves_the_model_as_it_was():
    budget = ks.callbacks.AccuracyBudget(0.1, "quality", "max", patience=1)
    with pytest.warns(UserWarning, match="No sparsity that was tried"):
        model, _, script = fit(budget, lambda share, epoch: 1.0 - (share > 0), epochs=6)
    for value, other in zip(model.get_weights(), script.weights[0], strict=True):
        np.testing.assert_array_equal(value, other)


def test_patience_with_a_noisy_metric_and_the_same_run_twice():
    found = []
    for _ in range(2):
        rng = np.random.default_rng(3)
        budget = ks.callbacks.AccuracyBudget(0.05, "quality", "max", patience=3, tolerance=0.5)
        model, history, _ = fit(budget, lambda share, epoch, rng=rng: 1 - share**6 / 4 + rng.normal(0, 0.02), epochs=8)
        found.append((history["sparsity"], model.get_weights()))
        rows = budget.front().rows
        best = max(row["sparsity"] for row in rows if row["within"])
        assert sparsity(model) == pytest.approx(best)
        assert len(rows) == len(history["sparsity"])
    assert found[0][0] == found[1][0]
    for value, other in zip(found[0][1], found[1][1], strict=True):
        np.testing.assert_array_equal(value, other)


@pytest.mark.thorough(1)
@pytest.mark.parametrize("pattern", ["channel", "2:4", "block_1x4"])
def test_patterns(pattern):
    budget = ks.callbacks.AccuracyBudget(
        0.1, "quality", "max", 1.0, 0.25, pattern=pattern, allocation="uniform", filters="dense/"
    )
    model, history, _ = fit(budget, lambda share, epoch: 1.0 if share < 0.35 else 0.0, make(batch_norm=True))
    kept = max(s for s, q in zip(history["sparsity"], history["quality"], strict=True) if q)
    assert 0 < kept == np.mean(model.get_weights()[0] == 0)
    assert ks.report(model).rows[0]["pattern"] == pattern or pattern == "2:4"


@pytest.mark.lengthy(0)
def test_resumed_is_uninterrupted(tmp_path):
    def quality(share, epoch):
        return 1.0 if share < 0.8 else 0.0

    def run(model, *callbacks, epochs=9):
        budget = ks.callbacks.AccuracyBudget(0.1, "quality", "max", patience=1)
        callbacks = [Scripted(quality), budget, keras.callbacks.BackupAndRestore(tmp_path / "backup"), *callbacks]
        history = model.fit(X, Y, batch_size=64, shuffle=False, verbose=0, epochs=epochs, callbacks=callbacks)
        return history.history["sparsity"], model.get_weights()

    class Break(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 4:
                raise KeyboardInterrupt

    expected = run(make())
    with pytest.raises(KeyboardInterrupt):
        run(make(), Break())
    found = run(make())
    assert found[0] == expected[0][4:]
    for value, other in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(value, other, atol=1e-6)


class Densities(keras.callbacks.Callback):
    """The share of weights that are left after each batch, and in the validation after an epoch."""

    def __init__(self):
        super().__init__()
        self.batches, self.validation = [], []

    def _density(self):
        kernels = [v for v in self.model.get_weights() if v.ndim == 2]
        return sum(np.count_nonzero(k) for k in kernels) / sum(k.size for k in kernels)

    def on_train_batch_end(self, batch, logs=None):
        self.batches.append(self._density())

    def on_test_begin(self, logs=None):
        self.validation.append(self._density())


@pytest.mark.parametrize("accumulation", [None, 2])
def test_half_an_epoch_leads_to_a_sparsity_by_equal_factors(accumulation):
    model, found = make(), Densities()
    optimizer = keras.optimizers.SGD(0.001, gradient_accumulation_steps=accumulation)
    model.compile(optimizer, "mse", run_eagerly=keras.backend.backend() != "jax")
    budget = ks.callbacks.AccuracyBudget(9.0, "val_loss", baseline=30.0, max_sparsity=0.75)
    each = accumulation or 1
    model.fit(X, Y, 8 // each, epochs=3, verbose=0, validation_data=(X, Y), callbacks=[budget, found])
    ways = np.repeat([0.25, 0.5, 0.75, 1, 1, 1, 1, 1], each)
    ways = np.concatenate([np.zeros(each - 1), ways])[: 8 * each]  # the optimizer steps with the last batch of several
    expected = np.concatenate([0.5**ways, 0.5 ** (1 + ways)])
    np.testing.assert_allclose(found.batches[: 16 * each], expected, atol=0.01)
    np.testing.assert_allclose(found.validation, [0.5, 0.25], atol=0.01)
    assert len(found.batches) == 16 * each  # the cap holds after two epochs


@pytest.mark.parametrize("validated", [True, False])
@pytest.mark.parametrize("accumulation", [None, 2])
def test_statistics_of_batch_normalization_are_those_of_the_pruned_model(validated, accumulation):
    model = make(batch_norm=True)
    normalization = model.layers[1]
    normalization.moving_mean.assign(RNG.normal(size=16))
    optimizer = keras.optimizers.SGD(0.0, gradient_accumulation_steps=accumulation)
    model.compile(optimizer, "mse", run_eagerly=keras.backend.backend() != "jax")
    monitor, data = ("val_loss", {"validation_data": (X, Y)}) if validated else ("loss", {})
    budget = ks.callbacks.AccuracyBudget(9.0, monitor, baseline=1000.0)
    history = model.fit(X, Y, 4, epochs=1, shuffle=False, verbose=0, callbacks=[budget], **data).history
    assert sparsity(model) == pytest.approx(0.5, abs=0.01)
    kernel, bias = model.get_weights()[:2]
    hidden = np.maximum(X @ kernel + bias, 0).reshape(16, 4, 16)[8:]  # batches since half of the epoch
    weights = 0.99 ** np.arange(7, -1, -1)
    for found, value in ((normalization.moving_mean, hidden.mean(1)), (normalization.moving_variance, hidden.var(1))):
        np.testing.assert_allclose(found, weights @ value / weights.sum(), rtol=1e-3, atol=1e-4)
    if validated:
        assert history["val_loss"][0] == pytest.approx(model.evaluate(X, Y, verbose=0), rel=1e-4)


def test_statistics_are_settled_where_a_normalization_runs_once_for_each_batch():
    def named(name):
        return keras.layers.BatchNormalization(name=name)

    inner = keras.Sequential([keras.Input((4,)), named("inner")], name="once")
    shared = keras.Sequential([keras.Input((4,)), named("in shared")], name="twice")
    inputs, own, both = keras.Input((4,)), named("own"), named("both")
    outputs = own(inner(shared(both(shared(both(inputs))))))
    model = keras.Model(inputs, keras.layers.TimeDistributed(named("steps"))(keras.layers.RepeatVector(2)(outputs)))
    rng = np.random.default_rng(1)
    for layer in ks.graph.layers(model):
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.moving_mean.assign(rng.normal(size=4))
            layer.moving_variance.assign(rng.uniform(1, 2, 4))
    recent = ks.pruning.batch_norm.Recent(model)
    x = rng.normal(size=(3, 4)).astype("float32")
    model(x, training=True)
    before = [np.array(ks.graph.as_array(v)) for v in model.variables]
    recent.settle(1)
    pairs = zip(model.variables, before, strict=True)
    changed = {v.path.split("/")[-2] for v, value in pairs if not np.array_equal(value, ks.graph.as_array(v))}
    assert changed == {"own", "inner"}
    frozen = keras.Sequential([keras.Input((4,)), named("frozen")])
    frozen.layers[0].moving_mean.assign(rng.normal(size=4))
    frozen.trainable = False
    recent, values = ks.pruning.batch_norm.Recent(frozen), frozen.get_weights()
    frozen(x, training=True)
    recent.settle(3)
    for value, other in zip(frozen.get_weights(), values, strict=True):
        np.testing.assert_array_equal(value, other)


def test_a_real_metric_on_validation_data():
    budget = ks.callbacks.AccuracyBudget(0.5, "val_loss", baseline=30.0, initial_sparsity=0.3, max_sparsity=0.8)
    model = make()
    history = model.fit(X, Y, validation_data=(X, Y), epochs=4, batch_size=64, verbose=0, callbacks=[budget]).history
    assert history["sparsity"][0] == pytest.approx(0.3, abs=0.01)
    assert sparsity(model) == pytest.approx(budget.front().totals["sparsity"])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"monitor": "quality"}, ValueError, "pass `mode='max'`"),
        ({"monitor": 3}, TypeError, "a name in the logs"),
        ({"mode": "up"}, ValueError, "'auto', 'max' or 'min'"),
        ({"max_drop": -1}, ValueError, "`max_drop` must be"),
        ({"max_sparsity": 1.5}, ValueError, "at least 0 and below 1"),
        ({"initial_sparsity": 0.0}, ValueError, "above 0"),
        ({"patience": 0}, ValueError, "patience"),
        ({"baseline": "dense"}, TypeError, "`baseline` must be a number"),
        ({"criterion": "no"}, ValueError, "no"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        ks.callbacks.AccuracyBudget(**arguments)


def test_a_missing_metric():
    model = make()
    with pytest.raises(ValueError, match="'val_accuracy', which is not in the logs. They have \\['loss'\\]"):
        model.fit(X, Y, verbose=0, callbacks=[ks.callbacks.AccuracyBudget()])
    assert ks.optimizers.find(model) is None


def test_a_metric_of_some_epochs_only():
    model = make()
    budget = ks.callbacks.AccuracyBudget(monitor="val_loss")
    with pytest.raises(ValueError, match="need `validation_data`, and `validation_freq=1`. Received"):
        model.fit(X, Y, verbose=0, epochs=2, validation_data=(X, Y), validation_freq=2, callbacks=[budget])
    assert ks.optimizers.find(model) is None


def test_one_budget_in_a_fit():
    """Two would share one ledger, and judge each epoch twice."""
    model = make()
    budgets = [ks.callbacks.AccuracyBudget(0.5, "loss", filters=layer) for layer in model.layers]
    with pytest.raises(ValueError, match="One `fit` takes one `AccuracyBudget`: name all weights in its `filters`"):
        model.fit(X, Y, verbose=0, callbacks=budgets)
    assert ks.optimizers.find(model) is None
