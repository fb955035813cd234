"""A runtime is a program that runs .tflite files: how it is started here, or what is missing, and what it can tell.

Whoever asks something of a runtime reads it from its `Runtime`. To add one, write a worker that answers the requests of
`worker.py`, a function that starts it, and an entry in `RUNTIMES`.
"""

import importlib.util
import os
import pathlib
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

from keras_sparse.registry import did_you_mean

__all__ = [
    "COMPILERS", "LITERTJS", "MEASURING", "RUNTIMES", "TIMING", "Runtime", "RuntimeMissing", "arm64_python",
    "available", "cache_folder", "get", "gpu_driver", "program", "python_worker",
]  # fmt: skip

LITERTJS = "@litertjs/core@2.5.3"  # what we know of WebAssembly was measured with this version

_HERE = pathlib.Path(__file__).parent
_WORKER = str(_HERE / "worker.py")
_CHROMIUM = ("/usr/lib/chromium", "/usr/lib/chromium-browser")  # where Debian's and others' packages put it
_HARDWARE = ("dri/renderD*", "nvidia[0-9]*")  # devices below /dev
_GPU = (
    "The runtimes 'gpu' and 'gpu-cpu' need a Vulkan driver. Without a GPU: `apt-get install chromium` brings "
    "SwiftShader, a software driver; `keras-sparse setup-gpu` takes it out of Debian's package without installing that."
)
_QEMU = "QEMU's user mode emulation: `apt-get install qemu-user`"


class RuntimeMissing(OSError):
    """A runtime that is not installed here; the message says what to install.

    Example:

    >>> from keras_sparse.tflite.commands import RuntimeMissing
    >>> issubclass(RuntimeMissing, OSError)
    True
    """


@dataclass(frozen=True)
class Runtime:
    """A program that runs .tflite files, and what can be asked of it.

    Attributes:
        name: What functions call it.
        title: What people call it.
        start: Function of a folder, in which the worker may leave files. It returns the command line that starts the
            worker and what must be set in its environment, `(list of strings, dict)`; `RuntimeMissing` if it is not
            installed.
        sparse_convolutions: Whether XNNPACK's sparse kernels for convolutions are on there.
        verifies: Whether `ks.tflite.export` compares files there if sparse kernels could touch them.
        thorough: Whether it is compared on all inputs; if not, on a few, because it is slow.
        counts: What `ks.tflite.benchmark` measures there: `"seconds"`, `"instructions"`, `"cycles"`, or `None` where
            none would mean anything.
        resizes: Whether it runs batches of other sizes than the one that the file is made for.
        tells_memory: Whether the memory of its process says something of the file's.
        max_threads: How many threads it takes; `None`: any number.
        runs: Whether it runs files; a compiler does not.
        precision: What it computes floats in; `"float16"` where a GPU may.
        says: Regular expression of what it prints where its errors do not tell the reason.
        absent: Regular expression of what it prints where its driver turns out to be missing, and
        install: what to do about that.

    Example:

    >>> from keras_sparse.tflite.commands import RUNTIMES
    >>> [name for name, runtime in RUNTIMES.items() if runtime.counts == "instructions"]
    ['arm64']
    """

    name: str
    title: str
    start: Callable
    sparse_convolutions: bool
    verifies: bool = False
    thorough: bool = False
    counts: str | None = None
    resizes: bool = True
    tells_memory: bool = True
    max_threads: int | None = None
    runs: bool = True
    precision: str = "float32"
    says: str = ""
    absent: str = ""
    install: str = ""

    def missing(self):
        """The sentence that says what is missing here, or `None` if the runtime can be used."""
        try:
            self.start(".")
        except RuntimeMissing as error:
            return str(error)
        return None


def available():
    """Tell which runtimes can be used on this machine.

    Returns:
        Dict from the name of each runtime to `None` if it can be used, or else the sentence that says what is missing.

    Example:

    >>> import keras_sparse as ks
    >>> list(ks.tflite.runtimes.available())
    ['native', 'x86-no-avx', 'wasm', 'arm64', 'compiled-cpu', 'gpu', 'gpu-cpu', 'micro', 'ethos-u']
    """
    return {name: runtime.missing() for name, runtime in RUNTIMES.items()}


def get(name, among=None):
    """Return the `Runtime` of a name.

    Args:
        name: A string.
        among: Dict of the runtimes that may be chosen; `None`: all, `RUNTIMES`.

    Raises:
        ValueError: If there is no such runtime.

    Example:

    >>> from keras_sparse.tflite.commands import get
    >>> get("wasm").title
    'LiteRT.js, WebAssembly in Node'
    """
    among = RUNTIMES if among is None else among
    if not isinstance(name, str) or name not in among:
        hint = did_you_mean(name, among)
        raise ValueError(f"`runtime` must be one of {', '.join(map(repr, among))}. Received: runtime={name!r}{hint}")
    return among[name]


def _start_native(folder):
    return python_worker("ai_edge_litert")


