"""A run of the command line parses the arguments, runs the command, and prints its report or one line about an error.

Exit codes: 0 when all went well, 1 for an error of the input (one line on stderr), 2 for wrong usage, 130 when
interrupted. With `--json` stdout holds one JSON document and nothing else.
"""

import argparse
import importlib
import os
import pkgutil
import sys

from keras_sparse.cli.command import COMMANDS
from keras_sparse.quiet import quiet

__all__ = ["main"]

for _module in pkgutil.iter_modules([os.path.dirname(__file__)]):
    importlib.import_module(f"{__package__}.{_module.name}")  # its commands register themselves


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
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        with quiet():  # some choices are known to modules that import Keras
            parser = _parser(arguments)
        options = parser.parse_args(arguments)
        with quiet() as (_, stderr):
            _import_classes(options.modules)
            report = options.command(options, stderr)
            _draw(report, options)
            if options.full:
                report = report.full()
        _print(report.to_json() if options.json else report)
    except KeyboardInterrupt:
        print("keras-sparse: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        print(f"keras-sparse: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 1
    return 0


def _parser(arguments):
    """The parser, with the arguments of the command that is asked for; what the others take, nobody wants to know."""
    parser = argparse.ArgumentParser(
        prog="keras-sparse",
        description="Sparse Keras models and .tflite files. `keras-sparse COMMAND --help` shows an example for each.",
    )
    version = sys.modules["keras_sparse"].__version__
    parser.add_argument("--version", action="version", version=f"%(prog)s {version}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    asked = next((word for word in arguments if not word.startswith("-")), None)
    for name in sorted(COMMANDS):
        COMMANDS[name].add_to(commands, whole=name == asked)
    return parser


def _import_classes(modules):
    """Import what registers with Keras the classes that a model may be made of: the library, and a user's modules."""
    package = sys.modules["keras_sparse"]
    for name in dir(package):
        getattr(package, name)
    if modules:
        sys.path.insert(0, os.getcwd())  # an installed command, unlike `python`, does not look there
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:
            raise ImportError(f"`--import {module}` failed: {type(error).__name__}: {error}") from error


def _draw(report, options):
    """Write what `--html` and `--plot`, of the commands that have them, ask for."""
    from keras_sparse import files, reports

    if getattr(options, "html", None):
        with files.replacing(options.html) as path, open(path, "w", encoding="utf-8") as file:
            file.write(reports.html_page(report.title, report))
    if getattr(options, "plot", None):
        with files.replacing(options.plot) as path:
            report.plot().savefig(path)


def _print(result):
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a table's lines, on a stream that has no such characters
    if sys.stdout.isatty() and not isinstance(result, str):
        from rich.console import Console

        Console(highlight=False).print(result)
    else:
        print(result)
    sys.stdout.flush()
