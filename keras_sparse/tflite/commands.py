"""A command starts the worker of a runtime: the programs that it needs are found, or an error says how to get them."""

import importlib.util
import os
import pathlib
import platform
import shutil
import sys

__all__ = ["LITERTJS", "RUNTIMES", "RuntimeMissing", "arm64_python", "available", "cache_folder", "command", "program"]

RUNTIMES = ("native", "x86-no-avx", "wasm", "arm64")
LITERTJS = "@litertjs/core@2.5.3"  # what we know of WebAssembly was measured with this version

_HERE = pathlib.Path(__file__).parent


class RuntimeMissing(OSError):
    """A runtime that is not installed here; the message says what to install.

    Example:

    >>> from keras_sparse.tflite.commands import RuntimeMissing
    >>> issubclass(RuntimeMissing, OSError)
    True
    """


def available():
    """Tell which runtimes can be used on this machine.

    Returns:
        Dict from the name of each runtime to `None` if it can be used, or else the sentence that says what is missing.

    Example:

    >>> import keras_sparse as ks
    >>> list(ks.tflite.runtimes.available())
    ['native', 'x86-no-avx', 'wasm', 'arm64']
    """
    found = {}
    for runtime in RUNTIMES:
        try:
            command(runtime)
            found[runtime] = None
        except RuntimeMissing as error:
            found[runtime] = str(error)
    return found


def command(runtime, folder="."):
    """The command line, and what must be set in its environment, that start the worker of a runtime.

    Args:
        runtime: One of `RUNTIMES`.
        folder: Where the worker may leave files: `"arm64"` writes the number of executed instructions to `counts`.

    Returns:
        `(list of strings, dict)`.

    Raises:
        RuntimeMissing: If it is not installed.

    Example:

    >>> from keras_sparse.tflite.commands import command
    >>> command("native")[0][1:2]
    ['-P']
    """
    script = str(_HERE / "worker.py")
    if runtime == "wasm":
        node = program("node", "Node.js 20 or newer, from https://nodejs.org or your system's package `nodejs`")
        return [node, str(_HERE / "worker.mjs"), str(_litertjs()), str(folder)], {}
    environment = {"PYTHONPATH": _packages()}
    if runtime == "native":
        return [sys.executable, "-P", script], environment
    if sys.platform != "linux":
        raise RuntimeMissing(f"The runtime {runtime!r} needs QEMU's user mode emulation, which exists on Linux only.")
    if runtime == "x86-no-avx":
        if platform.machine() != "x86_64":
            raise RuntimeMissing(f"The runtime {runtime!r} needs an x86_64 CPU. Received: {platform.machine()}")
        # OpenBLAS asks the real CPU, finds AVX, and dies of an illegal instruction.
        environment["OPENBLAS_CORETYPE"] = "Nehalem"
        return [program("qemu-x86_64", _QEMU), "-cpu", "Nehalem", sys.executable, "-P", script], environment
    root = cache_folder() / "arm64"
    if not (root / "instructions.so").exists():
        raise RuntimeMissing(
            "The runtime 'arm64' is not set up. Run `keras-sparse setup-arm64` (on Debian), or set "
            f"KERAS_SPARSE_CACHE to the folder in which it was set up. Looked for: {root}"
        )
    line = arm64_python(root, root / "instructions.so", os.path.join(folder, "counts"))
    return [*line, "-P", script], {}


def arm64_python(root, plugin, counts):
    """The command line of the ARM64 Python below `root` in an emulator that counts instructions.

    Example:

    >>> from keras_sparse.tflite.commands import RuntimeMissing, arm64_python
    >>> try:
    ...     arm64_python("/nowhere", "instructions.so", "counts")
    ... except RuntimeMissing as error:
    ...     print("not installed")
    not installed
    """
    root = pathlib.Path(root)
    pythons = sorted(root.glob("usr/bin/python3.[0-9][0-9]"))
    if not pythons:
        raise RuntimeMissing(
            f"There is no Python for ARM64; run `keras-sparse setup-arm64`. Looked for: {root}/usr/bin"
        )
    variables = {
        "PYTHONPATH": root / "site",
        "PYTHONHOME": root / "usr",
        "PYTHONHASHSEED": "0",  # the same instructions each time
        "PYTHONDONTWRITEBYTECODE": "1",
        "OPENBLAS_CORETYPE": "ARMV8",
    }
    # The default CPU has SME, which no phone had when XNNPACK's rules were measured, and takes another path there.
    line = [program("qemu-aarch64", _QEMU), "-cpu", "cortex-a76", "-L", str(root), "-plugin", f"{plugin},out={counts}"]
    for name, value in variables.items():
        line += ["-E", f"{name}={value}"]
    return [*line, str(pythons[0])]


def program(name, source):
    """Path of a program, or a `RuntimeMissing` that says where to get it.

    Example:

    >>> from keras_sparse.tflite.commands import program
    >>> program("no-such-program", "nowhere")
    Traceback (most recent call last):
    ...
    keras_sparse.tflite.commands.RuntimeMissing: The program `no-such-program` is not on the PATH. Install nowhere.
    """
    found = shutil.which(name)
    if found is None:
        raise RuntimeMissing(f"The program `{name}` is not on the PATH. Install {source}.")
    return found


def cache_folder():
    """The folder in which runtimes are looked for and set up: `KERAS_SPARSE_CACHE`, or one in the user's cache.

    Example:

    >>> from keras_sparse.tflite.commands import cache_folder
    >>> cache_folder().is_absolute()
    True
    """
    folder = os.environ.get("KERAS_SPARSE_CACHE")
    if not folder:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"), "keras_sparse")
    return pathlib.Path(folder).expanduser().absolute()


_QEMU = "QEMU's user mode emulation: `apt-get install qemu-user`"


def _litertjs():
    """Where npm has put LiteRT.js: as Node looks for it, from the current folder upward, then in the cache folder."""
    current = pathlib.Path.cwd()
    for folder in (current, *current.parents, cache_folder()):
        package = folder / "node_modules" / "@litertjs" / "core"
        if (package / "package.json").exists():
            return package
    raise RuntimeMissing(
        "The runtime 'wasm' needs LiteRT.js. "
        f"Run `npm install --legacy-peer-deps --prefix {cache_folder()} {LITERTJS}`, "
        f"or without --prefix in the current folder. Looked for: node_modules in {current} and above, and in the cache"
    )


def _packages():
    """Folders of the packages that the worker imports: this Python may know them from `sys.path` alone."""
    specs = [importlib.util.find_spec(name) for name in ("ai_edge_litert", "numpy")]
    return os.pathsep.join(dict.fromkeys(os.path.dirname(os.path.dirname(spec.origin)) for spec in specs))
