"""Each operator alone on each runtime: which ones an accelerator computes otherwise than this machine's CPU.

Layers and operations of Keras in many sizes, a dozen at a time as outputs of one network with random weights and
biases. A file of which a runtime refuses something or computes it wrong is cut into one for each operator. An
operator is wrong if it differs from the Keras model by more than twice of what it does on this machine's CPU, and by
more than 5 % of its magnitude for integers, 0.2 % for floats; 5 % where a GPU computes in half precision.
"""

import argparse
import functools

import result  # isort: skip - sets the environment that TensorFlow reads

import keras
import numpy as np
from keras import layers, ops

from keras_sparse.tflite import signatures
from keras_sparse.tflite.commands import RUNTIMES, available
from keras_sparse.tflite.convert import convert
from keras_sparse.tflite.editing import File
from keras_sparse.tflite.errors import ExportError
from keras_sparse.tflite.faults import FAULTS
from keras_sparse.tflite.flatmodel import read
from keras_sparse.tflite.job import CALIBRATED, INTEGERS, Job
from keras_sparse.tflite.runtimes import Worker

SEQUENCE, IMAGE, ODD, VOLUME, TOKENS = (16, 12), (8, 8, 6), (9, 7, 5), (4, 5, 6, 3), (7,)
ACTIVATIONS = (
    "relu", "relu6", "tanh", "sigmoid", "elu", "gelu", "silu", "hard_silu", "hard_sigmoid", "leaky_relu", "softmax",
    "softplus", "exponential", "mish", "selu", "softsign", "log_softmax",
)  # fmt: skip


def dense(x, units=8):
    return layers.Dense(units)(x)


def conv(x, filters=8):
    return layers.Conv2D(filters, 1)(x)


def onto(function, before):
    """`function` of what a layer with weights makes of the input."""
    return lambda x: function(before(x))


def sequences():
    """Yield names and functions of sequences."""
    for name in ACTIVATIONS:
        yield name, onto(layers.Activation(name), dense)
    for layer in (layers.LayerNormalization, layers.RMSNormalization, layers.UnitNormalization, layers.PReLU):
        yield layer.__name__, onto(lambda x, layer=layer: layer()(x), dense)
    for name in ("mean", "sum", "max", "min", "var", "std", "prod"):
        for axis in (-1, 1, (1, 2)):
            reduced = functools.partial(getattr(ops, name), axis=axis, keepdims=True)
            yield f"{name} over {axis}", onto(reduced, dense)
    for name in ("abs", "negative", "exp", "square", "sin", "cos", "floor", "round", "sign"):
        yield name, onto(getattr(ops, name), dense)
    for name in ("sqrt", "log", "rsqrt", "reciprocal"):
        yield name, onto(lambda x, name=name: getattr(ops, name)(ops.abs(x) + 0.3), dense)
    yield "power", onto(lambda x: ops.power(ops.abs(x) + 0.1, 1.5), dense)
    yield "clip", onto(lambda x: ops.clip(x, -0.5, 0.5), dense)
    yield "cumsum", onto(lambda x: ops.cumsum(x, axis=1), dense)
    yield "top k", onto(lambda x: ops.top_k(x, 3)[0], dense)
    yield "softmax over 1", onto(layers.Softmax(axis=1), dense)
    yield "divide", lambda x: dense(x) / (ops.abs(dense(x)) + 1.0)
    yield "where", lambda x: ops.where(dense(x) > 0, dense(x), dense(x) * 0.1)
    for layer in (layers.Add, layers.Subtract, layers.Multiply, layers.Average, layers.Maximum, layers.Minimum):
        for units in (8, 1):
            yield f"{layer.__name__} of {units}", lambda x, u=units, layer=layer: layer()([dense(x), dense(x, u)])
    yield "add a row", lambda x: dense(x) + dense(x)[:, :1]
    yield "multiply by a row", lambda x: dense(x) * dense(x)[:, :1]
    yield "add a number", onto(lambda x: x + 0.3, dense)
    yield "multiply by a number", onto(lambda x: x * 0.3, dense)
    for units in (8, 3):
        yield f"concatenate {units}", lambda x, units=units: layers.Concatenate()([dense(x), dense(x, units) * 3])
        yield f"split {units}", lambda x, units=units: ops.split(dense(x, 2 * units), 2, axis=-1)[1]
    yield "concatenate rows", lambda x: layers.Concatenate(axis=1)([dense(x), dense(x) * 3])
    yield "stack", lambda x: ops.stack([dense(x), dense(x)], axis=1)
    yield "dot", lambda x: layers.Dot(2)([dense(x), dense(x)])
    yield "einsum", lambda x: ops.einsum("bic,bcj->bij", dense(x), ops.transpose(dense(x), (0, 2, 1)))
    for name, function in {
        "permute": layers.Permute((2, 1)), "flip": lambda x: ops.flip(x, 1), "every second": lambda x: x[:, ::2],
        "tile": lambda x: ops.tile(x, (1, 2, 1)), "repeat": lambda x: ops.repeat(x, 2, axis=1),
        "gather": lambda x: ops.take(x, [0, 3, 2], axis=1), "part of a row": lambda x: x[:, :, 1:6],
        "reshape": layers.Reshape((4, 32)), "flatten": layers.Flatten(), "roll": lambda x: ops.roll(x, 1, axis=1),
        "zeros around": layers.ZeroPadding1D(2), "crop": layers.Cropping1D(2), "upsample": layers.UpSampling1D(2),
        "max pooling": layers.MaxPooling1D(2), "average pooling": layers.AveragePooling1D(3, 2, padding="same"),
    }.items():  # fmt: skip
        yield name, onto(function, dense)
    yield "attention", lambda x: layers.MultiHeadAttention(2, 8)(x, x)
    yield "grouped attention", lambda x: layers.GroupQueryAttention(8, 4, 2)(x, x)
    yield "dot attention", lambda x: layers.Attention()([dense(x), dense(x)])
    for layer in (layers.LSTM, layers.GRU, layers.SimpleRNN):
        yield layer.__name__, layer(8)
        yield f"{layer.__name__}, sequences", layer(8, return_sequences=True)
    yield "Bidirectional", layers.Bidirectional(layers.GRU(8))
    for options in ({}, {"strides": 2, "padding": "same"}, {"dilation_rate": 2, "padding": "causal"}, {"groups": 2}):
        yield f"Conv1D {options}", layers.Conv1D(8, 3, **options)
    yield "SeparableConv1D", layers.SeparableConv1D(8, 3)
    yield "DepthwiseConv1D", layers.DepthwiseConv1D(3)
    yield "Conv1DTranspose", layers.Conv1DTranspose(8, 3, 2)


