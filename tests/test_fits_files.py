"""Files of the middle of fits, models that are compiled anew in it, and loops of fits."""

import subprocess
import sys

import keras
import numpy as np
import pytest
from fit_algorithms import (
    ALGORITHMS,
    BACKEND,
    EAGER,
    LOSS,
    QUICK,
    Masked,
    dense_model,
    fit,
    has_class,
    is_plain,
    kernels,
    rounded,
    train,
    zeros,
)

import keras_sparse as ks


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_an_h5_file_of_the_middle_of_a_fit_loads(tmp_path):
    model = dense_model(**EAGER)
    fit(model, ks.callbacks.Pruning(0.8), keras.callbacks.ModelCheckpoint(tmp_path / "model.h5"))
    loaded = keras.saving.load_model(tmp_path / "model.h5")
    assert zeros(loaded) == rounded(0.8) and has_class(loaded.optimizer, keras.optimizers.Adam)
    # Keras loads this format without the optimizer's variables.
    loaded.compile(keras.optimizers.Adam(0.01), LOSS, **EAGER)
    train(loaded, ALGORITHMS["keep"], 0.8)


def test_weights_of_the_middle_of_a_fit_load_into_a_plain_model(tmp_path):
    path, model, other = tmp_path / "{epoch}.weights.h5", dense_model(**EAGER), dense_model(**EAGER)
    fit(model, ks.callbacks.Pruning(0.8), keras.callbacks.ModelCheckpoint(path, save_weights_only=True))
    fit(other, epochs=1)
    other.load_weights(tmp_path / "4.weights.h5")
    assert zeros(other) == rounded(0.8)
    assert int(other.optimizer.iterations) == int(model.optimizer.iterations) == 12
    assert is_plain(other)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="checkpoints of TensorFlow")
