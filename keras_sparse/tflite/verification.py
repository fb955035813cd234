"""A verification says whether a file computes what its model computes, wherever encodings are known to go wrong.

XNNPACK's sparse kernels for convolutions are off on x86 CPUs with AVX: a comparison on such a machine cannot see their
faults. Others that have them on are emulated.
"""

import functools
import os

from keras_sparse.tflite.commands import COMPILERS, RUNTIMES, RuntimeMissing, available
from keras_sparse.tflite.errors import ExportError, first_line, reason
from keras_sparse.tflite.flatmodel import read
from keras_sparse.tflite.inputs import random_batches
from keras_sparse.tflite.job import CALIBRATED, INTEGERS
from keras_sparse.tflite.parity import Reference
from keras_sparse.tflite.rounding import TOLERANCE, unexplained
from keras_sparse.tflite.samples import in_batches_of
from keras_sparse.tflite.trial import REFUSED, UNKNOWN, compiled
from keras_sparse.tflite.xnnpack import hazard, touched, uses

__all__ = ["NEAR", "SPARSE_RUNTIMES", "VERIFY", "Verification", "allowed_elsewhere", "precision", "sparse_runtimes"]

VERIFY = ("auto", "strict")  # which runtimes to compare on; see `export`
# Where XNNPACK's sparse kernels for convolutions are on: what is said about a file that was compared there.
SPARSE_RUNTIMES = {name: runtime.title for name, runtime in RUNTIMES.items() if runtime.verifies}
_NATIVE = RUNTIMES["native"]
_SAMPLES = 16  # of representative data that a file is compared on, one by one, if it was calibrated with them
NEAR = 0.05  # that a runtime may differ by where this machine is closer than half of that: kernels round otherwise
_ALIKE = 0.03  # share of an output's magnitude: one that differs less between samples hardly depends on them


