"""The command line is argparse over the functions of the library: `keras-sparse COMMAND ...`.

Exit codes: 0 when all went well, 1 for an error of the input (one line on stderr), 2 for wrong usage, 130 when
interrupted. With `--json` stdout holds one JSON document and nothing else.
"""

import argparse
import contextlib
import importlib
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor

from keras_sparse import comparison, files, pruning, quickstart, reports, search, tflite
from keras_sparse.quiet import quiet
from keras_sparse.registry import check_whole
from keras_sparse.search.goals import CONSTRAINTS
from keras_sparse.tflite.commands import MEASURING
from keras_sparse.tflite.job import QUANTIZE

__all__ = ["main"]


def main(arguments=None):
    """Run the command line.

    Args:
        arguments: List of strings. `None`: those of the process.

    Returns:
        The exit code.

    Raises:
        SystemExit: After `--help`, and for wrong usage.

    Example:

    >>> from keras_sparse.cli import main
    >>> main(["inspect", "no_such_file.tflite"])  # and a line on stderr that says so
    1
    """
    options = _parser().parse_args(arguments)
    try:
        with quiet() as (_, stderr):
            _import(options.modules)
            report = options.command(options, stderr)
        _print(report.to_json() if options.json else report)
    except KeyboardInterrupt:
        print("keras-sparse: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        print(f"keras-sparse: error: {_one_line(error)}", file=sys.stderr)
        return 1
    return 0


def _parser():
    parser = argparse.ArgumentParser(
        prog="keras-sparse",
        description="Sparse Keras models and .tflite files. `keras-sparse COMMAND --help` shows an example for each.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {sys.modules[__package__].__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(command, example, loads=None):
        name, summary = command.__name__.strip("_").replace("_", "-"), command.__doc__
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example:\n  keras-sparse {name} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(command=command, modules=[])
        sub.add_argument("--json", action="store_true", help="print JSON instead of a table")
        if loads == "model":
            sub.add_argument("model", metavar="MODEL.keras", help="a saved Keras model")
        if loads:
            sub.add_argument(
                "--import",
                dest="modules",
                metavar="MODULE",
                action="append",
                help="import a module first that registers the model's custom classes, from the current folder or "
                "PYTHONPATH; may be repeated",
            )
        return sub

    def draws(sub, what):
        sub.add_argument("--html", metavar="FILE", help="write what is printed as an HTML page, too")
        sub.add_argument("--plot", metavar="FILE", help=f"draw {what} (.png, .svg, .pdf)")

    sub = add(_quickstart, "--dataset mnist --sparsity 0.95 --output results")
    sub.add_argument("--dataset", choices=list(quickstart.DATASETS), default="digits", help="default: digits")
    sub.add_argument("--sparsity", type=float, default=0.9, help="share of weights to prune (default: 0.9)")
    sub.add_argument("--epochs", type=int, help="epochs of each of the two trainings (default: as suits the dataset)")
    sub.add_argument("--output", metavar="DIR", default="quickstart", help="folder to write to (default: quickstart)")

    sub = add(_prune, "model.keras --sparsity 0.9 --filters conv dense_1 -o sparse.keras", loads="model")
    sub.add_argument(
        "--sparsity", type=float, help="share of weights to prune, in [0, 1); a pattern such as 2:4 has its own"
    )
    sub.add_argument(
        "--filters",
        nargs="+",
        action="extend",
        metavar="REGEX",
        help="prune only weights whose path a regular expression matches (default: all that multiply inputs, but for "
        "depthwise kernels and embeddings)",
    )
    sub.add_argument("--allocation", choices=["uniform", "global", "erk"], default="uniform", help="default: uniform")
    sub.add_argument(
        "--floor", type=float, metavar="SHARE", help="what stays of each weight at least, with --allocation global"
    )
    sub.add_argument("--pattern", help="unstructured (default), channel, or such as block_1x4 or 2:4")
    sub.add_argument(
        "--criterion",
        choices=["magnitude", "random", "snip", "taylor", "gradient", "movement"],
        default="magnitude",
        help="which weights matter (default: magnitude); the last four need --data",
    )
    sub.add_argument("--data", metavar="FILE.npz", help="arrays `x` and `y` to take gradients on")
    sub.add_argument("-o", "--output", metavar="OUT.keras", required=True, help="file to write; may be the input")

    sub = add(_report, "model.keras --html report.html --plot report.png", loads="model")
    draws(sub, "the sparsity of each weight")

    sub = add(_check, "model.keras --target xnnpack", loads="model")
    sub.add_argument("--target", default="xnnpack", help="see `keras-sparse targets` (default: xnnpack)")
    sub.add_argument("--sparsity", type=float, default=0.9, help="to look at (default: 0.9)")

    add(_targets, "")

    sub = add(_adapt, "model.keras -o adapted.keras", loads="model")
    sub.add_argument("-o", "--output", metavar="OUT.keras", required=True, help="file to write; may be the input")
    sub.add_argument("--target", default="xnnpack", help="the runtime that it should run sparse on (default: xnnpack)")

    sub = add(_export, "model.keras model.tflite --quantize float16", loads="model")
    sub.add_argument("output", metavar="OUT.tflite", help="file to write")
    sub.add_argument("--dense", action="store_true", help="do not use a sparse encoding, however small")
    sub.add_argument(
        "--quantize",
        choices=[name for name in QUANTIZE if name],
        help="how to store the weights (default: float32); int8 and int16x8 need --representative-data",
    )
    sub.add_argument(
        "--inference-type",
        choices=["int8", "uint8", "int16"],
        help="of inputs and outputs, as integers (default: float32)",
    )
    sub.add_argument("--batch-size", type=int, metavar="N", help="of the file (default: open, if the model's is)")
    sub.add_argument(
        "--representative-data",
        metavar="FILE.npz",
        help="inputs, by name or as `x`, to compare on and to calibrate int8",
    )
    sub.add_argument(
        "--verify", choices=["auto", "strict"], default="auto", help="strict: runtimes with sparse kernels must agree"
    )

    sub = add(_inspect, "model.tflite")
    sub.add_argument("file", metavar="FILE.tflite")

    sub = add(_benchmark, "sparse.tflite --baseline dense.tflite --runtime wasm")
    sub.add_argument("file", metavar="FILE.tflite")
    sub.add_argument("--baseline", metavar="FILE.tflite", help="another file to compare with, run in turns")
    sub.add_argument(
        "--runtime",
        choices=list(MEASURING),
        default="native",
        help="this CPU (default), LiteRT.js in Node, or an emulated ARM64 CPU that counts instructions",
    )
    sub.add_argument("--threads", type=int, default=1, help="threads of the interpreter (default: 1)")
    sub.add_argument("--seconds", type=float, default=1.0, help="of measuring, for each file (default: 1)")

    sub = add(_compare, "dense.keras pruned.keras m.tflite --data data.npz --metrics accuracy f1", loads="models")
    sub.add_argument("models", metavar="MODEL", nargs="+", help=".keras and .tflite files; the first is the measure")
    sub.add_argument("--data", metavar="FILE.npz", required=True, help="arrays `x` and `y`")
    sub.add_argument(
        "--metrics",
        nargs="*",
        default=["accuracy"],
        metavar="NAME",
        help="accuracy (default), precision, recall, f1, or what Keras knows by name; none for a table without",
    )
    sub.add_argument("--threshold", type=float, help="from where on a single output means class 1 (default: 0.5)")
    sub.add_argument("--seconds", type=float, default=1.0, help="of measuring latency, for each; 0: none (default: 1)")
    draws(sub, "the first metric over sparsity and size")

    sub = add(_search, "model.keras --data data.npz --sparsity 0.9 --epochs 1 --workers 2 -o best.keras", loads="model")
    sub.add_argument(
        "--data",
        metavar="FILE.npz",
        required=True,
        help="arrays `x` and `y` to score on, and `x_train`, `y_train` to train candidates on with --epochs",
    )
    for name in CONSTRAINTS:
        what = "share of zeros to have" if name == "sparsity" else "upper limit"
        sub.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="N", help=f"constraint: {what}")
    sub.add_argument(
        "--objective",
        nargs="+",
        metavar="NAME",
        help="metrics of the model, sparsity, macs, bytes, latency_ms; several make a front (default: first metric)",
    )
    sub.add_argument(
        "--searcher", choices=["evolution", "reinforce", "random"], default="evolution", help="default: evolution"
    )
    sub.add_argument("--patterns", nargs="+", default=["unstructured"], help="to choose from, such as 2:4 block_1x4")
    sub.add_argument("--filters", nargs="+", metavar="REGEX", help="search only weights whose path matches")
    sub.add_argument("--budget", type=int, default=100, help="candidates (default: 100)")
    sub.add_argument("--epochs", type=int, default=0, help="of training each candidate (default: 0)")
    sub.add_argument("--time-limit", type=float, metavar="SECONDS", help="ask for no more candidates after that")
    sub.add_argument("--seed", type=int, default=0, help="default: 0")
    sub.add_argument("--workers", type=int, help="processes that evaluate (default: this one alone)")
    sub.add_argument("--directory", metavar="DIR", help="journal: a search that was killed goes on where it was")
    sub.add_argument("-o", "--output", metavar="OUT.keras", help="write the model, pruned to the best allocation")
    draws(sub, "the candidates and the front")

    add(_setup_arm64, "")
    return parser


# The commands. Their docstrings are the help texts.


def _quickstart(options, stderr):
    """Train a small CNN, prune it, export it to .tflite, and compare it with the dense one."""
    from rich.console import Console

    return quickstart.run(
        options.dataset, options.sparsity, options.epochs, options.output, console=Console(file=stderr)
    )


def _prune(options, stderr):
    """Prune a saved model in one shot, without training."""
    allocation = options.allocation
    if options.floor is not None:
        if allocation != "global":
            raise ValueError(f"`--floor` goes with `--allocation global`. Received: --allocation {allocation}")
        allocation = pruning.Global(options.floor)
    with files.replacing(options.output, ".keras") as path:
        model, notes = _load_compiled(options.model)
        report = pruning.prune(
            model,
            options.sparsity,
            criterion=options.criterion,
            pattern=options.pattern,
            allocation=allocation,
            filters=options.filters,
            data=files.load_arrays(options.data) if options.data else None,
        )
        model.save(path)
    report.notes += [*notes, f"Written: {options.output}"]
    return report


def _report(options, stderr):
    """Tell what is sparse in a saved model, what is not, and why."""
    return _drawn(reports.report(comparison.load(options.model)), options)


def _check(options, stderr):
    """Say what a saved model would gain on a target if it were pruned, and what stands in its way."""
    return tflite.check(comparison.load(options.model), options.target, options.sparsity)


def _targets(options, stderr):
    """List the runtimes: what each multiplies sparse, from which sparsity, and where that is known from."""
    return tflite.targets()


def _adapt(options, stderr):
    """Bring a saved model into the form that a runtime's sparse kernels take; the weights stay the same."""
    with files.replacing(options.output, ".keras") as path:
        model, report = tflite.adapt(comparison.load(options.model), options.target, verbose=0, return_report=True)
        model.save(path)
    report.notes.append(f"Written: {options.output}")
    return report


def _export(options, stderr):
    """Write a saved model as a .tflite file that is verified against it."""
    data = None
    if options.representative_data:
        data = files.load_arrays(options.representative_data, "inputs, by name or as `x`", _inputs)
    return tflite.export(
        comparison.load(options.model),
        options.output,
        sparse=not options.dense,
        quantize=options.quantize,
        representative_data=data,
        verify=options.verify,
        inference_type=options.inference_type,
        batch_size=options.batch_size,
    )


def _inspect(options, stderr):
    """List the tensors of a .tflite file: how they are stored, how sparse they are."""
    return tflite.inspect(options.file)


def _benchmark(options, stderr):
    """Measure the latency of a .tflite file, or its instructions. It is run: use files that you trust."""
    return tflite.benchmark(
        options.file,
        baseline=options.baseline,
        runtime=options.runtime,
        threads=options.threads,
        seconds=options.seconds,
    )


def _compare(options, stderr):
    """Put models and .tflite files in one table: metrics, sparsity, size, latency. Files are run: trust them."""
    from rich.console import Console

    names = [os.path.basename(path) for path in options.models]
    twice = {path for path in options.models if options.models.count(path) > 1}
    if twice:
        raise ValueError(f"Each file can be compared once. Received twice: {sorted(twice)}")
    models = {path if names.count(name) > 1 else name: path for name, path in zip(names, options.models, strict=True)}
    report = comparison.compare(
        models,
        *files.load_arrays(options.data),
        metrics=options.metrics,
        threshold=options.threshold,
        seconds=options.seconds,
        console=Console(file=stderr),
    )
    return _drawn(report, options)


def _search(options, stderr):
    """Search for how sparse each weight of a saved, compiled model should be."""
    from rich.console import Console

    model = comparison.load(options.model, compile=True)
    data = files.load_arrays(options.data, "`x` and `y`, or these and `x_train` and `y_train`", _both_sets)
    limits = {name: getattr(options, name) for name in CONSTRAINTS}
    with contextlib.ExitStack() as stack:
        if options.output:
            path = stack.enter_context(files.replacing(options.output, ".keras"))
        executor = None
        if options.workers is not None:
            check_whole("--workers", options.workers)
            context = multiprocessing.get_context("spawn")
            executor = stack.enter_context(ProcessPoolExecutor(options.workers, mp_context=context))
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
            executor=executor,
            directory=options.directory,
            console=Console(file=stderr),
        )
        if options.output:
            pruning.prune(model, results.best.allocation)
            model.save(path)
            results.notes.append(f"Written: {options.output}")
    return _drawn(results, options)


