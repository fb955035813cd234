"""Pruning decides which weights become zero: a plan of how sparse each weight should be, and the masks it leads to."""

from keras_sparse.pruning import allocation
from keras_sparse.pruning.allocation import *  # noqa: F403 - a new allocation is a class in that file, and nothing here
from keras_sparse.pruning.batch_norm import reestimate_batch_norm
from keras_sparse.pruning.budget import as_target, check_target, final_target
from keras_sparse.pruning.costs import Budget
from keras_sparse.pruning.loops import update_masks
from keras_sparse.pruning.one_shot import prune
from keras_sparse.pruning.plan import Plan
from keras_sparse.pruning.regrowth import MovingChannels
from keras_sparse.pruning.sensitivities import DynamicProgramming, SensitivityReport, sensitivity

__all__ = [
    *allocation.__all__,
    "Budget",
    "DynamicProgramming",
    "MovingChannels",
    "Plan",
    "SensitivityReport",
    "as_target",
    "check_target",
    "final_target",
    "prune",
    "reestimate_batch_norm",
    "sensitivity",
    "update_masks",
]