def python_worker(package, *engine, install=""):
    """The command line of the worker under this Python, and what must be set in its environment.

    Args:
        package: Name of the package that it imports, besides NumPy: this Python may know it from `sys.path` alone.
        engine: Name of the module beside `worker.py` that holds what runs the file, and what that is made with.
        install: What to install if the package is missing.

    Raises:
        RuntimeMissing: If it is.

    Example:

    >>> from keras_sparse.tflite.commands import python_worker
    >>> line, environment = python_worker("ai_edge_litert")
    >>> line[1], list(environment)
    ('-PS', ['PYTHONPATH'])
    """
    specs = [importlib.util.find_spec(name) for name in (package, "numpy")]
    if None in specs:
        raise RuntimeMissing(install)
    folders = [os.path.dirname(next(iter(spec.submodule_search_locations))) for spec in specs]
    # What these two import. What else this Python runs at its start (`-S`) takes half of that under an emulator.
    folders += [path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")]
    script = [str(_HERE / f"{engine[0]}.py"), *engine[1:]] if engine else []
    return [sys.executable, "-PS", _WORKER, *script], {"PYTHONPATH": os.pathsep.join(dict.fromkeys(folders))}


def _start_without_avx(folder):
    if sys.platform != "linux":
        raise RuntimeMissing("The runtime 'x86-no-avx' needs QEMU's user mode emulation, which exists on Linux only.")
    if platform.machine() != "x86_64":
        raise RuntimeMissing(f"The runtime 'x86-no-avx' needs an x86_64 CPU. Received: {platform.machine()}")
    line, environment = _start_native(folder)
    # OpenBLAS asks the real CPU, finds AVX, and dies of an illegal instruction.
    environment["OPENBLAS_CORETYPE"] = "Nehalem"
    return [program("qemu-x86_64", _QEMU), "-cpu", "Nehalem", *line], environment


def _start_node(folder):
    node = program("node", "Node.js 20 or newer, from https://nodejs.org or your system's package `nodejs`")
    return [node, str(_HERE / "worker.mjs"), str(_litertjs()), str(folder)], {}


def _start_arm64(folder):
    """The worker writes the number of executed instructions to `counts` in the folder."""
    if sys.platform != "linux":
        raise RuntimeMissing("The runtime 'arm64' needs QEMU's user mode emulation, which exists on Linux only.")
    root = cache_folder() / "arm64"
    if not (root / "instructions.so").exists():
        raise RuntimeMissing(
            "The runtime 'arm64' is not set up. Run `keras-sparse setup-arm64` (on Debian), or set "
            f"KERAS_SPARSE_CACHE to the folder in which it was set up. Looked for: {root}"
        )
    line = arm64_python(root, root / "instructions.so", os.path.join(folder, "counts"))
    return [*line, "-BPS", _WORKER], {}  # what is compiled was when it was set up


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
        "OPENBLAS_CORETYPE": "ARMV8",
    }
    # The default CPU has SME, which no phone had when XNNPACK's rules were measured, and takes another path there.
    line = [program("qemu-aarch64", _QEMU), "-cpu", "cortex-a76", "-L", str(root), "-plugin", f"{plugin},out={counts}"]
    for name, value in variables.items():
        line += ["-E", f"{name}={value}"]
    return [*line, "-U", "PYTHONDONTWRITEBYTECODE", str(pythons[0])]


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


def _has_avx():
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        return re.search(r"^flags\s*:.*\bavx\b", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE) is not None
    except OSError:  # not Linux; CPUs without AVX are from before 2013
        return True


def _start_compiled(accelerators):
    return lambda folder: python_worker("ai_edge_litert", "compiled", accelerators)


def _start_gpu(accelerators):
    def start(folder):
        line, environment = _start_compiled(accelerators)(folder)
        return line, environment | gpu_driver()[0]

    return start