def images():
    """Yield names and functions of images."""
    for kernel, stride, padding in ((1, 1, "valid"), (1, 2, "same"), (2, 1, "same"), (3, 1, "same"), (3, 2, "same"),
                                    (3, 2, "valid"), (4, 2, "same"), (5, 3, "same"), ((1, 3), 1, "same")):  # fmt: skip
        for layer, many in ((layers.Conv2D, (7,)), (layers.DepthwiseConv2D, ()), (layers.Conv2DTranspose, (7,))):
            options = {"strides": stride, "padding": padding}
            yield f"{layer.__name__} {kernel}/{stride} {padding}", layer(*many, kernel, **options)
    for size, stride, padding in ((2, 2, "valid"), (3, 2, "same"), (3, 1, "same"), (2, 1, "valid"), (5, 3, "same")):
        for layer in (layers.MaxPooling2D, layers.AveragePooling2D):
            yield f"{layer.__name__} {size}/{stride} {padding}", onto(layer(size, stride, padding), conv)
    for multiplier in (2, 3, 4):
        yield f"depth multiplier {multiplier}", layers.DepthwiseConv2D(3, depth_multiplier=multiplier)
    for rate in (2, 3):
        for padding in ("valid", "same"):
            yield f"dilated {rate} {padding}", layers.Conv2D(8, 2, dilation_rate=rate, padding=padding)
            yield f"depthwise, dilated {rate} {padding}", layers.DepthwiseConv2D(2, dilation_rate=rate, padding=padding)
    for inputs, outputs, groups in ((1, 1, 6), (1, 2, 6), (3, 4, 2), (4, 4, 2), (4, 2, 2), (8, 4, 2), (2, 4, 4)):
        grouped = layers.Conv2D(outputs * groups, 3, groups=groups)
        yield (
            f"{groups} groups of {inputs} to {outputs}",
            onto(grouped, functools.partial(conv, filters=inputs * groups)),
        )
    for layer in (layers.GlobalAveragePooling2D, layers.GlobalMaxPooling2D):
        for keepdims in (True, False):
            yield f"{layer.__name__} {keepdims}", onto(layer(keepdims=keepdims), conv)
    for axis in ((1, 2), 1, 2, 3, (1, 3), (2, 3), (1, 2, 3)):
        yield f"mean over {axis}", onto(functools.partial(ops.mean, axis=axis, keepdims=True), conv)
        yield f"sum over {axis}, flat", onto(functools.partial(ops.sum, axis=axis), conv)
    for factor in (2, 3):
        for mode in ("nearest", "bilinear"):
            yield f"upsample {factor} {mode}", onto(layers.UpSampling2D(factor, interpolation=mode), conv)
    for size in ((13, 11), (4, 4), (5, 16)):
        for mode in ("nearest", "bilinear"):
            yield f"resize {size} {mode}", onto(layers.Resizing(*size, interpolation=mode), conv)
    for name, function in {
        "zeros around": layers.ZeroPadding2D(((1, 2), (0, 3))), "crop": layers.Cropping2D(((1, 2), (0, 1))),
        "mirror": lambda x: ops.pad(x, ((0, 0), (1, 1), (2, 1), (0, 0)), mode="reflect"),
        "zeros in channels": lambda x: ops.pad(x, ((0, 0), (0, 0), (0, 0), (1, 2))),
        "every second": lambda x: x[:, ::2, 1::2], "part of channels": lambda x: x[..., 1:6],
        "flip": lambda x: ops.flip(x, 2), "relu of a part": lambda x: ops.relu(x[:, 1:5, 2:6]),
        "flatten": layers.Flatten(), "GroupNormalization": layers.GroupNormalization(2),
        "instance normalization": layers.GroupNormalization(-1), "BatchNormalization": layers.BatchNormalization(),
        "PReLU": layers.PReLU(shared_axes=[1, 2]), "LayerNormalization": layers.LayerNormalization(),
        "softmax": layers.Softmax(), "roll": lambda x: ops.roll(x, 2, axis=1),
    }.items():  # fmt: skip
        yield name, onto(function, conv)
    for order in ((0, 1, 3, 2), (0, 2, 1, 3), (0, 2, 3, 1), (0, 3, 1, 2), (0, 3, 2, 1)):
        yield f"transpose {order}", onto(functools.partial(ops.transpose, axes=order), conv)
    for axis in (1, 2, 3):
        yield f"concatenate over {axis}", lambda x, axis=axis: ops.concatenate([conv(x), conv(x) * 2], axis=axis)
    yield "concatenate 3 and 5", lambda x: ops.concatenate([conv(x, 3), conv(x, 5)], axis=-1)
    for part in ((slice(0, 1), slice(0, 1)), (slice(0, 1), slice(None)), (slice(None), slice(0, 1))):
        sizes = ["all" if one.stop is None else "1" for one in part]
        yield f"add broadcast {sizes}", lambda x, part=part: conv(x) + conv(x)[:, *part]
        yield f"multiply broadcast {sizes}", lambda x, part=part: conv(x) * conv(x)[:, *part]
    yield (
        "squeeze and excite",
        lambda x: conv(x) * layers.Dense(8, "sigmoid")(layers.GlobalAveragePooling2D(keepdims=True)(conv(x))),
    )
    yield "dense", lambda x: layers.Dense(5)(conv(x))


