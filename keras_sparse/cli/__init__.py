"""The command line, `keras-sparse COMMAND ...`: argparse over the functions of the library."""

from keras_sparse.cli.run import main

__all__ = ["main"]
