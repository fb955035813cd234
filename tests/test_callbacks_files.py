"""Files of the middle of a fit, kills, strategies, and what is wrong before training starts."""

import json
import os
import subprocess
import sys
import textwrap
import warnings

import keras
import numpy as np
import pytest
from callback_models import X, Y, ZerosAfterEachStep, dense_model, fit, zeros

import keras_sparse as ks

# Saving


@pytest.mark.lengthy(0)
def test_saved_model_is_plain(tmp_path):
    model = dense_model()
    fit(model, ks.callbacks.Pruning(0.9))
    model.save(tmp_path / "model.keras")
    program = """
    import sys
    sys.modules["keras_sparse"] = None
    import keras, numpy as np
    model = keras.saving.load_model(sys.argv[1])
    print(type(model.optimizer).__name__, [int((layer.kernel.numpy() == 0).sum()) for layer in model.layers])
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "model.keras")], capture_output=True, text=True
    )
    assert run.stdout.strip() == "Adam [108, 27]", run.stderr


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
@pytest.mark.lengthy(1)
def test_checkpoint_from_the_middle_of_fit_goes_on(tmp_path, policy):
    def run(*callbacks, model=None, **arguments):
        model = model or dense_model(optimizer=keras.optimizers.Adam(0.01))
        fit(model, ks.callbacks.Pruning(0.9, schedule="linear", frequency=1), *callbacks, epochs=4, **arguments)
        return model

    keras.config.set_dtype_policy(policy)
    try:
        whole = run(keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras"))
        loaded = keras.saving.load_model(tmp_path / "2.keras")
        assert ks.optimizers.find(loaded) is None
        resumed = run(model=loaded, initial_epoch=2)
        resumed.save(tmp_path / "end.keras")
        config = keras.saving.load_model(tmp_path / "end.keras").get_compile_config()
    finally:
        keras.config.set_dtype_policy("float32")
    for a, b in zip(whole.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_array_equal(a == 0, b == 0)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert "keras_sparse" not in json.dumps(config)


RESUME = """
import json, os, signal, sys
import keras, numpy as np
import keras_sparse as ks
if keras.backend.backend() == "tensorflow":
    import tensorflow as tf
    tf.config.experimental.enable_op_determinism()
x = np.random.default_rng(0).normal(size=(96, 12)).astype("float32")
y = np.random.default_rng(1).integers(0, 3, 96)

class Kill(keras.callbacks.Callback):
    steps = 0
    def on_train_batch_end(self, batch, logs=None):
        self.steps += 1
        if self.steps == kill:
            os.kill(os.getpid(), signal.SIGKILL)

