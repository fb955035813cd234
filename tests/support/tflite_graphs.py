"""Networks drawn at random around the edges of XNNPACK's rules, and what becomes of their exported files.

A network is a recipe, a list of words, so that one that fails can be made smaller word by word (`shrink`).
"""

import contextlib
import os
import pathlib
import random
import tempfile
from unittest import mock

import keras
import numpy as np
from keras import layers

import keras_sparse as ks
from keras_sparse.tflite import rounding
from keras_sparse.tflite.encoding import encode
from keras_sparse.tflite.inputs import random_batches
from keras_sparse.tflite.parity import Reference
from keras_sparse.tflite.runtimes import Worker, available, run
from keras_sparse.tflite.signatures import signature

SIZES = ("32x32", "32x32", "32x32", "96x96", "33x33", "32x33", "48x32", "open", "batch of 2")
STEMS = ("fit", "fit", "fit", "fit", "same", "asymmetric", "wide", "stride 1", "gray")
FITTING = (
    "pointwise relu6", "pointwise swish", "pointwise none", "pointwise hard_silu", "pointwise gelu", "depthwise 3",
    "depthwise 5", "depthwise 3 down", "depthwise 5 down", "residual", "excite sigmoid", "elu", "leaky", "resize",
    "double", "batch normalization",
)  # fmt: skip
OTHERS = (
    "depthwise 3 same", "depthwise 5 same", "depthwise multiplier", "depthwise valid", "convolution", "grouped",
    "max pooling", "average pooling", "prelu", "excite hard_sigmoid", "excite tanh", "nearest", "concatenate", "scale",
    "shift", "crop", "transposed", "flip", "tanh", "softmax", "branch", "channel mean", "strided pointwise", "pad",
    "squeeze",
)  # fmt: skip
HEADS = (
    "dense", "dense", "dense", "convolution", "keepdims dense", "keepdims output", "flatten", "max", "image", "two",
    "two images", "sum", "hidden", "second input", "pooled twice",
)  # fmt: skip


def recipe(seed):
    """A list of words: size, stem, blocks, head, sparsity. Half of the networks fit but for one word at most."""
    rng = random.Random(seed)
    words = ["32x32", "fit", *(rng.choice(FITTING) for _ in range(rng.randint(1, 5))), "dense", "0.9"]
    choices = [SIZES, STEMS, *[OTHERS] * (len(words) - 4), HEADS, ("0.5", "0.65", "0.7", "0.9", "0.97")]
    if seed % 2:
        place = rng.randrange(len(words))
        words[place] = rng.choice(choices[place])
        return words
    words = [rng.choice(choice) if choice is not OTHERS else word for word, choice in zip(words, choices, strict=True)]
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        words.insert(rng.randrange(2, len(words) - 1), rng.choice(OTHERS))
    return words


def build(words):
    """The network of a recipe; its 1x1 convolutions and Dense layers are sparse."""
    keras.utils.set_random_seed(0)
    size, stem, *blocks, head, sparsity = words
    sizes = [None, None] if size == "open" else [32, 32] if size == "batch of 2" else [int(n) for n in size.split("x")]
    inputs = keras.Input(
        (*sizes, 1 if stem == "gray" else 3), batch_size=2 if size == "batch of 2" else None, name="image"
    )
    x = layers.ReLU(6.0)(_stem(stem, inputs))
    for word in blocks:
        x = _block(word, x)
    model = keras.Model(*_head(head, inputs, x))
    rng = np.random.default_rng(0)
    for weight in model.weights:
        value = keras.ops.convert_to_numpy(weight)
        if weight.name == "kernel" and (value.ndim == 2 or tuple(value.shape[:2]) == (1, 1)):
            pattern = ks.patterns.get("block_1x4" if value.ndim == 2 and float(sparsity) > 0.9 else None)
            value = np.where(pattern.mask(np.abs(value), float(sparsity)), value, 0)
            # Zeros make outputs small; with biases and scales apart no channel equals another.
            weight.assign(value / np.sqrt(1 - float(sparsity)))
        elif value.ndim == 1:
            weight.assign(value + rng.uniform(0.1, 0.3, value.shape))
    return model


