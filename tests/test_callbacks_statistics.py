"""Statistics of batch normalization after pruning: those of the pruned network, in a `fit` of a few steps as well."""

import keras
import numpy as np
import pytest

import keras_sparse as ks

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 10)).astype("float32")
Y = RNG.normal(size=(64, 6)).astype("float32")
BATCHES = 16  # in an epoch


def make(train_step=None, rate=0.0, **arguments):
    """A network with another one's statistics. At a learning rate of 0 only pruning changes it."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((10,))
    x = keras.layers.BatchNormalization(name="normalization")(keras.layers.Dense(16, "relu", name="hidden")(inputs))
    model_class = keras.Model if train_step is None else type("Own", (keras.Model,), {"train_step": train_step})
    model = model_class(inputs, keras.layers.Dense(6)(x))
    model.get_layer("normalization").moving_mean.assign(np.arange(16.0))
    eagerly = keras.backend.backend() != "jax" and "steps_per_execution" not in arguments
    model.compile(keras.optimizers.SGD(rate), "mse", run_eagerly=eagerly, **arguments)
    return model


def fit(model, *callbacks, epochs=3, **arguments):
    return model.fit(X, Y, 4, epochs=epochs, shuffle=False, verbose=0, callbacks=list(callbacks), **arguments).history


def expected(model, batches):
    """The mean and variance over the last `batches` batches, as a moving average without a start has them."""
    kernel, bias = model.get_layer("hidden").get_weights()
    hidden = np.maximum(X @ kernel + bias, 0).reshape(BATCHES, 4, 16)
    hidden = np.concatenate([hidden] * 3)[-batches:]
    weights = 0.99 ** np.arange(batches - 1, -1, -1)
    return [weights @ value / weights.sum() for value in (hidden.mean(axis=1), hidden.var(axis=1))]


def statistics(model):
    layer = model.get_layer("normalization")
    return [np.array(ks.graph.as_array(v)) for v in (layer.moving_mean, layer.moving_variance)]


@pytest.mark.parametrize(
    ("end", "batches"),
    [
        (4, 44),  # in the first epoch: all batches since then count
        (BATCHES, 32),  # with its last step: those of the next two
        (2 * BATCHES + 4, 12),  # in the last
    ],
)
@pytest.mark.parametrize("validated", [True, False])
def test_statistics_are_those_since_the_target_was_met(end, batches, validated):
    model = make()
    pruning = ks.callbacks.Pruning(0.5, schedule="one_shot", begin=end, end=end + 1, allocation="global")
    history = fit(model, pruning, **({"validation_data": (X, Y)} if validated else {}))
    for found, value in zip(statistics(model), expected(model, batches), strict=True):
        np.testing.assert_allclose(found, value, rtol=2e-3, atol=2e-4)
    if validated:
        assert history["val_loss"][-1] == pytest.approx(model.evaluate(X, Y, verbose=0), rel=1e-4)


def test_on_the_way_to_the_target_they_are_those_of_the_epoch():
    model = make(rate=1e-3)
    losses = fit(model, ks.callbacks.Pruning(0.8, end=1.0), validation_data=(X, Y))["val_loss"]
    plain = make(rate=1e-3)
    before = fit(plain, epochs=1, validation_data=(X, Y))["val_loss"]
    assert max(losses) < before[0] / 2  # of another network's statistics


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="Keras takes one step at a time there")
@pytest.mark.lengthy(0)
@pytest.mark.parametrize("steps", [4, 5])  # the latter does not divide the epoch
def test_several_steps_in_one_execution(steps):
    model = make(steps_per_execution=steps)
    fit(model, ks.callbacks.Pruning(0.5, schedule="one_shot", begin=4, end=5, allocation="global"))
    for found, value in zip(statistics(model), expected(model, 3 * BATCHES - steps), strict=True):
        np.testing.assert_allclose(found, value, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("kind", ["accumulated", "skipped"])
def test_batches_without_a_step_count(kind):
    model, y, optimizer = make(), Y.copy(), keras.optimizers.SGD(0.0)
    if kind == "accumulated":  # the last of 16 batches is the first of a step
        optimizer, start = keras.optimizers.SGD(0.0, gradient_accumulation_steps=5), 5
    else:  # as where gradients of float16 overflow
        optimizer, start = keras.optimizers.LossScaleOptimizer(optimizer), 1
        y[8:48] = np.nan
    model.compile(optimizer, "mse", run_eagerly=keras.backend.backend() != "jax")
    pruning = ks.callbacks.Pruning(0.5, schedule="one_shot", begin=1, end=2, allocation="global")
    model.fit(X, y, 4, epochs=1, shuffle=False, verbose=0, callbacks=[pruning])
    steps = int(getattr(optimizer, "inner_optimizer", optimizer).iterations)
    assert steps == (3 if kind == "accumulated" else 6)
    for found, value in zip(statistics(model), expected(model, BATCHES - start), strict=True):
        np.testing.assert_allclose(found, value, rtol=2e-3, atol=2e-4)


@pytest.mark.lengthy(0)
def test_a_resumed_fit_ends_with_the_same(tmp_path):
    class Break(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    def run(*callbacks):
        model = make(rate=1e-2)
        pruning = ks.callbacks.Pruning(0.5, begin=4, end=BATCHES - 3)
        fit(model, keras.callbacks.BackupAndRestore(tmp_path / "backup"), pruning, *callbacks)
        return model

    whole = run()
    with pytest.raises(KeyboardInterrupt):
        run(Break())
    for value, other in zip(run().get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_array_equal(value, other)


def test_where_nothing_is_pruned_and_in_steps_of_ones_own_they_are_what_keras_makes_of_them():
    plain = make()
    fit(plain)
    own = make(train_step=lambda self, *args, **kwargs: keras.Model.train_step(self, *args, **kwargs))
    for model, target in ((make(), 0.0), (own, 0.5)):
        fit(model, ks.callbacks.Pruning(target, filters="dense"))  # behind the normalization
        for value, other in zip(statistics(model), statistics(plain), strict=True):
            np.testing.assert_allclose(value, other, rtol=1e-5)


def test_in_a_loop_of_ones_own_they_are_what_it_makes_of_them():
    found = []
    for own in (False, True):
        model = make()
        pruning = [ks.callbacks.Pruning(0.5, begin=1, end=4, filters="dense")] if own else []
        callbacks = keras.callbacks.CallbackList(pruning, model=model, epochs=1, steps=BATCHES)
        callbacks.on_train_begin()
        callbacks.on_epoch_begin(0)
        for batch in range(BATCHES):
            callbacks.on_train_batch_begin(batch)
            for _ in range(2):  # twice each
                model.train_on_batch(X[4 * batch : 4 * batch + 4], Y[4 * batch : 4 * batch + 4])
            callbacks.on_train_batch_end(batch)
        callbacks.on_epoch_end(0, {})
        callbacks.on_train_end()
        found.append(statistics(model))
    for value, other in zip(*found, strict=True):
        np.testing.assert_allclose(value, other, rtol=1e-5)
