"""While a callback prunes, `model.optimizer` is what it is in plain Keras: its attributes, its class, its overrides."""

import inspect
import re

import keras
import numpy as np
import pytest

import keras_sparse as ks

BACKEND = keras.backend.backend()
X = np.random.default_rng(0).normal(size=(16, 8)).astype("float32")
Y = np.random.default_rng(1).normal(size=(16, 4)).astype("float32")
# Compiling takes longer than a few steps.
EAGER = {"run_eagerly": True} if BACKEND == "tensorflow" else {}

NAMES = sorted(
    name
    for name, kind in vars(keras.optimizers).items()
    if isinstance(kind, type) and issubclass(kind, keras.optimizers.Optimizer)
    # The first is abstract; `OptimizerMap` is the state of a `MultiOptimizer`.
    if name not in ("Optimizer", "OptimizerMap", "LossScaleOptimizer", "MultiOptimizer")
)


def make(name):
    if name == "LossScaleOptimizer":
        inner = keras.optimizers.Adam(0.01, name="inner")
        return keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0, name="mine")
    if name == "MultiOptimizer":
        sgd, adam = keras.optimizers.SGD(0.01, name="sgd"), keras.optimizers.Adam(0.01, name="adam")

        def one_of_two(variable):
            return sgd if "kernel" in variable.path else adam

        return keras.optimizers.MultiOptimizer(one_of_two, name="mine")
    return getattr(keras.optimizers, name)(learning_rate=0.01, name="mine")


def dense_model(optimizer, **arguments):
    keras.utils.set_random_seed(0)
    parts = [keras.layers.Dense(6, "relu", name="a"), keras.layers.Dense(4, name="b")]
    model = keras.Sequential([keras.Input((8,)), *parts], name="net")
    model.compile(optimizer, "mse", **(EAGER | arguments))
    return model


def fit(model, *callbacks, epochs=2, batch_size=8):
    model.fit(X, Y, epochs=epochs, batch_size=batch_size, shuffle=False, verbose=0, callbacks=list(callbacks))
    return model


def public(optimizer):
    return [name for name in dir(optimizer) if not name.startswith("_")]


def plain_data(value):
    """What can be compared of a value: numbers as they are, state by its place and shape."""
    if isinstance(value, keras.Variable):
        number = float(ks.selection.as_array(value)) if not value.shape else None
        # Nadam has one without a name; Keras numbers those.
        name = re.sub(r"^variable(_\d+)?$", "", value.name)
        return "variable", name, tuple(value.shape), str(value.dtype), number
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return {key: plain_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_data(item) for item in value]
    if inspect.ismethod(value) or inspect.isfunction(value):
        return "method", value.__name__
    if hasattr(value, "shape"):
        return "tensor", tuple(value.shape), float(ks.selection.as_array(value)) if not value.shape else None
    return value.__class__.__name__


class Look(keras.callbacks.Callback):
    """Reads all that is public at the start of the second epoch."""

    def on_epoch_begin(self, epoch, logs=None):
        if not epoch:
            return
        optimizer = self.model.optimizer
        self.optimizer = optimizer
        self.seen = {}
        for name in public(optimizer):
            try:
                self.seen[name] = plain_data(getattr(optimizer, name))
            except Exception as error:  # An attribute that raises in plain Keras must raise the same.
                self.seen[name] = type(error).__name__, str(error)
        self.config = optimizer.get_config()
        self.serialized = keras.saving.serialize_keras_object(optimizer)
        self.kind = optimizer.__class__
        self.instance = isinstance(optimizer, self.kind)


OURS = {*public(ks.optimizers.SparseOptimizer("sgd")), "sparse_state", "plain_class"} - set(
    public(keras.optimizers.SGD())
)


@pytest.mark.parametrize("name", [*NAMES, "LossScaleOptimizer", "MultiOptimizer"], ids=str)
def test_every_public_attribute_is_what_plain_keras_shows(name):
    plain, pruned, optimizer = Look(), Look(), make(name)
    fit(dense_model(make(name)), plain, batch_size=16)
    model = fit(dense_model(optimizer), pruned, ks.callbacks.Pruning(0.5), batch_size=16)
    assert pruned.optimizer is model.optimizer is optimizer
    assert pruned.kind is plain.kind is type(make(name)) and pruned.instance
    more = set(pruned.seen) - set(plain.seen)
    assert more <= OURS
    if BACKEND == "jax":  # The state that a step is handed: ours comes last.
        assert pruned.seen["variables"][: len(plain.seen["variables"])] == plain.seen["variables"]
        plain.seen["variables"] = pruned.seen["variables"]
    assert {key: pruned.seen[key] for key in plain.seen} == plain.seen
    assert str(pruned.config) == str(plain.config) or name == "MultiOptimizer"
    assert str(pruned.serialized) == str(plain.serialized) or name == "MultiOptimizer"
    assert public(optimizer) == sorted(plain.seen)
    assert type(optimizer) is type(make(name))


# Averages are made when an optimizer is built, and `built` says that it is.
NOT_TO_BE_SET = {"built", "use_ema"}


