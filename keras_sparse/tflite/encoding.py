"""An encoding is a .tflite file rewritten so that zeros take no room: weight by weight, where that is safe and smaller.

TensorFlow's own option, `Optimize.EXPERIMENTAL_SPARSITY`, encodes whatever has 30 % zeros, even if it becomes larger,
and lets operators read weights that they misread. Here each weight is encoded by what its readers were seen to do
(ai-edge-litert 2.3.0, LiteRT.js 2.5.3):

* `FULLY_CONNECTED` reads float32 in blocks of 1x4, and int8 with integer inputs in blocks of 1x16, directly, by a
  sparse kernel (tensorflow/lite/kernels/fully_connected.cc, `SupportedSparsityFormat`).
* All others read what a `DENSIFY` operator restores when the model is loaded. Where float inputs meet int8 weights
  (dynamic range), restored int8 does not load or is garbage: a `DEQUANTIZE` follows, and floats are multiplied.
* Where XNNPACK leaves an operator alone, as it does with convolutions in three dimensions and transposed ones of open
  batch size, but could unpack its weights, those that need both steps (float16, dynamic range) become garbage: these
  are stored as floats of 32 bits without zeros, if that is smaller, else dense.
* What only zeros stand in, and others read, is filled by a `FILL` when the model runs.
* `FULLY_CONNECTED` with integer inputs does not load with restored weights. A convolution by 1x1 of images of one pixel
  multiplies the same integers, and does load: it takes the operator's place. Not where inputs have 16 bits: these
  convolutions compute garbage there, and no sparse kernel takes such inputs.

The storage is that of TFLite's converter: compressed sparse rows of single values or blocks, where rows are all axes
but the last (schema.fbs, `SparsityParameters`). What is restored may as well have rows of all axes but the first: the
place in a row takes a byte where that axis has up to 256 entries, and two where it has more.
"""

import copy
import functools
from dataclasses import dataclass, field

import numpy as np

from keras_sparse.tflite.editing import File
from keras_sparse.tflite.targets import XNNPACK, pays_from

__all__ = ["OUTWEIGHED", "Encoded", "encode", "fill"]

OUTWEIGHED = (
    "A sparse kernel would take all Dense layers out of XNNPACK, and those without blocks of zeros would lose more "
    "than it gains"
)
_ALONE = ("TRANSPOSE_CONV", "CONV_3D", "CONV_3D_TRANSPOSE")  # what XNNPACK does not take, always or often
_READERS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "BATCH_MATMUL", *_ALONE)  # they read weights as input 1
_TABLES = ("GATHER", "BATCH_MATMUL")  # they read an embedding, or a constant matrix, as input 0
_FULLY_CONNECTED_SPARSE = 8  # the version of the operator that reads sparse weights
_DEQUANTIZE_CHANNELS = 5  # the version of the operator that knows scales for each channel
_CONVOLUTION_CHANNELS = 5  # the version of CONV_2D that does
# Share of zero blocks from where on a sparse kernel is faster than XNNPACK's dense one, on some target.
_WORTH = {block: pays_from("FULLY_CONNECTED", f"block_1x{block}") for block in (4, 16)}
# What other Dense layers lose if sparse kernels take them out of XNNPACK, too, in times of their time there: 0.5 (x86),
# 1.8 (ARM64) and 2.4 (WebAssembly) for floats; 3, 5 and 75 for integers.
_LOSS = {"float32": 2.0, "int8": 10.0}
_OVERHEAD = 300  # bytes of the tables that an encoded weight and its DENSIFY add
_OVERHEAD_CHANNEL = 12  # bytes of the scale and the zero point of a channel, which each integer tensor has anew


