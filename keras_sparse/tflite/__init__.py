"""The TFLite stage: from a Keras model to a small .tflite file, with proof that it computes the same."""

from keras_sparse.tflite import runtimes
from keras_sparse.tflite.adapt import adapt
from keras_sparse.tflite.arm64 import setup_arm64
from keras_sparse.tflite.benchmark import BenchmarkReport, benchmark
from keras_sparse.tflite.check import CheckReport, check
from keras_sparse.tflite.encode import encode
from keras_sparse.tflite.export import ExportError, ExportReport, export
from keras_sparse.tflite.inspect import inspect
from keras_sparse.tflite.swiftshader import setup_gpu
from keras_sparse.tflite.targets import targets
from keras_sparse.tflite.verify import VerifyReport, verify

__all__ = [
    "BenchmarkReport",
    "CheckReport",
    "ExportError",
    "ExportReport",
    "VerifyReport",
    "adapt",
    "benchmark",
    "check",
    "encode",
    "export",
    "inspect",
    "runtimes",
    "setup_arm64",
    "setup_gpu",
    "targets",
    "verify",
]
