"""The command that trains, prunes, exports and compares a first model."""

from keras_sparse.cli.command import argument, command

__all__ = []


@command(
    argument("--dataset", choices="keras_sparse.quickstart:DATASETS", default="digits", help="default: digits"),
    argument("--sparsity", type=float, default=0.9, help="share of weights to prune (default: 0.9)"),
    argument("--epochs", type=int, help="epochs of each of the three trainings (default: as suits the dataset)"),
    argument("--output", metavar="DIR", default="quickstart", help="folder to write to (default: quickstart)"),
    example="--dataset mnist --sparsity 0.95 --output results",
)
def _quickstart(options, stderr):
    """Train a small CNN, prune its weights or its channels, export it to .tflite, and compare with the dense one."""
    from rich.console import Console

    from keras_sparse import quickstart

    return quickstart.run(
        options.dataset, options.sparsity, options.epochs, options.output, console=Console(file=stderr)
    )