@dataclass
class Encoded:
    """What `encode` made.

    Attributes:
        content: The file's bytes.
        kept: `{name of a tensor: reason}` of weights with zeros that stay dense although an encoding were smaller.
        moved: How many convolutions were kept out of XNNPACK's sparse kernels, see `encode`.
        outweighed: Names of weights in blocks that are restored, although a sparse kernel reads them.

    Example:

    >>> Encoded(b"").kept
    {}
    """

    content: object
    kept: dict = field(default_factory=dict)
    moved: int = 0
    outweighed: list = field(default_factory=list)


def encode(content, engage=True):
    """Rewrite a .tflite file with dense weights so that weights with many zeros are stored without them.

    Args:
        content: The file's bytes.
        engage: `False` takes care that XNNPACK's sparse kernels for convolutions, which compute wrong numbers on some
            graphs, leave the file alone: their way in is a 3x3 convolution of stride 2 and padding 1 on each side. At
            even sizes it never reads the last row and column of the padding, so a padding without them computes the
            same, and is no way in. (A convolution of unknown size is left as it is.)

    Returns:
        An `Encoded`. Weights whose encoding would not be smaller stay dense.

    Example:

    >>> import keras, keras_sparse as ks
    >>> from keras_sparse.tflite.convert import convert
    >>> from keras_sparse.tflite.encoding import encode
    >>> from keras_sparse.tflite.job import Job
    >>> model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64)])
    >>> _ = ks.prune(model, 0.9)
    >>> dense = convert(Job(model)).content
    >>> len(encode(dense).content) < len(dense) / 3
    True
    """
    file = File(content)
    encoded = Encoded(None)
    for graph in file.model.subgraphs:
        encoded.moved += 0 if engage else _move_entries(file, graph)
        _encode_graph(file, graph, encoded)
    encoded.content = file.pack()
    return encoded


def fill(content):
    """Rewrite a .tflite file so that the zeros that a loop begins with are filled in when it runs, not stored.

    These are the list of outputs that a recurrent layer writes into and its first state. A loop (`WHILE`) runs on a CPU
    wherever the file runs, and so does a `FILL`, which is no encoding: every runtime that has loops reads it.

    Args:
        content: The file's bytes.

    Returns:
        The bytes of the file: `content` itself if it has no such zeros of more than some hundred bytes.

    Example:

    >>> import keras
    >>> from keras_sparse.tflite.convert import convert
    >>> from keras_sparse.tflite.encoding import fill
    >>> from keras_sparse.tflite.job import Job
    >>> model = keras.Sequential([keras.Input((200, 4), batch_size=1), keras.layers.GRU(64, return_sequences=True)])
    >>> content = convert(Job(model)).content  # filled already: the 200 outputs take no room
    >>> len(content) < 4 * (model.count_params() + 200 * 64), fill(content) == content
    (True, True)
    """
    file, found = File(content), False
    for graph in file.model.subgraphs:
        readers, weights = _weights(file, graph)
        looped = [n for n, w in weights.items() if w.is_filled and {file.name(o) for o, _ in w.final} == {"WHILE"}]
        graph.operators = [_fill(file, graph, n, readers[n], weights[n]) for n in looped] + graph.operators
        found = found or bool(looped)
    return file.pack() if found else content


def _fill(file, graph, number, readers, weight):
    graph.tensors[number].type = file.schema.TensorType.FLOAT32
    operator = file.fill(graph, number)
    _pass_on(file, graph, number, readers, weight.final)
    return operator


def _weights(file, graph):
    """The operators that read each tensor, with the input's position, and the weights that may be encoded."""
    readers = {}
    for operator in graph.operators:
        for position, number in enumerate(operator.inputs):
            readers.setdefault(int(number), []).append((operator, position))
    weights = {number: _Weight.of(file, graph, readers, number) for number in range(len(graph.tensors))}
    return readers, {number: weight for number, weight in weights.items() if weight is not None}


