"""Dynamic sparse training (RigL, SET, static masks) in real `fit` calls."""

import keras
import numpy as np
import pytest
from callback_models import X, Y, dense_model, fit, interrupt_at, kernels, zeros

import keras_sparse as ks

GROW = ["gradient", "random", "static"]


def dynamic(sparsity=0.7, **arguments):
    return ks.callbacks.DynamicSparseTraining(sparsity, **({"frequency": 3} | arguments))


class Masks(keras.callbacks.Callback):
    """Records masks, weights, gradients that RigL sees, and slots after every step."""

    def __init__(self, kind=None):
        super().__init__()
        self.kind = kind
        self.masks, self.weights, self.gradients, self.slots = [], [], [], []

    def on_train_batch_end(self, batch, logs=None):
        sparse = ks.optimizers.find(self.model)
        self.masks.append([ks.selection.as_array(mask) for _, mask in sparse.masks])
        self.weights.append([ks.selection.as_array(variable) for variable, _ in sparse.masks])
        if self.kind is not None:
            statistics = [sparse.sparse_parts.statistics.of(variable, self.kind) for variable, _ in sparse.masks]
            self.gradients.append([ks.selection.as_array(statistic) for statistic in statistics])
        found = ks.optimizers.slots(sparse, self.model.trainable_variables)
        self.slots.append({(index, kind): ks.selection.as_array(slot) for index, kind, slot in found})

    @property
    def live(self):
        return [[int(mask.sum()) for mask in masks] for masks in self.masks]

    @property
    def moved(self):
        """Steps after which the masks are others than before."""
        pairs = zip(self.masks, self.masks[1:], strict=False)
        return [i + 2 for i, (a, b) in enumerate(pairs) if any((x != y).any() for x, y in zip(a, b, strict=True))]


@pytest.mark.parametrize("grow", GROW)
@pytest.mark.parametrize("allocation", ["erk", "uniform"])
def test_live_positions_are_constant_at_every_step(grow, allocation):
    model, record = dense_model(), Masks()
    fit(model, dynamic(grow=grow, allocation=allocation), record, epochs=4)
    erk = ks.pruning.erk_counts([(12, 10), (10, 3)], [120, 30], 0.7)
    counts = [120 - erk[0], 30 - erk[1]] if allocation == "erk" else [36, 9]
    assert sum(counts) == 45
    assert record.live == [counts] * 24
    assert record.moved == ([] if grow == "static" else [3, 6, 9, 12, 15])
    for masks, weights in zip(record.masks, record.weights, strict=True):
        assert all((weight[~mask] == 0).all() for mask, weight in zip(masks, weights, strict=True))
    assert isinstance(model.optimizer, keras.optimizers.Adam)


def first(model, callback, steps, kind=None):
    """Train for `steps` steps and return what `Masks` recorded."""
    record = Masks(kind)
    with pytest.raises(KeyboardInterrupt):
        fit(model, callback, record, interrupt_at(steps), epochs=100)
    return record


@pytest.mark.parametrize("step", [5, 10, 40])
def test_rigl_drops_the_smallest_and_grows_where_the_gradient_is_steepest(step):
    record = first(
        dense_model(optimizer=keras.optimizers.SGD(0.05, momentum=0.9)),
        dynamic(0.8, frequency=5, end=50, drop_fraction=0.4),
        step,
        "last_gradient",
    )
    # The weights of the step before the update have taken one more step: replay it from the momentum.
    for index, (old, new) in enumerate(zip(record.masks[step - 2], record.masks[step - 1], strict=True)):
        slot = (2 * index, "momentum")
        gradient = record.gradients[step - 1][index]
        moved = 0.9 * record.slots[step - 2][slot] - 0.05 * np.where(old, gradient, 0)
        weight = np.where(old, record.weights[step - 2][index] + moved, 0)
        live = int(old.sum())
        count = round(0.4 / 2 * (1 + np.cos(np.pi * step / 50)) * live)
        assert (step == 40) == (count < 2)
        flat = np.flatnonzero(old)
        dropped = flat[np.argsort(np.abs(weight).reshape(-1)[flat], kind="stable")[:count]]
        flat = np.flatnonzero(~old)
        grown = flat[np.argsort(-np.abs(gradient).reshape(-1)[flat], kind="stable")[:count]]
        expected = old.reshape(-1).copy()
        expected[dropped], expected[grown] = False, True
        np.testing.assert_array_equal(new.reshape(-1), expected)
        # What grows starts at zero, without momentum; so does what was dropped. The others keep theirs.
        value = record.weights[step - 1][index].reshape(-1)
        assert (value[grown] == 0).all() and (value[dropped] == 0).all()
        momentum = record.slots[step - 1][slot].reshape(-1)
        changed = np.concatenate([dropped, grown])
        assert (momentum[changed] == 0).all()
        np.testing.assert_allclose(np.delete(momentum, changed), np.delete(moved.reshape(-1), changed), rtol=1e-4)


