"""An edited file is a .tflite file as the objects of TFLite's schema, which can be changed and packed again."""

import copy

import flatbuffers
import numpy as np

__all__ = ["File"]


class _Builder(flatbuffers.Builder):
    """Aligns vectors of bytes, which hold the weights, as schema.fbs asks (`force_align: 16`); Python's does not."""

    def StartVector(self, elemSize, numElems, alignment):
        return super().StartVector(elemSize, numElems, 16 if elemSize == 1 else alignment)


class File:
    """A .tflite file as the objects of TFLite's schema, which can be changed.

    Attributes:
        model: `ModelT` of the schema that ai-edge-litert ships.

    Example:

    >>> import keras
    >>> from keras_sparse.tflite.convert import convert
    >>> from keras_sparse.tflite.editing import File
    >>> from keras_sparse.tflite.job import Job
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> file = File(convert(Job(model)).content)
    >>> [file.name(operator) for operator in file.model.subgraphs[0].operators]
    ['FULLY_CONNECTED']
    """

    def __init__(self, content):
        from ai_edge_litert import schema_py_generated as schema

        self.schema = schema
        self.model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
        self._names = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}
        self._dtypes = {v: k.lower() for k, v in vars(schema.TensorType).items() if isinstance(v, int)}

    def name(self, operator):
        code = self.model.operatorCodes[operator.opcodeIndex]
        return self._names[max(code.builtinCode, code.deprecatedBuiltinCode)]

    def dtype(self, tensor):
        return self._dtypes[tensor.type]

    def data(self, tensor):
        """The stored bytes, or `None` if the tensor is computed."""
        data = self.model.buffers[tensor.buffer].data
        return None if data is None or not len(data) else np.asarray(data, "uint8")

    def sizes(self, tensor):
        """The size of each axis, a list: -1 where it is open. Empty if not even their number is known."""
        found = tensor.shape if tensor.shapeSignature is None else tensor.shapeSignature
        return [] if found is None else [int(n) for n in found]

    def store(self, tensor, values):
        """Give a tensor bytes of its own: others may share its buffer."""
        tensor.buffer = len(self.model.buffers)
        self.model.buffers.append(self.schema.BufferT(data=np.frombuffer(values.tobytes(), "uint8")))

    def code(self, name, version=1):
        """The index of an operator's code, of this version at least."""
        number = getattr(self.schema.BuiltinOperator, name)
        for index, code in enumerate(self.model.operatorCodes):
            if max(code.builtinCode, code.deprecatedBuiltinCode) == number:
                code.version = max(code.version, version)
                return index
        code = self.schema.OperatorCodeT(deprecatedBuiltinCode=min(number, 127), builtinCode=number, version=version)
        self.model.operatorCodes.append(code)
        return len(self.model.operatorCodes) - 1

    def unpack(self, graph, source, operator, version, dtype, quantization):
        """Make an operator without options that unpacks the tensor `source`; returns it and its output's number."""
        tensor = graph.tensors[source]
        output = self.schema.TensorT(
            shape=tensor.shape,
            type=dtype,
            buffer=0,  # the empty one
            name=tensor.name + b"/" + operator.lower().encode(),
            quantization=quantization,
            hasRank=True,
        )
        graph.tensors.append(output)
        number = len(graph.tensors) - 1
        code = self.code(operator, version)
        return self.schema.OperatorT(opcodeIndex=code, inputs=[source], outputs=[number]), number

    def image(self, graph, like, rows, opened, channels):
        """Make a tensor of images of one pixel, quantized as another; returns its number."""
        graph.tensors.append(
            self.schema.TensorT(
                shape=np.array([rows, 1, 1, channels], "int32"),
                shapeSignature=np.array([opened, 1, 1, channels], "int32"),
                type=like.type,
                buffer=0,
                name=like.name + b"/pixels",
                quantization=like.quantization,
                hasRank=True,
            )
        )
        return len(graph.tensors) - 1

    def zeros(self, graph, inputs, kernel):
        """Make a bias of zeros for integers; returns its number. Its scale is that of the products."""
        scale = np.asarray(inputs.quantization.scale, "float32") * np.asarray(kernel.quantization.scale, "float32")
        bias = self.schema.TensorT(
            shape=np.array(kernel.shape[:1], "int32"),
            type=self.schema.TensorType.INT32,
            name=kernel.name + b"/bias",
            quantization=self.schema.QuantizationParametersT(scale=scale, zeroPoint=np.zeros(len(scale), "int64")),
            hasRank=True,
        )
        self.store(bias, np.zeros(kernel.shape[0], "int32"))
        graph.tensors.append(bias)
        return len(graph.tensors) - 1

    def fill(self, graph, number):
        """Make an operator that fills a stored tensor of floats with zeros, which is stored no longer."""
        tensor = graph.tensors[number]
        kinds = self.schema.TensorType
        inputs = []
        for name, kind, values in (
            (b"/shape", kinds.INT32, np.array(tensor.shape, "int32")),
            (b"/zero", kinds.FLOAT32, np.zeros((), "float32")),
        ):
            shape = np.array(values.shape, "int32")
            graph.tensors.append(self.schema.TensorT(shape=shape, type=kind, name=tensor.name + name, hasRank=True))
            self.store(graph.tensors[-1], values)
            inputs.append(len(graph.tensors) - 1)
        tensor.buffer = 0  # the empty one
        return self.schema.OperatorT(opcodeIndex=self.code("FILL"), inputs=inputs, outputs=[number])

    def like(self, graph, number, suffix):
        """Make a tensor of the type and shape of another that is computed; returns its number."""
        tensor = copy.copy(graph.tensors[number])
        tensor.name += suffix
        graph.tensors.append(tensor)
        return len(graph.tensors) - 1

    def reshape(self, graph, source, target, sizes):
        """Make an operator that gives a tensor another shape."""
        shape = self.schema.TensorT(
            shape=np.array([len(sizes)], "int32"),
            type=self.schema.TensorType.INT32,
            name=graph.tensors[target].name + b"/shape",
            hasRank=True,
        )
        self.store(shape, np.array(sizes, "int32"))
        graph.tensors.append(shape)
        return self.schema.OperatorT(
            opcodeIndex=self.code("RESHAPE"), inputs=[source, len(graph.tensors) - 1], outputs=[target]
        )

    def pack(self):
        used = {tensor.buffer for graph in self.model.subgraphs for tensor in graph.tensors}
        used |= {entry.buffer for entry in self.model.metadata or ()}
        for index, buffer in enumerate(self.model.buffers):
            if index not in used:
                buffer.data = None  # others refer to buffers by their numbers, so it stays as an empty one
        builder = _Builder(1024)
        builder.Finish(self.model.Pack(builder), file_identifier=b"TFL3")
        return bytes(builder.Output())