for folder, order, kill, callback in json.loads(sys.argv[1]):
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((12,)), keras.layers.Dense(10, activation="relu"), keras.layers.Dense(3)])
    model.compile(keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    ours = [eval(callback), Kill()]
    backup = [keras.callbacks.BackupAndRestore(os.path.join(folder, "backup"), save_freq="epoch")]
    callbacks = backup + ours if order == "backup first" else ours + backup
    model.fit(x, y, epochs=4, batch_size=16, shuffle=False, verbose=0, callbacks=callbacks)
    np.savez(os.path.join(folder, "end.npz"), *model.get_weights())
"""


RESUMED = {
    "ks.callbacks.Pruning(0.9, frequency=2)": "backup first",
    "ks.callbacks.DynamicSparseTraining(0.9, 'uniform', frequency=2)": "backup last",
    "ks.callbacks.DynamicSparseTraining(0.9, 'uniform', grow='random', frequency=2)": "backup last",
    "ks.callbacks.LotteryTicket(2, 0.9, rewind_to=3, allocation='uniform')": "backup first",
}


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    def run(kill, *names):
        for name in names:
            (tmp_path / name).mkdir(exist_ok=True)
        pairs = zip(names, [name.partition(" ")[2] for name in names], strict=True)
        jobs = [(str(tmp_path / name), RESUMED[callback], kill, callback) for name, callback in pairs]
        command = [sys.executable, "-c", RESUME, json.dumps(jobs)]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ).returncode

    for callback in RESUMED:
        assert run(15, f"cut {callback}") == -9
        assert not (tmp_path / f"cut {callback}" / "end.npz").exists()
    assert run(0, *(f"{how} {callback}" for callback in RESUMED for how in ("whole", "cut"))) == 0
    for callback in RESUMED:
        whole, cut = (np.load(tmp_path / f"{how} {callback}" / "end.npz") for how in ("whole", "cut"))
        assert (whole["arr_0"] == 0).sum() >= 108
        for name in whole.files:
            np.testing.assert_array_equal(whole[name], cut[name], err_msg=callback)


@pytest.mark.parametrize("arguments", [{}, {"use_ema": True}, {"policy": "mixed_float16"}], ids=str)
@pytest.mark.thorough(1)
@pytest.mark.lengthy(0)
def test_mirrored_strategy(arguments, two_replicas):
    arguments, strategy = dict(arguments), two_replicas
    keras.config.set_dtype_policy(arguments.pop("policy", "float32"))
    try:
        with strategy.scope():
            model = dense_model(optimizer=keras.optimizers.Adam(0.01, **arguments), jit_compile=False)
    finally:
        keras.config.set_dtype_policy("float32")
    record = ZerosAfterEachStep()
    fit(model, ks.callbacks.Pruning(0.9), record)
    assert zeros(model) == [108, 27]
    assert record.revived == 0
    for layer in model.layers:
        replicas = strategy.experimental_local_results(layer.kernel.value)
        assert len(replicas) == 2
        np.testing.assert_array_equal(replicas[0].numpy(), replicas[1].numpy())


# Errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "`target_sparsity` is missing"),
        ({"target_sparsity": 1.0}, ValueError, "at least 0 and below 1"),
        ({"target_sparsity": 90}, ValueError, r"Did you mean 0\.9"),
        ({"target_sparsity": -0.1}, ValueError, "at least 0 and below 1"),
        ({"target_sparsity": float("nan")}, ValueError, "at least 0 and below 1"),
        ({"target_sparsity": "0.9"}, TypeError, "Received: '0.9' of type str"),
        ({"target_sparsity": True}, TypeError, "of type bool"),
        ({"target_sparsity": {}}, ValueError, "at least one key"),
        ({"target_sparsity": {"a": 2.0}}, ValueError, "below 1"),
        ({"target_sparsity": {"a": (0.5,)}}, ValueError, "a pair"),
        ({"target_sparsity": {"a": 0.5}, "allocation": "global"}, ValueError, "says itself"),
        ({"target_sparsity": 0.5, "allocation": "globl"}, ValueError, "allocation"),
        ({"target_sparsity": 0.5, "criterion": "magnitud"}, ValueError, "Did you mean 'magnitude'"),
        ({"target_sparsity": 0.5, "pattern": "unstructurd"}, ValueError, "Did you mean 'unstructured'"),
        ({"target_sparsity": 0.5, "schedule": "polynomal"}, ValueError, "Did you mean 'polynomial'"),
        ({"target_sparsity": 0.5, "schedule": 3}, TypeError, "A schedule is a string"),
        ({"target_sparsity": 0.5, "schedule": ks.schedules.Linear}, TypeError, "Create an instance"),
        ({"target_sparsity": 0.5, "begin": 0.5, "end": 0.5}, ValueError, "`end` must be after `begin`"),
        ({"target_sparsity": 0.5, "begin": 5, "end": 3}, ValueError, "`end` must be after `begin`"),
        ({"target_sparsity": 0.5, "begin": -1}, ValueError, "negative"),
        ({"target_sparsity": 0.5, "end": 1.5}, ValueError, "fraction of the fit"),
        ({"target_sparsity": 0.5, "begin": "0"}, TypeError, "`begin` is a float"),
        ({"target_sparsity": 0.5, "frequency": 0}, ValueError, "`frequency` must be a whole number"),
        ({"target_sparsity": 0.5, "frequency": 1.5}, ValueError, "`frequency` must be a whole number"),
        ({"target_sparsity": 0.5, "filters": 3}, TypeError, "`filters` must be a regex.*Received: filters=3"),
        ({"target_sparsity": 0.5, "filters": ["a/", None]}, TypeError, "`filters` must be a regex"),
        ({"target_sparsity": 0.5, "verbose": "x"}, ValueError, "`verbose` must be 0, 1 or 2. Received: verbose='x'"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        ks.callbacks.Pruning(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"begin": 18, "end": 30}, "can never fire: it begins at step 18, and this fit has 18"),
        ({"begin": 12, "end": 0.5}, "in this fit of 18 steps they come to 12 and 9"),
        ({"filters": "nothing"}, "matches no weight"),
        ({"filters": ["a/", "nothing"]}, "'nothing' matches no weight"),
        ({"filters": "bias"}, "Biases and normalization weights are never pruned"),
        ({"filters": lambda variable: False}, "nothing to prune"),
        ({"target_sparsity": {"nothing": 0.5}}, "matches no weight"),
        ({"filters": "("}, "regular expression"),
        ({"criterion": "taylor", "schedule": "one_shot"}, "no training step has been taken"),
    ],
)
def test_errors_before_training_starts(arguments, message):
    model, record = dense_model(), ZerosAfterEachStep()
    before = model.get_weights()
    optimizer = model.optimizer
    with pytest.raises(ValueError, match=message):
        fit(model, ks.callbacks.Pruning(**({"target_sparsity": 0.5} | arguments)), record)
    assert record.counts == []
    assert all((a == b).all() for a, b in zip(before, model.get_weights(), strict=True))
    assert model.optimizer is optimizer
    assert "get_compile_config" not in vars(model)


def test_a_fit_that_fails_at_its_start_leaves_nothing_to_the_next():
    model = dense_model()
    optimizer = model.optimizer
    with pytest.raises(ValueError, match="matches no weight"):
        fit(model, ks.callbacks.Pruning(0.5), ks.callbacks.Pruning(0.5, filters="nothing"))
    assert model.optimizer is optimizer
    with pytest.raises(ValueError, match="can never fire"):
        fit(model, ks.callbacks.Pruning(0.5, filters="a/"), ks.callbacks.Pruning(0.5, begin=18, end=20, filters="b/"))
    assert model.optimizer is optimizer

    class Broken(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fit(model, Broken(), ks.callbacks.Pruning(0.5))
    fit(model, ks.callbacks.Pruning(0.5))
    assert model.optimizer is optimizer
    assert zeros(model) == [60, 15]


def test_evaluating_with_a_callback_in_the_middle_of_fit_keeps_the_masks():
    model, record = dense_model(), ZerosAfterEachStep()
    evaluate = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: model.evaluate(X, Y, verbose=0, callbacks=[ks.callbacks.KeepSparsity()])
    )
    fit(model, ks.callbacks.Pruning(0.5, begin=0, end=5), evaluate, record)
    assert zeros(model) == [60, 15]
    assert record.revived == 0
    assert not isinstance(model.optimizer, ks.optimizers.SparseOptimizer)


def test_uncompiled_model():
    model = keras.Sequential([keras.Input((12,)), keras.layers.Dense(3)])
    with pytest.raises(ValueError, match="call `model.compile"):
        ks.callbacks.Pruning(0.5).set_model(model)


class TwoOptimizers(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(3)

    def call(self, x):
        return self.dense(x)

    def compile(self, first, second):
        super().compile(loss="mse")
        self.first, self.second = first, second


def test_model_with_several_optimizers():
    model = TwoOptimizers()
    model(X)
    model.compile(keras.optimizers.SGD(), keras.optimizers.Adam())
    with pytest.raises(ValueError, match=r"further optimizers: \['first', 'second'\]"):
        model.fit(X, X[:, :3], verbose=0, callbacks=[ks.callbacks.Pruning(0.5)])


def test_verbose_tells_each_update(capsys):
    fit(dense_model(), ks.callbacks.Pruning(0.5, begin=0, end=4, frequency=2, verbose=1), epochs=1)
    out = capsys.readouterr().out
    assert "Step 4: sparsity 0.5000" in out and "Step 2:" in out


def test_no_warning_in_an_ordinary_fit():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="__array__ implementation")  # Keras 3.15 with NumPy 2
        model = dense_model()
        fit(model, ks.callbacks.Pruning(0.5), validation_data=(X, Y))
    assert zeros(model) == [60, 15]
