"""Fits one after another: broken off, from files, with new weights, compiled anew, in a loop; with each callback."""

import gc
import json
import subprocess
import sys
import zipfile
from typing import NamedTuple

import keras
import numpy as np
import pytest

import keras_sparse as ks
from keras_sparse.layers import L0, gated_layers

BACKEND = keras.backend.backend()
X = np.random.default_rng(0).normal(size=(48, 12)).astype("float32")
Y = np.random.default_rng(1).integers(0, 3, 48)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
# Compiling takes longer than these fits.
QUICK = {"jit_compile": False} if BACKEND == "tensorflow" else {}
EAGER = {"run_eagerly": True} if BACKEND == "tensorflow" else {}
SIZES = 120, 30


def dense_model(optimizer=None, gated=False, **arguments):
    keras.utils.set_random_seed(1)
    parts = [keras.layers.Dense(10, activation="relu", name="a"), keras.layers.Dense(3, name="b")]
    if gated:
        parts = [L0(layer, 0.01, seed=1) for layer in parts]
    model = keras.Sequential([keras.Input((12,)), *parts])
    model.compile(optimizer or keras.optimizers.Adam(0.01), LOSS, **(arguments or QUICK))
    return model


def fit(model, *callbacks, epochs=4, **arguments):
    arguments = {"batch_size": 16, "verbose": 0, "shuffle": False} | arguments
    return model.fit(X, Y, epochs=epochs, callbacks=list(callbacks), **arguments).history


def kernels(model):
    return [w.numpy() for w in ks.selection.weights(model) if w.kernel]


def zeros(model):
    return [int((kernel == 0).sum()) for kernel in kernels(model)]


def rounded(sparsity):
    return [round(sparsity * size) for size in SIZES]


class Masked(keras.callbacks.Callback):
    """Counts steps, and the weights that were not zero after a step although their mask says so."""

    def __init__(self, interrupt_at=None):
        super().__init__()
        self.steps, self.alive, self.interrupt_at = 0, 0, interrupt_at

    def on_train_batch_end(self, batch, logs=None):
        self.steps += 1
        for variable, mask in ks.optimizers.find(self.model).masks:
            value, mask = ks.selection.as_array(variable), ks.selection.as_array(mask)
            self.alive += np.count_nonzero(value[~mask])
        if self.steps == self.interrupt_at:
            raise KeyboardInterrupt


class Algorithm(NamedTuple):
    """A way to make a model sparse in a fit.

    Attributes:
        make: The callback for a sparsity.
        met: Whether a model is as sparse as that.
        rises: Whether the sparsity after the first epoch is below the target.
        prepare: What is done to a model before a fit, or `None`.
        gated: Whether the model has gates.
    """

    make: object
    met: object
    rises: bool = False
    prepare: object = None
    gated: bool = False


def each_kernel(model, sparsity):
    return zeros(model) == rounded(sparsity)


def at_full_price(model, sparsity):
    return [float(ks.selection.as_array(layer.penalty)) for layer in gated_layers(model)] == pytest.approx([0.01] * 2)


ALGORITHMS = {
    "pruning": Algorithm(lambda s: ks.callbacks.Pruning(s, schedule="linear", frequency=1), each_kernel, rises=True),
    "dynamic": Algorithm(lambda s: ks.callbacks.DynamicSparseTraining(s, "uniform", frequency=2, end=6), each_kernel),
    "lottery": Algorithm(lambda s: ks.callbacks.LotteryTicket(2, s, allocation="uniform"), each_kernel, rises=True),
    "proximal": Algorithm(
        lambda s: ks.callbacks.ProximalL1(target_sparsity=s, frequency=1),
        lambda model, s: sum(zeros(model)) == round(s * 150),
        rises=True,
    ),
    "gates": Algorithm(lambda s: ks.callbacks.L0Penalty("linear", frequency=1), at_full_price, gated=True),
    "keep": Algorithm(lambda s: ks.callbacks.KeepSparsity(), each_kernel, prepare=ks.prune),
}
each_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)


def has_class(optimizer, kind):
    """Whether an optimizer is of the very class that `kind()` makes: on torch, Keras makes subclasses of its own."""
    return type(optimizer) is type(kind())


def is_plain(model, kind=keras.optimizers.Adam):
    return has_class(model.optimizer, kind) and "sparse_state" not in vars(model.optimizer)