class Constant(ks.schedules.Schedule):
    def fraction(self, progress):
        return 0.0


def test_set_grows_uniformly():
    # 4,000 of 10,000 positions are dead; the first update, after step 3, lets 1,200 of them grow.
    model = keras.Sequential([keras.Input((100,)), keras.layers.Dense(100, use_bias=False)])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    start = np.random.default_rng(5).normal(size=(100, 100))
    start.reshape(-1)[:4000] = 0
    grown = np.zeros(4000)
    for seed in range(4):
        model.layers[0].kernel.assign(start)
        record = Masks()
        callback = dynamic(0.4, grow="random", drop_fraction=0.2, schedule=Constant(), seed=seed, end=6)
        fit(model, callback, record, epochs=1, x=np.ones((8, 100)), y=np.ones((8, 100)), batch_size=2)
        old, new = record.masks[1][0].reshape(-1), record.masks[2][0].reshape(-1)
        np.testing.assert_array_equal(np.flatnonzero(~old), np.arange(4000))
        assert int((new & ~old).sum()) == 1200
        grown += new[:4000]
    assert len(np.unique(grown)) == 5  # From never to each time: the seeds differ.
    for cells in (grown.reshape(40, 100), grown.reshape(100, 40).T):
        # Those of one update exclude each other, which shrinks the variance of a count by 1 - 1200 / 4000.
        statistic = ((cells.sum(axis=1) - 120) ** 2 / 120).sum() / (1 - 1200 / 4000)
        # 39 degrees of freedom: between the 0.1 % and the 99.9 % quantile.
        assert 17.3 < statistic < 72.1


@pytest.mark.parametrize("grow", GROW)
def test_random_masks_are_uniform_and_seeded(grow):
    masks = []
    for seed in (0, 0, 1):
        record = first(dense_model(), dynamic(0.5, allocation="uniform", grow=grow, seed=seed), 1)
        masks.append(record.masks[0][0])
    np.testing.assert_array_equal(masks[0], masks[1])
    assert 30 < (masks[0] != masks[2]).sum() < 90


def test_zeros_that_exist_are_dead_first():
    pruned = dense_model()
    ks.prune(pruned, {"a/": 0.4})
    before = kernels(pruned)[0] == 0
    record = first(pruned, dynamic(0.5, allocation="uniform", grow=None), 1)
    assert record.live == [[60, 15]]
    assert not record.masks[0][0][before].any()
    # Where there are more than asked for, some grow.
    sparser = dense_model()
    ks.prune(sparser, 0.9)
    before = kernels(sparser)[0] == 0
    record = first(sparser, dynamic(0.5, allocation="uniform", grow=None), 1)
    assert record.live == [[60, 15]]
    assert record.masks[0][0][~before].all()


def test_none_keeps_the_sparsity_of_each_kernel():
    model = dense_model()
    ks.prune(model, {"a/": 0.6})
    record = Masks()
    fit(model, dynamic(None, grow="random"), record, epochs=4)
    assert record.live == [[48]] * 24
    assert record.moved == [3, 6, 9, 12, 15]
    with pytest.raises(ValueError, match="it has no zeros"):
        fit(dense_model(), dynamic(None))


def test_a_dense_kernel_moves_nothing_and_a_nearly_dense_one_what_is_dead():
    record = Masks()
    fit(dense_model(), dynamic({"a/": 0.0, "b/": 0.1}, allocation="uniform", drop_fraction=0.9), record, epochs=4)
    assert record.live == [[120, 27]] * 24
    assert all(masks[0].all() for masks in record.masks)
    first_update = [masks[1] for masks in record.masks[1:3]]
    assert (first_update[0] & ~first_update[1]).sum() == 3


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("grow", ["gradient", "random"])
def test_weights_that_diverged_are_counted_too(grow, value):
    model, record = dense_model(), Masks()
    diverge = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: model.layers[0].kernel.assign(np.full((12, 10), value))
    )
    fit(model, dynamic(0.5, grow=grow, allocation="uniform"), diverge, record)
    assert record.live == [[60, 15]] * 18


