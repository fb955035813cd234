"""The command that searches for the sparsity of each weight."""

import contextlib

from keras_sparse.cli.command import argument, command, drawing, saved_model

__all__ = []


def _constraints(parser):
    from keras_sparse.search.goals import CONSTRAINTS

    for name in CONSTRAINTS:
        what = "share of zeros to have" if name == "sparsity" else "upper limit"
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="N", help=f"constraint: {what}")


@command(
    saved_model,
    argument(
        "--data",
        metavar="FILE.npz",
        required=True,
        help="arrays `x` and `y` to score on, and `x_train`, `y_train` to train candidates on with --epochs",
    ),
    _constraints,
    argument(
        "--objective",
        nargs="+",
        metavar="NAME",
        help="metrics of the model, sparsity, macs, bytes, latency_ms; several make a front (default: first metric)",
    ),
    argument(
        "--searcher",
        choices="keras_sparse.search.searchers:SEARCHERS",
        default="evolution",
        help="what proposes candidates (default: evolution)",
    ),
    argument("--patterns", nargs="+", default=["unstructured"], help="to choose from, such as 2:4 block_1x4"),
    argument("--filters", nargs="+", metavar="REGEX", help="search only weights whose path matches"),
    argument("--budget", type=int, default=100, help="candidates (default: 100)"),
    argument("--epochs", type=int, default=0, help="of training each candidate (default: 0)"),
    argument("--time-limit", type=float, metavar="SECONDS", help="ask for no more candidates after that"),
    argument("--seed", type=int, default=0, help="default: 0"),
    argument("--workers", type=int, help="processes that evaluate (default: this one alone)"),
    argument("--directory", metavar="DIR", help="journal: a search that was killed goes on where it was"),
    argument("-o", "--output", metavar="OUT.keras", help="write the model, pruned to the best allocation"),
    drawing("the candidates and the front"),
    example="model.keras --data data.npz --sparsity 0.9 --epochs 1 --workers 2 -o best.keras",
)
def _search(options, stderr):
    """Search for how sparse each weight of a saved, compiled model should be."""
    from rich.console import Console

    from keras_sparse import comparison, files, pruning, search
    from keras_sparse.search.goals import CONSTRAINTS

    model = comparison.load(options.model, compile=True)
    data = files.load_arrays(options.data, "`x` and `y`, or these and `x_train` and `y_train`", _both_sets)
    limits = {name: getattr(options, name) for name in CONSTRAINTS}
    with contextlib.ExitStack() as stack:
        if options.output:
            path = stack.enter_context(files.replacing(options.output, ".keras"))
        results = search.search(
            model,
            data,
            search.Space(model, patterns=options.patterns, filters=options.filters),
            searcher=options.searcher,
            objective=options.objective,
            constraints={name: limit for name, limit in limits.items() if limit is not None},
            budget=options.budget,
            epochs=options.epochs,
            time_limit=options.time_limit,
            seed=options.seed,
            executor=_executor(options.workers, stack),
            directory=options.directory,
            console=Console(file=stderr),
        )
        if options.output:
            pruning.prune(model, results.best.allocation)
            model.save(path)
            results.notes.append(f"Written: {options.output}")
    return results


def _executor(workers, stack):
    """Processes to evaluate in, which end with the `stack`; `None` for this process alone."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    from keras_sparse.registry import check_whole

    if workers is None:
        return None
    check_whole("--workers", workers)
    return stack.enter_context(ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")))


def _both_sets(file):
    sets = {"val": (file["x"], file["y"])}
    return sets | ({"train": (file["x_train"], file["y_train"])} if "x_train" in file.files else {})
