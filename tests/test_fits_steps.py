"""What steps do in a fit: to kernels that are emptied, to a teacher, to gradients of pruned weights."""

import keras
import numpy as np
import pytest
from fit_algorithms import BACKEND, EAGER, LOSS, QUICK, dense_model, fit, rounded, zeros

import keras_sparse as ks


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
