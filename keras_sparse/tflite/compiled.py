"""The compiled model is LiteRT's newer interface, which runs a file on the accelerators that it is asked for.

`worker.py` runs this as a script: it knows NumPy and ai-edge-litert alone.
"""

import importlib

import numpy as np

__all__ = ["Engine"]

_INTEGERS = ("int8", "uint8", "int16")  # types of inputs and outputs that may stand for other numbers


class Engine:
    """LiteRT's `CompiledModel`, for `worker.py`.

    Args:
        accelerators: Names of LiteRT's accelerators, joined by `+`: `"CPU"`, `"GPU"` alone, or `"GPU+CPU"`, where what
            the GPU does not take stays on the CPU.

    Example:

    >>> from keras_sparse.tflite.compiled import Engine
    >>> Engine("GPU+CPU").accelerators
    ['GPU', 'CPU']
    """

    def __init__(self, accelerators):
        self.accelerators = accelerators.split("+")

    def prepare(self):
        """Import what loading a file needs."""
        importlib.import_module("ai_edge_litert.compiled_model")

    def load(self, path, threads):
        """Compile the file."""
        from ai_edge_litert.compiled_model import CompiledModel
        from ai_edge_litert.hardware_accelerator import HardwareAccelerator
        from ai_edge_litert.options import CpuOptions, Options

        wanted = HardwareAccelerator(0)
        for name in self.accelerators:
            wanted |= HardwareAccelerator[name]
        options = Options(hardware_accelerators=wanted, cpu_options=CpuOptions(num_threads=threads))
        self._path = path
        self._model = CompiledModel.from_file(path, options=options)
        self._accelerated = self._model.is_fully_accelerated()

    def describe(self):
        """What the file takes and gives, and whether all of it runs on the accelerators."""
        model = self._model
        signature = next(iter(model.get_signature_list()))
        names = model.get_signature_by_index(0)
        self._inputs, self._outputs = (
            {name: details[name] for name in names[kind]}
            for kind, details in (
                ("inputs", model.get_input_tensor_details(signature)),
                ("outputs", model.get_output_tensor_details(signature)),
            )
        )
        self._given = model.create_input_buffers(0)
        self._results = model.create_output_buffers(0)
        inputs = [{"name": name, "dtype": _dtype(d), "shape": _shape(d)} for name, d in self._inputs.items()]
        return {
            "inputs": inputs,
            "outputs": list(self._outputs),
            "scales": self._scales(),
            "accelerated": bool(self._accelerated),
        }

    def _scales(self):
        """What stored integers stand for: the compiled model does not tell, the interpreter does."""
        integers = [d for d in [*self._inputs.values(), *self._outputs.values()] if _dtype(d) in _INTEGERS]
        if not integers:
            return {}
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        interpreter = Interpreter(model_path=self._path, experimental_op_resolver_type=plain)
        key = next(iter(interpreter.get_signature_list()), None)
        if key is None:
            return {}
        runner = interpreter.get_signature_runner(key)
        details = {**runner.get_input_details(), **runner.get_output_details()}
        pairs = {name: detail["quantization"] for name, detail in details.items()}
        return {name: [float(scale), int(point)] for name, (scale, point) in pairs.items() if scale}

    def set(self, inputs):
        """Write the inputs of the next runs."""
        for buffer, name in zip(self._given, self._inputs, strict=True):
            buffer.write(np.ascontiguousarray(inputs[name]))

    def run(self):
        """Run, and wait until the outputs have been read: a GPU computes on after its call has returned."""
        self._model.run_by_index(0, self._given, self._results)
        self._values = {}
        for buffer, (name, detail) in zip(self._results, self._outputs.items(), strict=True):
            shape = _shape(detail)
            values = buffer.read(int(np.prod(shape)), np.dtype(_dtype(detail)).type)
            self._values[name] = np.reshape(values, shape)

    def get(self):
        """The outputs of the last run."""
        return self._values


def _shape(detail):
    return [max(1, int(n)) for n in detail["shape"]]


def _dtype(detail):
    dtype = detail["dtype"]
    return dtype.lower() if isinstance(dtype, str) else np.dtype(dtype).name
