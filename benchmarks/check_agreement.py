"""Does `ks.tflite.check` say what a runtime does? The networks of `keras.applications`, as they are and adapted.

"Will run sparse" is compared with a CPU without AVX: whether the outputs of the sparse file differ in their last bits
from the dense file's, since sparse kernels add up in another order. The weights that the check names are pruned to
90 %; normalizations get the statistics of a batch. Each sparse file must also be right there.
"""

import argparse
import time

import keras
import numpy as np
import result  # first: it keeps TensorFlow quiet
from mobilenet import normalize

import keras_sparse as ks
from keras_sparse.tflite.convert import convert
from keras_sparse.tflite.encoding import encode
from keras_sparse.tflite.job import Job
from keras_sparse.tflite.parity import Reference
from keras_sparse.tflite.runtimes import run
from keras_sparse.tflite.signatures import signature

NETWORKS = (
    "MobileNet MobileNetV2 MobileNetV3Small MobileNetV3Large EfficientNetB0 EfficientNetB1 EfficientNetB2 "
    "EfficientNetB3 EfficientNetB4 EfficientNetV2B0 EfficientNetV2B1 EfficientNetV2B2 EfficientNetV2B3 EfficientNetV2S "
    "DenseNet121 DenseNet169 DenseNet201 NASNetMobile Xception InceptionV3 ResNet50 ResNet50V2 ConvNeXtTiny"
).split()
PLAIN = ("MobileNetV3Small minimalistic", "MobileNetV3Large minimalistic")


def build(name, size):
    """The network with random weights and ten classes."""
    options = {"weights": None, "input_shape": (size, size, 3), "classes": 10}
    if name.endswith("minimalistic"):
        options["minimalistic"] = True
    return getattr(keras.applications, name.split()[0])(**options, classifier_activation=None)


def agreement(model, x):
    """`(what the check says, what a CPU without AVX does, error there)`."""
    report = ks.tflite.check(model)
    says = any(row["runs"] == "sparse" and row["operator"] == "CONV_2D" for row in report.rows)
    dense_rows = [regex for regex, (_, pattern) in report.target_sparsity.items() if pattern == "block_1x4"]
    goal = {regex: pair for regex, pair in report.target_sparsity.items() if regex not in dense_rows}
    goal = goal or {r"kernel$": (0.9, "unstructured")}
    ks.prune(model, goal, filters=lambda v: len(v.shape) == 4 and tuple(v.shape[:2]) == (1, 1))
    called = signature(model).with_batch(1)
    dense = convert(Job(model, called)).content
    sparse = encode(dense, engage=not any("keeps the file out" in note for note in report.notes)).content
    feed = {called.inputs[0].name: x[:1]}
    first, second = (run(content, feed, "x86-no-avx", timeout=600) for content in (dense, sparse))
    error = Reference(model, called, [[x[:1]]]).compare_on("x86-no-avx", sparse, timeout=600).relative
    return says, any((first[name] != second[name]).any() for name in first), error


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=[*NETWORKS, *PLAIN])
    parser.add_argument("--size", type=int, default=96)
    args = parser.parse_args()
    load, started, rows, agreed, wrong = result.load(), time.perf_counter(), [], 0, 0
    for name in args.networks:
        x = np.random.default_rng(0).normal(size=(4, args.size, args.size, 3)).astype("float32")
        for form in ("as it is", "adapted"):
            keras.utils.clear_session()
            keras.utils.set_random_seed(0)
            model = build(name, args.size)
            normalize(model, x)
            parameters = model.count_params()
            if form == "adapted":
                model, changes = ks.tflite.adapt(model)
                form += ", exact" if changes.totals["exact"] else ", shifted"
            says, does, error = agreement(model, x)
            agreed, wrong = agreed + (says == does), wrong + (error > 1e-3)
            words = [name, form, f"{parameters / 1e6:.1f} M", *("yes" if one else "no" for one in (says, does))]
            rows.append([*words, f"{error:.0e}"])
            print(rows[-1], flush=True)
    result.show(
        f"Check against a CPU without AVX, {args.size} px",
        ["network", "form", "parameters", "will run sparse", "runs sparse", "error"],
        rows,
        [
            f"Agreement: {agreed} of {len(rows)}; wrong files: {wrong}. "
            f"{(time.perf_counter() - started) / 60:.0f} minutes."
        ],
        load,
    )


if __name__ == "__main__":
    main()
