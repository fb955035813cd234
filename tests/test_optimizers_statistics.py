"""Gradient statistics inside the optimizer, against NumPy: a linear model, whose gradient has a closed form."""

import keras
import numpy as np
import pytest

import keras_sparse as ks

BACKEND = keras.backend.backend()
X = np.random.default_rng(0).normal(size=(64, 8)).astype("float32")
Y = np.random.default_rng(1).normal(size=(64, 4)).astype("float32")
BATCH = 8


def make(optimizer="sgd", **arguments):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4), keras.layers.Activation("linear")])
    model.compile(optimizer, "mse", **arguments)
    return model


class Record(keras.callbacks.Callback):
    """The weights that each step starts from, how many steps were made, and the statistic after each."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.weights, self.steps, self.found = [], [], []

    def on_train_batch_begin(self, batch, logs=None):
        self.weights.append([w.astype("float64") for w in self.model.get_weights()])

    def on_train_batch_end(self, batch, logs=None):
        sparse, kernel = ks.optimizers.find(self.model), self.model.layers[0].kernel
        self.steps.append(int(ks.selection.as_array(sparse.sparse_parts.statistics.count_of(self.kind))))
        self.found.append(ks.selection.as_array(sparse.sparse_parts.statistics.of(kernel, self.kind)))


def numpy_statistics(kind, record, accumulate=1):
    """The statistic after each step, from the closed form of the gradient: slow and obvious."""
    terms, found, cycle = [], [], np.zeros((8, 4))
    for number, (kernel, bias) in enumerate(record.weights):
        if record.steps[number] == (record.steps[number - 1] if number else 0):
            found.append(found[-1] if found else np.zeros((8, 4)))  # A skipped step.
            continue
        start = number * BATCH % len(X)
        x, y = X[start : start + BATCH].astype("float64"), Y[start : start + BATCH].astype("float64")
        gradient = 2 / y.size * x.T @ (x @ kernel + bias - y)
        terms.append(
            {
                "gradient": np.abs(gradient),
                "taylor": np.abs(kernel * gradient),
                "movement": -kernel * gradient,
                "last_gradient": gradient,
                "squared_gradient": gradient**2,
            }[kind]
        )
        if kind == "movement":
            found.append(sum(terms))
        elif kind == "last_gradient":
            cycle = terms[-1] + (cycle if (len(terms) - 1) % accumulate else 0)
            found.append(cycle)
        else:
            found.append(sum(terms) / len(terms))
    return found


def keep(kind):
    class Keep(ks.criteria.Criterion):
        statistic = kind

        def scores(self, weight, statistic):
            return np.abs(statistic)

    return Keep()


OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.1),
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: keras.optimizers.Adam(0.05),
    "clipped and decayed": lambda: keras.optimizers.AdamW(0.05, clipnorm=0.01, weight_decay=0.1),
    "scaled": lambda: keras.optimizers.SGD(0.1, loss_scale_factor=64.0),
    "averaged": lambda: keras.optimizers.SGD(0.1, use_ema=True),
    "accumulating": lambda: keras.optimizers.Adam(0.05, gradient_accumulation_steps=3),
    "accumulating and scaled": lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=2, loss_scale_factor=4.0),
}
ALL_KINDS = ["gradient", "last_gradient", "movement", "squared_gradient", "taylor"]


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.thorough(8)
def test_equal_numpy(kind, name):
    optimizer = OPTIMIZERS[name]()
    model, record = make(optimizer), Record(kind)
    pruning = ks.callbacks.Pruning(0.5, keep(kind))
    model.fit(X, Y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0, callbacks=[pruning, record])
    expected = numpy_statistics(kind, record, optimizer.gradient_accumulation_steps or 1)
    np.testing.assert_allclose(record.found, expected, rtol=2e-4, atol=1e-5)
    assert (model.layers[0].kernel.numpy() == 0).sum() == 16


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.thorough(3)
def test_equal_numpy_in_mixed_precision(kind, jit):
    if BACKEND == "torch" and jit:
        pytest.skip("Keras compiles torch models for minutes")
    keras.config.set_dtype_policy("mixed_float16")
    try:
        # The first steps overflow and are skipped.
        inner = keras.optimizers.Adam(0.05)
        model = make(keras.optimizers.LossScaleOptimizer(inner, initial_scale=2.0**20), jit_compile=jit)
    finally:
        keras.config.set_dtype_policy("float32")
    record = Record(kind)
    pruning = ks.callbacks.Pruning(0.5, keep(kind))
    model.fit(X, Y, batch_size=BATCH, epochs=3, shuffle=False, verbose=0, callbacks=[pruning, record])
    assert 0 < record.steps[-1] < len(record.steps)
    expected = numpy_statistics(kind, record)
    np.testing.assert_allclose(record.found, expected, rtol=0.02, atol=0.005)
    # A factor of the scale would be seen.
    assert np.abs(record.found[-1]).mean() == pytest.approx(np.abs(expected[-1]).mean(), rel=0.01)


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
@pytest.mark.thorough(2)
def test_equal_numpy_in_two_replicas(kind, policy, two_replicas):
    keras.config.set_dtype_policy(policy)
    try:
        with two_replicas.scope():
            optimizer = keras.optimizers.Adam(0.05)  # Keras cannot accumulate gradients in replicas that merge calls.
            if policy == "mixed_float16":
                optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=16.0)
            model = make(optimizer, jit_compile=False)
    finally:
        keras.config.set_dtype_policy("float32")
    record = Record(kind)
    pruning = ks.callbacks.Pruning(0.5, keep(kind))
    model.fit(X, Y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0, callbacks=[pruning, record])
    tolerance = {"rtol": 2e-4, "atol": 1e-5} if policy == "float32" else {"rtol": 0.02, "atol": 0.005}
    np.testing.assert_allclose(record.found, numpy_statistics(kind, record), **tolerance)


def test_old_gradients_are_forgotten():
    model = make(ks.optimizers.SparseOptimizer(keras.optimizers.SGD(0.0)))
    optimizer, kernel = model.optimizer, model.layers[0].kernel
    optimizer.build(model.trainable_variables)
    optimizer.sparse_parts.statistics.add("gradient", [kernel])
    window, mean = ks.optimizers.statistics.WINDOW, 0.0
    gradients = np.random.default_rng(0).random(window + 20).astype("float32")
    for number, gradient in enumerate(gradients, start=1):
        optimizer.apply([keras.ops.full((8, 4), gradient), keras.ops.zeros((4,))])
        mean += (gradient - mean) / min(number, window)
    found = ks.selection.as_array(optimizer.sparse_parts.statistics.of(kernel, "gradient"))
    np.testing.assert_allclose(found, np.full((8, 4), mean), rtol=1e-5)
    np.testing.assert_allclose(mean, gradients.mean(), rtol=0.05)


def test_a_weight_without_a_gradient_and_one_without_a_statistic():
    model = make(ks.optimizers.SparseOptimizer("sgd"))
    optimizer = model.optimizer
    kernel, bias = model.trainable_variables
    optimizer.build(model.trainable_variables)
    for _ in range(2):
        optimizer.sparse_parts.statistics.add("movement", [kernel])
    assert optimizer.sparse_parts.statistics.of(bias, "movement") is None
    assert optimizer.sparse_parts.statistics.of(kernel, "taylor") is None
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Gradients do not exist")
        optimizer.apply([None, keras.ops.ones((4,))])
    assert (ks.selection.as_array(optimizer.sparse_parts.statistics.of(kernel, "movement")) == 0).all()


@pytest.mark.skipif(BACKEND != "tensorflow", reason="IndexedSlices are TensorFlow's")
@pytest.mark.parametrize("jit", [True, False])
def test_sparse_gradients_of_embeddings(jit):
    embedding = keras.layers.Embedding(5, 2, embeddings_initializer="ones")
    model = keras.Sequential([keras.Input((3,), dtype="int32"), embedding])
    model.compile(ks.optimizers.SparseOptimizer(keras.optimizers.SGD(0.0)), "mse", jit_compile=jit)
    model.optimizer.build(model.trainable_variables)
    model.optimizer.sparse_parts.statistics.add("taylor", model.trainable_variables)
    # d/dw of the mean of w^2 over 6 numbers: 2 w / 6 for each time that a row is used.
    model.train_on_batch(np.array([[1, 1, 4]]), np.zeros((1, 3, 2)))
    found = ks.selection.as_array(model.optimizer.sparse_parts.statistics.of(embedding.embeddings, "taylor"))
    np.testing.assert_allclose(found, np.array([0, 2, 0, 0, 1])[:, None] / 3 * np.ones((5, 2)), rtol=1e-6)


def test_saved_and_loaded_whatever_came_first(tmp_path):
    model = make(ks.optimizers.SparseOptimizer("adam"))
    optimizer = model.optimizer
    optimizer.build(model.trainable_variables)
    kernel, bias = model.trainable_variables
    optimizer.sparse_parts.statistics.add("movement", [kernel])
    optimizer.add_masks([kernel])
    optimizer.sparse_parts.statistics.add("gradient", [bias, kernel])
    model.train_on_batch(X, Y)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.get_config() == optimizer.get_config()
    for m in (model, loaded):
        m.train_on_batch(X, Y)
    for a, b in zip(model.trainable_variables, loaded.trainable_variables, strict=True):
        for kind in ("movement", "gradient"):
            states = [m.sparse_parts.statistics.of(v, kind) for m, v in ((optimizer, a), (loaded.optimizer, b))]
            if states[0] is not None:
                np.testing.assert_allclose(*map(ks.selection.as_array, states), rtol=1e-6)
    assert int(loaded.optimizer.sparse_parts.statistics.count_of("gradient").numpy()) == 2


def test_memory_only_while_a_callback_needs_it():
    model = make(ks.optimizers.SparseOptimizer("sgd"))
    parts, count = model.optimizer.sparse_parts, []

    class Count(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            count.append(len(parts.variables))

    for criterion in ("taylor", "magnitude"):
        model.fit(X, Y, epochs=2, verbose=0, callbacks=[ks.callbacks.Pruning(0.5, criterion), Count()])
        count.append(sum(len(part.variables) for part in parts))
    # A mask; in a fit the four of its clock; the statistic with its count and step.
    assert count == [8, 8, 1, 5, 5, 1]


def test_a_statistic_of_ones_own():
    class SignedMean(ks.criteria.Statistic):
        def update(self, value, weight, gradient, count):
            return value + (gradient - value) / count

    class Signed(ks.criteria.Criterion):
        statistic = SignedMean()

        def scores(self, weight, statistic):
            found.append(statistic)
            return np.abs(statistic)

    found = []
    model = make(keras.optimizers.SGD(0.0))
    model.fit(X, Y, batch_size=BATCH, epochs=2, verbose=0, callbacks=[ks.callbacks.Pruning(0.5, Signed(), end=2)])
    kernel, bias = (w.astype("float64") for w in make().get_weights())
    gradient = 2 / Y.size * X.T @ (X @ kernel + bias - Y)
    # The mean over the batches of an epoch is the gradient of the whole.
    assert (model.layers[0].kernel.numpy() == 0).sum() == 16
    assert any(np.allclose(value, gradient, atol=1e-5) for value in found) or len(X) // BATCH != 2


def test_errors():
    model = make(ks.optimizers.SparseOptimizer("sgd"))
    model.optimizer.build(model.trainable_variables)
    with pytest.raises(ValueError, match="Unknown statistic: expected one of"):
        model.optimizer.sparse_parts.statistics.add("hessian", [model.layers[0].kernel])
    with pytest.raises(ValueError, match="built with can be masked"):
        model.optimizer.sparse_parts.statistics.add("taylor", [make().layers[0].kernel])
    for kind in ("taylor", "movement"):
        with pytest.raises(ValueError, match="no training step has been taken"):
            make().fit(X, Y, verbose=0, callbacks=[ks.callbacks.Pruning(0.5, kind, schedule="one_shot")])
        with pytest.raises(ValueError, match="no training step has been taken"):
            ks.update_masks(model, 0.5, kind)
    model.train_on_batch(X, Y)
    assert ks.update_masks(model, 0.5, "movement").totals["zeros"] == 16