def _stem(word, x):
    if word == "fit":
        return layers.Conv2D(16, 3, 2)(layers.ZeroPadding2D(1)(x))
    if word == "asymmetric":
        return layers.Conv2D(16, 3, 2)(layers.ZeroPadding2D(((0, 1), (0, 1)))(x))
    if word == "wide":
        return layers.Conv2D(16, 3, 2)(layers.ZeroPadding2D(2)(x))
    return layers.Conv2D(16, 3, 1 if word == "stride 1" else 2, padding="same")(x)


def _block(word, x):
    channels, kind, option = x.shape[-1], word.split()[0], word.split()[-1]
    if kind == "pointwise":
        return layers.Conv2D(32, 1, activation=None if option == "none" else option)(x)
    if word == "depthwise multiplier":
        return layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2)(x)
    if word == "depthwise valid":
        return layers.DepthwiseConv2D(3)(layers.ZeroPadding2D(2)(x))
    if kind == "depthwise":
        kernel = int(word.split()[1])
        if option == "down":
            return layers.DepthwiseConv2D(kernel, 2)(layers.ZeroPadding2D(kernel // 2)(x))
        return layers.DepthwiseConv2D(kernel, 2 if option == "same" else 1, padding="same")(x)
    if word == "residual":
        return layers.add([x, layers.Conv2D(channels, 1)(layers.DepthwiseConv2D(3, padding="same")(x))])
    if kind == "excite":
        y = layers.GlobalAveragePooling2D(keepdims=True)(x)
        y = layers.Conv2D(channels, 1, activation=option)(layers.Conv2D(8, 1, activation="relu")(y))
        return layers.multiply([x, y])
    simple = {
        "elu": lambda: layers.ELU()(x),
        "leaky": lambda: layers.LeakyReLU()(x),
        "resize": lambda: layers.UpSampling2D(interpolation="bilinear")(x),
        "double": lambda: layers.add([x, x]),
        "batch normalization": lambda: layers.BatchNormalization()(layers.ReLU()(x)),
        "convolution": lambda: layers.Conv2D(24, 3, padding="same")(x),
        "grouped": lambda: layers.Conv2D(32, 1, groups=4)(x),
        "max pooling": lambda: layers.MaxPooling2D(2, padding="same")(x),
        "average pooling": lambda: layers.AveragePooling2D(2, padding="same")(x),
        "prelu": lambda: layers.PReLU(shared_axes=[1, 2])(x),
        "nearest": lambda: layers.UpSampling2D()(x),
        "concatenate": lambda: layers.concatenate([x, layers.Conv2D(16, 1)(x)]),
        "scale": lambda: x * 0.5,
        "shift": lambda: x + 0.25,
        "crop": lambda: layers.Cropping2D(((0, 1), (0, 1)))(layers.ZeroPadding2D(((0, 1), (0, 1)))(x)),
        "transposed": lambda: layers.Conv2DTranspose(16, 3, 2, padding="same")(x),
        "flip": lambda: keras.ops.flip(x, 1),
        "tanh": lambda: layers.Activation("tanh")(x),
        "softmax": lambda: layers.Softmax()(x),
        "branch": lambda: layers.add([layers.Conv2D(32, 1)(x), layers.Conv2D(32, 3, padding="same")(x)]),
        "channel mean": lambda: x - keras.ops.mean(x, axis=-1, keepdims=True),
        "strided pointwise": lambda: layers.Conv2D(32, 1, 2)(x),
        "pad": lambda: layers.ZeroPadding2D(1)(x),
        "squeeze": lambda: x * layers.GlobalAveragePooling2D(keepdims=True)(x),
    }
    return simple[word]()


def _head(word, inputs, x):
    def pooled(keep=False):
        return layers.GlobalAveragePooling2D(keepdims=keep)(x)

    if word == "second input":
        other = keras.Input((5,), batch_size=inputs.shape[0], name="other")
        return [inputs, other], layers.Dense(12)(layers.concatenate([pooled(), layers.Dense(8)(other)]))
    found = {
        "dense": lambda: layers.Dense(12)(pooled()),
        "convolution": lambda: layers.Flatten()(layers.Conv2D(12, 1)(pooled(True))),
        "keepdims dense": lambda: layers.Dense(12)(pooled(True)),
        "keepdims output": lambda: pooled(True),
        "flatten": lambda: layers.Dense(12)(layers.Flatten()(layers.GlobalAveragePooling2D(keepdims=True)(x))),
        "max": lambda: layers.Dense(12)(layers.GlobalMaxPooling2D()(x)),
        "image": lambda: layers.Conv2D(12, 1)(x),
        "two": lambda: [layers.Dense(12)(pooled()), layers.Dense(4)(layers.Dense(16, activation="relu")(pooled()))],
        "two images": lambda: [layers.Dense(12)(pooled()), layers.Conv2D(4, 1)(x)],
        "sum": lambda: layers.Dense(12)(keras.ops.sum(x, axis=(1, 2))),
        "hidden": lambda: layers.Dense(12)(layers.Dense(64, activation="relu")(pooled())),
        "pooled twice": lambda: layers.Dense(12)(layers.concatenate([pooled(), layers.GlobalMaxPooling2D()(x)])),
    }
    return inputs, found[word]()


def outcome(words, quantize=None, runtimes=("native", "x86-no-avx", "wasm"), rules=True):
    """What becomes of a network: `{"encoding", "says", "engages", "faults"}`.

    Export has no runtime with sparse kernels to verify on, as on most users' machines: what is tested are the rules.
    `says` and `engages`: whether weights run sparse by the report, and by the bits of the outputs on a CPU without AVX,
    or where these are the dense file's by the instructions of ARM64 (`None` where it was not looked at). `faults`:
    `{runtime: what is wrong}`, which the dense file is not. Without `rules` zeros are stored sparsely in any case.
    """
    model = build(words)
    called = signature(model)
    data = [np.concatenate(parts) for parts in zip(*(random_batches(model, called)[-1] for _ in range(4)), strict=True)]
    inputs = dict(zip([leaf.name for leaf in called.inputs], data, strict=True))
    calibration = {"representative_data": inputs} if quantize == "int8" else {}
    keep_to_this_machine = mock.patch.dict(os.environ, KERAS_SPARSE_VERIFY="native")
    with tempfile.TemporaryDirectory() as folder, keep_to_this_machine:
        report = ks.tflite.export(model, f"{folder}/m.tflite", target="xnnpack", quantize=quantize, **calibration)
        dense = ks.tflite.export(model, f"{folder}/d.tflite", sparse=False, quantize=quantize, **calibration)
        sparse_file, dense_file = (pathlib.Path(one.path).read_bytes() for one in (report, dense))
    sparse_file = sparse_file if rules else encode(dense_file).content
    step = called.inputs[0].shape[0] or 1
    batch = [array[:step] for array in data]
    reference = Reference(model, called, [batch])
    allowed = rounding.TOLERANCE[quantize or "float32"]
    faults = {}
    for runtime in runtimes:
        problem = _problem(reference, runtime, sparse_file, allowed)
        if problem and not _problem(reference, runtime, dense_file, allowed):
            faults[runtime] = problem
    says, ran = bool(report.runs_sparse), None
    if "x86-no-avx" in runtimes and not faults and report.encoding == "sparse" and quantize in (None, "float16"):
        with contextlib.suppress(ValueError):  # a file that cannot be run there, dense or sparse
            ran = engages_sparse(sparse_file, dense_file, {name: array[:step] for name, array in inputs.items()}, says)
    return {"encoding": report.encoding, "says": says, "engages": ran, "faults": faults, "notes": report.notes}


def engages_sparse(sparse_file, dense_file, feed, says):
    """Whether a file's zeros are skipped on a CPU without AVX: by the bits of its outputs and of the dense file's.

    Few weights may sum up to the same bits: if `says` that they are skipped, the instructions of ARM64 decide, if they
    can be counted.
    """
    first, second = (run(content, feed, "x86-no-avx") for content in (sparse_file, dense_file))
    if any((first[name] != second[name]).any() for name in first):
        return True
    return says and available()["arm64"] is None and _instructions(sparse_file) < _instructions(dense_file)


def _instructions(content):
    with Worker(content, "arm64") as worker:
        worker.feed()
        return worker.count()


def _problem(reference, runtime, content, allowed):
    try:
        parity = reference.compare_on(runtime, content)
    except ValueError as error:
        return str(error).strip().splitlines()[0][-160:]
    return "" if parity.relative <= allowed else f"differs by {parity.relative:.2g}"


def shrink(words, quantize, runtimes, rules=True):
    """The recipe without each block that its file is wrong without, too."""
    place = 2
    while place < len(words) - 2:
        shorter = [*words[:place], *words[place + 1 :]]
        with contextlib.suppress(Exception):  # a network that cannot be built any more
            if outcome(shorter, quantize, runtimes, rules)["faults"]:
                words = shorter
                continue
        place += 1
    return words
