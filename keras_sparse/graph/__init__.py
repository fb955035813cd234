"""What is known of Keras models: their layers, weights and channels, and how the layers are wired."""

from keras_sparse.graph.channels import CHANNELWISE, elementwise, unit_variables
from keras_sparse.graph.macs import uses
from keras_sparse.graph.rebuilding import substituted
from keras_sparse.graph.weights import NO_KERNELS, Weight, as_array, check_model, layers, weights
from keras_sparse.graph.wiring import consumers, filled, histories, references, wiring

__all__ = [
    "CHANNELWISE",
    "NO_KERNELS",
    "Weight",
    "as_array",
    "check_model",
    "consumers",
    "elementwise",
    "filled",
    "histories",
    "layers",
    "references",
    "substituted",
    "unit_variables",
    "uses",
    "weights",
    "wiring",
]
