"""Optimizers that keep a model sparse: `SparseOptimizer`, and how it gets around a model's optimizer and off it."""

from keras_sparse.optimizers.assignment import masked_value
from keras_sparse.optimizers.proximal import Shrinkage, group_soft_threshold, knows_step, soft_threshold
from keras_sparse.optimizers.slots import reset_slots, restart, slots
from keras_sparse.optimizers.sparse import SparseOptimizer
from keras_sparse.optimizers.wrapping import before_first_step, drop_functions, find, measuring, unwrap, wrap

__all__ = [
    "Shrinkage",
    "SparseOptimizer",
    "before_first_step",
    "drop_functions",
    "find",
    "group_soft_threshold",
    "knows_step",
    "masked_value",
    "measuring",
    "reset_slots",
    "restart",
    "slots",
    "soft_threshold",
    "unwrap",
    "wrap",
]