def _setup_arm64(options, stderr):
    """Set up the emulated ARM64 CPU of `benchmark --runtime arm64`, on Debian with qemu-user and a C compiler."""
    folder = str(tflite.setup_arm64())
    return reports.Report("ARM64 runtime", [{"folder": folder}], {})


def _drawn(report, options):
    """The report, once it is written where `--html` and `--plot` say."""
    if options.html:
        with files.replacing(options.html) as path, open(path, "w", encoding="utf-8") as file:
            file.write(reports.html_page(report.title, report))
    if options.plot:
        with files.replacing(options.plot) as path:
            report.plot().savefig(path)
    return report


def _import(modules):
    if modules:
        sys.path.insert(0, os.getcwd())  # an installed command, unlike `python`, does not look there
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:
            raise ImportError(f"`--import {module}` failed: {type(error).__name__}: {error}") from error


def _inputs(file):
    arrays = {name: file[name] for name in file.files if name != "y"}
    return arrays["x"] if list(arrays) == ["x"] else arrays


def _both_sets(file):
    sets = {"val": (file["x"], file["y"])}
    return sets | ({"train": (file["x_train"], file["y_train"])} if "x_train" in file.files else {})


def _load_compiled(path):
    """The model, with its optimizer and losses if they can be loaded, and notes."""
    try:
        return comparison.load(path, compile=True), []
    except ValueError as error:
        reason = _one_line(error)
    return comparison.load(path), [f"Optimizer and losses were left out, because they cannot be loaded. {reason}"]


def _print(result):
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a table's lines, on a stream that has no such characters
    if sys.stdout.isatty() and not isinstance(result, str):
        from rich.console import Console

        Console(highlight=False).print(result)
    else:
        print(result)
    sys.stdout.flush()


def _one_line(error):
    return " ".join(str(error).split()) or type(error).__name__