def gpu_driver(chromium=_CHROMIUM):
    """How LiteRT's GPU accelerator finds a driver here.

    On Linux it computes by Vulkan: on a GPU if there is one with a driver, else on SwiftShader, a software driver that
    Chromium brings along. `VK_DRIVER_FILES` in the environment is heeded, as by all programs that use Vulkan.

    Args:
        chromium: Folders in which a package may have put Chromium.

    Returns:
        `(environment, is_software)`: what must be set, and whether no GPU computes.

    Raises:
        RuntimeMissing: If there is none.

    Example:

    >>> from keras_sparse.tflite.commands import RuntimeMissing, gpu_driver
    >>> try:
    ...     environment, is_software = gpu_driver()
    ... except RuntimeMissing as error:
    ...     assert "setup-gpu" in str(error) or "ai-edge-litert" in str(error)
    """
    spec = importlib.util.find_spec("ai_edge_litert")
    package = pathlib.Path(next(iter(spec.submodule_search_locations)))
    if not list(package.glob("*LiteRt*GpuAccelerator*")) + list(package.glob("*LiteRt*MetalAccelerator*")):
        raise RuntimeMissing(f"ai-edge-litert brings no GPU accelerator for {sys.platform} on {platform.machine()}.")
    named = [os.environ[name] for name in ("VK_DRIVER_FILES", "VK_ICD_FILENAMES") if os.environ.get(name)]
    if sys.platform != "linux" or named:
        return {}, "swiftshader" in "".join(named)
    devices = [device for pattern in _HARDWARE for device in pathlib.Path("/dev").glob(pattern)]
    manifests = [
        file for folder in ("/usr/share", "/etc") for file in pathlib.Path(folder, "vulkan/icd.d").glob("*.json")
    ]
    if devices and manifests:
        return {}, False
    for folder in (cache_folder() / "swiftshader", *map(pathlib.Path, chromium)):
        manifest = str(folder / "vk_swiftshader_icd.json")
        if os.path.exists(manifest) and (folder / "libvk_swiftshader.so").exists():
            libraries = os.pathsep.join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH")]))
            variables = {"VK_DRIVER_FILES": manifest, "VK_ICD_FILENAMES": manifest, "LD_LIBRARY_PATH": libraries}
            return variables | {"XDG_RUNTIME_DIR": tempfile.gettempdir()}, True
    raise RuntimeMissing(_GPU)


def _gpu():
    """Title, precision and measure of the GPU accelerator on what computes here."""
    try:
        software = gpu_driver()[1]
    except RuntimeMissing:
        software = True
    if software:  # its time says nothing of a GPU's
        return "software driver", {"precision": "float32", "counts": None}
    return "this machine's GPU", {"precision": "float16", "counts": "seconds"}


_GPU_PLACE, _GPU_KIND = _gpu()
_GPU_KIND |= {
    "sparse_convolutions": False,
    "resizes": False,
    "max_threads": 1,
    "says": r"^.*(?:[Oo]peration is not supported|not supported by|has dynamic-sized tensors).*$",
    "absent": "No adapters found|Failed to load Vulkan",
    "install": _GPU,
}
_MICRO = "The runtime 'micro' needs tflite-micro: `pip install --pre tflite-micro` (Linux on x86_64)."
_VELA = "The runtime 'ethos-u' needs Arm's compiler Vela: `pip install ethos-u-vela`."

RUNTIMES = {
    runtime.name: runtime
    for runtime in (
        Runtime(
            "native",
            f"ai-edge-litert on this {platform.machine()} CPU",
            _start_native,
            sparse_convolutions=not _has_avx(),  # XNNPACK has no sparse kernels for AVX, and takes its dense ones
            thorough=True,
            counts="seconds",
        ),
        Runtime(
            "x86-no-avx",
            "ai-edge-litert on an emulated x86_64 CPU without AVX",
            _start_without_avx,
            sparse_convolutions=True,
            verifies=True,
        ),
        Runtime(
            "wasm",
            "LiteRT.js, WebAssembly in Node",
            _start_node,
            sparse_convolutions=True,
            verifies=True,
            counts="seconds",
            resizes=False,
            tells_memory=False,  # the compiler of WebAssembly takes more, at its own times, than a file does
        ),
        Runtime(
            "arm64",
            "ai-edge-litert on an emulated Cortex-A76",
            _start_arm64,
            sparse_convolutions=True,
            counts="instructions",
            max_threads=1,  # the instructions of one are counted
        ),
        Runtime(
            "compiled-cpu",
            f"LiteRT's CompiledModel on this {platform.machine()} CPU",
            _start_compiled("CPU"),
            sparse_convolutions=not _has_avx(),
            counts="seconds",
            resizes=False,
        ),
        Runtime("gpu", f"LiteRT's GPU alone, {_GPU_PLACE}", _start_gpu("GPU"), **_GPU_KIND),
        Runtime(
            "gpu-cpu",
            f"LiteRT's GPU and CPU, {_GPU_PLACE}",
            _start_gpu("GPU+CPU"),
            **_GPU_KIND,
        ),
        Runtime(
            "micro",
            "TFLite Micro on this CPU",
            lambda folder: python_worker("tflite_micro", "micro", install=_MICRO),
            sparse_convolutions=False,
            resizes=False,
            max_threads=1,
            says=r"^.*(?:Failed to get registration|Didn't find op).*$",
        ),
        Runtime(
            "ethos-u",
            "Vela, the compiler for Arm's Ethos-U NPUs",
            lambda folder: python_worker("ethosu", "vela", install=_VELA),
            sparse_convolutions=False,
            counts="cycles",
            resizes=False,
            runs=False,
            max_threads=1,
        ),
    )
}
MEASURING = {name: one for name, one in RUNTIMES.items() if one.runs and one.counts is not None}
TIMING = {name: one for name, one in MEASURING.items() if one.counts == "seconds"}
COMPILERS = [runtime for runtime in RUNTIMES.values() if not runtime.runs]
