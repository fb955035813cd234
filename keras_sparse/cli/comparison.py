"""The command that compares models and .tflite files."""

import os

from keras_sparse.cli.command import argument, command, drawing, saved_model

__all__ = []


@command(
    lambda parser: saved_model(parser, several=True),
    argument("--data", metavar="FILE.npz", required=True, help="inputs, by name or as `x`, and targets as `y`"),
    argument(
        "--metrics",
        nargs="*",
        default=["accuracy"],
        metavar="NAME",
        help="accuracy (default), precision, recall, f1, or what Keras knows by name; none for a table without",
    ),
    argument("--threshold", type=float, help="from where on a single output means class 1 (default: 0.5)"),
    argument("--seconds", type=float, default=1.0, help="of measuring latency, for each; 0: none (default: 1)"),
    drawing("the first metric over sparsity and size"),
    example="dense.keras pruned.keras m.tflite --data data.npz --metrics accuracy f1",
)
def _compare(options, stderr):
    """Put models and .tflite files in one table: metrics, sparsity, size, latency. Files are run: trust them."""
    from rich.console import Console

    from keras_sparse import comparison, files

    names = [os.path.basename(path) for path in options.models]
    twice = {path for path in options.models if options.models.count(path) > 1}
    if twice:
        raise ValueError(f"Each file can be compared once. Received twice: {sorted(twice)}")
    models = {path if names.count(name) > 1 else name: path for name, path in zip(names, options.models, strict=True)}
    return comparison.compare(
        models,
        *files.load_arrays(options.data),
        metrics=options.metrics,
        threshold=options.threshold,
        seconds=options.seconds,
        console=Console(file=stderr),
    )