def train(model, algorithm, sparsity, callback=None, kind=keras.optimizers.Adam, **arguments):
    """Fit, and check what every fit promises."""
    if algorithm.prepare is not None:
        algorithm.prepare(model, sparsity)
    optimizer, watch, prices = model.optimizer, Masked(), []

    class Prices(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            prices.extend(float(ks.selection.as_array(layer.penalty)) for layer in gated_layers(model))

    history = fit(model, callback or algorithm.make(sparsity), watch, Prices(), **arguments)
    assert algorithm.met(model, sparsity), (zeros(model), history["sparsity"])
    assert watch.steps and not watch.alive
    assert model.optimizer is optimizer and is_plain(model, kind)
    if algorithm.gated:
        assert prices[:2] == [0, 0]
    else:
        assert history["sparsity"][-1] == pytest.approx(sparsity, abs=0.01)
        assert (history["sparsity"][0] < sparsity - 0.01) == (algorithm.rises and len(history["sparsity"]) > 1)
    return history


def interrupt(model, algorithm, sparsity, step=7):
    if algorithm.prepare is not None:
        algorithm.prepare(model, sparsity)
    with pytest.raises(KeyboardInterrupt):
        fit(model, algorithm.make(sparsity), Masked(interrupt_at=step))
    assert is_plain(model)


def optimizer_config(path):
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("config.json"))["compile_config"]["optimizer"]


def check_file(model, path):
    """Save a model, and compare it with what is loaded."""
    model.save(path)
    assert "keras_sparse" not in json.dumps(optimizer_config(path))
    loaded = keras.saving.load_model(path)
    assert is_plain(loaded, type(model.optimizer))
    state, expected = loaded.optimizer.variables, model.optimizer.variables
    assert len(state) == len(expected)
    for a, b in zip([*loaded.weights, *state], [*model.weights, *expected], strict=True):
        np.testing.assert_array_equal(ks.selection.as_array(a), ks.selection.as_array(b))


# The table: each callback, whatever came before its fit


@each_algorithm
@pytest.mark.thorough(3)
def test_a_fit_after_an_interrupted_one_begins_anew(algorithm, tmp_path):
    model = dense_model(gated=algorithm.gated)
    interrupt(model, algorithm, 0.5)
    check_file(model, tmp_path / "interrupted.keras")
    train(model, algorithm, 0.8)
    check_file(model, tmp_path / "model.keras")