def _encode_graph(file, graph, encoded):
    readers, weights = _weights(file, graph)
    direct = {number: weight.best for number, weight in weights.items() if weight.runs_sparse}
    if direct and not _pays(file, graph, direct):
        for number in direct:
            weights[number].direct = None
        encoded.outweighed += [_name(graph.tensors[number]) for number in direct]
    unpacking = []
    for number, weight in weights.items():
        tensor, best = graph.tensors[number], weight.best
        if best is None:
            if weight.obstacle and weight.is_filled:
                unpacking.append(_fill(file, graph, number, readers[number], weight))
                continue
            if weight.obstacle and weight.stored(1).bytes + weight.overhead < weight.values.nbytes:
                encoded.kept[_name(tensor)] = weight.obstacle
            continue
        file.store(tensor, best.values)
        if weight.pixels and not weight.runs_sparse:
            tensor.shape = np.array([tensor.shape[0], 1, 1, tensor.shape[1]], "int32")
        tensor.sparsity = best.parameters(file.schema, tensor.shape)
        if weight.whole:
            tensor.type, tensor.quantization = file.schema.TensorType.FLOAT32, None
        if weight.runs_sparse:
            file.code("FULLY_CONNECTED", _FULLY_CONNECTED_SPARSE)
            continue
        operator, output = file.unpack(graph, number, "DENSIFY", 1, tensor.type, tensor.quantization)
        unpacking.append(operator)
        if weight.hybrid:
            float32 = file.schema.TensorType.FLOAT32
            operator, output = file.unpack(graph, output, "DEQUANTIZE", _DEQUANTIZE_CHANNELS, float32, None)
            unpacking.append(operator)
        _pass_on(file, graph, output, readers[number] if weight.whole else [], weight.final)
        if weight.pixels:
            _as_convolutions(file, graph, [reader for reader, _ in readers[number]])
    graph.operators = unpacking + graph.operators


def _pass_on(file, graph, number, readers, final):
    """Let the operators of `final` read the tensor `number`, and drop those of `readers` that only unpacked it."""
    passed = [reader for reader, _ in readers if file.name(reader) == "DEQUANTIZE"]
    graph.operators = [operator for operator in graph.operators if all(operator is not one for one in passed)]
    for operator, position in final:
        inputs = list(operator.inputs)
        inputs[position] = number
        operator.inputs = inputs


def _name(tensor):
    return tensor.name.decode("utf8", "replace")


def _pays(file, graph, direct):
    # One sparse kernel in use takes all Dense layers out of XNNPACK. `direct`: what they would read, by tensor.
    gain = 0.0
    for operator in graph.operators:
        if file.name(operator) != "FULLY_CONNECTED":
            continue
        number = int(operator.inputs[1])
        kernel, rows = graph.tensors[number], direct.get(number)
        products = np.prod(kernel.shape) * np.prod(graph.tensors[int(operator.outputs[0])].shape[:-1])
        if rows is not None:
            gain += products * (1 - (1 - rows.zeros) / (1 - _WORTH[rows.block]))
        elif kernel.sparsity is None:
            gain -= products * _LOSS.get(file.dtype(kernel), 0.0)
    return gain >= 0


