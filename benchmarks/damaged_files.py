"""Damaged .tflite files through `inspect`, and `benchmark` and `ks.compare` or a run on one of the other runtimes.

Bits are flipped, files cut short, offsets set wild, bytes blanked and moved: each seed damages one of the files of the
tests in its own way (tflite_mutations.py), which was exported for the runtime. Right is an answer that makes sense or a
clean error (`ValueError`, `OSError`), in bounded time and memory; anything else ends this program with the seed.
"""

import argparse
import collections
import concurrent.futures
import pathlib
import resource
import sys
import tempfile
import time

import numpy as np
import result

import keras_sparse as ks
from keras_sparse.tflite.runtimes import RUNTIMES, Worker

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests" / "support"))
import tflite_models
from tflite_mutations import attempt, inspected, mutate, outcome

MODELS = ("mlp", "several", "attention", "lstm", "qualifying")
EXPORTED = {  # what the files of a runtime are exported with
    "native": {"target": "xnnpack"},
    "wasm": {"target": "xnnpack"},
    "compiled-cpu": {"target": "xnnpack-x86", "batch_size": 1},
    "gpu": {"target": "gpu"},
    "gpu-cpu": {"target": "gpu"},
    "micro": {"target": "micro"},
    "ethos-u": {"target": "ethos-u85", "quantize": "int8"},
}
NPU = "ethos-u85-128"
COMPARED = ("native", "wasm")  # by `benchmark` and `ks.compare`


def contents(folder, options):
    """The undamaged files: content, inputs and outputs of the model."""
    rng = np.random.default_rng(0)
    for name in MODELS:
        model = getattr(tflite_models, name)()
        if name != "qualifying":
            model = tflite_models.sparsify(model, 0.9, blocks=name == "mlp")
        x = {each.name: rng.integers(0, 9, (2, *each.shape[1:])).astype(each.dtype) for each in model.inputs}
        x = x if len(x) > 1 else x.popitem()[1]
        try:
            ks.tflite.export(model, folder / "whole.tflite", representative_data=x, **options)
        except ks.tflite.ExportError as error:
            print(f"No file of {name}: {str(error).splitlines()[0][:160]}", flush=True)
            continue
        yield (folder / "whole.tflite").read_bytes(), x, model.predict(x, verbose=0)


def compare(path, x, y):
    """Compare a file's outputs with the model's."""
    report = ks.compare({"damaged": path}, x, y, ["mean_absolute_error"], seconds=0.01, timeout=20)
    assert not any(value < 0 for name, value in report.rows[0].items() if name.endswith("mean_absolute_error"))
    assert str(report) and report.to_json()


def ran(path, runtime):
    """Load a file and run it on random inputs, or compile it."""
    with Worker(path, runtime, timeout=20) as worker:
        if not RUNTIMES[runtime].runs:
            made = worker.compile(NPU)
            assert made["cycles"] >= 0 and made["npu_operators"] + made["cpu_operators"] >= 0
            return
        worker.feed()
        outputs = worker.run()
        assert set(outputs) == set(worker.outputs)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--runtime", choices=list(EXPORTED), default="native")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    load = result.load()
    counts, slowest = collections.Counter(), (0.0, None)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        whole = list(contents(folder, EXPORTED[args.runtime]))

        def one(seed):
            path, (content, x, y) = folder / f"{seed}.tflite", whole[seed % len(whole)]
            path.write_bytes(mutate(content, seed))
            start = time.perf_counter()
            try:
                if args.runtime in COMPARED:
                    found = (*outcome(path, runtime=args.runtime), attempt(compare, path, x, y))
                else:
                    found = attempt(inspected, path), attempt(ran, path, args.runtime)
                return found, time.perf_counter() - start
            except BaseException as error:
                raise SystemExit(f"seed {seed}: {type(error).__name__}: {error}") from error
            finally:
                path.unlink()

        with concurrent.futures.ThreadPoolExecutor(args.processes) as pool:
            seeds = range(args.first, args.first + args.files)
            for seed, (found, seconds) in zip(seeds, pool.map(one, seeds), strict=True):
                counts[found] += 1
                slowest = max(slowest, (seconds, seed))
    rows = [[*found, f"{count:,d}"] for found, count in counts.most_common()]
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    notes = [f"Slowest: {slowest[0]:.1f} s (seed {slowest[1]}). Most memory of a process: {largest:,.0f} MiB."]
    calls = ("`inspect`", "`benchmark`", "`compare`") if args.runtime in COMPARED else ("`inspect`", "run")
    title = f"{args.files:,d} damaged files on the runtime {args.runtime}"
    result.show(title, [*calls, "files"], rows, notes, load_before=load)


if __name__ == "__main__":
    main()
