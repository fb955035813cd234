"""Patterns say where zeros may stand: shapes of zeros, and the recognition of the shape that a weight's zeros have."""

from keras_sparse.patterns import shapes
from keras_sparse.patterns.recognition import recognize
from keras_sparse.patterns.shapes import *  # noqa: F403 - a new pattern is a class in that file, and nothing here

__all__ = ["recognize", *shapes.__all__]
