"""What is known of Keras models: their layers, weights and channels, and how the layers are wired.

`__all__` is for layers of your own (`docs/guides/custom_layers.md`); other names serve the modules of this library.
"""

from keras_sparse.graph.channels import scale_of as scale_of
from keras_sparse.graph.channels import unit_kernel as unit_kernel
from keras_sparse.graph.channels import unit_variables as unit_variables
from keras_sparse.graph.channels import unread_channels as unread_channels
from keras_sparse.graph.groups import ChannelGroup as ChannelGroup
from keras_sparse.graph.groups import Channels as Channels
from keras_sparse.graph.kinds import (
    DEPTHWISE,
    EMBEDDING,
    FOREIGN,
    NO_KERNELS,
    Equation,
    Kernel,
    Kind,
    kernel_of,
    kind_of,
    kinds,
    register_kind,
)
from keras_sparse.graph.kinds import operator_axes as operator_axes
from keras_sparse.graph.labels import OUTPUT as OUTPUT
from keras_sparse.graph.macs import uses
from keras_sparse.graph.paths import Paths
from keras_sparse.graph.rebuilding import Rebuilding, replay
from keras_sparse.graph.substitution import substituted as substituted
from keras_sparse.graph.weights import Weight, layers, weights
from keras_sparse.graph.weights import along as along
from keras_sparse.graph.weights import as_array as as_array
from keras_sparse.graph.weights import check_model as check_model
from keras_sparse.graph.wiring import consumers, wiring
from keras_sparse.graph.wiring import references as references

__all__ = [
    "DEPTHWISE",
    "EMBEDDING",
    "FOREIGN",
    "NO_KERNELS",
    "Equation",
    "Kernel",
    "Kind",
    "Paths",
    "Rebuilding",
    "Weight",
    "consumers",
    "kernel_of",
    "kind_of",
    "kinds",
    "layers",
    "register_kind",
    "replay",
    "uses",
    "weights",
    "wiring",
]