def wide():
    """Yield shapes, names and functions of 1,024 weights or more: fewer, quantize="dynamic" leaves in floats."""
    for shape in ((48,), (16, 48)):
        yield shape, "wide Dense", layers.Dense(32, "relu")
    for name, layer in {
        "LSTM": layers.LSTM(32), "GRU": layers.GRU(32), "GRU, sequences": layers.GRU(32, return_sequences=True),
        "SimpleRNN": layers.SimpleRNN(32), "Conv1D": layers.Conv1D(32, 3), "Conv1D 1/2": layers.Conv1D(32, 1, 2),
        "Conv1D 3/2": layers.Conv1D(32, 3, 2, padding="same"), "SeparableConv1D": layers.SeparableConv1D(32, 3),
        "dilated Conv1D": layers.Conv1D(32, 3, dilation_rate=2, padding="causal"),
        "Conv1DTranspose": layers.Conv1DTranspose(32, 3, 2), "einsum": layers.EinsumDense("btc,cd->btd", (16, 32)),
    }.items():  # fmt: skip
        yield (16, 48), f"wide {name}", layer
    yield (16, 48), "wide attention", lambda x: layers.MultiHeadAttention(2, 16)(x, x)
    yield (16, 400), "wide DepthwiseConv1D", layers.DepthwiseConv1D(3)
    for shape in ((8, 8, 36), (9, 7, 36)):
        for kernel, stride in ((1, 1), (1, 2), (2, 1), (3, 1), (3, 2), (5, 2)):
            options = {"strides": stride, "padding": "same"}
            yield shape, f"wide Conv2D {kernel}/{stride}", layers.Conv2D(32, kernel, **options)
            yield shape, f"wide Conv2DTranspose {kernel}/{stride}", layers.Conv2DTranspose(32, kernel, **options)
        yield shape, "wide dilated", layers.Conv2D(32, 3, dilation_rate=2, padding="same")
        yield shape, "wide groups", layers.Conv2D(64, 3, groups=2)
        yield shape, "wide Dense of images", layers.Dense(32)
    for stride in (1, 2):
        yield (9, 8, 128), f"wide depthwise 3/{stride}", layers.DepthwiseConv2D(3, stride, "same")
    yield (9, 8, 128), "wide depthwise, dilated", layers.DepthwiseConv2D(3, dilation_rate=2)
    yield (9, 8, 128), "wide depthwise, two each", layers.DepthwiseConv2D(3, depth_multiplier=2)
    yield (4, 5, 6, 16), "wide Conv3D", layers.Conv3D(32, 2)
    yield TOKENS, "wide Embedding", layers.Embedding(64, 32)


