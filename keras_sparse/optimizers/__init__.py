"""Optimizers that keep a model sparse: `SparseOptimizer`, and how it gets around a model's optimizer and off it."""

from keras_sparse.optimizers.slots import reset_slots, slots
from keras_sparse.optimizers.sparse import SparseOptimizer, masked_value
from keras_sparse.optimizers.wrapping import drop_functions, find, unwrap, wrap

__all__ = ["SparseOptimizer", "drop_functions", "find", "masked_value", "reset_slots", "slots", "unwrap", "wrap"]
