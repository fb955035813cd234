"""Patterns say where zeros may stand: shapes of zeros, and the recognition of the shape that a weight's zeros have."""

from keras_sparse.patterns.recognition import recognize
from keras_sparse.patterns.shapes import (
    NM,
    Block,
    Channel,
    Pattern,
    Unstructured,
    WithinOutputs,
    from_matrix,
    get,
    keep_highest,
    to_matrix,
)

__all__ = [
    "NM",
    "Block",
    "Channel",
    "Pattern",
    "Unstructured",
    "WithinOutputs",
    "from_matrix",
    "get",
    "keep_highest",
    "recognize",
    "to_matrix",
]