@pytest.mark.parametrize("name", [*NAMES, "LossScaleOptimizer", "MultiOptimizer"])
@pytest.mark.parametrize("first", [False, True], ids=["after ours", "before ours"])
def test_what_a_callback_sets_stays_on_the_optimizer(name, first):
    expected = {}

    class Set(keras.callbacks.Callback):
        def on_train_end(self, logs=None):
            optimizer = self.model.optimizer
            for key in set(public(make(name))) - NOT_TO_BE_SET:
                try:
                    value = getattr(optimizer, key)
                    if isinstance(value, bool) or value is None:
                        setattr(optimizer, key, not value)
                    elif isinstance(value, (int, float)):
                        setattr(optimizer, key, value / 2)
                    elif key == "learning_rate":
                        optimizer.learning_rate = 0.125
                    else:
                        continue
                    expected[key] = plain_data(getattr(optimizer, key))
                except (AttributeError, NotImplementedError):  # A property without a setter.
                    continue

    optimizer = make(name)
    ours = ks.callbacks.Pruning(0.5)
    fit(dense_model(optimizer), *((Set(), ours) if first else (ours, Set())), epochs=1, batch_size=16)
    assert len(expected) >= 3
    assert {key: plain_data(getattr(optimizer, key)) for key in expected} == expected
    assert {key for key in expected if key in vars(optimizer)} >= {"clipnorm"} or name == "LossScaleOptimizer"


def test_a_learning_rate_that_is_set_in_a_fit_is_that_of_the_next_step():
    def biases(*ours):
        model = dense_model(keras.optimizers.SGD(0.1))

        class Stop(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None):
                self.model.optimizer.learning_rate = 0.1 if epoch == 0 else 0.0
                if epoch == 1:
                    self.before = self.model.get_weights()[3]

        stop = Stop()
        fit(model, stop, *ours, epochs=3)
        return stop.before, model.get_weights()[3], float(model.optimizer.learning_rate)

    for ours in ([], [ks.callbacks.Pruning(0.5)]):
        before, after, rate = biases(*ours)
        np.testing.assert_array_equal(before, after)
        assert before.any() and rate == 0


# What a subclass has of its own


class Mine(keras.optimizers.SGD):
    """Counts calls in Python, of traces where steps are compiled, and keeps something of its own."""

    def __init__(self, learning_rate=0.1, factor=0.5, **arguments):
        super().__init__(learning_rate, **arguments)
        self.factor, self.calls = factor, []

    @property
    def doubled(self):
        return 2 * self.factor

    def build(self, variables):
        self.calls.append("build")
        super().build(variables)

    def apply_gradients(self, grads_and_vars):
        self.calls.append("apply_gradients")
        return super().apply_gradients([(gradient * self.factor, v) for gradient, v in grads_and_vars])

    def apply(self, grads, trainable_variables=None):
        self.calls.append("apply")
        return super().apply([gradient * self.factor for gradient in grads], trainable_variables)

    def update_step(self, gradient, variable, learning_rate):
        self.calls.append("update_step")
        super().update_step(gradient * self.factor, variable, learning_rate)

    def get_config(self):
        return super().get_config() | {"factor": self.factor}


def overriding(*names):
    members = {name: vars(Mine)[name] for name in ("__init__", "doubled", "get_config", *names)}
    # `super()` of these functions is that of `Mine`.
    return Mine if set(names) >= {"build", "apply_gradients", "apply", "update_step"} else _without(members, names)


def _without(members, names):
    absent = {"build", "apply_gradients", "apply", "update_step"} - set(names)
    return type("Mine", (Mine,), {name: getattr(keras.optimizers.SGD, name) for name in absent})


