"""A result is a Markdown table, printed under the machine, the versions and the command that made it."""

import importlib.metadata
import os
import pathlib
import platform
import statistics
import sys

import numpy as np

# TensorFlow's banners are not part of a result, and the machine is its CPU. To be set before TensorFlow is imported.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

PACKAGES = ("tensorflow", "keras", "tensorflow-model-optimization", "tf_keras", "jax", "torch", "numpy")


def processor():
    """Return the processor's name and the number of cores that this process may use."""
    names = [platform.processor() or platform.machine()]
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return names[0], cores


def versions(packages=PACKAGES):
    """Return `"python 3.11.2, tensorflow 2.21.0, ..."` for those of `packages` that are installed."""
    found = [f"Python {platform.python_version()}"]
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def load():
    """Return the mean number of runnable processes over the last minute: above 1, someone else was at work too."""
    return os.getloadavg()[0]


def show(title, columns, rows, notes=(), load_before=None):
    """Print a table.

    Args:
        title: What was measured.
        columns: The column heads.
        rows: Lists of strings, one per column.
        notes: Lines printed under the table.
        load_before: The load average before the measurement.
    """
    name, cores = processor()
    print(f"\n### {title}\n")
    print(f"* Command: `python {' '.join([os.path.relpath(sys.argv[0]), *sys.argv[1:]])}`")
    print(f"* Machine: {name}, {cores} cores, all of them for the frameworks' threads; {platform.system()}")
    print(f"* Versions: {versions()}")
    if load_before is not None:
        print(f"* Load average before: {load_before:.1f}")
    print()
    print("| " + " | ".join(columns) + " |")
    print("| " + " | ".join("---" for _ in columns) + " |")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()
    for note in notes:
        print(note)


def mean_and_spread(values):
    """Return `"1.23 ± 0.04 %"`, the mean and the standard deviation of percentages, one for each seed."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {spread:.2f} %"


def bootstrap_median(groups, seed=0, samples=4000):
    """Return the median of all values and its 95 % bootstrap interval.

    Values of one launch share what that launch's processes share (memory layout, for example), so launches are drawn
    first and values within them second.

    Args:
        groups: List of arrays of values, one per launch.
        seed: Seed of the draws.
        samples: Number of draws.

    Returns:
        `(median, low, high)`.
    """
    groups = [np.asarray(group, float) for group in groups]
    rng = np.random.default_rng(seed)
    medians = []
    for _ in range(samples):
        drawn = [groups[i] for i in rng.integers(len(groups), size=len(groups))]
        medians.append(np.median(np.concatenate([rng.choice(group, group.size) for group in drawn])))
    return float(np.median(np.concatenate(groups))), *(float(q) for q in np.quantile(medians, [0.025, 0.975]))
