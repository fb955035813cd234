"""Callbacks in fits on every kind of data, and of models that `fit` builds."""

import keras
import numpy as np
import pytest
from callback_models import TENSORFLOW, X, Y, ZerosAfterEachStep, dense_model, fit, zeros

import keras_sparse as ks

# Input pipelines and epochs


# What Keras says about every generator and dataset of unknown length.
KERAS_SAYS = [
    pytest.mark.filterwarnings("ignore:Your input ran out of data"),
    pytest.mark.filterwarnings("ignore:`shuffle=True` was passed, but will be ignored"),
]


def with_keras_warnings(test):
    for mark in KERAS_SAYS:
        test = mark(test)
    return test


def batches(n=6):
    for start in range(0, 16 * n, 16):
        yield X[start : start + 16], Y[start : start + 16]


class Sequence(keras.utils.PyDataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return X[16 * index : 16 * index + 16], Y[16 * index : 16 * index + 16]


def endless():
    while True:
        yield from batches()


@with_keras_warnings
def test_generator_of_unknown_length():
    tf = pytest.importorskip("tensorflow")
    data = tf.data.Dataset.from_generator(
        batches, output_signature=(tf.TensorSpec((None, 12), tf.float32), tf.TensorSpec((None,), tf.int64))
    )
    model, record = dense_model(), ZerosAfterEachStep()
    model.fit(data, epochs=4, verbose=0, callbacks=[ks.callbacks.Pruning(0.9, frequency=1), record])
    assert zeros(model) == [108, 27]
    first = [counts[0] for counts in record.counts]
    # Fractions count from the second epoch on, when the length of an epoch is known: 18 of 24 steps to the end.
    assert first[:6] == [0] * 6
    assert first[11] < 108 and first[17] == 108


@with_keras_warnings
def test_one_epoch_of_unknown_length_prunes_at_its_end_and_warns():
    tf = pytest.importorskip("tensorflow")
    data = tf.data.Dataset.from_generator(
        batches, output_signature=(tf.TensorSpec((None, 12), tf.float32), tf.TensorSpec((None,), tf.int64))
    )
    model = dense_model()
    with pytest.warns(UserWarning, match="ended before the schedule did"):
        model.fit(data, epochs=1, verbose=0, callbacks=[ks.callbacks.Pruning(0.9)])
    assert zeros(model) == [108, 27]


@with_keras_warnings
@pytest.mark.parametrize("kind", ["tf.data", "generator", "sequence"])
def test_input_pipelines(kind):
    arguments = {}
    if kind == "tf.data":
        tf = pytest.importorskip("tensorflow")
        data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(16)
    elif kind == "generator":
        data, arguments = endless(), {"steps_per_epoch": 6}
    else:
        data = Sequence()
    model, record = dense_model(), ZerosAfterEachStep()
    model.fit(data, epochs=3, verbose=0, callbacks=[ks.callbacks.Pruning(0.9, begin=2, end=12), record], **arguments)
    assert [counts[0] for counts in record.counts][11:] == [108] * 7


def test_initial_epoch_shortens_the_fit():
    model, record = dense_model(), ZerosAfterEachStep()
    fit(model, ks.callbacks.Pruning(0.9, schedule="linear", end=0.5, frequency=1), record, epochs=5, initial_epoch=3)
    assert [counts[0] == 108 for counts in record.counts] == [False] * 5 + [True] * 7


def test_accumulation_counts_optimizer_steps():
    model = dense_model(optimizer=keras.optimizers.SGD(0.1, gradient_accumulation_steps=3))
    record = ZerosAfterEachStep()
    fit(model, ks.callbacks.Pruning(0.9, begin=1, end=4, frequency=1), record)
    # 18 batches are 6 steps; the fourth ends with batch 12.
    assert [counts[0] == 108 for counts in record.counts] == [False] * 11 + [True] * 7


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.first, self.second = keras.layers.Dense(10, activation="relu", name="a"), keras.layers.Dense(3, name="b")

    def call(self, x):
        return self.second(self.first(x))


class OwnStep(Subclassed):
    def train_step(self, data):
        return super().train_step((data[0][:, :8], data[1]))


UNBUILT = {
    "pruning": lambda: [ks.callbacks.Pruning(0.9, schedule="linear", end=0.5)],
    "taylor": lambda: [ks.callbacks.Pruning(0.9, criterion="taylor")],
    "rigl": lambda: [ks.callbacks.DynamicSparseTraining(0.9, "uniform", frequency=3)],
    "lottery": lambda: [ks.callbacks.LotteryTicket(2, 0.9, allocation="uniform")],
    "proximal": lambda: [ks.callbacks.ProximalL1(target_sparsity=0.9)],
    "two": lambda: [
        ks.callbacks.Pruning(0.9, criterion="movement", filters="b/"),
        ks.callbacks.DynamicSparseTraining(0.9, filters="a/", frequency=3),
    ],
}


def deferred():
    return keras.Sequential([keras.layers.Dense(10, activation="relu", name="a"), keras.layers.Dense(3, name="b")])


@pytest.mark.parametrize("name", UNBUILT)
@pytest.mark.parametrize(
    "make", [deferred, pytest.param(Subclassed, marks=pytest.mark.slow), pytest.param(OwnStep, marks=pytest.mark.slow)]
)
@pytest.mark.thorough(2)
@pytest.mark.lengthy(1)
def test_a_model_that_fit_builds_trains_as_one_that_was_built(name, make):
    if make is OwnStep and not TENSORFLOW:
        pytest.skip("The training step has other arguments")
    weights = []
    for built in (True, False):
        keras.utils.set_random_seed(1)
        model = make()
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        if built:
            model(X[:1, :8] if make is OwnStep else X[:1])
        callbacks = UNBUILT[name]()
        fit(model, *callbacks, epochs=4)
        assert all(callback.reached for callback in callbacks)
        weights.append(model.get_weights())
        assert isinstance(model.optimizer, keras.optimizers.Adam)
    for a, b in zip(*weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_what_fit_cannot_build_is_an_error_of_its_first_step():
    class Broken(Subclassed):
        def call(self, x):
            raise ArithmeticError("no such layer")

    model = Broken()
    model.compile("adam", "mse")
    with pytest.raises((ArithmeticError, RuntimeError), match="no such layer"):
        fit(model, ks.callbacks.Pruning(0.5))


def test_unbuilt_model():
    wrong = keras.Sequential([keras.layers.Dense(3)])
    wrong.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    with pytest.raises(ValueError, match="matches no weight"):
        fit(wrong, ks.callbacks.Pruning(0.9, filters="nothing"))
    assert isinstance(wrong.optimizer, keras.optimizers.Adam)