def cases():
    """Yield `(shape of the input, name, function)`."""
    yield from ((SEQUENCE, name, function) for name, function in sequences())
    for shape in (IMAGE, ODD):
        yield from ((shape, name, function) for name, function in images())
    yield VOLUME, "Conv3D", lambda x: layers.Conv3D(4, 2)(x)
    yield TOKENS, "Embedding", lambda x: layers.Embedding(20, 8)(x)
    yield from wide()


def draw(rng, shape, count):
    if shape == TOKENS:
        return rng.integers(0, 20, (count, *shape)).astype("int32")
    return rng.normal(size=(count, *shape)).astype("float32")


def network(group):
    """A model whose outputs are the operators of a group, with random weights."""
    keras.utils.set_random_seed(0)
    shape, rng = group[0][0], np.random.default_rng(0)
    x = keras.Input(shape, dtype="int32" if shape == TOKENS else None)
    model = keras.Model(x, [function(x) for _, _, function in group])
    for weight in model.weights:
        if len(weight.shape) == 1 and weight.dtype == "float32":
            weight.assign(keras.ops.convert_to_numpy(weight) + rng.uniform(0, 0.2, weight.shape))
    return model


def computed(content, runtime, samples):
    """`{name: outputs}` of a file on a runtime."""
    found = {}
    with Worker(content, runtime, timeout=60.0) as worker:
        for sample in samples:
            worker.feed({worker.inputs[0]["name"]: sample[None]})
            for name, value in worker.run().items():
                found.setdefault(name, []).append(np.asarray(value, "float64"))
    return found


def file_of(group, mode, x, batch):
    """The model of a group, and its file."""
    model = network(group)
    samples = [[sample[None]] for sample in x] if mode in CALIBRATED else []
    return model, convert(Job(model, signatures.signature(model).with_batch(batch), mode, samples)).content


def compared(group, mode, runtimes, batch):
    """Yield each operator's name, and `{runtime: difference, or why there is none}`."""
    rng, found = np.random.default_rng(1), {}
    x, unseen = draw(rng, group[0][0], 64), draw(rng, group[0][0], 3)
    try:
        model, content = file_of(group, mode, x, batch)
    except ExportError as error:
        if len(group) == 1:
            yield group[0], {"converter": str(error)}
        else:
            yield from halves(group, mode, runtimes, batch)
        return
    right = [[np.asarray(y, "float64") for y in keras.tree.flatten(model(sample[None]))] for sample in unseen]
    found = {runtime: outcome(content, runtime, unseen) for runtime in runtimes}
    differences = [apart(number, found, right) for number in range(len(group))]
    told = any(isinstance(outputs, str) for outputs in found.values())
    spoiled = len(group) > 1 and (told or any(wrong(values, mode) for values in differences))
    if spoiled and len(read(content).subgraphs) > 1:  # the loops of others would stay in each part
        yield from halves(group, mode, runtimes, batch)
        return
    if spoiled:
        for number in range(len(group)):
            alone = part(content, f"output_{number}")
            found = {runtime: outcome(alone, runtime, unseen) for runtime in runtimes}
            differences[number] = apart(number, found, right)
    yield from zip(group, differences, strict=True)