def test_zero_initialised_kernels_train():
    model = dense_model()
    model.layers[0].kernel.assign(np.zeros((12, 10)))
    model.layers[0].bias.assign(np.full(10, 0.1))
    record = Masks()
    fit(model, dynamic(0.5, allocation="uniform"), record, epochs=4)
    assert record.live == [[60, 15]] * 24
    assert np.count_nonzero(kernels(model)[0]) > 50


@pytest.mark.parametrize("grow", ["gradient", "random"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"steps_per_execution": 3},
        {"jit_compile": True},
        {"gradient_accumulation_steps": 2},
        {"loss_scale_factor": 512.0, "use_ema": True},
        {"policy": "mixed_float16"},
        {"policy": "mixed_bfloat16"},
    ],
    ids=str,
)
@pytest.mark.thorough(2)
def test_compile_options(grow, arguments):
    if keras.backend.backend() == "torch" and (arguments.get("jit_compile") or "steps_per_execution" in arguments):
        pytest.skip("Keras does not support it on torch, or compiles for minutes")
    arguments = dict(arguments)
    keras.config.set_dtype_policy(arguments.pop("policy", "float32"))
    ours = {name: arguments.pop(name) for name in list(arguments) if name in ("steps_per_execution", "jit_compile")}
    try:
        model = dense_model(optimizer=keras.optimizers.Adam(0.01, **arguments), **ours)
    finally:
        keras.config.set_dtype_policy("float32")
    record, optimizer = Masks(), model.optimizer
    history = fit(model, dynamic(grow=grow), record, epochs=6).history
    assert {tuple(live) for live in record.live} == {(28, 17)}
    assert len(record.moved) >= 3
    assert model.optimizer is optimizer
    assert history["loss"][-1] < history["loss"][0]
    assert all(a >= b for a, b in zip(zeros(model), (92, 13), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("grow", ["gradient", "random"])
@pytest.mark.thorough(1)
def test_mirrored_strategy(grow, two_replicas):
    with two_replicas.scope():
        model = dense_model(jit_compile=False)
    record, alone = Masks(), Masks()
    fit(model, dynamic(grow=grow), record)
    fit(dense_model(jit_compile=False), dynamic(grow=grow), alone)
    assert record.live == [[28, 17]] * 18
    for layer in model.layers:
        replicas = two_replicas.experimental_local_results(layer.kernel.value)
        np.testing.assert_array_equal(replicas[0].numpy(), replicas[1].numpy())
    # The gradients that count are the reduced ones: two replicas move what one would.
    for a, b in zip(record.masks, alone.masks, strict=True):
        assert all((x == y).all() for x, y in zip(a, b, strict=True))


@pytest.mark.lengthy(0)
def test_unbuilt_model_and_second_fit():
    model = keras.Sequential([keras.layers.Dense(10, activation="relu"), keras.layers.Dense(3)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    for _ in range(2):
        record = Masks()
        fit(model, dynamic(0.7), record)
        assert record.live[1:] == [[28, 17]] * 17
        assert record.moved == [3, 6, 9]


def test_evaluate_leaves_the_model_as_it_was():
    model = dense_model()
    before, optimizer = model.get_weights(), model.optimizer
    model.evaluate(X, Y, verbose=0, callbacks=[dynamic()])
    assert all((a == b).all() for a, b in zip(before, model.get_weights(), strict=True))
    assert model.optimizer is optimizer


@pytest.mark.parametrize("pruning", [None, "before", "after"])
@pytest.mark.parametrize("grow", GROW)
@pytest.mark.thorough(2)
def test_weights_that_early_stopping_restores_are_whole(grow, pruning):
    model, record = dense_model(optimizer=ks.optimizers.SparseOptimizer(keras.optimizers.Adam(0.01))), Masks()
    stop = keras.callbacks.EarlyStopping("loss", mode="max", patience=4, restore_best_weights=True)
    callbacks = [
        dynamic(0.5, filters="a/", grow=grow, drop_fraction=0.8, frequency=4),
        ks.callbacks.AtTargetSparsity(stop) if pruning else stop,
    ]
    if pruning is not None:
        other = ks.callbacks.Pruning(0.5, filters="b/", schedule="one_shot")
        callbacks = [other, *callbacks] if pruning == "before" else [*callbacks, other]
    fit(model, *callbacks, record, epochs=8)
    best = stop.best_epoch
    assert best < 4
    kernel = record.weights[6 * best + 5][0]
    np.testing.assert_array_equal(kernels(model)[0], kernel)
    mask = ks.selection.as_array(model.optimizer.mask_of(model.layers[0].kernel))
    assert mask.sum() == 60
    assert mask[kernel != 0].all()


def test_weights_of_a_denser_epoch_are_masked_with_a_warning():
    model = dense_model()
    dense = model.get_weights()
    restore = keras.callbacks.LambdaCallback(on_train_end=lambda logs: model.set_weights(dense))
    with pytest.warns(UserWarning, match="pruned weights were not zero"):
        fit(model, dynamic(0.5, allocation="uniform"), restore)
    assert zeros(model) == [60, 15]


def test_two_kinds_in_one_fit():
    model, record = dense_model(), Masks()
    rigl = dynamic(0.5, allocation="uniform", filters="a/")
    fit(model, ks.callbacks.Pruning(0.8, filters="b/", frequency=2), rigl, record)
    assert [live[0] for live in record.live] == [60] * 18
    assert zeros(model)[1] == 24


@pytest.mark.parametrize("grow", ["gradient", pytest.param("random", marks=pytest.mark.slow)])
def test_checkpoint_from_the_middle_of_fit_goes_on(tmp_path, grow):
    def run(*callbacks, model=None, **arguments):
        model = model or dense_model(optimizer=keras.optimizers.Adam(0.01))
        record = Masks()
        fit(model, dynamic(grow=grow), *callbacks, record, epochs=4, **arguments)
        return record

    whole = run(keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras"))
    resumed = run(model=keras.saving.load_model(tmp_path / "2.keras"), initial_epoch=2)
    assert resumed.moved == [3]
    for a, b in zip(whole.masks[12:], resumed.masks, strict=True):
        assert all((x == y).all() for x, y in zip(a, b, strict=True))


def test_verbose_tells_each_update(capsys):
    fit(dense_model(), dynamic(verbose=1, frequency=5))
    assert "Step 5: 10 weights dropped, as many grown" in capsys.readouterr().out


BAD = [
    ({"sparsity": 1.0}, ValueError, "below 1"),
    ({"sparsity": "0.9"}, TypeError, "Received: '0.9'"),
    ({"sparsity": {"a/": 0.5}}, ValueError, "allocation='uniform'"),
    ({"sparsity": {"a/": (0.5, "channel")}, "allocation": "uniform"}, ValueError, "without patterns"),
    ({"allocation": "global"}, ValueError, "must be 'erk' or 'uniform'"),
    ({"grow": "gradients"}, ValueError, "`grow` must be"),
    ({"drop_fraction": 0.0}, ValueError, "above 0"),
    ({"drop_fraction": 1.5}, ValueError, "at most 1"),
    ({"schedule": "cosin"}, ValueError, "Did you mean 'cosine'"),
    ({"frequency": 0}, ValueError, "whole number"),
    ({"end": 0}, ValueError, "`end` must be above 0"),
    ({"end": 1.5}, ValueError, "fraction of the fit"),
    ({"seed": -1}, ValueError, "`seed` must be"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=str)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        dynamic(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frequency": 100}, "Nothing would ever grow: updates are due every 100 steps, and the last one at step 14"),
        ({"end": 3}, "Nothing would ever grow"),
        ({"filters": "nothing"}, "matches no weight"),
    ],
)
def test_errors_before_training_starts(arguments, message):
    model = dense_model()
    before, optimizer = model.get_weights(), model.optimizer
    with pytest.raises(ValueError, match=message):
        fit(model, dynamic(**arguments))
    assert all((a == b).all() for a, b in zip(before, model.get_weights(), strict=True))
    assert model.optimizer is optimizer


def test_a_static_mask_needs_no_frequency():
    model = dense_model()
    fit(model, dynamic(0.5, grow="static", frequency=1000))
    assert sum(zeros(model)) == 75
