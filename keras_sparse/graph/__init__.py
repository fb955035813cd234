"""What is known of Keras models: their layers, weights and channels, and how the layers are wired."""

from keras_sparse.graph.calls import Call, Condition, Part, Tensor
from keras_sparse.graph.channels import elementwise, scale_of, unit_kernel, unit_variables, unread_channels
from keras_sparse.graph.classes import Classes
from keras_sparse.graph.groups import ChannelGroup, Channels
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
    operator_axes,
    register_kind,
)
from keras_sparse.graph.labels import OUTPUT, Labelled
from keras_sparse.graph.macs import uses
from keras_sparse.graph.paths import Paths
from keras_sparse.graph.rebuilding import Rebuilding, replay
from keras_sparse.graph.substitution import substituted
from keras_sparse.graph.weights import Weight, along, as_array, check_model, layers, weights
from keras_sparse.graph.wiring import consumers, filled, histories, references, wiring

__all__ = [
    "DEPTHWISE",
    "EMBEDDING",
    "FOREIGN",
    "NO_KERNELS",
    "OUTPUT",
    "Call",
    "ChannelGroup",
    "Channels",
    "Classes",
    "Condition",
    "Equation",
    "Kernel",
    "Kind",
    "Labelled",
    "Part",
    "Paths",
    "Rebuilding",
    "Tensor",
    "Weight",
    "along",
    "as_array",
    "check_model",
    "consumers",
    "elementwise",
    "filled",
    "histories",
    "kernel_of",
    "kind_of",
    "kinds",
    "layers",
    "operator_axes",
    "references",
    "register_kind",
    "replay",
    "scale_of",
    "substituted",
    "unit_kernel",
    "unit_variables",
    "unread_channels",
    "uses",
    "weights",
    "wiring",
]
