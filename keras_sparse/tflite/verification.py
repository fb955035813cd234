"""A verification says whether a file computes what its model computes, wherever encodings are known to go wrong.

XNNPACK's sparse kernels for convolutions are off on x86 CPUs with AVX: a comparison on such a machine cannot see their
faults. Others that have them on are emulated.
"""

import platform

from keras_sparse.tflite.convert import ExportError, first_line
from keras_sparse.tflite.flatmodel import read
from keras_sparse.tflite.runtimes import RuntimeMissing, available
from keras_sparse.tflite.xnnpack import hazard, touched

__all__ = ["SPARSE_RUNTIMES", "TOLERANCE", "VERIFY", "Verification", "sparse_runtimes"]

# How far an output may be from the model's, relative to that output's largest magnitude.
# float32: two correct programs differ by the order of their sums and by the polynomials they use for exp and tanh: 1e-7
# to 1e-6 in shallow models, below 1e-5 in the deepest of keras.applications; batch normalization of a pruned network
# that was not trained on can make 1e-4 of that (MobileNetV3, random weights). A wrong layout or weight costs 1e-1 and
# more. Half precision rounds each weight or product to 2**-11 (float16) or 2**-8 (bfloat16), and layers add that up.
# int8 rounds each weight to 1/254 of its channel's range, and "int8" each activation to 1/256 of its own; random
# networks of fifty layers add that up to 0.1 and 0.3. Faults of sparse encodings are 0.4 and more, and
# `Verification.fault` compares with the dense file, too.
TOLERANCE = {"float32": 1e-3, "float16": 3e-2, "bfloat16": 1e-1, "dynamic": 2e-1, "int8": 4e-1}
VERIFY = ("auto", "strict")  # which runtimes to compare on; see `export`
# Where XNNPACK's sparse kernels for convolutions are on: what is said about a file that was compared there.
SPARSE_RUNTIMES = {
    "x86-no-avx": "ai-edge-litert on an emulated x86_64 CPU without AVX",
    "wasm": "LiteRT.js, WebAssembly in Node",
}


def sparse_runtimes(verify="auto"):
    """List the installed runtimes that have XNNPACK's sparse kernels for convolutions on.

    Args:
        verify: `"auto"`, or `"strict"` for an error if there is none.

    Raises:
        RuntimeMissing: If there is none; an `OSError`.
        ValueError: If `verify` is something else.

    Example:

    >>> from keras_sparse.tflite.verification import sparse_runtimes
    >>> set(sparse_runtimes()) <= {"x86-no-avx", "wasm"}
    True
    """
    if verify not in VERIFY:
        raise ValueError(f"`verify` must be 'auto' or 'strict'. Received: verify={verify!r}")
    missing = available()
    found = [name for name in SPARSE_RUNTIMES if missing[name] is None]
    if verify == "strict" and not found:
        reasons = " ".join(missing[name] for name in SPARSE_RUNTIMES)
        raise RuntimeMissing(
            f"verify='strict' needs a runtime on which sparse kernels are on; one is enough. {reasons}"
        )
    return found


