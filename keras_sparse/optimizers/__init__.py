"""Optimizers that keep a model sparse: `SparseOptimizer`, and how a model's optimizer becomes one and plain again."""

from keras_sparse.optimizers.assignment import masked_value
from keras_sparse.optimizers.functions import before_first_step, drop, refresh
from keras_sparse.optimizers.measuring import measuring
from keras_sparse.optimizers.parts import Part, Parts, variable_like
from keras_sparse.optimizers.proximal import group_soft_threshold, knows_step, soft_threshold
from keras_sparse.optimizers.slots import reset_slots, restart, slots
from keras_sparse.optimizers.sparse import SparseOptimizer, make_plain
from keras_sparse.optimizers.wrapping import find, innermost, unwrap, wrap

__all__ = [
    "Part",
    "Parts",
    "SparseOptimizer",
    "before_first_step",
    "drop",
    "find",
    "group_soft_threshold",
    "innermost",
    "knows_step",
    "make_plain",
    "masked_value",
    "measuring",
    "refresh",
    "reset_slots",
    "restart",
    "slots",
    "soft_threshold",
    "unwrap",
    "variable_like",
    "wrap",
]
