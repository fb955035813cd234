"""TFLite Micro's interpreter, as microcontrollers run it, on this CPU.

`worker.py` runs this as a script: it knows NumPy and tflite-micro alone.
"""

import importlib

import numpy as np

__all__ = ["Engine"]

_ARENAS = (64 << 20, 1 << 30)  # bytes for all that is computed; a microcontroller has less than either


class Engine:
    """TFLite Micro, for `worker.py`. It runs a file at the size that is stored in it: one sample, if that is open.

    Example:

    >>> from keras_sparse.tflite.micro import Engine
    >>> callable(Engine().load)
    True
    """

    def prepare(self):
        """Import what loading a file needs."""
        importlib.import_module("tflite_micro.python.tflite_micro.runtime")

    def load(self, path, threads):
        """Load the file and allocate its memory."""
        from tflite_micro.python.tflite_micro import runtime

        with open(path, "rb") as file:
            content = file.read()
        self._flat = runtime.convert_bytearray_to_object(content)
        for arena in _ARENAS:
            try:
                self._interpreter = runtime.Interpreter.from_bytes(content, arena_size=arena)
                return
            except RuntimeError as error:
                refusal = error
        raise refusal

    def describe(self):
        """What the file takes and gives."""
        graph = self._flat.subgraphs[0]
        named = {}
        for signature in (self._flat.signatureDefs or [])[:1]:
            for entry in [*signature.inputs, *signature.outputs]:
                named[entry.tensorIndex] = entry.name.decode()
        self._inputs, self._outputs = (
            {
                named.get(int(number), graph.tensors[number].name.decode()): (position, details(position))
                for position, number in enumerate(numbers)
            }
            for numbers, details in (
                (graph.inputs, self._interpreter.get_input_details),
                (graph.outputs, self._interpreter.get_output_details),
            )
        )
        return {
            "inputs": [
                {"name": name, "dtype": np.dtype(d["dtype"]).name, "shape": [int(n) for n in d["shape"]]}
                for name, (_, d) in self._inputs.items()
            ],
            "outputs": list(self._outputs),
            "scales": {
                name: [float(scales[0]), int(d["quantization_parameters"]["zero_points"][0])]
                for name, (_, d) in [*self._inputs.items(), *self._outputs.items()]
                for scales in [d["quantization_parameters"]["scales"]]
                if len(scales)
            },
        }

    def set(self, inputs):
        """Keep the inputs: their memory is used for other values while the file runs."""
        self._given = inputs

    def run(self):
        """Run once."""
        for name, values in self._given.items():
            position, detail = self._inputs[name]
            self._interpreter.set_input(np.reshape(values, detail["shape"]), position)
        self._interpreter.invoke()

    def get(self):
        """The outputs of the last run."""
        return {name: self._interpreter.get_output(position) for name, (position, _) in self._outputs.items()}
