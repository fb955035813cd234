"""A flat model is the content of a .tflite file as data: tensors, operators, and how the weights are encoded.

The reader is pure Python over the flatbuffer schema that ai-edge-litert ships, so a damaged file can only raise.
"""

import contextlib
import math
import os
import struct
import zlib
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

__all__ = ["UNPACK", "FlatModel", "Operator", "Subgraph", "Tensor", "damaged", "described", "gzip_size", "read"]

UNPACK = ("DENSIFY", "DEQUANTIZE")  # operators that restore what a file stores in less room
# float16 and bfloat16 are counted as bit patterns: NumPy has no bfloat16, and both are zero when all but the sign is.
_DTYPES = {
    "float32": "<f4", "float64": "<f8", "float16": "<u2", "bfloat16": "<u2", "int8": "i1", "uint8": "u1", "bool": "u1",
    "int16": "<i2", "uint16": "<u2", "int32": "<i4", "uint32": "<u4", "int64": "<i8", "uint64": "<u8",
    "complex64": "<c8", "complex128": "<c16",
}  # fmt: skip
_BITS_OF_HALF = 0x7FFF  # everything but the sign
_OPTIONS = {
    "TRANSPOSE_CONV": ("TransposeConvOptions", ("StrideH", "StrideW", "Padding")),
    "CONV_2D": ("Conv2DOptions", ("StrideH", "StrideW", "DilationHFactor", "DilationWFactor", "Padding")),
    "DEPTHWISE_CONV_2D": (
        "DepthwiseConv2DOptions",
        ("StrideH", "StrideW", "DilationHFactor", "DilationWFactor", "Padding", "DepthMultiplier"),
    ),
}


