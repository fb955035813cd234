"""Callbacks that make a model sparse, or keep it so, while `model.fit` trains it."""

from keras_sparse.callbacks.accuracy_budget import AccuracyBudget
from keras_sparse.callbacks.at_target_sparsity import AtTargetSparsity
from keras_sparse.callbacks.dynamic_sparse_training import DynamicSparseTraining
from keras_sparse.callbacks.keep_sparsity import KeepSparsity
from keras_sparse.callbacks.l0_penalty import L0Penalty
from keras_sparse.callbacks.lottery_ticket import LotteryTicket
from keras_sparse.callbacks.neuron_sparsity import NeuronSparsity
from keras_sparse.callbacks.proximal_l1 import ProximalL1
from keras_sparse.callbacks.pruning import Pruning
from keras_sparse.callbacks.sparse_callback import SparseCallback
from keras_sparse.callbacks.strength_schedule import StrengthSchedule

__all__ = [
    "AccuracyBudget",
    "AtTargetSparsity",
    "DynamicSparseTraining",
    "KeepSparsity",
    "L0Penalty",
    "LotteryTicket",
    "NeuronSparsity",
    "ProximalL1",
    "Pruning",
    "SparseCallback",
    "StrengthSchedule",
]
