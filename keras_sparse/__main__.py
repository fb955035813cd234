"""`python -m keras_sparse` is the command line."""

import sys

from keras_sparse.cli import main

if __name__ == "__main__":
    sys.exit(main())
