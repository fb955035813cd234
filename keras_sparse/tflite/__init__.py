"""The TFLite stage: from a Keras model to a small .tflite file, with proof that it computes the same."""

from keras_sparse.tflite import runtimes
from keras_sparse.tflite.adapt import adapt
from keras_sparse.tflite.arm64 import setup_arm64
from keras_sparse.tflite.benchmark import BenchmarkReport, benchmark
from keras_sparse.tflite.export import ExportError, ExportReport, export
from keras_sparse.tflite.inspect import inspect

__all__ = [
    "BenchmarkReport",
    "ExportError",
    "ExportReport",
    "adapt",
    "benchmark",
    "export",
    "inspect",
    "runtimes",
    "setup_arm64",
]
