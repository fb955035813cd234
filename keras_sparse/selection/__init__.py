"""A selection: which weights of a model may become sparse, and why the others may not."""

from keras_sparse.selection.filters import check_filters, matching, only, pruned_weights, select
from keras_sparse.selection.weight import NO_KERNELS, Weight, as_array, check_model, layers, weights

__all__ = [
    "NO_KERNELS",
    "Weight",
    "as_array",
    "check_filters",
    "check_model",
    "layers",
    "matching",
    "only",
    "pruned_weights",
    "select",
    "weights",
]