@dataclass
class _Weight:
    """A weight that may be encoded: its values, and what its readers can do."""

    values: np.ndarray
    blocks: list  # sizes of blocks that may be tried
    direct: int | None = None  # the size of block that its readers multiply without unpacking
    hybrid: bool = False  # int8 weights for float inputs
    pixels: bool = False  # whether its readers must become convolutions to read it restored
    whole: bool = False  # whether it is stored as float32, which it is not in the dense file
    final: list = field(default_factory=list)  # pairs of an operator that reads it stored so, and the input's position
    obstacle: str = ""  # why it cannot be encoded in some way that may be smaller

    @classmethod
    def of(cls, file, graph, readers, number):
        """The weight in a tensor, or `None` if it is none that could be encoded."""
        tensor, own = graph.tensors[number], readers.get(number, [])
        dtype = {"float32": "<f4", "float16": "<f2", "int8": "i1"}.get(file.dtype(tensor))
        if dtype is None or not own or tensor.sparsity is not None or number in {*graph.inputs, *graph.outputs}:
            return None
        data, shape = file.data(tensor), tuple(int(n) for n in tensor.shape)
        quantization = tensor.quantization
        points = () if quantization is None or quantization.zeroPoint is None else quantization.zeroPoint
        if data is None or len(shape) < 2 or any(points):
            return None
        final = []
        for operator, position in own:
            through = file.name(operator) == "DEQUANTIZE"
            final += readers.get(int(operator.outputs[0]), []) if through else [(operator, position)]
        names = {file.name(operator) for operator, _ in final}
        table = dtype != "i1" and all(position == 0 for _, position in final) and names <= set(_TABLES)
        values = np.frombuffer(data.tobytes(), dtype).reshape(shape)
        if not table and (not names <= set(_READERS) or any(position != 1 for _, position in final)):
            others = ", ".join(sorted(names - set(_READERS))) or "An operator that multiplies it with itself"
            reason = f"{others} is not known to read restored weights right"
            return cls(values, [], final=final, obstacle=reason) if names else None
        weight, fully = cls(values, [1], final=own), names == {"FULLY_CONNECTED"}
        if dtype == "i1":
            inputs = {int(o.inputs[2 if file.name(o) == "TRANSPOSE_CONV" else 0]) for o, _ in final}
            weight.hybrid = all(file.dtype(graph.tensors[n]) == "float32" for n in inputs)
        alone = sorted(names & {*_ALONE, *_TABLES[:1]})
        if dtype == "<f4" and fully:
            weight.direct = 4
        elif dtype == "i1" and not weight.hybrid and "FULLY_CONNECTED" in names:
            narrow = fully and all(file.dtype(graph.tensors[n]) == "int8" for n in inputs)  # not of 16 bits
            weight.pixels = narrow and all(_may_be_convolution(file, graph, reader) for reader, _ in own)
            weight.direct = 16 if narrow else None
            if not weight.pixels:
                weight.blocks, weight.obstacle = [], "FULLY_CONNECTED in integers does not load with restored weights"
        elif alone and (weight.hybrid or dtype == "<f2"):
            whole = cls(_real(values, quantization), [1], whole=True, final=final)
            if whole.stored(1).bytes + _OVERHEAD < values.nbytes:
                return whole
            weight.blocks, kind = [], "float16" if dtype == "<f2" else "int8"
            weight.obstacle = f"{alone[0]} computes garbage or NaN from restored {kind} weights under XNNPACK"
        blocks = {weight.direct, 4} if fully and not weight.obstacle and not weight.pixels else {weight.direct}
        weight.blocks += sorted(n for n in blocks - {None} if shape[-1] % n == 0)
        return weight

    @property
    def overhead(self):
        """Bytes that the encoding adds to values and index, at most."""
        if self.values.dtype != np.int8:
            return _OVERHEAD
        restored = _OVERHEAD + _OVERHEAD_CHANNEL * len(self.values)
        # Two reshapings, and maybe a bias of integers of four bytes.
        return restored + 2 * _OVERHEAD + (_OVERHEAD_CHANNEL + 4) * len(self.values) if self.pixels else restored

    @property
    def is_filled(self):
        """Whether it is nothing but zeros, such as the list of outputs that a loop begins with, and large enough."""
        floats = self.values.dtype in ("<f4", "<f2")
        return floats and self.values.nbytes > 4 * _OVERHEAD and not self.values.any()

    def stored(self, block):
        return _Rows.of(self.values, block)

    @functools.cached_property
    def smaller(self):
        """List of `_Rows`, those that are smaller than the dense weight."""
        found = [self.stored(block) for block in self.blocks]
        if 1 in self.blocks:
            found.append(_Rows.of(self.values, 1, axis=0))
        return [rows for rows in found if rows.bytes + self.overhead < self.values.nbytes]

    @property
    def best(self):
        """The smallest `_Rows` that can be read, or `None`."""
        # What cannot be restored must be read directly.
        found = [rows for rows in self.smaller if not self.obstacle or self._reads(rows)]
        return min(found, key=lambda rows: rows.bytes, default=None)

    @property
    def runs_sparse(self):
        """Whether a sparse kernel multiplies the best rows."""
        return self.best is not None and self._reads(self.best)

    def _reads(self, rows):
        return rows.block == self.direct and rows.zeros >= _WORTH[rows.block]