@dataclass(eq=False)
class Tensor:
    """One tensor of a .tflite file.

    Attributes:
        name: Name in the file.
        shape: Tuple of ints; a dynamic batch reads as 1.
        dtype: Such as `"float32"`.
        stored: The stored bytes as uint8, or `None` where the tensor is computed when the model runs.
        levels: For sparse encoding, one `(stride, size, segments, indices)` for each dimension in storage order;
            `segments` is `None` where all positions are stored. `None` for dense encoding.
        block: Sizes of the block, one for each dimension (all 1: no blocks).
        zero_point: The stored integer that means zero.
        scales: What a stored integer of 1 means: one number, or one for each index along `scale_axis`; or `None`.
        scale_axis: That axis.
        metadata_bytes: Bytes that the index of a sparse encoding takes.
        opened: Axes whose size is open, such as that of the batch.

    Example:

    >>> Tensor("kernel", (2, 2), "float32", np.frombuffer(np.float32([0, 1, 0, 2]), "uint8")).zeros
    2
    """

    name: str
    shape: tuple
    dtype: str
    stored: np.ndarray | None
    levels: list | None = None
    block: tuple = ()
    zero_point: int = 0
    scales: np.ndarray | None = None
    scale_axis: int = 0
    metadata_bytes: int = 0
    opened: tuple = ()

    @property
    def size(self):
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self):
        """Bytes that the tensor takes in the file: values, and the index of a sparse encoding."""
        return 0 if self.stored is None else len(self.stored) + self.metadata_bytes

    @property
    def encoding(self):
        """`"dense"`, `"sparse-csr"` (single values) or `"sparse-block-csr"`."""
        if self.levels is None:
            return "dense"
        return "sparse-block-csr" if any(n > 1 for n in self.block) else "sparse-csr"

    @property
    def bytes_limit(self):
        """Bytes that an encoding of its zeros needs: its other values, and the entropy of where these stand.

        That is log2 of the number of ways to choose their places, in bits (Shannon 1948): of single values, or of the
        blocks that it is stored in. The dense tensor where that is smaller.
        """
        if self.stored is None or not self.zeros:
            return self.bytes
        width = np.dtype(_DTYPES[self.dtype]).itemsize if self.dtype in _DTYPES else 0.5
        block = math.prod(self.block) if self.levels is not None else 1
        rest = self.size - self.zeros if block == 1 else len(self.stored) // width
        places, chosen = self.size // block, rest // block
        ways = math.lgamma(places + 1) - math.lgamma(chosen + 1) - math.lgamma(places - chosen + 1)
        return min(math.ceil(rest * width + ways / math.log(2) / 8), math.ceil(self.size * width))

    @cached_property
    def zeros(self):
        """Number of zeros, those that a sparse encoding leaves out included; `None` for types that are not numbers."""
        values = self._stored_values()
        if values is None:
            return None
        if self.levels is not None:
            self._positions(len(values))
        zeros = self.size - int(np.count_nonzero(values))
        if zeros < 0:
            raise ValueError(f"tensor {self.name!r}: more values are stored than its shape holds")
        return zeros

    def values(self):
        """The tensor as a NumPy array, decoded (integers as stored, quantised zeros as 0).

        Raises:
            ValueError: If it holds no data, or its type has no NumPy counterpart.
        """
        values = self._stored_values(as_numbers=True)
        if values is None:
            raise ValueError(f"The tensor {self.name!r} holds no numbers. Received: dtype {self.dtype}")
        if self.levels is None:
            return values.reshape(self.shape)
        dense = np.zeros(self.size, values.dtype)
        dense[self._positions(len(values))] = values
        return dense.reshape(self.shape)

    def real_values(self):
        """The tensor as floats of 32 bits: what stored integers mean."""
        values = self.values().astype("<f4")
        if self.scales is None:
            return values
        sizes = [-1 if axis == self.scale_axis else 1 for axis in range(values.ndim)]
        return values * (self.scales.reshape(sizes) if self.scales.size > 1 else self.scales)

    def _stored_values(self, as_numbers=False):
        if self.stored is None:
            return None
        if self.dtype in ("int4", "uint4"):
            nibbles = np.stack([self.stored & 15, self.stored >> 4], axis=1).ravel()[: self.size]
            values = ((nibbles ^ 8).astype("int8") - 8) if self.dtype == "int4" else nibbles
        elif self.dtype in _DTYPES:
            width = np.dtype(_DTYPES[self.dtype]).itemsize
            if len(self.stored) % width:
                raise ValueError(f"tensor {self.name!r}: {len(self.stored)} bytes are no whole number of {self.dtype}")
            values = np.frombuffer(self.stored, _DTYPES[self.dtype])
        else:
            return None
        if self.levels is None and len(values) != self.size:
            raise ValueError(f"tensor {self.name!r}: shape {self.shape} needs {self.size} values, not {len(values)}")
        if self.dtype == "float16":
            return values.view("<f2") if as_numbers else values & _BITS_OF_HALF
        if self.dtype == "bfloat16":
            return (values.astype("<u4") << 16).view("<f4") if as_numbers else values & _BITS_OF_HALF
        return values.astype("int64") - self.zero_point if self.zero_point else values

    def _positions(self, count):
        """Flat C-order position of each stored value of a sparse encoding (tensorflow/lite/kernels/internal/utils)."""
        # Every node of the tree ends in a stored value or in an entry of `segments`, so a tree that has more nodes than
        # both is damaged: this bounds the memory that a hostile file can ask for.
        limit = count + max((len(segments) for _, _, segments, _ in self.levels if segments is not None), default=0)
        positions = np.zeros(1, "int64")
        for stride, size, segments, indices in self.levels:
            if segments is None:
                if len(positions) * size > limit:
                    raise ValueError(f"tensor {self.name!r}: its sparse index describes more values than are stored")
                positions = (positions[:, None] + stride * np.arange(size)[None, :]).ravel()
                continue
            counts = np.diff(segments)
            valid = len(segments) == len(positions) + 1 and segments[0] == 0 and segments[-1] == len(indices)
            if not valid or (counts < 0).any() or (len(indices) and not 0 <= indices.min() <= indices.max() < size):
                raise ValueError(f"tensor {self.name!r}: its sparse index is inconsistent")
            positions = np.repeat(positions, counts) + stride * indices
        if len(positions) != count:
            raise ValueError(f"tensor {self.name!r}: {count} values are stored, its index describes {len(positions)}")
        return positions


