"""SparseOptimizer: as an optimizer, in custom loops, wrapped and unwrapped."""

import contextlib

import keras
import numpy as np
import pytest

import keras_sparse as ks
from keras_sparse.optimizers.assignment import mask_in_step

X = np.random.default_rng(0).normal(size=(32, 8)).astype("float32")
Y = np.random.default_rng(1).normal(size=(32, 4)).astype("float32")
BACKEND = keras.backend.backend()


def make(optimizer="adam"):
    keras.utils.set_random_seed(0)
    first = keras.layers.Dense(6, activation="relu", name="a")
    model = keras.Sequential([keras.Input((8,)), first, keras.layers.Dense(4)])
    model.compile(optimizer, "mse")
    return model


def zeros(model):
    return [int((layer.kernel.numpy() == 0).sum()) for layer in model.layers]


def test_the_variables_of_its_parts_are_hidden_but_on_jax():
    model = make(ks.optimizers.SparseOptimizer("adam"))
    optimizer = model.optimizer
    optimizer.build(model.trainable_variables)
    plain = len(optimizer.variables)
    optimizer.add_masks([model.layers[0].kernel])
    masks = [tuple(v.shape) for v in optimizer.variables if v.dtype == "bool"]
    # JAX hands the state of an optimizer from step to step.
    assert masks == ([(8, 6)] if BACKEND == "jax" else [])
    assert len(optimizer.variables) == plain + len(masks)


def test_passes_through_what_keras_asks_for():
    inner = keras.optimizers.Adam(0.5, loss_scale_factor=8.0, gradient_accumulation_steps=2, use_ema=True)
    optimizer = ks.optimizers.SparseOptimizer(inner)
    assert float(optimizer.learning_rate) == 0.5
    optimizer.learning_rate = 0.25
    assert float(inner.learning_rate) == 0.25
    assert optimizer.loss_scale_factor == 8.0
    assert float(optimizer.scale_loss(keras.ops.convert_to_tensor(2.0))) == 16.0
    assert optimizer.gradient_accumulation_steps == 2
    assert optimizer.use_ema is True
    assert int(optimizer.iterations) == int(inner.iterations) == 0
    assert not hasattr(optimizer, "optimizers")


def test_multi_optimizer():
    for_kernels, for_others = keras.optimizers.SGD(0.1), keras.optimizers.Adam(0.1)
    model = make(keras.optimizers.MultiOptimizer(lambda v: for_kernels if "kernel" in v.path else for_others))
    model.fit(X, Y, epochs=4, verbose=0, callbacks=[ks.callbacks.Pruning(0.5)])
    assert zeros(model) == [24, 12]
    assert type(model.optimizer).__name__ == "MultiOptimizer"


def test_learning_rate_schedule():
    rate = keras.optimizers.schedules.CosineDecay(0.01, 40)
    model = make(keras.optimizers.Adam(rate))
    model.fit(X, Y, epochs=4, verbose=0, callbacks=[ks.callbacks.Pruning(0.5)])
    assert zeros(model) == [24, 12]
    assert float(model.optimizer.learning_rate) < 0.01


def test_masked_weights_become_plus_zero_even_from_nan():
    model = make(ks.optimizers.SparseOptimizer("sgd"))
    optimizer, kernel = model.optimizer, model.layers[0].kernel
    optimizer.build(model.trainable_variables)
    optimizer.add_masks([kernel])
    value = np.full((8, 6), -1.0, "float32")
    value[0, 0] = np.nan
    kernel.assign(value)
    optimizer.mask_of(kernel).assign(np.zeros((8, 6), bool))
    optimizer.apply_masks()
    assert not np.signbit(kernel.numpy()).any()
    assert (kernel.numpy() == 0).all()


def test_update_masks_with_train_on_batch():
    model = make(ks.optimizers.SparseOptimizer(keras.optimizers.Adam(0.01)))
    schedule = ks.schedules.get("polynomial")
    for step in range(30):
        if step % 5 == 0:
            ks.update_masks(model, 0.8 * schedule(step / 20))
        model.train_on_batch(X, Y)
    assert zeros(model) == [round(0.8 * 48), round(0.8 * 24)]
    # `None` keeps what is there.
    ks.update_masks(model)
    model.train_on_batch(X, Y)
    assert zeros(model) == [38, 19]


def test_update_masks_takes_the_sparsity_of_a_pattern():
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    model.compile(ks.optimizers.SparseOptimizer("sgd"), "mse")
    assert ks.update_masks(model, 0.25, pattern="2:4").totals["zeros"] == 8
    assert ks.update_masks(model, pattern="2:4").totals["zeros"] == 16
    for arguments in ({"sparsity": 0.9}, {"sparsity": 0.3, "allocation": "erk"}, {"sparsity": {"kernel": 0.9}}):
        with pytest.raises(ValueError, match="leave the target out, or give this one or less.* Received: 0.[39]"):
            ks.update_masks(model, **arguments, pattern="2:4")


