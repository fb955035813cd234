"""SwiftShader is a software driver for Vulkan: with it LiteRT's GPU accelerator computes on machines without a GPU."""

import shutil

from keras_sparse.tflite.commands import RuntimeMissing
from keras_sparse.tflite.debian import call, prepared

__all__ = ["setup_gpu"]

_FILES = ("libvk_swiftshader.so", "vk_swiftshader_icd.json", "libvulkan.so.1")
_FAILED = "Setting up the GPU runtime failed; `apt-get update` may be needed first."


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
    with prepared("swiftshader", folder) as (target, made, aside):
        aside.chmod(0o755)  # apt-get downloads as a user of its own
        call(["apt-get", "download", "-q", "chromium"], _FAILED, cwd=aside)
        for archive in aside.glob("*.deb"):
            call(["dpkg", "-x", str(archive), "package"], _FAILED, cwd=aside)
        for name in _FILES:
            found = next((aside / "package").rglob(name), None)
            if found is None:
                raise RuntimeMissing(f"Debian's package of Chromium holds no {name}.")
            shutil.copy(found, made / name)
    return target
