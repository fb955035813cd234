"""Models and fits that the tests of callbacks share."""

import keras
import numpy as np

import keras_sparse as ks

TENSORFLOW = keras.backend.backend() == "tensorflow"
X = np.random.default_rng(0).normal(size=(96, 12)).astype("float32")
Y = np.random.default_rng(1).integers(0, 3, 96)


def dense_model(**compile_arguments):
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [keras.Input((12,)), keras.layers.Dense(10, activation="relu", name="a"), keras.layers.Dense(3, name="b")]
    )
    arguments = {"optimizer": "adam", "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True)}
    model.compile(**(arguments | compile_arguments))
    return model


def fit(model, *callbacks, epochs=3, x=X, y=Y, **arguments):
    arguments = {"batch_size": 16, "verbose": 0, "shuffle": False} | arguments
    return model.fit(x, y, epochs=epochs, callbacks=list(callbacks), **arguments)


def kernels(model):
    return [w.numpy() for w in ks.selection.weights(model) if w.kernel]


def zeros(model):
    return [int((kernel == 0).sum()) for kernel in kernels(model)]


class ZerosAfterEachStep(keras.callbacks.Callback):
    """Records the zeros of every kernel after every step, and whether a zero ever came back to life."""

    def __init__(self):
        super().__init__()
        self.counts, self.revived, self.before = [], 0, None

    def on_train_batch_end(self, batch, logs=None):
        now = [kernel == 0 for kernel in kernels(self.model)]
        self.counts.append([int(z.sum()) for z in now])
        if self.before is not None:
            self.revived += sum(int((b & ~n).sum()) for b, n in zip(self.before, now, strict=True))
        self.before = now


def interrupt_at(step):
    class Interrupt(keras.callbacks.Callback):
        seen = 0

        def on_train_batch_end(self, batch, logs=None):
            self.seen += 1
            if self.seen == step:
                raise KeyboardInterrupt

    return Interrupt()