@each_algorithm
@pytest.mark.thorough(3)
def test_a_file_of_the_middle_of_a_fit_is_trained_with_other_arguments(algorithm, tmp_path):
    model = dense_model(gated=algorithm.gated, **EAGER)
    if algorithm.prepare is not None:
        algorithm.prepare(model, 0.5)
    fit(model, algorithm.make(0.5), keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras"))
    loaded = keras.saving.load_model(tmp_path / "2.keras")
    assert has_class(loaded.optimizer, keras.optimizers.Adam)
    # It keeps what the file brought, for a fit that resumes; this one does not.
    train(loaded, algorithm, 0.8)
    check_file(loaded, tmp_path / "again.keras")


@each_algorithm
@pytest.mark.thorough(3)
def test_a_second_fit_begins_anew_from_the_zeros_of_the_first(algorithm):
    model = dense_model(gated=algorithm.gated)
    train(model, algorithm, 0.5)
    train(model, algorithm, 0.8)
    assert ks.optimizers.find(model) is None


@each_algorithm
@pytest.mark.thorough(3)
def test_new_weights_know_nothing_of_old_masks(algorithm):
    model = dense_model(gated=algorithm.gated, **EAGER)
    first = model.get_weights()
    interrupt(model, algorithm, 0.8, step=11)
    model.set_weights(first)
    train(model, algorithm, 0.5)
    assert ks.optimizers.find(model) is None


@each_algorithm
@pytest.mark.thorough(3)
def test_a_model_that_is_compiled_anew_begins_anew(algorithm, tmp_path):
    model = dense_model(gated=algorithm.gated, **EAGER)
    old = model.optimizer
    train(model, algorithm, 0.5)
    model.compile(keras.optimizers.RMSprop(0.01), LOSS, **QUICK)
    train(model, algorithm, 0.8, kind=keras.optimizers.RMSprop)
    assert "sparse_state" not in vars(old) and has_class(old, keras.optimizers.Adam)
    check_file(model, tmp_path / "model.keras")


@each_algorithm
@pytest.mark.thorough(3)
def test_each_fit_of_a_loop_ends_at_the_target(algorithm):
    model, callback = dense_model(gated=algorithm.gated), algorithm.make(0.5)
    train(model, algorithm, 0.5, callback, epochs=2)
    for again in (callback, algorithm.make(0.5)):
        before, record = kernels(model), Masked()
        fit(model, again, record, epochs=2)
        assert algorithm.met(model, 0.5) and is_plain(model) and not record.alive
        assert any((a != b).any() for a, b in zip(before, kernels(model), strict=True))


# What was found at fault once, and what is next to it


@each_algorithm
def test_an_interrupted_fit_ends_at_once(algorithm):
    model = dense_model(gated=algorithm.gated, **EAGER)
    gc.disable()
    try:
        interrupt(model, algorithm, 0.5)
        assert ks.optimizers.find(model) is None
    finally:
        gc.enable()


def test_an_interrupted_fit_says_what_it_leaves():
    with pytest.warns(UserWarning, match=r"broken off at sparsity 0\.[1-9]\d*\. .*own optimizer"):
        interrupt(dense_model(**EAGER), ALGORITHMS["pruning"], 0.8)


CELL = """
import keras, numpy as np, keras_sparse as ks
class Interrupt(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        raise KeyboardInterrupt
model = keras.Sequential([keras.Input((12,)), keras.layers.Dense(10), keras.layers.Dense(3)])
model.compile("adam", "mse")
pruning = ks.callbacks.Pruning(0.5, schedule="one_shot")
model.fit(np.ones((8, 12)), np.ones((8, 3)), verbose=0, callbacks=[pruning, Interrupt()])
"""


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="about notebooks")
def test_an_interrupted_fit_ends_with_its_cell_of_a_notebook(tmp_path):
    pytest.importorskip("IPython")
    (tmp_path / "cell.py").write_text(CELL)
    program = (
        "from IPython.core.interactiveshell import InteractiveShell\n"
        "import sys\n"
        "shell = InteractiveShell.instance()\n"
        "shell.run_cell(open(sys.argv[1]).read())\n"
        "assert sys.last_traceback is not None\n"
        "shell.run_cell('print(ks.optimizers.find(model), np.count_nonzero(model.get_weights()[0]))')\n"
    )
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path / "cell.py")], capture_output=True, text=True)
    assert run.stdout.endswith("None 60\n"), run.stdout + run.stderr
    assert "broken off at sparsity 0.500" in run.stderr


def test_a_program_that_keeps_the_last_traceback_keeps_no_fit(tmp_path):
    model = dense_model(**EAGER)
    try:
        fit(model, ks.callbacks.Pruning(0.5), Masked(interrupt_at=7))
    except KeyboardInterrupt as error:
        kept = error
    # The fit is not known to be over, so its file is one of the middle of a fit: it loads all the same.
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert has_class(loaded.optimizer, keras.optimizers.Adam)
    train(model, ALGORITHMS["pruning"], 0.8)
    train(loaded, ALGORITHMS["pruning"], 0.8)
    del kept
    assert is_plain(model)


@pytest.mark.parametrize("times", [{"begin": 0, "end": 9, "frequency": 1}, {"begin": 0.0, "end": 0.75}], ids=str)
def test_a_file_of_the_last_epoch_is_pruned_further_over_the_whole_fit(times, tmp_path):
    model = dense_model(**EAGER)
    fit(model, ks.callbacks.Pruning(0.3), keras.callbacks.ModelCheckpoint(tmp_path / "last.keras"))
    loaded = keras.saving.load_model(tmp_path / "last.keras")
    seen = fit(loaded, ks.callbacks.Pruning(0.8, schedule="linear", **times))["sparsity"]
    assert 0.3 <= seen[0] < 0.5 and seen[0] < seen[1] < seen[2] == pytest.approx(0.8)


