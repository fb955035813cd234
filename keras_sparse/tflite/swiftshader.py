"""SwiftShader is a software driver for Vulkan: with it LiteRT's GPU accelerator computes on machines without a GPU."""

import os
import pathlib
import shutil
import subprocess
import tempfile

from keras_sparse.tflite.commands import RuntimeMissing, cache_folder, program

__all__ = ["setup_gpu"]

_FILES = ("libvk_swiftshader.so", "vk_swiftshader_icd.json", "libvulkan.so.1")


def setup_gpu(folder=None):
    """Set up a driver for the runtimes `"gpu"` and `"gpu-cpu"` on a machine without a GPU.

    Debian's package of Chromium, about 80 MB, is downloaded, and SwiftShader taken out of it; nothing is installed in
    the system. Needs Debian. Where Chromium is installed, or a GPU with a Vulkan driver, nothing needs to be set up.

    Args:
        folder: Where to put it; it is replaced. `None`: where it is looked for, `swiftshader` in
            `ks.tflite.commands.cache_folder()`.

    Returns:
        The folder, a `pathlib.Path`.

    Raises:
        RuntimeMissing: If a program is missing, or a step fails; an `OSError`. The folder is as it was before.

    Example:

    >>> import keras_sparse as ks
    >>> folder = ks.tflite.setup_gpu()  # doctest: +SKIP
    """
    target = pathlib.Path(folder).absolute() if folder is not None else cache_folder() / "swiftshader"
    for name in ("apt-get", "dpkg"):
        program(name, "Debian's package tools; they exist on Debian only")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="swiftshader-", dir=target.parent) as temporary:
        temporary = pathlib.Path(temporary)
        temporary.chmod(0o755)  # apt-get downloads as a user of its own
        _call(["apt-get", "download", "-q", "chromium"], temporary)
        for archive in temporary.glob("*.deb"):
            _call(["dpkg", "-x", str(archive), "package"], temporary)
        made = temporary / "made"
        made.mkdir()
        for name in _FILES:
            found = next((temporary / "package").rglob(name), None)
            if found is None:
                raise RuntimeMissing(f"Debian's package of Chromium holds no {name}.")
            shutil.copy(found, made / name)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(made, target)
    return target


def _call(line, folder):
    run = subprocess.run(line, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeMissing(
            "Setting up the GPU runtime failed; `apt-get update` may be needed first. Received: "
            f"`{' '.join(line[:3])} ...` ended with exit status {run.returncode} ({run.stderr.strip()[-300:]})"
        )
