"""Vela is Arm's compiler for Ethos-U NPUs: it says what of a file the NPU takes, in how many cycles and bytes.

`worker.py` runs this as a script: it knows ethos-u-vela alone. Nothing is run.
"""

import contextlib
import csv
import importlib
import io
import os
import re
import tempfile

__all__ = ["Engine"]

_OPERATORS = re.compile(r"^(CPU|NPU) operators = (\d+)", re.MULTILINE)


class Engine:
    """The compiler, for `worker.py`.

    Example:

    >>> from keras_sparse.tflite.vela import Engine
    >>> callable(Engine().compile)
    True
    """

    def prepare(self):
        """Import what compiling a file needs."""
        importlib.import_module("ethosu.vela.vela")

    def load(self, path, threads):
        """Remember the file."""
        self._path = path

    def describe(self):
        """A compiler has neither inputs nor outputs."""
        return {"inputs": [], "outputs": []}

    def set(self, inputs=None):
        """Refuse to run anything."""
        raise ValueError("Vela compiles files for an NPU and runs none")

    run = get = set

    def compile(self, npu):
        """Compile the file for an NPU.

        Args:
            npu: Vela's name of it, such as `"ethos-u85-128"`. Clocks and memories are Vela's defaults for it.

        Returns:
            Dict: `npu_operators` and `cpu_operators`, how many operators run where; `cycles` of one inference;
            `bytes_weights`, all weights as bytes, and `bytes_encoded`, what the NPU reads in their place.
        """
        from ethosu.vela import vela

        said = io.StringIO()
        with tempfile.TemporaryDirectory() as folder:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                vela.main([self._path, "--accelerator-config", npu, "--output-dir", folder])
            [name] = [name for name in os.listdir(folder) if name.endswith(".csv")]
            with open(os.path.join(folder, name), newline="") as file:
                row = next(csv.DictReader(file))
        operators = {where: int(count) for where, count in _OPERATORS.findall(said.getvalue())}
        return {
            "npu_operators": operators.get("NPU", 0),
            "cpu_operators": operators.get("CPU", 0),
            "cycles": round(float(row["cycles_total"])),
            "bytes_weights": round(float(row["total_original_weights"])),
            "bytes_encoded": round(float(row["total_npu_encoded_weights"])),
        }