def test_update_masks_after_prune_keeps_the_zeros():
    model = make(ks.optimizers.SparseOptimizer("adam"))
    ks.prune(model, 0.5)
    ks.update_masks(model)
    before = model.layers[0].kernel.numpy() == 0
    for _ in range(5):
        model.train_on_batch(X, Y)
    np.testing.assert_array_equal(model.layers[0].kernel.numpy() == 0, before)


def no_gradients():
    if BACKEND != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()


def gradient_step(model, optimizer):
    """One step of a hand-written loop, in the backend's own way."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = keras.ops.mean((model(X) - Y) ** 2)
        optimizer.apply_gradients(
            zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables, strict=True)
        )
    elif BACKEND == "torch":
        model.zero_grad()
        loss = keras.ops.mean((model(X) - keras.ops.convert_to_tensor(Y)) ** 2)
        loss.backward()
        import torch

        with torch.no_grad():
            optimizer.apply([v.value.grad for v in model.trainable_variables], model.trainable_variables)
    else:
        import jax

        def loss(trainable):
            out, _ = model.stateless_call(trainable, [v.value for v in model.non_trainable_variables], X)
            return keras.ops.mean((out - Y) ** 2)

        trainable = [v.value for v in model.trainable_variables]
        new, state = optimizer.stateless_apply(
            [v.value for v in optimizer.variables], jax.grad(loss)(trainable), trainable
        )
        for variable, value in zip([*model.trainable_variables, *optimizer.variables], [*new, *state], strict=True):
            variable.assign(value)


def test_hand_written_loop():
    model = make()
    optimizer = ks.optimizers.SparseOptimizer(keras.optimizers.SGD(0.1))
    for step in range(8):
        if step % 2 == 0:
            ks.update_masks(model, step / 8, optimizer=optimizer)
        gradient_step(model, optimizer)
    assert zeros(model) == [36, 18]
    assert int(optimizer.iterations) == 8


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", *(["float64"] if BACKEND != "jax" else [])])
def test_zeros_in_a_step_are_plus_zero_whatever_was_there(dtype):
    """Pruned: 1, NaN, inf, -2; beside them NaN and -0.0 that live."""
    weight = keras.Variable(np.array([1, np.nan, np.inf, -2, np.nan, -0.0, 3]), dtype=dtype)
    mask = keras.Variable(np.array([0, 0, 0, 0, 1, 1, 1], bool), dtype="bool", trainable=False)
    mask_in_step([(weight, mask)])
    found = keras.ops.convert_to_numpy(keras.ops.cast(weight, "float32"))
    np.testing.assert_array_equal(found, [0, 0, 0, 0, np.nan, 0, 3])
    assert np.signbit(found[:6]).tolist()[:4] == [False] * 4 and np.signbit(found[5])


def test_gradients_that_are_handed_in_stay_as_they_are():
    model = make()
    optimizer = ks.optimizers.SparseOptimizer(keras.optimizers.SGD(0.1))
    ks.update_masks(model, 0.5, optimizer=optimizer)
    grads = [keras.ops.ones(v.shape) for v in model.trainable_variables]
    with no_gradients():
        optimizer.apply(grads, model.trainable_variables)
    assert all(keras.ops.convert_to_numpy(gradient).all() for gradient in grads)
    assert zeros(model) == [24, 12]


@pytest.mark.skipif(BACKEND != "torch", reason="`.grad`")
def test_gradients_of_torch_are_masked_in_place():
    model = make()
    optimizer = ks.optimizers.SparseOptimizer(keras.optimizers.SGD(0.1))
    ks.update_masks(model, 0.5, optimizer=optimizer)
    gradient_step(model, optimizer)
    for variable, mask in optimizer.masks:
        gradient = keras.ops.convert_to_numpy(variable.value.grad)
        assert not gradient[~keras.ops.convert_to_numpy(mask)].any() and gradient.any()


def test_hand_written_loop_in_mixed_precision():
    if BACKEND != "tensorflow":
        pytest.skip("loss scaling in a hand-written loop is shown for TensorFlow")
    model = make()
    optimizer = keras.optimizers.LossScaleOptimizer(ks.optimizers.SparseOptimizer("sgd"), initial_scale=1.0)
    optimizer.build(model.trainable_variables)
    ks.update_masks(model, 0.5, optimizer=optimizer)
    gradient_step(model, optimizer)
    assert zeros(model) == [24, 12]


@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.function")
def test_several_optimizers_each_wrapped():
    import tensorflow as tf

    first, second = make(), make()
    optimizers = [ks.optimizers.SparseOptimizer(keras.optimizers.SGD(0.1)) for _ in range(2)]
    for model, optimizer in zip((first, second), optimizers, strict=True):
        ks.update_masks(model, 0.5, optimizer=optimizer)

    @tf.function
    def step():
        for model, optimizer in zip((first, second), optimizers, strict=True):
            with tf.GradientTape() as tape:
                loss = keras.ops.mean((model(X) - Y) ** 2)
            optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    for _ in range(3):
        step()
    # A new mask of the same weights needs no new trace.
    ks.update_masks(first, 0.75, optimizer=optimizers[0])
    step()
    assert zeros(first) == [36, 18]
    assert zeros(second) == [24, 12]


def test_user_compiled_wrapper_stays_after_fit():
    model = make(ks.optimizers.SparseOptimizer("adam"))
    optimizer = model.optimizer
    for target in (0.5, 0.75):
        model.fit(X, Y, epochs=4, batch_size=8, verbose=0, callbacks=[ks.callbacks.Pruning(target)])
    assert model.optimizer is optimizer
    model.train_on_batch(X, Y)
    assert zeros(model) == [36, 18]
    assert type(ks.optimizers.unwrap(model)).__name__ == "Adam"


def test_wrap_and_unwrap():
    model = make()
    optimizer, kind = model.optimizer, type(model.optimizer)
    assert ks.optimizers.wrap(model) is ks.optimizers.wrap(model) is ks.optimizers.find(model) is optimizer
    assert "keras_sparse" in str(model.get_compile_config()["optimizer"])
    assert optimizer.__class__ is kind
    assert ks.optimizers.unwrap(model) is ks.optimizers.unwrap(model) is optimizer is model.optimizer
    assert ks.optimizers.find(model) is None
    assert type(optimizer) is kind
    assert "keras_sparse" not in str(model.get_compile_config()["optimizer"])
    assert "get_compile_config" not in vars(model)


def test_saved_with_a_directly_used_wrapper(tmp_path):
    model = make(ks.optimizers.SparseOptimizer("adam"))
    ks.update_masks(model, 0.5)
    model.train_on_batch(X, Y)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for a, b in zip(model.optimizer.variables, loaded.optimizer.variables, strict=True):
        np.testing.assert_array_equal(ks.selection.as_array(a), ks.selection.as_array(b))
    for m in (model, loaded):
        m.train_on_batch(X, Y)
    for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    assert zeros(loaded) == [24, 12]


def test_state_of_another_selection_is_refused(tmp_path):
    model = make(ks.optimizers.SparseOptimizer("adam"))
    ks.update_masks(model, 0.5)
    model.save_weights(tmp_path / "state.weights.h5")
    other = make(ks.optimizers.SparseOptimizer("adam"))
    ks.update_masks(other, 0.5, filters="a/")
    with pytest.raises(ValueError, match="another selection of weights"):
        other.load_weights(tmp_path / "state.weights.h5")


def test_errors():
    with pytest.raises(ValueError, match=r"LossScaleOptimizer\(SparseOptimizer\(inner\)\)"):
        ks.optimizers.SparseOptimizer(keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()))
    with pytest.raises(ValueError, match="wraps a plain optimizer"):
        ks.optimizers.SparseOptimizer(ks.optimizers.SparseOptimizer("adam"))
    with pytest.raises(ValueError, match="`update_masks` needs a `SparseOptimizer`"):
        ks.update_masks(make(), 0.5)
    with pytest.raises(ValueError, match="`update_masks` needs a `SparseOptimizer`"):
        ks.update_masks(make(), 0.5, optimizer=keras.optimizers.Adam())
    optimizer = ks.optimizers.SparseOptimizer("adam")
    with pytest.raises(ValueError, match="must already be built"):
        optimizer.apply([X])
    model = make()
    optimizer.build(model.trainable_variables)
    with pytest.raises(ValueError, match="built with can be masked"):
        optimizer.add_masks([make().layers[0].kernel])


@pytest.mark.skipif(BACKEND != "tensorflow", reason="IndexedSlices are TensorFlow's")
def test_sparse_gradients_of_embeddings():
    model = keras.Sequential([keras.Input((3,), dtype="int32"), keras.layers.Embedding(9, 4), keras.layers.Dense(2)])
    model.compile("adam", "mse")
    x = np.random.default_rng(0).integers(0, 9, (16, 3))
    model.fit(x, np.ones((16, 3, 2)), epochs=4, verbose=0, callbacks=[ks.callbacks.Pruning(0.5, filters=".")])
    assert [int((w.numpy() == 0).sum()) for w in model.trainable_variables] == [18, 4, 0]


def test_variables_without_a_gradient():
    class Unused(keras.layers.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=(4, 4), name="w")

        def call(self, x):
            return x

    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4), Unused()])
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=False)
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Gradients do not exist")
        if BACKEND == "jax":
            pytest.skip("JAX gives every weight a gradient, of zeros")
        with pytest.warns(UserWarning, match=r"No optimizer step changes \['sequential/unused/w'\]"):
            model.fit(X, Y, epochs=4, verbose=0, callbacks=[ks.callbacks.Pruning(0.5)])
        assert int((model.layers[1].w.numpy() == 0).sum()) == 0
        model.fit(X, Y, epochs=4, verbose=0, callbacks=[ks.callbacks.Pruning(0.5, filters="unused")])
    assert int((model.layers[1].w.numpy() == 0).sum()) == 8
