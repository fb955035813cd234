"""A comparison is one table over models in different forms: how right they are, how large, and how fast."""

from keras_sparse.comparison.evaluation import compare
from keras_sparse.comparison.report import CompareReport
from keras_sparse.comparison.subjects import load

__all__ = ["CompareReport", "compare", "load"]
