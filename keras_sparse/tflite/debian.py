"""Debian's packages are taken apart in a folder of our own; nothing is installed in the system."""

import contextlib
import os
import pathlib
import shutil
import subprocess
import tempfile

from keras_sparse.tflite.commands import RuntimeMissing, cache_folder, program

__all__ = ["call", "prepared"]


@contextlib.contextmanager
def prepared(name, folder=None):
    """Make a folder aside, and put it in its place if the block succeeds.

    Args:
        name: Its name in `ks.tflite.commands.cache_folder()`, where `folder` is `None`.
        folder: The folder; it is replaced.

    Yields:
        `(target, made, aside)`, paths: the folder, the empty one that will be it, and one for what is needed meanwhile.

    Raises:
        RuntimeMissing: If Debian's package tools are missing.

    Example:

    >>> import tempfile
    >>> from keras_sparse.tflite.debian import prepared
    >>> with tempfile.TemporaryDirectory() as place:
    ...     with prepared("tool", f"{place}/tool") as (target, made, aside):  # doctest: +SKIP
    ...         (made / "program").touch()
    """
    target = pathlib.Path(folder).absolute() if folder is not None else cache_folder() / name
    for tool in ("apt-get", "dpkg"):
        program(tool, "Debian's package tools; they exist on Debian only")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=target.parent) as temporary:
        aside = pathlib.Path(temporary)
        made = aside / "made"
        made.mkdir()
        yield target, made, aside
        shutil.rmtree(target, ignore_errors=True)
        os.replace(made, target)


def call(line, failed, **options):
    """Run a program.

    Args:
        line: Its command line, a list.
        failed: What is said, before how it ended, if it fails.
        options: For `subprocess.run`.

    Raises:
        RuntimeMissing: If it fails.

    Example:

    >>> from keras_sparse.tflite.debian import call
    >>> call(["false"], "No tool.")
    Traceback (most recent call last):
    ...
    keras_sparse.tflite.commands.RuntimeMissing: No tool. Received: `false ...` ended with exit status 1 ()
    """
    run = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, text=True, **options)
    if run.returncode:
        raise RuntimeMissing(
            f"{failed} Received: `{' '.join(line[:3])} ...` ended with exit status {run.returncode} "
            f"({(run.stderr or run.stdout).strip()[-300:]})"
        )