@dataclass(eq=False)
class Operator:
    """One operator: its name, the numbers of its input and output tensors (-1: none), and the options that we read.

    Example:

    >>> Operator("RELU", inputs=[0], outputs=[1]).name
    'RELU'
    """

    name: str
    inputs: list
    outputs: list
    options: dict = field(default_factory=dict)


@dataclass
class Subgraph:
    """One graph of a .tflite file: tensors, operators in execution order, numbers of its inputs and outputs.

    Example:

    >>> Subgraph(tensors=[], operators=[], inputs=[], outputs=[]).operators
    []
    """

    tensors: list
    operators: list
    inputs: list
    outputs: list


@dataclass
class FlatModel:
    """A .tflite file as data: its subgraphs, and its content as bytes.

    Example:

    >>> FlatModel(subgraphs=[], content=bytes(1000)).bytes_gzip < 100
    True
    """

    subgraphs: list
    content: bytes

    @property
    def bytes(self):
        """Size of the file."""
        return len(self.content)

    @property
    def bytes_limit(self):
        """Bytes that it would take if each tensor took its own least: what is no tensor counts as it is."""
        tensors = [tensor for subgraph in self.subgraphs for tensor in subgraph.tensors]
        return self.bytes - sum(tensor.bytes - tensor.bytes_limit for tensor in tensors)

    @cached_property
    def bytes_gzip(self):
        """Size of the file in a zip archive."""
        return gzip_size(self.content)

    @property
    def is_sparse(self):
        """Whether weights are stored without their zeros."""
        return any(tensor.levels is not None for graph in self.subgraphs for tensor in graph.tensors)

    @property
    def has_open_batch(self):
        """Whether an input takes batches of any size."""
        return any(0 in graph.tensors[number].opened for graph in self.subgraphs[:1] for number in graph.inputs)


_HEAD = 8  # bytes that tell what a file is
_OTHERS = {  # files that are taken for others, by what they begin with
    b"\x89HDF": "an HDF5 file, such as Keras 2 saves: load it with `keras.saving.load_model`",
    b"PK": "a zip archive, such as a .keras file",
}


def read(path):
    """Read a .tflite file (a path, or its content as bytes) into a `FlatModel`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a valid .tflite file.

    Example:

    >>> from keras_sparse.tflite.flatmodel import read
    >>> read(b"this is no model")
    Traceback (most recent call last):
    ...
    ValueError: Expected a .tflite file. ... Received: content of 16 bytes without the mark 'TFL3' at byte 4
    """
    content = path if isinstance(path, bytes) else _content(path)
    if content[4:8] != b"TFL3":
        size = f" ({len(content)} bytes in all)" if len(content) < _HEAD else ""
        kinds = [f", {kind}" for mark, kind in _OTHERS.items() if content.startswith(mark)]
        kind = kinds[0] if kinds else f" without the mark 'TFL3' at byte 4{size}"
        raise ValueError(
            "Expected a .tflite file. Write one with `ks.tflite.export(model, path)`. "
            f"Received: {described(path)}{kind}"
        )
    with damaged(path):
        return FlatModel(_subgraphs(content), content)


def gzip_size(content):
    """Bytes that `content` takes in a zip or gzip archive, as app stores deliver it.

    Example:

    >>> gzip_size(bytes(1000))
    29
    """
    deflate = zlib.compressobj(wbits=31)  # level 6, the default of zip and gzip; 9 takes three times as long
    return len(deflate.compress(content)) + len(deflate.flush())


def _content(path):
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(
            "Expected the path of one .tflite file; `ks.tflite.export(model, path)` writes one. "
            f"Received: path of type {type(path).__name__}"
        )
    path = os.fspath(path)
    if os.path.isdir(path):
        raise ValueError(f"Expected a .tflite file, and this is a folder. Received: path={path!r}")
    if not os.path.exists(path):
        raise FileNotFoundError(f"There is no such file. Received: path={path!r}")
    with open(path, "rb") as file:
        head = file.read(_HEAD)  # a large file that is no model at all is not read to its end
        return head if head[4:] != b"TFL3" else head + file.read()


