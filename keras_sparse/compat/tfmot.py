"""The names of tensorflow-model-optimization (tfmot) on Keras 3."""

from keras_sparse.compat.loading import load

__all__ = ["load"]
