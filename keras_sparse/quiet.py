"""Quiet is a stretch of a program in which nothing that TensorFlow prints, from C++ too, reaches the terminal."""

import contextlib
import importlib.util
import io
import logging
import os
import sys
import threading
import time
import warnings

__all__ = ["progress_bar", "quiet", "shows_progress"]

_LONG = 2.0  # seconds after which a progress bar appears

_REDIRECTION = threading.RLock()


@contextlib.contextmanager
def quiet():
    """Keep what TensorFlow, TFLite and the libraries around them print off the terminal, from C++ too.

    `TF_CPP_MIN_LOG_LEVEL` does not silence the import of TensorFlow (2.21), nor the converter, so the file descriptors
    1 and 2 themselves are redirected, together with Python's streams, log messages and warnings. Exceptions pass.

    Yields:
        `(stdout, stderr)`: text streams that still reach where `sys.stdout` and `sys.stderr` went before, for a
        progress bar.

    Example:

    >>> import os
    >>> from keras_sparse.quiet import quiet
    >>> with quiet() as (stdout, stderr):
    ...     _ = os.write(2, b"from C++")
    ...     print("from Python")
    ...     print("to the terminal", file=stdout)
    to the terminal
    """
    with _REDIRECTION, contextlib.ExitStack() as stack:
        kept = []
        with open(os.devnull, "w") as void:
            for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
                with contextlib.suppress(AttributeError, OSError, ValueError):  # None, or closed
                    stream.flush()  # what was printed before belongs to the terminal
                try:
                    saved = os.dup(descriptor)
                except OSError:  # a process without a terminal may have closed it
                    kept.append(stream)
                    continue
                stack.callback(_restore, descriptor, saved)
                kept.append(stack.enter_context(_same_target(stream, descriptor, saved)))
                os.dup2(void.fileno(), descriptor)
        for name in ("tensorflow", "absl"):
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield tuple(kept)


def _restore(descriptor, saved):
    os.dup2(saved, descriptor)
    os.close(saved)


@contextlib.contextmanager
def _same_target(stream, descriptor, saved):
    """Yield `stream`, or, if it writes to the descriptor that is redirected, one that writes to the saved copy."""
    try:
        redirected = stream.fileno() == descriptor
    except (AttributeError, OSError, ValueError):  # a notebook's stream, pytest's, a closed one
        redirected = False
    if not redirected:
        yield stream
        return
    with open(saved, "w", buffering=1, encoding=stream.encoding, errors=stream.errors, closefd=False) as copy:
        yield copy


def shows_progress(console):
    """Whether a progress bar can be drawn: on a terminal, and in a notebook that has widgets.

    Args:
        console: A `rich.console.Console`.

    Example:

    >>> import io
    >>> from rich.console import Console
    >>> from keras_sparse.quiet import shows_progress
    >>> shows_progress(Console(file=io.StringIO())), shows_progress(Console(force_terminal=True))
    (False, True)
    """
    return console.is_terminal or (console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None)


@contextlib.contextmanager
def progress_bar(title, total=None, console=None):
    """Yield a function that counts a step; a bar appears if it takes long, on a terminal or in a notebook.

    Args:
        title: What is being done.
        total: How many steps there will be, if that is known.
        console: A `rich.console.Console`. `None`: stderr.

    Example:

    >>> from keras_sparse.quiet import progress_bar
    >>> with progress_bar("counting", total=2) as advance:
    ...     advance()
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True) if console is None else console
    progress = Progress(console=console, transient=True, disable=not shows_progress(console))
    task, start, running = progress.add_task(title, total=total), time.perf_counter(), []

    def advance():
        progress.advance(task)
        if not running and time.perf_counter() - start > _LONG:
            progress.start()
            running.append(True)

    try:
        yield advance
    finally:
        if running:
            progress.stop()
