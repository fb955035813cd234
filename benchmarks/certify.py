"""What each installed runtime makes of dense and of sparse-encoded files, against what was recorded.

Small networks of each family (tflite_models.py) in each format, dense and stored without zeros, straight from the
encoder: what `ks.tflite.export` would hold back is run, too; and operators alone that a runtime is known to compute
wrong, with such beside them that it computes right. Of each file and runtime: `right`, `wrong`, `refused`, or
`in part` where some of it ran on the CPU instead; of a compiler for NPUs, what it takes and the cycles. The record
(`certified.json`) is what the rules of `ks.tflite` were written for; after a new version of a runtime, this says what
of it no longer holds. `--record` writes the record anew.
"""

import argparse
import functools
import json
import pathlib
import sys
import time

import keras
import numpy as np
import operators  # first of those that import TensorFlow: it keeps it quiet
import result

from keras_sparse.tflite import verification
from keras_sparse.tflite.commands import LITERTJS, RUNTIMES
from keras_sparse.tflite.convert import convert
from keras_sparse.tflite.encoding import encode
from keras_sparse.tflite.errors import ExportError
from keras_sparse.tflite.inputs import random_batches
from keras_sparse.tflite.job import CALIBRATED, Job
from keras_sparse.tflite.parity import Reference
from keras_sparse.tflite.runtimes import Worker, available
from keras_sparse.tflite.samples import in_batches_of
from keras_sparse.tflite.signatures import signature

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests" / "support"))
import tflite_models as models

RECORD = pathlib.Path(__file__).with_name("certified.json")
FORMATS = ("float32", "float16", "dynamic", "int8")
NETWORKS = {
    "dense layers": lambda: models.sparsify(models.mlp(), 0.9),
    "dense layers in blocks": lambda: models.sparsify(models.mlp(), 0.9, blocks=True),
    "convolutions": lambda: models.sparsify(models.cnn(), 0.9),
    "transposed convolutions": lambda: models.sparsify(models.transposed(), 0.9),
    "1x1 convolutions in XNNPACK's form": models.qualifying,
    "LSTM": lambda: models.sparsify(models.lstm(), 0.9),
    "attention": lambda: models.sparsify(models.attention(), 0.9),
    "several inputs and outputs": lambda: models.sparsify(models.several(), 0.9),
}
# Operators that a runtime computes wrong without an error, by a rule of keras_sparse.tflite.faults, and others beside
# them that it computes right: of the survey in operators.py.
ALONE_IN = ("float32", "int8")
ALONE = {
    operators.ODD: ("Conv2DTranspose 3/2 same", "Conv2DTranspose 4/2 same"),
    operators.IMAGE: (
        "Conv2DTranspose 3/2 same", "2 groups of 3 to 4", "2 groups of 4 to 4", "Conv2D 1/2 same", "Conv2D 3/2 same",
        "mean over 3", "mean over (1, 2)",
    ),
    operators.SEQUENCE: ("add a row", "Add of 8"),
}  # fmt: skip
OPERATORS = {
    f"{case[1]} of {'x'.join(map(str, case[0]))}": functools.partial(operators.network, [case])
    for case in operators.cases()
    if case[1] in ALONE.get(case[0], ())
}
PACKAGES = ("tensorflow", "ai-edge-litert", "ai-edge-litert-nightly", "tflite-micro", "ethos-u-vela")
NPU = "ethos-u85-128"


def files(name, mode):
    """`{"dense": bytes, "sparse": bytes}` of a network of fixed batch in a format, and its reference."""
    keras.utils.set_random_seed(0)
    model, rng = (NETWORKS | OPERATORS)[name](), np.random.default_rng(0)
    for weight in model.weights:  # a bias of zero hides that a runtime loses it
        if len(weight.shape) == 1 and weight.dtype == "float32":
            weight.assign(keras.ops.convert_to_numpy(weight) + rng.uniform(0.1, 0.3, weight.shape))
    called = signature(model).with_batch(1)
    batches = random_batches(model, called)
    quantize = None if mode == "float32" else mode
    samples = in_batches_of(1, batches) if quantize in CALIBRATED else []
    dense = convert(Job(model, called, quantize, samples)).content
    return {"dense": dense, "sparse": encode(dense).content}, Reference(model, called, batches)


def outcome(content, reference, runtime, allowed):
    """What a runtime makes of a file, in words."""
    try:
        if not RUNTIMES[runtime].runs:
            with Worker(content, runtime) as worker:
                made = worker.compile(NPU)
            operators = made["npu_operators"] + made["cpu_operators"]
            return f"{made['npu_operators']} of {operators} operators, {made['cycles']} cycles"
        parity = reference.compare_on(runtime, content)
    except TimeoutError:
        return "hangs"
    except ValueError:
        return "refused"
    if not parity.relative <= allowed:  # NaN is wrong, too
        return "wrong"
    return "in part" if parity.accelerated is False else "right"


def main():
    names = [*NETWORKS, *OPERATORS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=names, choices=names)
    parser.add_argument("--quantize", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--runtimes", nargs="+", default=list(RUNTIMES), choices=list(RUNTIMES))
    parser.add_argument("--record", action="store_true", help="write the record anew; what was not run is kept")
    args = parser.parse_args()
    load, started = result.load(), time.perf_counter()
    missing = available()
    runtimes = [name for name in args.runtimes if missing[name] is None]
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"versions": "", "found": {}}
    found, changed = {}, []
    for name in args.networks:
        for mode in args.quantize if name in NETWORKS else [one for one in args.quantize if one in ALONE_IN]:
            try:
                made, reference = files(name, mode)
            except ExportError as error:
                print(f"{name}, {mode}: not converted: {str(error)[:160]}", flush=True)
                continue
            if name in OPERATORS or made["sparse"] == made["dense"]:
                made.pop("sparse")
            for encoding, content in made.items():
                for runtime in runtimes:
                    key = f"{name} | {mode} | {encoding} | {runtime}"
                    found[key] = outcome(content, reference, runtime, verification.TOLERANCE[mode])
                    before = record["found"].get(key)
                    if before is not None and before != found[key]:
                        changed.append([*key.split(" | "), before, found[key]])
                        print(f"changed: {key}: {before} -> {found[key]}", flush=True)
    versions = f"{result.versions(PACKAGES)}, LiteRT.js {LITERTJS.rpartition('@')[2]}"
    minutes = (time.perf_counter() - started) / 60
    wrong = sum(value == "wrong" for value in found.values())
    notes = [
        f"Now: {versions}. Recorded: {record['versions'] or 'nothing'}.",
        f"{len(found)} files on runtimes, {wrong} wrong without an error; {minutes:.0f} minutes.",
    ]
    columns = ["network", "weights", "encoding", "runtime", "recorded", "now"]
    result.show("What changed against the record", columns, changed, notes, load)
    if args.record:
        record = {"versions": versions, "found": dict(sorted((record["found"] | found).items()))}
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(bool(changed) and not args.record)


if __name__ == "__main__":
    main()