def sparse_runtimes(verify="auto"):
    """List the installed runtimes that have XNNPACK's sparse kernels for convolutions on.

    With `KERAS_SPARSE_VERIFY=native` in the environment `"auto"` finds none: a comparison there takes some seconds,
    and a test suite may have hundreds of exports.

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
    if verify == "auto" and _keeps_to_this_machine():
        return []
    missing = available()
    found = [name for name in SPARSE_RUNTIMES if missing[name] is None]
    if verify == "strict" and not found:
        reasons = " ".join(missing[name] for name in SPARSE_RUNTIMES)
        raise RuntimeMissing(
            f"verify='strict' needs a runtime on which sparse kernels are on; one is enough. {reasons}"
        )
    return found


def _keeps_to_this_machine():
    return os.environ.get("KERAS_SPARSE_VERIFY") == _NATIVE.name


def allowed_elsewhere(allowed, here):
    """How far a file's outputs may be from its model's on another runtime than this machine's, a share of the largest.

    Args:
        allowed: What its numbers cost at most.
        here: Its `Parity` on this machine.

    Example:

    >>> from keras_sparse.tflite.parity import Parity
    >>> from keras_sparse.tflite.verification import allowed_elsewhere
    >>> allowed_elsewhere(0.4, Parity(absolute=0.5, relative=0.04, worst="y"))
    0.08
    """
    return min(allowed, max(2 * here.relative, NEAR))


class Verification:
    """Compares encodings of a file with its model, on this machine and where sparse kernels are on.

    Args:
        dense: Bytes of the file with dense weights.
        reference: The `Reference` of the model.
        tolerance: How far an output may be from the model's, relative to its largest magnitude.
        integers: Whether weights are stored as integers.
        runtimes: Names of runtimes with sparse kernels, as `sparse_runtimes` returns them.
        strict: Whether these are asked about every file, not only those that sparse kernels could touch.
        targets: The `Target` objects that it is meant for: their runtimes are asked about every file.
        rules: Functions that say of a `FlatModel` why it must not be handed out, or `None`.

    Attributes:
        verified_on: Where the last one that was looked at was right, in words.
        not_verified: List of sentences: for which target it could not be compared, and why.
        notes: What was found out about runtimes that compute wrong numbers from the dense file, too.

    Example:

    >>> import keras
    >>> from keras_sparse.tflite.convert import convert
    >>> from keras_sparse.tflite.inputs import random_batches
    >>> from keras_sparse.tflite.job import Job
    >>> from keras_sparse.tflite.parity import Reference
    >>> from keras_sparse.tflite.verification import Verification
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> job = Job(model)
    >>> reference = Reference(model, job.signature, random_batches(model, job.signature))
    >>> verification = Verification(convert(job).content, reference, tolerance=1e-4)
    >>> right, parity = verification.dense()
    >>> right, len(verification.verified_on)
    (True, 1)
    """

    def __init__(
        self, dense, reference, tolerance, integers=False, runtimes=(), strict=False, targets=(), rules=(hazard,)
    ):
        self._dense, self._reference, self._tolerance = dense, reference, tolerance
        self._integers, self._runtimes, self._strict, self._targets = integers, runtimes, strict, targets
        self._rules = rules
        self.verified_on, self.not_verified, self.notes = [], [], []

    @classmethod
    def of(cls, job, conversion, runtimes=(), strict=False, targets=()):
        """The verification of what a job made, on the inputs that suit it.

        Args:
            job: A `Job`.
            conversion: Its `Conversion`.
            runtimes: As above.
            strict: As above.
            targets: As above.

        Raises:
            ExportError: If the model itself fails on these inputs.
        """
        # What is calibrated clips what is beyond the range of its samples: random inputs would be.
        batches = job.samples[:_SAMPLES]
        if job.quantize not in CALIBRATED:
            like = job.samples[0] if job.samples else None
            batches = random_batches(job.model, job.signature, like=like) + list(job.samples)
        batches = in_batches_of(1, batches) if conversion.fixed_batch else batches
        reference = Reference(job.model, job.signature, batches)
        tolerance = max(TOLERANCE[name] for name in (precision(job.model), job.quantize or "float32"))
        made = cls(conversion.content, reference, tolerance, job.quantize in INTEGERS, runtimes, strict, targets)
        steps = CALIBRATED.get(job.quantize)
        for name, (least, most) in reference.uneven_outputs(steps).items() if steps else ():
            made.notes.append(
                f"The features of output {name!r} reach from {least:.2g} to {most:.2g} and share one scale of "
                f"{steps:,} steps, on which the small ones are lost: give them outputs of their own, or let the app "
                "scale them."
            )
        alike = reference.alike(min(tolerance, _ALIKE))
        if alike:
            made.notes.append(
                f"The comparison says little of {', '.join(alike)}: on the inputs that were tried it differs by less "
                f"than {min(tolerance, _ALIKE):.1%} of its magnitude, from one to the next or from 0 and 1, and may do "
                "so in a wrong file. Pass inputs as the model will meet them, and several, as `representative_data`."
            )
        return made

    def dense(self):
        """Whether the dense file is right, and its parity on this machine.

        Raises:
            ExportError: If ai-edge-litert cannot run it, or a target's runtime cannot, or computes something else.
        """
        self.verified_on, self.not_verified = [_NATIVE.title], []
        try:
            parity = self._here
        except (RuntimeError, ValueError) as error:
            raise ExportError(
                "ai-edge-litert cannot run what TensorFlow's converter makes of this model, with dense weights either. "
                f"Received: {first_line(error)}"
            ) from error
        for runtime in self._runtimes if self._strict else ():
            self._fault_on(runtime, self._dense, self._tolerance)
        right = parity.relative <= self._tolerance
        for target in self._targets if right else ():
            problem = self.unfit(target)
            if problem is not None:
                raise ExportError(
                    f"The file is not for the target {target.name!r}; `ks.tflite.check(model, {target.name!r})` says "
                    f"more. Received: {problem}"
                )
        return right, parity

    def unfit(self, target):
        """What is wrong with the dense file, which is right on this machine, for a `Target`; or `None`."""
        return self._unproven(target, self._dense, self._tolerance)

    def fault(self, content):
        """Why a sparse-encoded file must not be handed out, or `None`; and its parity on this machine."""
        self.verified_on, self.not_verified = [_NATIVE.title], []
        model = read(content)
        fault = _first(self._rules, model)
        if fault is not None:
            return fault, None
        if not _same_weights(model, read(self._dense)):
            return "a decoded weight is not the dense file's", None
        for target in self._targets:
            if target.restores and not _restored(model) <= set(target.restores):
                return f"{target.title} restores only {' and '.join(target.restores)} weights right", None
        try:
            parity = self._native(content)
        except (RuntimeError, ValueError) as error:  # of the interpreter here, or in its process
            return f"ai-edge-litert cannot run it ({first_line(error)})", None
        allowed = self._tolerance
        if self._integers:
            # Their tolerance is wide; but leaving out zeros changes little.
            allowed = min(allowed, max(2 * self._here.relative, 0.02))
        if not parity.relative <= allowed:
            return f"output {parity.worst!r} differs from the model's by {parity.relative:.3g} of its magnitude", None
        if self._strict or touched(model):
            for runtime in self._runtimes:
                fault = self._fault_on(runtime, content, allowed)
                if fault is not None:
                    return fault, None
        for target in self._targets:
            if target.form is not None and touched(model) and not self._runtimes:
                self.not_verified.append(
                    f"{target.name}: no runtime with sparse kernels is asked here, {' or '.join(SPARSE_RUNTIMES)}."
                )
            fault = self._unproven(target, content, allowed)
            if fault is not None:
                return fault, None
        return None, parity

    def why_wrong(self, parity):
        """The sentences that say that the dense file, of this `Parity`, does not compute what the model computes."""
        if self._integers:
            why = (
                "Eight bits are too few for it, or the representative data do not cover what it meets: try "
                "quantize='float16'. "
            ) + "".join(
                f"The features of input {name!r} reach from {least:.2g} to {most:.2g} and share one scale of 8 bits: "
                "normalize them before the model, and leave its Normalization out. "
                for name, (least, most) in self._reference.uneven_inputs(CALIBRATED["int8"]).items()
            )
        else:
            why = "Report this model to keras_sparse if it has no random layer that is active in inference. "
        return (
            f"The .tflite file of model {self._reference.name!r} does not compute what the model computes, so it was "
            f"not kept. {why}Received: output {parity.worst!r} differs by {parity.absolute:.3g}, {parity.relative:.3g} "
            f"of its magnitude (allowed: {self._tolerance:.0e})"
        )

    def doubts(self, parity, quantize):
        """List of sentences on what a file of this `Parity`, which is allowed, may be wrong by all the same."""
        found = unexplained(self._reference, quantize, parity)
        return [found] if found else []

    def check_strict(self):
        """Raise an `ExportError` if the verification is strict and the last file was compared on this machine alone."""
        if self._strict and self.not_verified:
            raise RuntimeMissing(
                f"verify='strict' needs a runtime for each target. Received: {' '.join(self.not_verified)}"
            )
        if self._strict and len(self.verified_on) == 1:
            raise ExportError(
                "verify='strict' needs a runtime on which sparse kernels are on and the file is right. Received: "
                f"{' '.join(self.notes) or 'none that answered in time'}"
            )

    @functools.cached_property
    def _here(self):
        """The parity of the dense file on this machine."""
        return self._native(self._dense)

    def _native(self, content):
        # Kernels for integers may end the process.
        return self._reference.compare_on(_NATIVE.name, content) if self._integers else self._reference.compare(content)

    def _fault_on(self, runtime, content, allowed):
        name = SPARSE_RUNTIMES[runtime]
        try:
            problem = self._problem_on(runtime, content, allowed)
            if problem is None:
                self._verified(name)
                return None
            unfit = self._problem_on(runtime, self._dense, self._tolerance)
        except TimeoutError:  # emulators are slow: nothing is known
            return None
        if unfit is None:
            return f"on {name}, {problem}"
        self._note(f"Not for {name}: from the dense file as well, {unfit}.")
        return None

    def _unproven(self, target, content, allowed):
        """What is wrong with a file for a target, or `None`; what could not be found out is kept."""
        known = _first(target.faults, read(content)) if target.faults else None
        if known is not None:
            return known
        if not target.runtimes:
            self.not_verified.append(f"{target.name}: no runtime of this package runs it; try the file on the device.")
        for runtime in [RUNTIMES[name] for name in target.runtimes]:
            if runtime.title in self.verified_on:
                continue
            if not self._strict and _keeps_to_this_machine():
                self.not_verified.append(f"{target.name}: KERAS_SPARSE_VERIFY keeps to this machine's CPU.")
                continue
            try:
                problem = self._problem_on(runtime.name, content, max(allowed, TOLERANCE[runtime.precision]))
            except (RuntimeMissing, TimeoutError) as error:
                self.not_verified.append(f"{target.name}: {error}")
                continue
            if problem is not None:
                return f"on {runtime.title}, {problem}"
            self._verified(runtime.title)
        return self._uncompiled(target, content) if target.npu else None

    def _uncompiled(self, target, content):
        """What the compiler for a target's NPU objects to, or `None`; a note says what it makes of the file."""
        trial = compiled(content, target.npu)
        if trial.verdict == UNKNOWN:
            self.not_verified.append(f"{target.name}: {trial.reason}")
        elif trial.verdict == REFUSED:
            return trial.reason
        else:
            self._note(f"{trial.reason}.")
            self._verified(COMPILERS[0].title)
        return None

    def _verified(self, title):
        if title not in self.verified_on:
            self.verified_on.append(title)

    def _note(self, note):
        if note not in self.notes:
            self.notes.append(note)

    def _problem_on(self, runtime, content, allowed):
        try:
            parity = self._reference.compare_on(runtime, content)
        except ValueError as error:
            return f"the file cannot be run ({reason(error)})"
        if parity.relative <= allowed_elsewhere(allowed, self._here):
            if parity.accelerated is False:
                self._note(
                    f"{RUNTIMES[runtime].title}: in part on the CPU. Without one the accelerator refuses the file."
                )
            return None
        return f"output {parity.worst!r} differs by {parity.relative:.3g} of its magnitude"


def _first(rules, model):
    """The first objection of some rules to a `FlatModel`, or `None`."""
    return next(filter(None, (rule(model) for rule in rules)), None)


def _restored(model):
    """The types of the weights that are stored without their zeros and restored."""
    return {use.tensor.dtype for use in uses(model) if not use.sparse}


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


def precision(layer):
    """The coarsest number format that a model computes in.

    Example:

    >>> import keras
    >>> from keras_sparse.tflite.verification import precision
    >>> precision(keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, dtype="mixed_float16")]))
    'float16'
    """
    names = [precision(inner) for inner in getattr(layer, "layers", ())]
    names.append(layer.compute_dtype if layer.compute_dtype in TOLERANCE else "float32")
    return max(names, key=TOLERANCE.get)