@dataclass
class _Rows:
    """Compressed sparse rows: values of the blocks that are not zero, and for each row where these stand."""

    block: int
    axis: int  # along which the rows are, the first or the last
    values: np.ndarray
    segments: np.ndarray
    indices: np.ndarray
    zeros: float  # share of blocks that are zero

    @classmethod
    def of(cls, values, block, axis=-1):
        values = np.moveaxis(values, axis, -1)
        blocks = values.reshape(-1, values.shape[-1] // block, block)
        living = (blocks != 0).any(axis=2)
        segments = np.concatenate([[0], np.cumsum(living.sum(axis=1))])
        indices = np.nonzero(living)[1]
        return cls(block, axis, blocks[living], _narrow(segments), _narrow(indices), 1 - living.mean())

    @property
    def bytes(self):
        return self.values.nbytes + self.segments.nbytes + self.indices.nbytes

    def parameters(self, schema, shape):
        def vector(numbers):
            name = {"uint8": "Uint8Vector", "uint16": "Uint16Vector", "int32": "Int32Vector"}[numbers.dtype.name]
            return getattr(schema.SparseIndexVector, name), getattr(schema, f"{name}T")(numbers)

        kinds = schema.DimensionType
        axes = list(range(len(shape)))
        axes.append(axes.pop(self.axis))
        dims = [schema.DimensionMetadataT(kinds.DENSE, shape[axis]) for axis in axes[:-1]]
        dims.append(schema.DimensionMetadataT(kinds.SPARSE_CSR, 0, *vector(self.segments), *vector(self.indices)))
        blocked = []
        if self.block > 1:
            dims.append(schema.DimensionMetadataT(kinds.DENSE, self.block))
            blocked = [len(shape) - 1]
        return schema.SparsityParametersT([*axes, *range(len(shape), len(dims))], blocked, dims)


def _real(values, quantization):
    """Floats of 16 bits, or integers with scales, as floats of 32 bits."""
    values = values.astype("<f4")
    if quantization is None or quantization.scale is None:
        return values
    scales = np.asarray(quantization.scale, "<f4")
    axis = quantization.quantizedDimension if len(scales) > 1 else 0
    return values * scales.reshape([-1 if i == axis else 1 for i in range(values.ndim)])


def _narrow(numbers):
    largest = numbers.max(initial=0)
    return numbers.astype("uint8" if largest < 256 else "uint16" if largest < 65536 else "int32")


def _may_be_convolution(file, graph, operator):
    """Whether a `FULLY_CONNECTED` can be written as a convolution: a reshaping can restore one open size, no more."""
    options, output = operator.builtinOptions, graph.tensors[int(operator.outputs[0])]
    sizes = file.sizes(output)
    plain = options.weightsFormat == file.schema.FullyConnectedOptionsWeightsFormat.DEFAULT
    return plain and sum(n < 0 for n in sizes) <= 1


def _as_convolutions(file, graph, operators):
    """Turn each `FULLY_CONNECTED` into a reshaping to images of one pixel, a convolution, and a reshaping back."""
    schema = file.schema
    for operator in operators:
        source, target = int(operator.inputs[0]), int(operator.outputs[0])
        kernel, result = graph.tensors[int(operator.inputs[1])], graph.tensors[target]
        sizes = file.sizes(result)
        rows = int(np.prod(result.shape[:-1]))
        opened = -1 if any(n < 0 for n in sizes) else rows
        pixels = file.image(graph, graph.tensors[source], rows, opened, int(kernel.shape[-1]))
        products = file.image(graph, result, rows, opened, int(kernel.shape[0]))
        before = file.reshape(graph, source, pixels, [opened, 1, 1, int(kernel.shape[-1])])
        after = file.reshape(graph, products, target, sizes)
        options = schema.Conv2DOptionsT(
            padding=schema.Padding.VALID,
            strideH=1,
            strideW=1,
            fusedActivationFunction=operator.builtinOptions.fusedActivationFunction,
        )
        operator.opcodeIndex = file.code("CONV_2D", _CONVOLUTION_CHANNELS)
        operator.builtinOptionsType, operator.builtinOptions = schema.BuiltinOptions.Conv2DOptions, options
        bias = int(operator.inputs[2]) if len(operator.inputs) > 2 else -1
        if bias < 0:  # a convolution must have one
            bias = file.zeros(graph, graph.tensors[source], kernel)
        operator.inputs = [pixels, int(operator.inputs[1]), bias]
        operator.outputs = [products]
        place = next(i for i, other in enumerate(graph.operators) if other is operator)
        graph.operators[place : place + 1] = [before, operator, after]


def _move_entries(file, graph):
    """Take the last row and column from the padding of convolutions that XNNPACK's sparse kernels may begin at."""
    moved = 0
    for pad in [operator for operator in graph.operators if file.name(operator) == "PAD"]:
        padded = int(pad.outputs[0])
        readers = [operator for operator in graph.operators if padded in [int(n) for n in operator.inputs]]
        entries = [reader for reader in readers if _is_entry(file, graph, reader)]
        inner, outer, amounts = (graph.tensors[int(n)] for n in (pad.inputs[0], padded, pad.inputs[1]))
        data = file.data(amounts)
        if not entries or data is None:
            continue
        values = np.frombuffer(data.tobytes(), "<i4" if file.dtype(amounts) == "int32" else "<i8").reshape(4, 2).copy()
        sizes = file.sizes(inner)
        even = [axis for axis in (1, 2) if sizes[axis] > 0 and sizes[axis] % 2 == 0]
        if values.tolist() != [[0, 0], [1, 1], [1, 1], [0, 0]] or not even:
            continue
        if len(entries) < len(readers) or padded in [int(n) for n in graph.outputs]:  # others want it as it is
            place = next(i for i, other in enumerate(graph.operators) if other is pad)
            pad = copy.copy(pad)
            pad.outputs = [file.like(graph, padded, b"/moved")]
            outer = graph.tensors[pad.outputs[0]]
            graph.operators.insert(place + 1, pad)
            for entry in entries:
                entry.inputs = [pad.outputs[0], *entry.inputs[1:]]
        values[even, 1] = 0
        graph.tensors.append(
            file.schema.TensorT(shape=amounts.shape, type=amounts.type, name=amounts.name + b"/moved", hasRank=True)
        )
        file.store(graph.tensors[-1], values)
        pad.inputs = [pad.inputs[0], len(graph.tensors) - 1]
        for field_name in ("shape", "shapeSignature"):
            sizes = getattr(outer, field_name)
            if sizes is not None:
                sizes = np.array(sizes, "int32")
                sizes[even] -= 1
                setattr(outer, field_name, sizes)
        moved += len(entries)
    return moved


def _is_entry(file, graph, operator):
    if file.name(operator) != "CONV_2D":
        return False
    options, (image, kernel) = operator.builtinOptions, (graph.tensors[int(n)].shape for n in operator.inputs[:2])
    strides, dilation = (options.strideH, options.strideW), (options.dilationHFactor, options.dilationWFactor)
    fits = XNNPACK.is_entry(kernel[1:], strides, dilation, groups=image[-1] // kernel[-1])
    return fits and options.padding == file.schema.Padding.VALID
