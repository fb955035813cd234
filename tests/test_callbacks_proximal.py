"""`ProximalL1` in real `fit` calls: targets, phases, saving, resuming, errors."""

import keras
import numpy as np
import pytest

import keras_sparse as ks

X = np.random.default_rng(0).normal(size=(96, 12)).astype("float32")
Y = np.random.default_rng(1).integers(0, 3, 96)


def dense_model(optimizer="adam", **arguments):
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [keras.Input((12,)), keras.layers.Dense(16, activation="relu", name="a"), keras.layers.Dense(3, name="b")]
    )
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), **arguments)
    return model


def fit(model, *callbacks, epochs=12, **arguments):
    arguments = {"batch_size": 16, "verbose": 0, "shuffle": False} | arguments
    return model.fit(X, Y, epochs=epochs, callbacks=list(callbacks), **arguments)


def kernels(model):
    return [keras.ops.convert_to_numpy(layer.kernel.value) for layer in model.layers if layer.weights]


@pytest.mark.parametrize("target", [0.3, 0.9])
@pytest.mark.parametrize("group", [None, "channel", "block_1x4"])
@pytest.mark.thorough(2)
def test_a_target_is_met_exactly(target, group):
    model = dense_model(keras.optimizers.Adam(0.01))
    filters = "a/" if group else None
    history = fit(model, ks.callbacks.ProximalL1(target_sparsity=target, group=group, filters=filters)).history
    size = 192 if group else 240
    groups = {None: size, "channel": 16, "block_1x4": 48}[group]
    zeros = round(target * groups) * size // groups
    assert history["sparsity"][-1] == zeros / size
    assert isinstance(model.optimizer, keras.optimizers.Adam)