def test_a_tensorflow_checkpoint_of_the_middle_of_a_fit_is_restored_into_a_plain_model(tmp_path):
    import tensorflow as tf

    model, other = dense_model(**EAGER), dense_model(**EAGER)

    class Write(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.path = tf.train.Checkpoint(model=self.model, optimizer=self.model.optimizer).write(tmp_path / "point")

    write = Write()
    fit(model, ks.callbacks.Pruning(0.8), write)
    fit(other, epochs=1)
    status = tf.train.Checkpoint(model=other, optimizer=other.optimizer).read(write.path)
    status.assert_existing_objects_matched()
    assert zeros(other) == rounded(0.8) and int(other.optimizer.iterations) == 12
    for a, b in zip(other.optimizer.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(ks.selection.as_array(a), ks.selection.as_array(b))


@pytest.mark.slow
def test_files_of_the_middle_of_fits_load_without_us(tmp_path):
    for index, make in enumerate((keras.optimizers.Adam, keras.optimizers.SGD)):
        model = dense_model(make(0.01), **EAGER)
        path = tmp_path / f"{index}.keras"
        fit(model, ks.callbacks.Pruning(0.8), keras.callbacks.ModelCheckpoint(path), epochs=2)
    program = (
        "import sys; sys.modules['keras_sparse'] = None\n"
        "import keras\n"
        "for path in sys.argv[1:]:\n"
        "    model = keras.saving.load_model(path)\n"
        "    count = [int((keras.ops.convert_to_numpy(layer.kernel) == 0).sum()) for layer in model.layers]\n"
        "    print(type(model.optimizer).__name__, int(model.optimizer.iterations), count)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "0.keras"), str(tmp_path / "1.keras")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.stdout.split("\n")[:2] == ["Adam 6 [96, 24]", "SGD 6 [96, 24]"], run.stderr


class WarmUp(keras.optimizers.schedules.LearningRateSchedule):
    """Has no `get_config`."""

    def __call__(self, step):
        return 0.01 * keras.ops.minimum(1.0, (keras.ops.cast(step, "float32") + 1) / 6.0)


@pytest.mark.parametrize("name", ["pruning", "lottery", "proximal"])
def test_a_learning_rate_schedule_needs_no_config(name):
    model = dense_model(keras.optimizers.Adam(WarmUp()), **EAGER)
    train(model, ALGORITHMS[name], 0.5)
    assert ks.optimizers.find(model) is None


class Recompile(keras.callbacks.Callback):
    """Unfreezes the first layer and compiles anew in the middle of a fit."""

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            self.model.layers[0].trainable = True
            self.model.compile(keras.optimizers.SGD(0.01), LOSS, **QUICK)
            self.model.make_train_function()


@pytest.mark.skipif(BACKEND == "jax", reason="Keras's JAX trainer keeps the optimizer that a fit began with")
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_a_model_that_is_compiled_anew_in_the_middle_of_a_fit_goes_on(frozen, first):
    model, watch = dense_model(), Masked()
    old = model.optimizer
    if frozen:
        model.layers[0].trainable = False
        model.compile(old, LOSS, **QUICK)
    ours = ks.callbacks.Pruning(0.8, schedule="linear", frequency=1)
    seen = fit(model, *((Recompile(), ours) if first else (ours, Recompile())), watch, epochs=6)["sparsity"]
    assert watch.steps == 18 and not watch.alive
    assert zeros(model) == rounded(0.8) and seen == sorted(seen)
    assert is_plain(model, keras.optimizers.SGD)
    assert has_class(old, keras.optimizers.Adam) and "sparse_state" not in vars(old)


@pytest.mark.skipif(BACKEND == "jax", reason="Keras's JAX trainer keeps the optimizer that a fit began with")
def test_a_lottery_rewinds_though_its_model_was_compiled_anew():
    class Weights(keras.callbacks.Callback):
        seen = ()

        def on_train_batch_begin(self, batch, logs=None):
            self.seen += (kernels(self.model),)

    model, weights = dense_model(), Weights()
    fit(model, ks.callbacks.LotteryTicket(2, 0.5), Recompile(), weights, epochs=8)
    for first, again in zip(weights.seen[0], weights.seen[12], strict=True):
        np.testing.assert_array_equal(again, np.where(again == 0, 0, first))
    assert sum(zeros(model)) == 75 and is_plain(model, keras.optimizers.SGD)


@pytest.mark.parametrize("stop", [False, True], ids=["alone", "beside EarlyStopping"])
def test_a_best_file_of_a_denser_epoch_is_told_of(stop, tmp_path):
    path = tmp_path / "best.keras"
    best = keras.callbacks.ModelCheckpoint(path, "loss", mode="max", save_best_only=True)
    others = [keras.callbacks.EarlyStopping("loss", mode="min", patience=9)] if stop else []
    pruning = ks.callbacks.Pruning(0.5, begin=0.6, end=0.9)
    model = dense_model(keras.optimizers.Adam(0.03), **EAGER)
    with pytest.warns(UserWarning, match=r"`ModelCheckpoint\(save_best_only=True\)` has kept a file"):
        fit(model, pruning, best, *others, epochs=8)
    assert zeros(keras.saving.load_model(path))[0] < 60


class Travelled(ks.optimizers.Part):
    """Adds up how far a weight has come in each step."""

    name = "travelled"

    def add(self, index):
        shape = tuple(self.parts.trainable[index].shape)
        for key in ((index, "before"), (index, "sum")):
            self.claim(key, lambda: keras.Variable("zeros", shape, trainable=False))

    def before(self, gradients):
        for index, key in self.claimed:
            if key == "before":
                self.variables[index, key].assign(self.parts.trainable[index])
        return gradients

    def after(self):
        for index, key in self.claimed:
            if key == "sum":
                step = keras.ops.abs(self.parts.trainable[index] - self.variables[index, "before"])
                self.variables[index, key].assign_add(step)

    def restore(self, config):
        for index in {index for index, _ in config}:
            self.add(index)


class PruneLazy(ks.callbacks.sparse_callback.SparseCallback):
    """Prunes what has come least far at the end of training: state of its own, in a part of its own."""

    def attach(self, run):
        run.parts.of(Travelled).add(0)

    def finish(self, run):
        self.travelled = ks.selection.as_array(run.parts.of(Travelled).variables[0, "sum"])


def test_a_callback_with_state_of_its_own(tmp_path):
    class Steps(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.values = [kernels(self.model)[0]]

        def on_train_batch_end(self, batch, logs=None):
            self.values.append(kernels(self.model)[0])

    model, ours, steps = dense_model(**EAGER), PruneLazy(), Steps()
    fit(model, ours, steps, keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras"))
    np.testing.assert_allclose(ours.travelled, np.abs(np.diff(steps.values, axis=0)).sum(0), rtol=1e-5)
    resumed, again = keras.saving.load_model(tmp_path / "2.keras"), PruneLazy()
    fit(resumed, again, initial_epoch=2)
    np.testing.assert_allclose(again.travelled, ours.travelled, rtol=1e-6)


class Traced(keras.layers.Layer):
    """Counts how often it is traced."""

    count = 0

    def call(self, x):
        Traced.count += 1
        return x


@pytest.mark.skipif(BACKEND == "torch", reason="nothing is compiled")
@pytest.mark.parametrize("order", ["plain first", "ours first"])
def test_fits_of_a_loop_compile_once(order):
    model = keras.Sequential([keras.Input((12,)), Traced(), keras.layers.Dense(10), keras.layers.Dense(3)])
    model.compile(keras.optimizers.SGD(0.0), LOSS, **QUICK)
    ks.prune(model, 0.5)

    def traces(ours):
        before = Traced.count
        fit(model, *([ks.callbacks.KeepSparsity()] if ours else []), epochs=1)
        return Traced.count - before

    if order == "plain first":
        assert traces(ours=False)
    assert traces(ours=True)
    assert not traces(ours=True)
    # On JAX the first fit with masks takes the place of the function that was compiled before it.
    assert bool(traces(ours=False)) == (order == "ours first" or BACKEND == "jax")
    assert not any(traces(ours) for ours in (True, False, False, True, True, False))
    assert zeros(model) == rounded(0.5)