@pytest.mark.parametrize("arguments", [{}, {"gradient_accumulation_steps": 2}, {"use_ema": True}], ids=str)
@pytest.mark.parametrize(
    "names",
    [["apply_gradients"], ["apply"], ["update_step"], ["build"], ["build", "apply_gradients", "apply", "update_step"]],
    ids="+".join,
)
def test_what_a_subclass_overrides_is_called_as_ever(names, arguments):
    if arguments and len(names) < 4:
        pytest.skip("all at once is enough")
    kind, found = overriding(*names), []
    for ours in ([], [ks.callbacks.Pruning(0.0)]):
        optimizer = kind(0.1, **arguments)
        seen = []

        class See(keras.callbacks.Callback):
            def on_train_begin(self, logs=None, seen=seen):
                optimizer = self.model.optimizer
                seen.extend([optimizer.factor, optimizer.doubled, isinstance(optimizer, Mine), optimizer.__class__])
                seen.append(optimizer.get_config()["factor"])

        model = fit(dense_model(optimizer), See(), *ours)
        assert set(names) - {"apply_gradients"} <= set(optimizer.calls)
        assert ("apply_gradients" in optimizer.calls) == ("apply_gradients" in names and BACKEND == "tensorflow")
        found.append((model.get_weights(), seen, set(optimizer.calls)))
    (plain, *rest), (pruned, *other) = found
    assert rest == other
    for a, b in zip(plain, pruned, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("names", [["apply_gradients"], ["apply"], ["update_step"]], ids="+".join)
def test_zeros_hold_under_overrides(names):
    model = fit(dense_model(overriding(*names)(0.1, momentum=0.9)), ks.callbacks.Pruning(0.5), epochs=4)
    assert [int((layer.kernel.numpy() == 0).sum()) for layer in model.layers] == [24, 12]


# The compiled step of TensorFlow

tensorflow_only = pytest.mark.skipif(BACKEND != "tensorflow", reason="the compiled step is TensorFlow's")
LARGE_X = np.random.default_rng(2).normal(size=(24, 300)).astype("float32")
LARGE_Y = np.random.default_rng(3).normal(size=(24, 2)).astype("float32")


class Steps(keras.callbacks.Callback):
    """Notes which steps were compiled, and whether masked weights are zero after each."""

    def __init__(self):
        super().__init__()
        self.compiled, self.alive, self.masked = [], 0, 0

    def on_train_batch_end(self, batch, logs=None):
        sparse = ks.optimizers.find(self.model)
        self.compiled = list(sparse.sparse_parts.compiled.values())
        for variable, mask in sparse.masks:
            mask = ks.selection.as_array(mask)
            self.alive += np.count_nonzero(ks.selection.as_array(variable)[~mask])
            self.masked += np.count_nonzero(~mask)


def large_fit(optimizer, criterion="magnitude", **arguments):
    keras.utils.set_random_seed(0)
    hidden = keras.layers.Dense(512, "relu")
    model = keras.Sequential([keras.Input((300,)), hidden, keras.layers.Dense(2)])
    model.compile(optimizer, "mse", **arguments)
    steps = Steps()
    pruning = ks.callbacks.Pruning(0.5, criterion, schedule="one_shot", begin=1)
    model.fit(LARGE_X, LARGE_Y, batch_size=8, epochs=2, shuffle=False, verbose=0, callbacks=[pruning, steps])
    return model, steps


@tensorflow_only
@pytest.mark.parametrize("name", [*NAMES, "LossScaleOptimizer", "MultiOptimizer"])
@pytest.mark.thorough(3)
def test_the_compiled_step_is_the_plain_one(name):
    compiled, steps = large_fit(make(name), jit_compile=False)
    eager, plain_steps = large_fit(make(name), run_eagerly=True)
    assert steps.compiled and all(steps.compiled)
    assert not plain_steps.compiled
    assert steps.masked == plain_steps.masked and not steps.alive and not plain_steps.alive
    for a, b in zip(compiled.get_weights(), eager.get_weights(), strict=True):
        np.testing.assert_array_equal(a == 0, b == 0)
        # Rounding differs from CPU to CPU, and Adam-like steps enlarge it; a step left out would be 1e-2.
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


class Refused(keras.optimizers.SGD):
    def apply(self, grads, trainable_variables=None):
        import tensorflow as tf

        halved = [tf.ensure_shape(tf.py_function(lambda g: g / 2, [g], g.dtype), g.shape) for g in grads]
        return super().apply(halved, trainable_variables)


@tensorflow_only
def test_what_xla_refuses_trains_on_with_plain_operations():
    refused, steps = large_fit(Refused(0.1), jit_compile=False)
    expected, _ = large_fit(keras.optimizers.SGD(0.05), run_eagerly=True)
    assert steps.compiled == [None]
    assert steps.masked and not steps.alive
    for a, b in zip(refused.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(a == 0, b == 0)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@tensorflow_only
def test_an_optimizer_of_ones_own_is_compiled_where_xla_takes_it():
    mine, steps = large_fit(overriding("apply", "update_step")(0.4), jit_compile=False)
    expected, _ = large_fit(keras.optimizers.SGD(0.1), run_eagerly=True)
    assert steps.compiled and all(steps.compiled)
    for a, b in zip(mine.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(a == 0, b == 0)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


class RefusedMovement(ks.criteria.Statistic):
    def update(self, value, weight, gradient, count):
        import tensorflow as tf

        product = tf.py_function(lambda w, g: w * g, [weight, gradient], value.dtype)
        return value - tf.ensure_shape(product, value.shape)


class RefusedCriterion(ks.criteria.Movement):
    statistic = RefusedMovement()


@tensorflow_only
@pytest.mark.parametrize("accumulate", [None, 2])
def test_statistics_are_compiled_by_themselves_where_xla_takes_them(accumulate):
    arguments = {"gradient_accumulation_steps": accumulate}
    compiled, steps = large_fit(keras.optimizers.SGD(0.1, **arguments), "movement", jit_compile=False)
    refused, plain_steps = large_fit(keras.optimizers.SGD(0.1, **arguments), RefusedCriterion(), jit_compile=False)
    assert len(steps.compiled) == 2 and all(steps.compiled)
    assert len(plain_steps.compiled) == 2 and plain_steps.compiled.count(None) == 1
    assert steps.masked == plain_steps.masked > 0 and not steps.alive and not plain_steps.alive
    for a, b in zip(compiled.get_weights(), refused.get_weights(), strict=True):
        np.testing.assert_array_equal(a == 0, b == 0)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