def outcome(content, runtime, samples):
    """What a runtime makes of a file: `{name: outputs}`, or why there is nothing."""
    try:
        return computed(content, runtime, samples)
    except (ValueError, TimeoutError) as error:
        return str(error)


def part(content, output):
    """A file of the operators that one output needs."""
    file = File(content)
    (graph,), (called,) = file.model.subgraphs[:1], file.model.signatureDefs
    called.outputs = [one for one in called.outputs if one.name.decode() == output]
    needed = {called.outputs[0].tensorIndex}
    graph.outputs, kept = sorted(needed), []
    for operator in reversed(graph.operators):
        if needed & set(operator.outputs):
            needed |= set(operator.inputs)
            kept.insert(0, operator)
    graph.operators = kept
    return file.pack()


def apart(number, found, right):
    """How far an output is off on each runtime, relative to its largest magnitude, or why there is none."""
    wanted = np.stack([outputs[number] for outputs in right])
    values = {}
    for runtime, outputs in found.items():
        values[runtime] = outputs
        if isinstance(outputs, dict):
            off = np.abs(np.stack(outputs[f"output_{number}"]).reshape(wanted.shape) - wanted).max()
            values[runtime] = float(off / max(np.abs(wanted).max(), 1e-9))
    return values


def halves(group, mode, runtimes, batch):
    yield from compared(group[: len(group) // 2], mode, runtimes, batch)
    yield from compared(group[len(group) // 2 :], mode, runtimes, batch)


def known(case, mode, batch):
    """Where `export` says that the operator alone is wrong."""
    content = file_of([case], mode, draw(np.random.default_rng(1), case[0], 64), batch)[1]
    return [where for fault, where in FAULTS if fault(read(content))]


def wrong(values, mode):
    """The runtimes that compute something else."""
    here, least = values.get("native"), 0.05 if mode in INTEGERS else 2e-3
    if not isinstance(here, float):
        return []
    floors = {name: max(least, 0.05 if RUNTIMES[name].precision == "float16" else 0) for name in values}
    return [n for n, v in values.items() if isinstance(v, float) and not v <= max(2 * here, floors[n])]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs = [name for name, runtime in RUNTIMES.items() if runtime.runs and name != "native"]
    parser.add_argument("--runtimes", nargs="+", default=runs, choices=runs, help="beside this machine's CPU")
    parser.add_argument("--formats", nargs="+", default=["float32", "int8"])
    parser.add_argument("--at-once", type=int, default=12, help="operators in one file")
    parser.add_argument("--open-batch", action="store_true", help="leave the batch size open, and run one sample")
    parser.add_argument("--only", default="", help="operators whose names hold this")
    args = parser.parse_args()
    batch = None if args.open_batch else 1
    load, missing = result.load(), available()
    runtimes = ["native", *(name for name in args.runtimes if missing[name] is None)]
    print(f"not installed: {[name for name in args.runtimes if missing[name] is not None]}")
    rows, count, by_shape = [], 0, {}
    for case in cases():
        if args.only in case[1]:
            by_shape.setdefault(case[0], []).append(case)
    parts = [group[i : i + args.at_once] for group in by_shape.values() for i in range(0, len(group), args.at_once)]
    for named in args.formats:
        mode = None if named == "float32" else named
        for case, values in (one for part in parts for one in compared(part, mode, runtimes, batch)):
            count += 1
            off = wrong(values, mode)
            said = ", ".join(f"{runtime} {values[runtime]:.2g}" for runtime in off)
            refused = [f"{name}: {why.splitlines()[0][-90:]}" for name, why in values.items() if isinstance(why, str)]
            if off or refused:
                told = ", ".join(known(case, mode, batch)) if off else ""
                rows.append([named, "x".join(map(str, case[0])), case[1], said, told, "; ".join(refused)])
                print(" | ".join(rows[-1]), flush=True)
    silent = sum(bool(row[3]) and not row[4] for row in rows)
    notes = [
        f"{count} operators on {', '.join(runtimes)}: {sum(bool(row[3]) for row in rows)} wrong, of which {silent} are "
        "not refused by a rule."
    ]
    columns = ["weights", "input", "operator", "wrong on, by", "known for", "refused by"]
    result.show("Operators", columns, rows, notes, load)


if __name__ == "__main__":
    main()
