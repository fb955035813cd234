"""What the tests of selections share."""

import keras
from keras import layers

import keras_sparse as ks


class OwnDense(layers.Dense):
    """A subclass of a Keras layer."""


def selected(model, **arguments):
    return ks.selection.select(model, **arguments).chosen


# Kinds of models


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.blocks = [layers.Dense(6, activation="relu"), {"inner": layers.Dense(6)}]
        self.head = layers.Dense(3)

    def call(self, x):
        return self.head(self.blocks[1]["inner"](self.blocks[0](x)))


def sequential():
    return keras.Sequential([keras.Input((12,)), layers.Dense(6, activation="relu"), layers.Dense(6), layers.Dense(3)])
