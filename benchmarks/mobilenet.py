"""Networks of `keras.applications`, adapted: 1x1 convolutions at 90 %, sparse against dense on each runtime.

Latency, instructions and bytes do not depend on the values of the weights, so the networks are not trained, but for the
statistics of their normalizations, without which they compute next to nothing: they are adapted (`ks.tflite.adapt`) and
pruned in one shot. Each ratio is to the dense encoding of the same network, run in turns with it
(`ks.tflite.benchmark`); on ARM64 it is exact. `error` is the largest difference of the sparse file's outputs from the
Keras model's, relative to their magnitude, over the runtimes; the last layer gives logits. Runtimes that are not
installed are left out.
"""

import argparse
import pathlib
import tempfile

import keras
import numpy as np
import result  # first: it keeps TensorFlow quiet

import keras_sparse as ks
from keras_sparse.tflite.inputs import random_batches
from keras_sparse.tflite.parity import Reference
from keras_sparse.tflite.signatures import signature

BUILD = {
    "MobileNet": lambda shape: keras.applications.MobileNet(shape, weights=None, classifier_activation=None),
    "MobileNetV2": lambda shape: keras.applications.MobileNetV2(shape, weights=None, classifier_activation=None),
    "MobileNetV3Small": lambda shape: keras.applications.MobileNetV3Small(
        shape, minimalistic=True, weights=None, classifier_activation=None
    ),
    "MobileNetV3Large": lambda shape: keras.applications.MobileNetV3Large(
        shape, minimalistic=True, weights=None, classifier_activation=None
    ),
    "EfficientNetB0": lambda shape: keras.applications.EfficientNetB0(
        input_shape=shape, weights=None, classifier_activation=None
    ),
}


def pointwise(variable):
    """Whether a variable is the kernel of a 1x1 convolution."""
    return len(variable.shape) == 4 and tuple(variable.shape[:2]) == (1, 1)


def and_classifier(variable):
    """Whether it is that, or the kernel of a Dense layer."""
    return pointwise(variable) or len(variable.shape) == 2


def normalize(model, x):
    """Give batch normalizations the statistics of a batch."""
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0
    model(x, training=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(BUILD), choices=BUILD)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--classifier", action="store_true", help="prune the Dense layer at the end as well")
    parser.add_argument("--quantize", nargs="+", default=["float32"], choices=["float32", "float16", "dynamic", "int8"])
    parser.add_argument("--seconds", type=float, default=3.0, help="of measuring each file")
    parser.add_argument("--runtimes", nargs="+", default=["native", "wasm", "arm64"])
    args = parser.parse_args()
    load, rows = result.load(), []
    missing = {name: reason for name, reason in ks.tflite.runtimes.available().items() if reason}
    runtimes = [name for name in args.runtimes if name not in missing]
    checked = [name for name in ("native", "x86-no-avx", "wasm", "arm64") if name not in missing]
    with tempfile.TemporaryDirectory() as folder:
        dense, sparse = (pathlib.Path(folder) / f"{name}.tflite" for name in ("dense", "sparse"))
        for name in args.networks:
            keras.utils.set_random_seed(0)
            model = BUILD[name]((args.size, args.size, 3))
            x = np.random.default_rng(0).normal(size=(8, args.size, args.size, 3)).astype("float32")
            normalize(model, x)
            model, changes = ks.tflite.adapt(model)
            ks.prune(model, args.sparsity, filters=and_classifier if args.classifier else pointwise)
            normalize(model, x)
            called = signature(model).with_batch(1)
            float32 = ks.tflite.export(model, dense, sparse=False).bytes_file
            for mode in args.quantize:
                quantize = {"quantize": None if mode == "float32" else mode, "representative_data": x}
                report = ks.tflite.export(model, sparse, target="xnnpack", batch_size=1, **quantize)
                ks.tflite.export(model, dense, sparse=False, batch_size=1, **quantize)
                batches = [[x[:1]]] if mode == "int8" else random_batches(model, called)
                reference, content = Reference(model, called, batches), sparse.read_bytes()
                error = max(reference.compare_on(runtime, content).relative for runtime in checked)
                ratios = []
                for runtime in runtimes:
                    timed = ks.tflite.benchmark(sparse, baseline=dense, runtime=runtime, seconds=args.seconds)
                    ratios.append(f"{timed.rows[1]['ratio']:.3f}")
                share = report.bytes_file / float32
                sparse_runs = f"{len(report.runs_sparse)} of {len(report.rows)}"
                changed = f"{changes.totals['difference']:.0e}"
                rows.append([name, mode, changed, sparse_runs, f"{report.bytes_file:,d}", f"{share:.3f}"])
                rows[-1] += [*ratios, f"{error:.0e}"]
                print(rows[-1], flush=True)
    weights = "1x1 convolutions and the classifier" if args.classifier else "1x1 convolutions"
    result.show(
        f"{weights} at {args.sparsity:.0%}, {args.size} px",
        [
            "network",
            "weights",
            "adapting changes outputs by",
            "run sparse",
            "bytes",
            "of dense float32",
            *runtimes,
            "error",
        ],
        rows,
        [f"Not measured on {name}: {reason}" for name, reason in missing.items()]
        + [f"Compared on: {', '.join(checked)}."],
        load,
    )


if __name__ == "__main__":
    main()