def test_weights_that_are_loaded_know_nothing_of_old_masks(tmp_path):
    model = dense_model(**EAGER)
    fit(model, epochs=1)
    model.save_weights(tmp_path / "first.weights.h5")
    interrupt(model, ALGORITHMS["pruning"], 0.8, step=10)
    model.load_weights(tmp_path / "first.weights.h5")
    assert zeros(model) == [0, 0]
    train(model, ALGORITHMS["pruning"], 0.5)


def test_identities_of_recurrent_kernels_are_trained():
    sequences = np.random.default_rng(0).random((32, 4, 3)).astype("float32")
    eye = keras.initializers.Identity()
    for layer in (
        keras.layers.SimpleRNN(12, recurrent_initializer=eye),
        keras.layers.GRU(8, recurrent_initializer=eye),
    ):
        model = keras.Sequential([keras.Input((4, 3)), layer, keras.layers.Dense(1)])
        model.compile("adam", "mse", **QUICK)
        pruning = ks.callbacks.Pruning(0.5)
        model.fit(sequences, sequences.sum((1, 2)), epochs=2, batch_size=8, verbose=0, callbacks=[pruning])
        kernel = ks.selection.as_array(layer.cell.recurrent_kernel)
        assert (kernel == 0).sum() == kernel.size / 2


