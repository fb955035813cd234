"""Layers that learn which weights, units or channels to do without: L0 regularization by random gates."""

from keras_sparse.layers.channel_l0 import ChannelL0
from keras_sparse.layers.gated import HardConcrete, gated_layers
from keras_sparse.layers.l0 import L0

__all__ = ["L0", "ChannelL0", "HardConcrete", "gated_layers"]