class Verification:
    """Compares encodings of a file with its model, on this machine and where sparse kernels are on.

    Args:
        dense: Bytes of the file with dense weights.
        reference: The `Reference` of the model.
        tolerance: How far an output may be from the model's, relative to its largest magnitude.
        integers: Whether weights are stored as integers.
        runtimes: Names of runtimes with sparse kernels, as `sparse_runtimes` returns them.
        strict: Whether these are asked about every file, not only those that sparse kernels could touch.

    Attributes:
        verified_on: Where the last one that was looked at was right, in words.
        notes: What was found out about runtimes that compute wrong numbers from the dense file, too.

    Example:

    >>> import keras
    >>> from keras_sparse.tflite.convert import convert
    >>> from keras_sparse.tflite.parity import Reference, random_batches
    >>> from keras_sparse.tflite.signatures import signature
    >>> from keras_sparse.tflite.verification import Verification
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> called = signature(model)
    >>> reference = Reference(model, called, random_batches(model, called))
    >>> verification = Verification(convert(model, called).content, reference, tolerance=1e-4)
    >>> right, parity = verification.dense()
    >>> right, len(verification.verified_on)
    (True, 1)
    """

    def __init__(self, dense, reference, tolerance, integers=False, runtimes=(), strict=False):
        self._dense, self._reference, self._tolerance = dense, reference, tolerance
        self._integers, self._runtimes, self._strict = integers, runtimes, strict
        self.verified_on, self.notes = [], []

    def dense(self):
        """Whether the dense file is right, and its parity on this machine.

        Raises:
            ExportError: If ai-edge-litert cannot run it.
        """
        self.verified_on = [_here()]
        try:
            parity = self._native(self._dense)
        except (RuntimeError, ValueError) as error:
            raise ExportError(
                "ai-edge-litert cannot run what TensorFlow's converter makes of this model, with dense weights either. "
                f"Received: {first_line(error)}"
            ) from error
        for runtime in self._runtimes if self._strict else ():
            self._fault_on(runtime, self._dense, self._tolerance)
        return parity.relative <= self._tolerance, parity

    def fault(self, content):
        """Why a sparse-encoded file must not be handed out, or `None`; and its parity on this machine."""
        self.verified_on = [_here()]
        model = read(content)
        fault = hazard(model)
        if fault is not None:
            return fault, None
        if not _same_weights(model, read(self._dense)):
            return "a decoded weight is not the dense file's", None
        try:
            parity = self._native(content)
        except (RuntimeError, ValueError) as error:  # of the interpreter here, or in its process
            return f"ai-edge-litert cannot run it ({first_line(error)})", None
        allowed = self._tolerance
        if self._integers:
            # Their tolerance is wide; but leaving out zeros changes little.
            allowed = min(allowed, max(2 * self._native(self._dense).relative, 0.02))
        if not parity.relative <= allowed:
            return f"output {parity.worst!r} differs from the model's by {parity.relative:.3g} of its magnitude", None
        if self._strict or touched(model):
            for runtime in self._runtimes:
                fault = self._fault_on(runtime, content, allowed)
                if fault is not None:
                    return fault, None
        return None, parity

    def _native(self, content):
        # Kernels for integers may end the process.
        return self._reference.compare_on("native", content) if self._integers else self._reference.compare(content)

    def _fault_on(self, runtime, content, allowed):
        name = SPARSE_RUNTIMES[runtime]
        try:
            problem = self._problem_on(runtime, content, allowed)
            if problem is None:
                self.verified_on.append(name)
                return None
            unfit = self._problem_on(runtime, self._dense, self._tolerance)
        except TimeoutError:  # emulators are slow: nothing is known
            return None
        if unfit is None:
            return f"on {name}, {problem}"
        note = f"Not for {name}: from the dense file as well, {unfit}."
        self.notes += [] if note in self.notes else [note]
        return None

    def _problem_on(self, runtime, content, allowed):
        try:
            parity = self._reference.compare_on(runtime, content)
        except ValueError as error:
            return f"the file cannot be run ({str(error).strip().splitlines()[0][-200:]})"
        if parity.relative <= allowed:
            return None
        return f"output {parity.worst!r} differs by {parity.relative:.3g} of its magnitude"


def _here():
    return f"ai-edge-litert on this {platform.machine()} CPU"


def _same_weights(sparse, dense):
    """Whether each sparse-encoded tensor decodes to a tensor of the dense file (in another order, and shape)."""

    def sizes(tensor):
        return [n for n in tensor.shape if n > 1]

    def key(tensor):
        values = tensor.real_values() + 0  # a sparse encoding keeps no -0.0
        return *sizes(tensor), values.tobytes()

    encoded = [t for graph in sparse.subgraphs for t in graph.tensors if t.levels is not None]
    shapes = [sizes(t) for t in encoded]
    known = {key(t) for graph in dense.subgraphs for t in graph.tensors if t.stored is not None and sizes(t) in shapes}
    return all(key(tensor) in known for tensor in encoded)
