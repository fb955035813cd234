"""An ARM64 Python is set up from Debian's and PyPI's packages, for an emulator that counts its instructions."""

import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys

from keras_sparse.quiet import quiet
from keras_sparse.tflite.commands import RuntimeMissing, arm64_python, program
from keras_sparse.tflite.debian import call, prepared

__all__ = ["setup_arm64"]

_APT = """
APT::Architecture "arm64";
APT::Architectures {{ "arm64"; }};
APT::Install-Recommends "false";
APT::Sandbox::User "";
Dir::State "{folder}/state";
Dir::State::status "{folder}/status";
Dir::Cache "{folder}/cache";
"""
_PLATFORMS = ("manylinux_2_31", "manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")
# XNNPACK asks /proc and /sys what CPU it is on. The emulator shows it the host's, which cpuinfo does not understand
# (ai-edge-litert 2.3 crashes), unless the same file exists below its root: the core of a Cortex-A76 phone.
_CPU = {
    "proc/cpuinfo": """processor\t: 0
BogoMIPS\t: 243.75
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0b
CPU revision\t: 1

""",
    **{f"sys/devices/system/cpu/{name}": "0\n" for name in ("possible", "present", "online", "kernel_max")},
    **{
        f"sys/devices/system/cpu/cpu0/{name}": f"{value}\n"
        for name, value in {
            "topology/physical_package_id": 0,
            "topology/core_id": 0,
            "topology/core_siblings_list": 0,
            "topology/cluster_cpus_list": 0,
            "topology/thread_siblings_list": 0,
            "cpufreq/cpuinfo_max_freq": 2000000,
            "cpufreq/cpuinfo_min_freq": 1000000,
        }.items()
    },
}
# With all that the worker imports: the bytecode of these is kept, and to compile it takes an emulator seconds.
_CHECK = """
import contextlib, fcntl, importlib, json, os, queue, resource, runpy, select, signal, threading
import ai_edge_litert.interpreter
os.getppid(); os.getppid()
"""


def setup_arm64(folder=None):
    """Set up the runtime `"arm64"`: Python, NumPy and ai-edge-litert for ARM64, and a counter of its instructions.

    About 60 MB are downloaded, with apt-get and pip, into a folder; nothing is installed in the system. Needs Debian
    (Ubuntu's mirrors keep ARM64 elsewhere), `qemu-aarch64` (`apt-get install qemu-user`) and a C compiler
    (`apt-get install gcc libc6-dev`).

    Args:
        folder: Where to set it up; it is replaced. `None`: where the runtime is looked for, `arm64` in
            `ks.tflite.commands.cache_folder()`.

    Returns:
        The folder, a `pathlib.Path`.

    Raises:
        RuntimeMissing: If a program is missing, or a step fails; an `OSError`. The folder is as it was before.

    Example:

    >>> import keras_sparse as ks
    >>> folder = ks.tflite.setup_arm64()  # doctest: +SKIP
    """
    if sys.platform != "linux":
        raise RuntimeMissing(f"The ARM64 runtime can be set up on Linux only. Received: {sys.platform}")
    compiler = program(os.environ.get("CC", "cc"), "a C compiler: `apt-get install gcc libc6-dev`")
    with prepared("arm64", folder) as (target, root, temporary), quiet():
        _unpack_python(temporary, root)
        for name, content in _CPU.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(content)
        _unpack_wheels(temporary, root)
        _build_counter(compiler, temporary, root)
    return target


def _unpack_python(temporary, root):
    """Debian's Python, by an apt of its own that knows no installed package."""
    apt = temporary / "apt"
    for name in ("state/lists/partial", "cache/archives/partial"):
        (apt / name).mkdir(parents=True)
    (apt / "status").touch()
    (apt / "apt.conf").write_text(_APT.format(folder=apt))
    environment = os.environ | {"APT_CONFIG": str(apt / "apt.conf"), "DEBIAN_FRONTEND": "noninteractive"}
    _call(["apt-get", "update", "-q"], environment)
    _call(["apt-get", "install", "-y", "-q", "--download-only", "python3", "libstdc++6"], environment)
    archives = sorted((apt / "cache" / "archives").glob("*.deb"))
    for archive in archives:
        _call(["dpkg", "-x", str(archive), str(root)])
    if not (root / "lib").exists() and (root / "usr" / "lib").exists():  # packages since Debian 13 leave /lib to a link
        for name in ("lib", "bin"):
            (root / name).symlink_to(f"usr/{name}")


def _unpack_wheels(temporary, root):
    """The runtime in the version that is installed here, and what it imports."""
    python = next(iter(sorted(root.glob("usr/bin/python3.[0-9][0-9]"))), None)
    if python is None:
        raise RuntimeMissing("Debian's packages for ARM64 hold no Python.")
    platforms = [option for name in _PLATFORMS for option in ("--platform", f"{name}_aarch64")]
    litert = f"ai-edge-litert=={importlib.metadata.version('ai-edge-litert')}"
    options = ["--only-binary=:all:", "--no-deps", "--python-version", python.name.removeprefix("python")]
    wheels = temporary / "wheels"
    _call([sys.executable, "-m", "pip", "download", "-q", "-d", str(wheels), *options, *platforms, litert, "numpy"])
    for wheel in wheels.glob("*.whl"):
        shutil.unpack_archive(wheel, root / "site", "zip")


def _build_counter(compiler, temporary, root):
    source, plugin = pathlib.Path(__file__).with_name("instructions.c"), root / "instructions.so"
    counts = temporary / "counts"
    for api in (1, 2):  # QEMU takes one of them, depending on its version
        _call([compiler, "-O2", "-shared", "-fPIC", f"-DAPI={api}", "-o", str(plugin), str(source)])
        run = subprocess.run(
            [*arm64_python(root, plugin, counts), "-c", _CHECK],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        marks = counts.read_text().split() if counts.exists() else []
        if run.returncode == 0 and len(marks) >= 2 and 0 < int(marks[-1]) - int(marks[-2]) < 100_000:
            return
    raise RuntimeMissing(
        "The ARM64 Python does not run under `qemu-aarch64`, or its instructions cannot be counted. Received: exit "
        f"status {run.returncode} ({run.stderr.strip()[-300:]})"
    )


def _call(line, environment=None):
    call(line, "Setting up the ARM64 runtime failed.", env=environment)
