"""What the tests of searches run in other processes must be able to import."""

import functools
import time

import keras
import numpy as np

import keras_sparse as ks


@keras.saving.register_keras_serializable("search_models")
class Subclassed(keras.Model):
    """A subclassed model with a custom layer, both registered."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.one, self.two = keras.layers.Dense(12, activation="relu"), keras.layers.Dense(3)
        self.norm = keras.layers.BatchNormalization()

    def build(self, shape):
        self.one.build(shape)
        self.norm.build((*shape[:-1], 12))
        self.two.build((*shape[:-1], 12))
        super().build(shape)

    def call(self, x, training=False):
        return self.two(self.norm(self.one(x), training=training))


def confidence(y, outputs):
    """A metric that is not registered."""
    return keras.ops.mean(keras.ops.max(outputs, axis=-1))


def data(n=96, seed=0):
    """Samples of 6 features in 3 classes."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 6)).astype("float32")
    return x, x[:, :3].argmax(axis=1)


def model(kind="sequential"):
    """A compiled model, functional, Sequential or subclassed."""
    layers = keras.layers
    if kind == "subclassed":
        made = Subclassed()
        made.build((None, 6))
    else:
        body = [layers.Dense(12, activation="relu"), layers.BatchNormalization(), layers.Dense(3)]
        made = keras.Sequential([keras.Input((6,)), *body])
        if kind == "functional":
            made = keras.Model(made.inputs[0], made.outputs[0])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    made.compile(keras.optimizers.Adam(0.01), loss, metrics=["accuracy"])
    return made


@functools.cache
def trained_weights(kind):
    keras.utils.set_random_seed(3)
    trained = model(kind)
    trained.fit(*data(seed=1), epochs=3, verbose=0)
    return trained.get_weights()


def search(directory=None, budget=24, executor=None, **options):
    """A search of a trained model, the same each time that it is called."""
    kind = options.pop("kind", "sequential")
    weights = trained_weights(kind)
    keras.utils.set_random_seed(3)
    trained = model(kind)
    trained.set_weights(weights)
    options = {"objective": "loss", "constraints": {"sparsity": 0.7}, "epochs": 1, "batch_size": 32} | options
    sets = {"train": data(seed=1), "val": data(seed=2)}
    return ks.search.search(trained, sets, budget=budget, executor=executor, directory=directory, **options)


def facts(results):
    """What must be the same in two searches that are the same."""
    return [(one.number, one.point, one.values, one.error, one.violation) for one in results.candidates]


def main(directory):
    """Search slowly enough to be killed; print a line when it is done."""
    score = ks.search.evaluation.Evaluation.__call__

    def slow(self, *args):
        time.sleep(0.1)
        return score(self, *args)

    ks.search.evaluation.Evaluation.__call__ = slow
    print(search(directory).best.number, flush=True)
