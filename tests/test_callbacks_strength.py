"""The schedule of a strength."""

import keras
import numpy as np
import pytest

import keras_sparse as ks

X, Y = np.zeros((8, 4), "float32"), np.zeros((8, 3), "float32")


def make(regularizer=None, **compile_args):
    dense = keras.layers.Dense(3, kernel_initializer="ones", kernel_regularizer=regularizer)
    model = keras.Sequential([keras.Input((4,)), dense])
    model.compile(keras.optimizers.SGD(0.0), "mse", **compile_args)
    return model


def fit(model, epochs=4, **kwargs):
    callbacks = kwargs.pop("callbacks", [ks.callbacks.StrengthSchedule()])
    return model.fit(X, Y, epochs=epochs, verbose=0, callbacks=callbacks, **kwargs).history


@pytest.mark.parametrize("jit", [False, "auto"])
def test_the_loss_follows(jit):
    model = make(ks.regularizers.L1(0.5), jit_compile=jit)
    model.fit(X, Y, verbose=0)  # A function traced with the plain number must not stay.
    history = fit(model, validation_data=(X, Y))
    assert history["strength"] == [0.0, 0.25, 0.5, 0.5]
    np.testing.assert_allclose(history["loss"], [0, 3, 6, 6], rtol=1e-6)
    np.testing.assert_allclose(history["val_loss"], [0, 3, 6, 6], rtol=1e-6)
    assert model.layers[0].get_config()["kernel_regularizer"]["config"] == {"l1": 0.5}


def test_resumed_and_ended_early():
    model = make(ks.regularizers.GroupLasso(0.5))
    assert fit(model, initial_epoch=1)["strength"] == [0.0, 0.25, 0.5]
    assert fit(model, callbacks=[ks.callbacks.StrengthSchedule(begin=1, end=9)])["strength"][0] == 0
    assert float(keras.ops.convert_to_numpy(model.losses[0])) == pytest.approx(0.5 * 3 * 2 * 2)


@pytest.mark.lengthy(0)
def test_replicas(two_replicas):
    with two_replicas.scope():
        model = make(ks.regularizers.L1(0.5))
    np.testing.assert_allclose(fit(model)["loss"], [0, 3, 6, 6], rtol=1e-6)


def test_mixed_precision():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        np.testing.assert_allclose(fit(make(ks.regularizers.GroupLasso(0.5)))["loss"], [0, 3, 6, 6], rtol=1e-6)
    finally:
        keras.config.set_dtype_policy("float32")


def test_errors():
    with pytest.raises(ValueError, match="`end` must be after `begin`"):
        ks.callbacks.StrengthSchedule(begin=0.5, end=0.5)
    with pytest.raises(TypeError, match="`begin` is a float in"):
        ks.callbacks.StrengthSchedule(begin="0")
    with pytest.raises(ValueError, match="no strength to move"):
        fit(make())
    with pytest.raises(ValueError, match="0 in every epoch"):
        fit(make(ks.regularizers.L1(0.5)), epochs=1)
