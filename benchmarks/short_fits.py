"""Pruning in fits of a few dozen steps: what becomes of the statistics of batch normalization.

A convolutional network learns the digits of scikit-learn (1,300 images, batch 32: 41 steps in an epoch), and `Pruning`
trains it on for a few epochs. `moving`: the moving statistics are what Keras makes of them, as in each model with a
`train_step` of its own. `Pruning`: as they are otherwise. `reestimated`: of all training images, after the fit
(`ks.reestimate_batch_norm`). The accuracy is that of the last epoch on the 497 other images.
"""

import argparse

import result  # isort: skip - sets the environment that TensorFlow reads

import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_digits

import keras_sparse as ks

CASES = [(0.9, 2, "uniform"), (0.9, 4, "uniform"), (0.9, 4, "global"), (0.9, 12, "global")]


class Own(keras.Model):
    """Whose `train_step` is Keras's, but stands here."""

    def train_step(self, *args, **kwargs):
        return super().train_step(*args, **kwargs)


def build(model_class):
    x = inputs = keras.Input((8, 8, 1))
    for filters in (32, 64, 64):
        x = layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.GlobalAveragePooling2D()(x)
    return model_class(inputs, layers.Dense(10, activation="softmax")(x))


def trained(model_class, data, rate, epochs, weights=None, *callbacks):
    model = build(model_class)
    if weights is not None:
        model.set_weights(weights)
    model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(*data, batch_size=32, epochs=epochs, verbose=0, callbacks=list(callbacks))
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    load, found = result.load(), {(*case, how): [] for case in CASES for how in ("moving", "Pruning", "reestimated")}
    digits, dense = load_digits(), []
    for seed in args.seeds:
        keras.utils.set_random_seed(seed)
        order = np.random.default_rng(seed).permutation(len(digits.target))
        x, y = (digits.images[order, ..., None] / 16).astype("float32"), digits.target[order]
        data, test = (x[:1300], y[:1300]), (x[1300:], y[1300:])
        model = trained(keras.Model, data, 2e-3, 20)
        weights = model.get_weights()
        dense.append(100 * model.evaluate(*test, verbose=0)[1])
        for case in CASES:
            sparsity, epochs, allocation = case
            for how, model_class in (("moving", Own), ("Pruning", keras.Model)):
                keras.utils.set_random_seed(seed)
                pruning = ks.callbacks.Pruning(sparsity, allocation=allocation)
                model = trained(model_class, data, 1e-3, epochs, weights, pruning)
                found[*case, how].append(100 * model.evaluate(*test, verbose=0)[1])
            ks.reestimate_batch_norm(model, data[0])
            found[*case, "reestimated"].append(100 * model.evaluate(*test, verbose=0)[1])
    result.show(
        "Short fits, digits",
        ["zeros", "epochs", "allocation", "moving", "`Pruning`", "reestimated"],
        [
            [f"{case[0]:.0%}", str(case[1]), case[2]]
            + [result.mean_and_spread(found[*case, how]) for how in ("moving", "Pruning", "reestimated")]
            for case in CASES
        ],
        [f"Dense: {result.mean_and_spread(dense)}, seeds {args.seeds}."],
        load,
    )


if __name__ == "__main__":
    main()
