"""Channels that nothing needs are found, listed and removed: a smaller plain Keras model with the same outputs."""

from keras_sparse.channels.listing import channel_groups
from keras_sparse.channels.shrinking import shrink

__all__ = ["channel_groups", "shrink"]