def described(file):
    """Say in a message which file was received, a path or its content as bytes.

    Example:

    >>> from keras_sparse.tflite.flatmodel import described
    >>> described("m.tflite"), described(b"none")
    ("path='m.tflite'", 'content of 4 bytes')
    """
    return f"content of {len(file)} bytes" if isinstance(file, bytes) else f"path={os.fspath(file)!r}"


@contextlib.contextmanager
def damaged(file):
    """Turn whatever a flatbuffer reader raises on a damaged file into one ValueError.

    Example:

    >>> with damaged("m.tflite"):
    ...     [][3]
    Traceback (most recent call last):
    ...
    ValueError: The .tflite file is damaged or truncated; export it again. Received: path='m.tflite'
    """
    try:
        yield
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, struct.error, AssertionError) as error:
        raise ValueError(
            f"The .tflite file is damaged or truncated; export it again. Received: {described(file)}"
        ) from error


def _subgraphs(content):
    from ai_edge_litert import schema_py_generated as schema

    model = schema.Model.GetRootAs(content, 0)
    # A valid file spends at least 4 bytes on each entry of a vector; a damaged one may point many entries at one place.
    budget = [len(content)]

    def entries(length, get):
        budget[0] -= 4 * length
        if budget[0] < 0:
            raise ValueError("its vectors are longer than the file")
        return [get(i) for i in range(length)]

    names = {number: name for name, number in vars(schema.BuiltinOperator).items() if isinstance(number, int)}
    dtypes = {number: name.lower() for name, number in vars(schema.TensorType).items() if isinstance(number, int)}
    codes = entries(model.OperatorCodesLength(), model.OperatorCodes)
    codes = [names[max(code.DeprecatedBuiltinCode(), code.BuiltinCode())] for code in codes]
    buffers = entries(model.BuffersLength(), model.Buffers)
    subgraphs = []
    for graph in entries(model.SubgraphsLength(), model.Subgraphs):
        tensors = entries(graph.TensorsLength(), graph.Tensors)
        operators = entries(graph.OperatorsLength(), graph.Operators)
        subgraphs.append(
            Subgraph(
                tensors=[_tensor(schema, tensor, dtypes, buffers, content) for tensor in tensors],
                operators=[_operator(schema, operator, codes) for operator in operators],
                inputs=_ints(graph.InputsAsNumpy()),
                outputs=_ints(graph.OutputsAsNumpy()),
            )
        )
        _check_references(subgraphs[-1])
    if not subgraphs:
        raise ValueError("it has no graph")
    return subgraphs


def _check_references(graph):
    references = [*graph.inputs, *graph.outputs]
    for operator in graph.operators:
        references += operator.inputs + operator.outputs
    if any(not -1 <= number < len(graph.tensors) for number in references):
        raise ValueError("an operator refers to a tensor that does not exist")
    # Operators are stored in execution order. Who follows a graph from tensor to tensor could run in circles otherwise.
    position = {n: i for i, operator in enumerate(graph.operators) for n in operator.outputs}
    if any(position.get(n, -1) >= i for i, operator in enumerate(graph.operators) for n in operator.inputs if n >= 0):
        raise ValueError("an operator reads a tensor that is computed later")


def _ints(array):
    # flatbuffers answers 0 for a vector that is absent
    return [] if isinstance(array, int) else [int(n) for n in array]


def _operator(schema, operator, codes):
    name, options = codes[operator.OpcodeIndex()], {}
    if name in _OPTIONS:
        class_name, keys = _OPTIONS[name]
        table, reader = operator.BuiltinOptions(), getattr(schema, class_name)()
        if table is not None:
            reader.Init(table.Bytes, table.Pos)
            options = {key: int(getattr(reader, key)()) for key in keys}
    return Operator(name, _ints(operator.InputsAsNumpy()), _ints(operator.OutputsAsNumpy()), options)