def with_a_small_branch():
    """A model of which global pruning empties the kernel `small`."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((12,))
    initializer = keras.initializers.RandomNormal(stddev=1e-4, seed=1)
    branches = [
        keras.layers.Dense(10, activation="relu", name="a")(inputs),
        keras.layers.Dense(10, kernel_initializer=initializer, name="small")(inputs),
    ]
    model = keras.Model(inputs, keras.layers.Dense(3, name="b")(keras.layers.add(branches)))
    model.compile(keras.optimizers.Adam(0.01), LOSS, **QUICK)
    return model


@pytest.mark.filterwarnings("ignore:.*has no weight left")
def test_an_emptied_kernel_stays_empty():
    for make in (ks.callbacks.KeepSparsity, lambda: ks.callbacks.Pruning(0.5)):
        model = with_a_small_branch()
        ks.prune(model, 0.8, allocation="global")
        assert zeros(model)[1] == 120
        history = fit(model, make(), epochs=2)
        assert zeros(model)[1] == 120
        assert history["sparsity"][-1] == pytest.approx(sum(zeros(model)) / 270)


def test_a_fit_that_empties_a_kernel_says_so():
    with pytest.warns(UserWarning, match="small.*has no weight left"):
        fit(with_a_small_branch(), ks.callbacks.Pruning(0.8, allocation="global"))


@pytest.mark.parametrize(
    "make",
    [
        lambda: ks.callbacks.LotteryTicket(2, 0.8),
        lambda: ks.callbacks.ProximalL1(target_sparsity=0.8, frequency=1),
    ],
    ids=["lottery", "proximal"],
)
def test_other_callbacks_that_empty_a_kernel_say_so(make):
    model = with_a_small_branch()
    with pytest.warns(UserWarning, match="small.*has no weight left"):
        fit(model, make())


def test_low_rank_updates_are_counted_as_the_saved_model_has_them(tmp_path):
    model = dense_model()
    fit(model, ks.callbacks.Pruning(0.8))
    for layer in model.layers:
        layer.enable_lora(2)
    model.compile("adam", LOSS, **QUICK)
    with pytest.warns(UserWarning, match="LoRA adds a dense update"):
        fit(model, ks.callbacks.KeepSparsity(), epochs=1)
    said = ks.report(model).totals["sparsity"]
    model.save(tmp_path / "lora.keras")
    assert said == ks.report(keras.saving.load_model(tmp_path / "lora.keras")).totals["sparsity"] < 0.1


class Distiller(keras.Model):
    """Trains a student with the outputs of a teacher that it holds, too."""

    def __init__(self, student, teacher, optimizer=None):
        super().__init__()
        self.student, self.teacher, self.other = student, teacher, optimizer

    def build(self, shape):
        self.built = True

    def call(self, x):
        return self.student(x)

    def train_step(self, data):
        x, _ = data
        variables = self.student.trainable_variables
        if BACKEND == "tensorflow":
            import tensorflow as tf

            with tf.GradientTape() as tape:
                loss = keras.ops.mean((self.student(x) - self.teacher(x)) ** 2)
            self.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        else:
            import torch

            self.zero_grad()
            loss = keras.ops.mean((self.student(x) - self.teacher(x).detach()) ** 2)
            loss.backward()
            with torch.no_grad():
                self.optimizer.apply([v.value.grad for v in variables], variables)
        return {"loss": loss}


@pytest.mark.skipif(BACKEND == "jax", reason="there a step has gradients of everything")
@pytest.mark.parametrize(
    "build",
    [True, False],
    ids=["built", "not built"],
)
def test_a_teacher_that_no_step_changes_is_left_alone(build):
    student, teacher = dense_model(), dense_model()
    teacher.set_weights([w + 0.1 for w in teacher.get_weights()])
    before = teacher.get_weights()
    model = Distiller(student, teacher)
    if build:
        model.build((None, 12))
    model.compile("adam", **QUICK)
    with pytest.warns(UserWarning, match="No optimizer step changes"):
        fit(model, ks.callbacks.Pruning(0.8))
    assert zeros(student) == rounded(0.8)
    for a, b in zip(before, teacher.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="a train_step of TensorFlow")
def test_steps_of_an_optimizer_that_is_kept_elsewhere_are_missed():
    import tensorflow as tf

    mine = keras.optimizers.Adam(0.01)

    class Elsewhere(Distiller):
        def train_step(self, data):
            with tf.GradientTape() as tape:
                loss = keras.ops.mean(self.student(data[0]) ** 2)
            variables = self.student.trainable_variables
            mine.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
            return {"loss": loss}

    model = Elsewhere(dense_model(), None)
    model.compile("adam", **QUICK)
    with pytest.warns(UserWarning, match="`model.optimizer` has taken no step"):
        fit(model, ks.callbacks.Pruning(0.8))
    assert zeros(model.student) == [0, 0]


@pytest.mark.skipif(BACKEND != "tensorflow", reason="a train_step of TensorFlow")
@pytest.mark.parametrize("steps", [1 / 3, 2], ids=["a step in three batches", "two steps in a batch"])
def test_steps_that_come_otherwise_than_batches_are_counted(steps):
    import tensorflow as tf

    class Counting(Distiller):
        def train_step(self, data):
            self.seen.assign_add(1)
            variables = self.student.trainable_variables

            def step():
                with tf.GradientTape() as tape:
                    loss = keras.ops.mean(self.student(data[0]) ** 2)
                self.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
                return loss

            if steps > 1:
                step()
                return {"loss": step()}
            return {"loss": tf.cond(self.seen % 3 == 0, step, lambda: 0.0)}

    model = Counting(dense_model(), None)
    model.seen = tf.Variable(0, trainable=False)
    model.compile("adam", **QUICK)
    seen = fit(model, ks.callbacks.Pruning(0.8, schedule="linear", frequency=1), epochs=12)["sparsity"]
    assert zeros(model.student) == rounded(0.8)
    assert 0.1 < seen[3] < 0.7 and seen[-2] == pytest.approx(0.8)


def test_variables_that_are_excluded_from_weight_decay_stay_so():
    def weights(*ours):
        optimizer = keras.optimizers.AdamW(0.1, weight_decay=0.5)
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        model = dense_model(optimizer, **EAGER)
        fit(model, *ours, epochs=1)
        return model.get_weights()

    for a, b in zip(weights(), weights(ks.callbacks.Pruning(0.0)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.optimizers.SGD(0.1, global_clipnorm=1.0),
        lambda: keras.optimizers.SGD(0.1, clipnorm=1.0),
        lambda: keras.optimizers.Lamb(0.1),
    ],
    ids=["global_clipnorm", "clipnorm", "Lamb"],
)
def test_gradients_of_pruned_weights_steer_nothing(make):
    def live_step(inputs):
        layer = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
        model = keras.Sequential([keras.Input((inputs,)), layer])
        layer.kernel.assign(np.array([[1.0], [0.0]][:inputs], "float32"))
        model.compile(make(), "mse", **EAGER)
        ours = [ks.callbacks.KeepSparsity()] if inputs == 2 else []
        model.fit(np.array([[1.0, 100.0]], "float32")[:, :inputs], np.zeros((1, 1)), verbose=0, callbacks=ours)
        return float(ks.selection.as_array(layer.kernel)[0, 0])

    assert live_step(1) == pytest.approx(live_step(2), rel=1e-5)


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
