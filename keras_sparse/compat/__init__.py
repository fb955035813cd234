"""Other tools' files and names: what tensorflow-model-optimization (tfmot) wrote, and scripts written for it."""

from keras_sparse.compat import tfmot

__all__ = ["tfmot"]