def _tensor(schema, tensor, dtypes, buffers, content):
    shape = tuple(_ints(tensor.ShapeAsNumpy()))
    if any(n < 0 for n in shape):
        raise ValueError("a tensor has a negative dimension")
    result = Tensor(
        name=(tensor.Name() or b"").decode("utf8", "replace"),
        shape=shape,
        dtype=dtypes[tensor.Type()],
        stored=_stored(buffers[tensor.Buffer()], content),
        opened=tuple(axis for axis, n in enumerate(_ints(tensor.ShapeSignatureAsNumpy())) if n < 0),
    )
    quantization = tensor.Quantization()
    if quantization is not None and result.stored is not None:
        points = set(_ints(quantization.ZeroPointAsNumpy()))
        result.zero_point = points.pop() if len(points) == 1 else 0
        scales = quantization.ScaleAsNumpy()
        if not isinstance(scales, int) and len(scales):
            result.scales, result.scale_axis = scales, quantization.QuantizedDimension()
    sparsity = tensor.Sparsity()
    if sparsity is not None and result.stored is not None:
        _read_sparsity(schema, sparsity, result)
    return result


def _stored(buffer, content):
    if buffer.Offset() > 1:  # beyond 2 GB the data lie behind the flatbuffer
        if buffer.Offset() + buffer.Size() > len(content):
            raise ValueError("a buffer ends behind the end of the file")
        return np.frombuffer(content, "uint8", buffer.Size(), buffer.Offset())
    data = buffer.DataAsNumpy()
    return None if isinstance(data, int) or not len(data) else data


def _read_sparsity(schema, sparsity, tensor):
    """Fill in `levels`, `block` and `metadata_bytes` (schema.fbs, `SparsityParameters`, says what the fields mean)."""
    rank = len(tensor.shape)
    order, blocked = _ints(sparsity.TraversalOrderAsNumpy()), _ints(sparsity.BlockMapAsNumpy())
    dims = [sparsity.DimMetadata(i) for i in range(min(sparsity.DimMetadataLength(), 64))]
    if sorted(order) != list(range(rank + len(blocked))) or len(dims) != len(order):
        raise ValueError(f"tensor {tensor.name!r}: its traversal order does not fit its shape")
    block = [1] * rank
    for dim, axis in zip(dims, order, strict=True):
        if axis >= rank:
            block[blocked[axis - rank]] = dim.DenseSize()
    if any(b < 1 or n % b for n, b in zip(tensor.shape, block, strict=True)):
        raise ValueError(f"tensor {tensor.name!r}: blocks {block} do not tile shape {tensor.shape}")
    strides = [math.prod(tensor.shape[axis + 1 :]) for axis in range(rank)]
    tensor.levels, tensor.block = [], tuple(block)
    for dim, axis in zip(dims, order, strict=True):
        inner = axis >= rank
        origin = blocked[axis - rank] if inner else axis
        size = block[origin] if inner else tensor.shape[origin] // block[origin]
        stride = strides[origin] * (1 if inner else block[origin])
        if dim.Format() == schema.DimensionType.SPARSE_CSR:
            segments, a = _index_vector(schema, dim.ArraySegmentsType(), dim.ArraySegments())
            indices, b = _index_vector(schema, dim.ArrayIndicesType(), dim.ArrayIndices())
            tensor.levels.append((stride, size, segments, indices))
            tensor.metadata_bytes += a + b
        elif dim.DenseSize() == size:
            tensor.levels.append((stride, size, None, None))
        else:
            raise ValueError(f"tensor {tensor.name!r}: a dimension of {size} is stored as one of {dim.DenseSize()}")


def _index_vector(schema, kind, table):
    readers = {
        schema.SparseIndexVector.Int32Vector: schema.Int32Vector,
        schema.SparseIndexVector.Uint16Vector: schema.Uint16Vector,
        schema.SparseIndexVector.Uint8Vector: schema.Uint8Vector,
    }
    reader = readers[kind]()
    reader.Init(table.Bytes, table.Pos)
    values = reader.ValuesAsNumpy()
    if isinstance(values, int):
        return np.zeros(0, "int64"), 0
    return values.astype("int64"), values.nbytes