@pytest.mark.lengthy(0)
def test_zeros_stay_after_the_end():
    model, seen = dense_model(keras.optimizers.Adam(0.01)), []

    class Watch(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append(np.concatenate([k.reshape(-1) for k in kernels(self.model)]) == 0)

    fit(model, ks.callbacks.ProximalL1(target_sparsity=0.5, end=0.5), Watch())
    assert (seen[6] == seen[-1]).all()
    assert seen[-1].sum() == 120


@pytest.mark.lengthy(0)
def test_a_strength_shrinks_to_the_end_and_can_be_told_to_stop():
    model = dense_model(keras.optimizers.SGD(0.1))
    history = fit(model, ks.callbacks.ProximalL1(0.02), epochs=30).history["sparsity"]
    assert 0.05 < history[-1] < 1
    model = dense_model(keras.optimizers.SGD(0.1))
    history = fit(model, ks.callbacks.ProximalL1(0.02, end=0.5), epochs=30).history["sparsity"]
    assert len(set(history[16:])) == 1


@pytest.mark.parametrize(
    "how", ["jit", "steps_per_execution", "accumulation", "mixed_float16", "mixed_bfloat16", "ema"]
)
@pytest.mark.thorough(2)
@pytest.mark.lengthy(0)
def test_ways_of_training(how):
    if keras.backend.backend() == "torch" and how in ("jit", "steps_per_execution"):
        pytest.skip("Keras compiles torch models for minutes, and takes one step per execution")
    arguments = {"jit": {"jit_compile": True}, "steps_per_execution": {"steps_per_execution": 4}}.get(how, {})
    options = {"accumulation": {"gradient_accumulation_steps": 2}, "ema": {"use_ema": True}}.get(how, {})
    keras.config.set_dtype_policy(how if how.startswith("mixed") else "float32")
    try:
        model = dense_model(keras.optimizers.Adam(0.01, **options), **arguments)
        fit(model, ks.callbacks.ProximalL1(target_sparsity=0.5))
    finally:
        keras.config.set_dtype_policy("float32")
    assert sum(int((k == 0).sum()) for k in kernels(model)) == 120


@pytest.mark.lengthy(0)
def test_unbuilt_model():
    model = keras.Sequential([keras.layers.Dense(16, activation="relu"), keras.layers.Dense(3)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    history = fit(model, ks.callbacks.ProximalL1(target_sparsity=0.5)).history
    assert history["sparsity"][-1] == 0.5


@pytest.mark.parametrize("stop", [2, 10])
@pytest.mark.thorough(1)
@pytest.mark.lengthy(0)
def test_resumed_equals_uninterrupted(tmp_path, stop):
    class Stop(Exception):
        pass

    class StopAt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == stop:
                raise Stop

    def callbacks():
        return [ks.callbacks.ProximalL1(target_sparsity=0.6), keras.callbacks.BackupAndRestore(tmp_path / "backup")]

    whole = dense_model(keras.optimizers.Adam(0.01))
    fit(whole, ks.callbacks.ProximalL1(target_sparsity=0.6))
    first = dense_model(keras.optimizers.Adam(0.01))
    with pytest.raises(Stop):
        fit(first, *callbacks(), StopAt())
    second = dense_model(keras.optimizers.Adam(0.01))
    fit(second, *callbacks())
    for expected, got in zip(kernels(whole), kernels(second), strict=True):
        np.testing.assert_array_equal(expected, got)


@pytest.mark.lengthy(0)
def test_a_second_fit_starts_anew_and_files_are_plain(tmp_path):
    model = dense_model(keras.optimizers.SGD(0.1))
    callback = ks.callbacks.ProximalL1(0.02)
    fit(model, callback)
    fit(model, callback)
    assert ks.optimizers.find(model) is None
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for expected, got in zip(kernels(model), kernels(loaded), strict=True):
        np.testing.assert_array_equal(expected, got)


@pytest.mark.lengthy(0)
def test_a_file_from_the_middle_of_fit_holds_the_proximal_state(tmp_path):
    model = dense_model(keras.optimizers.Adam(0.01))

    class Save(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 5:
                self.model.save(tmp_path / "middle.keras")

    fit(model, ks.callbacks.ProximalL1(target_sparsity=0.6, group="block_1x4", filters="a/"), Save())
    loaded = keras.saving.load_model(tmp_path / "middle.keras")
    config, values = loaded.optimizer.sparse_state.parts.loaded
    assert config["parts"]["proximal"]["group"]["config"] == {"rows": 1, "cols": 4}
    assert len(values["proximal"]) == 2
    fit(loaded, ks.callbacks.ProximalL1(target_sparsity=0.6, group="block_1x4", filters="a/"), initial_epoch=6)
    for expected, got in zip(kernels(model), kernels(loaded), strict=True):
        np.testing.assert_array_equal(expected, got)


def test_a_fit_that_ends_early_says_so():
    with pytest.warns(UserWarning, match="ended before the schedule did"):
        model = dense_model()
        fit(model, ks.callbacks.ProximalL1(target_sparsity=0.5, end=1000))
    assert sum(int((k == 0).sum()) for k in kernels(model)) == 120

    class StopEarly(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = True

    with pytest.warns(UserWarning, match="stopped before the zeros were settled"):
        fit(dense_model(), ks.callbacks.ProximalL1(target_sparsity=0.5), StopEarly())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "Give either `strength`"),
        ({"strength": 0.1, "target_sparsity": 0.5}, ValueError, "Give either `strength`"),
        ({"strength": -0.1}, ValueError, "at least 0"),
        ({"strength": float("nan")}, ValueError, "at least 0"),
        ({"strength": "0.1"}, TypeError, "must be a number"),
        ({"target_sparsity": 1.0}, ValueError, "below 1"),
        ({"target_sparsity": 0}, ValueError, "above 0"),
        ({"target_sparsity": {"a": 0.5}}, TypeError, "one strength serves all"),
        ({"strength": 0.1, "group": "rows"}, ValueError, "Unknown pattern"),
        ({"strength": 0.1, "begin": 0.5, "end": 0.2}, ValueError, "must be after"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        ks.callbacks.ProximalL1(**arguments)


def test_errors_at_the_start_of_fit():
    with pytest.raises(ValueError, match="must divide .*b/kernel evenly"):
        fit(dense_model(), ks.callbacks.ProximalL1(0.1, group=ks.patterns.Block(2, 4)))
    with pytest.raises(ValueError, match="takes one `ProximalL1`"):
        fit(dense_model(), ks.callbacks.ProximalL1(0.1, filters="a/"), ks.callbacks.ProximalL1(0.1, filters="b/"))
    optimizers = keras.optimizers.OptimizerMap(keras.optimizers.SGD(), {"a/.*": keras.optimizers.Adam()})
    with pytest.raises(ValueError, match="needs one learning rate"):
        fit(dense_model(keras.optimizers.MultiOptimizer(optimizers)), ks.callbacks.ProximalL1(0.1))
    model = dense_model()
    with pytest.raises(ValueError, match="matches no weight"):
        fit(model, ks.callbacks.ProximalL1(0.1, filters="c/"))
    assert ks.optimizers.find(model) is None
