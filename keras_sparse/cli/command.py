"""A command is a function with the arguments that it takes from the command line and an example of its use.

A command is registered by the decorator `command`, in a module of `keras_sparse.cli`. That module imports the library
inside of its functions: `keras-sparse --help` is to answer before Keras is imported. What an argument's choices are is
asked when they are needed, for the same reason.
"""

import argparse
import pkgutil

__all__ = ["COMMANDS", "Command", "argument", "command", "drawing", "saved_model"]

COMMANDS = {}


class Command:
    """One command.

    Args:
        function: Takes the parsed options and the stream for progress bars; returns a `Report`. Its name, without `_`
            at its ends, names the command; its docstring is the help.
        arguments: Functions that add themselves to an `argparse.ArgumentParser`.
        example: What to write behind the command's name.

    Example:

    >>> from keras_sparse.cli.command import Command, argument
    >>> def _setup_x(options, stderr):
    ...     "Set x up."
    >>> made = Command(_setup_x, [argument("--force", action="store_true")], "--force")
    >>> made.name, made.summary
    ('setup-x', 'Set x up.')
    """

    def __init__(self, function, arguments, example):
        self.function = function
        self.name, self.summary = function.__name__.strip("_").replace("_", "-"), function.__doc__
        self._arguments, self._example = arguments, example

    def add_to(self, commands, whole):
        """Add the command's parser to argparse's `commands`: with its arguments if `whole`, else with its summary."""
        parser = commands.add_parser(
            self.name,
            help=self.summary,
            description=self.summary,
            epilog=f"example:\n  keras-sparse {self.name} {self._example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.set_defaults(command=self.function, modules=[])
        if whole:
            for add in self._arguments:
                add(parser)
            parser.add_argument("--full", action="store_true", help="print all rows and columns, however wide")
            parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def command(*arguments, example=""):
    """Decorator: make a function a command; see `Command`.

    Example:

    >>> from keras_sparse.cli.command import COMMANDS, argument, command
    >>> @command(argument("file"), example="model.tflite")
    ... def _show(options, stderr):
    ...     "Show a file."
    >>> COMMANDS.pop("show").summary
    'Show a file.'
    """

    def register(function):
        made = Command(function, arguments, example)
        COMMANDS[made.name] = made
        return function

    return register


def argument(*names, choices=None, **options):
    """An argument of a command, as `argparse.ArgumentParser.add_argument` takes it.

    Args:
        names: Of the argument, such as `"-o"`, `"--output"`.
        choices: Where the names to choose from are known, as `"module:attribute"`: a registry, or a table of names or
            of objects with names. It is imported when a parser takes the argument.
        options: As in argparse.

    Returns:
        A function that adds the argument to a parser.

    Example:

    >>> import argparse
    >>> from keras_sparse.cli.command import argument
    >>> parser = argparse.ArgumentParser()
    >>> argument("--criterion", choices="keras_sparse.criteria:CRITERIA")(parser)
    >>> parser.parse_args(["--criterion", "snip"]).criterion
    'snip'
    """

    def add(parser):
        if choices is not None:
            found = pkgutil.resolve_name(choices)
            options["choices"] = [getattr(one, "name", one) for one in found if one is not None]
            options["type"] = _one_of(options["choices"])
        parser.add_argument(*names, **options)

    return add


def _one_of(names):
    """What argparse reads a choice with: the same text, or an error that asks whether another was meant."""

    def choice(text):
        from keras_sparse.registry import did_you_mean

        hint = did_you_mean(text, names) if text not in names else ""
        if hint:
            raise argparse.ArgumentTypeError(f"invalid choice: {text!r}{hint}")
        return text  # of a choice that is like none, argparse lists all

    return choice


def saved_model(parser, several=False):
    """Add the arguments of a command that loads a Keras model: its path, or paths of `several`, and `--import`.

    Example:

    >>> import argparse
    >>> from keras_sparse.cli.command import saved_model
    >>> parser = argparse.ArgumentParser()
    >>> saved_model(parser)
    >>> parser.parse_args(["m.keras", "--import", "my_layers"]).modules
    ['my_layers']
    """
    if several:
        parser.add_argument(
            "models", metavar="MODEL", nargs="+", help=".keras and .tflite files; the first is the measure"
        )
    else:
        parser.add_argument("model", metavar="MODEL.keras", help="a saved Keras model")
    parser.add_argument(
        "--import",
        dest="modules",
        metavar="MODULE",
        action="append",
        default=[],
        help="import a module first that registers the model's custom classes, from the current folder or PYTHONPATH; "
        "may be repeated",
    )


def drawing(what):
    """The arguments of a command that can draw its report: `--html` and `--plot`.

    Example:

    >>> import argparse
    >>> from keras_sparse.cli.command import drawing
    >>> parser = argparse.ArgumentParser()
    >>> drawing("the sparsity of each weight")(parser)
    >>> parser.parse_args(["--plot", "plot.svg"]).plot
    'plot.svg'
    """

    def add(parser):
        parser.add_argument("--html", metavar="FILE", help="write what is printed as an HTML page, too")
        parser.add_argument("--plot", metavar="FILE", help=f"draw {what} (.png, .svg, .pdf)")

    return add
