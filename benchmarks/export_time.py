"""Time and memory of `ks.tflite.export` against Keras's own `model.export(path, format="litert")`.

MobileNetV2 with random weights. Each way exports in a process of its own, in turns, after TensorFlow was imported and
the model built: the seconds are those of the call, CPU seconds with those of processes that it starts (converters, the
runtimes that a file is verified on). Peak memory is that of the process, from its start, and of the largest one that it
has started, added up: more than both can have held at one time. `nothing` builds the model and exports nothing.
"""

import argparse
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import result

WAYS = {
    "nothing": lambda model, path: None,
    "Keras": lambda model, path: model.export(path, format="litert", verbose=False),
    "ks, default": lambda model, path: _ours(model, path),
    "ks, target='gpu'": lambda model, path: _ours(model, path, target="gpu"),
    "ks, target='xnnpack'": lambda model, path: _ours(model, path, target="xnnpack"),
}


def _ours(model, path, **options):
    import keras_sparse as ks

    ks.tflite.export(model, path, **options)


def cpu():
    """CPU seconds of this process and those that it has started and waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def measure(way, size):
    """Export once and print what it took, as JSON."""
    import keras

    keras.utils.set_random_seed(0)
    model = keras.applications.MobileNetV2((size, size, 3), weights=None)
    with tempfile.TemporaryDirectory() as folder:
        seconds, started = cpu(), time.perf_counter()
        WAYS[way](model, f"{folder}/model.tflite")
        found = {"wall": time.perf_counter() - started, "cpu": cpu() - seconds}
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        found["MiB"] = found.get("MiB", 0) + resource.getrusage(who).ru_maxrss / 1024
    print(json.dumps(found))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=224, help="of the images, in pixels")
    parser.add_argument("--measure", choices=list(WAYS), help="export in this process, once")
    args = parser.parse_args()
    if args.measure:
        return measure(args.measure, args.size)
    load, found = result.load(), {way: [] for way in args.ways}
    for number in range(args.rounds):
        for way in args.ways[:: 1 if number % 2 else -1]:
            line = [sys.executable, str(pathlib.Path(__file__)), "--measure", way, "--size", str(args.size)]
            done = subprocess.run(line, check=True, capture_output=True, text=True)
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
            print(way, found[way][-1], flush=True)
    base, rows = found.get("Keras"), []
    for way, runs in found.items():
        row = [way]
        for key, digits in ("wall", 1), ("cpu", 1), ("MiB", 0):
            median = statistics.median(run[key] for run in runs)
            ratio = f" ({median / statistics.median(run[key] for run in base):.2f})" if base else ""
            row.append(f"{median:,.{digits}f}{ratio}")
        rows.append(row)
    columns = ["export by", "wall, s (of Keras's)", "CPU, s (of Keras's)", "peak memory, MiB (of Keras's)"]
    result.show(f"Export of MobileNetV2, {args.size} px, median of {args.rounds}", columns, rows, load_before=load)


if __name__ == "__main__":
    main()
