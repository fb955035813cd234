"""A trial loads a file where a target would run it, and tells how it runs there."""

from dataclasses import dataclass, field

from keras_sparse.tflite.commands import COMPILERS, RUNTIMES, RuntimeMissing
from keras_sparse.tflite.errors import reason
from keras_sparse.tflite.runtimes import Worker

__all__ = ["DENSE", "PARTLY", "REFUSED", "SPARSE", "UNKNOWN", "Trial", "compiled", "tried"]

SPARSE, DENSE, PARTLY, REFUSED = "runs sparse", "runs dense", "in part on the CPU", "refused"
UNKNOWN = "not tried"


@dataclass(frozen=True)
class Trial:
    """How a file runs on a target.

    Attributes:
        verdict: `"runs sparse"`, `"runs dense"`, `"in part on the CPU"`, `"refused"`, or `"not tried"`.
        reason: What says so, or what is missing for a trial.
        made: What a compiler for an NPU made of it, a dict; empty where there is none.

    Example:

    >>> from keras_sparse.tflite.trial import Trial
    >>> Trial("runs dense", "").made
    {}
    """

    verdict: str
    reason: str
    made: dict = field(default_factory=dict)


def tried(content, target):
    """Load a file with dense weights where a target would.

    Args:
        content: The file's bytes.
        target: A `Target`.

    Returns:
        A `Trial`.

    Example:

    >>> import keras
    >>> from keras_sparse.tflite.convert import convert
    >>> from keras_sparse.tflite.job import Job
    >>> from keras_sparse.tflite.targets import get
    >>> from keras_sparse.tflite.trial import tried
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> tried(convert(Job(model)).content, get("xnnpack-x86")).verdict
    'runs dense'
    """
    made = Trial(UNKNOWN, "No runtime of this package runs it; try the file on the device")
    for name in target.runtimes:
        made = _asked(content, RUNTIMES[name], _loaded)
        if made.verdict in (REFUSED, PARTLY, UNKNOWN):
            return made
    return compiled(content, target.npu) if target.npu else made


def compiled(content, npu):
    """Compile a file with dense weights for an NPU.

    Args:
        content: The file's bytes.
        npu: What Arm's compiler calls it: `Target.npu`.

    Returns:
        A `Trial`.

    Example:

    >>> from keras_sparse.tflite.trial import compiled
    >>> compiled(b"this is no model", "ethos-u55-128").verdict in ("refused", "not tried")
    True
    """
    return _asked(content, COMPILERS[0], lambda worker, runtime: _by_compiler(worker.compile(npu), npu))


def _asked(content, runtime, ask):
    """The trial that `ask(worker, runtime)` makes where a runtime has loaded the file, or why there is none."""
    try:
        with Worker(content, runtime.name) as worker:
            return ask(worker, runtime)
    except ValueError as error:
        return Trial(REFUSED, reason(error))
    except (RuntimeMissing, TimeoutError) as error:
        return Trial(UNKNOWN, str(error))


def _loaded(worker, runtime):
    if worker.accelerated is False:
        return Trial(PARTLY, f"Without a CPU it is refused: {worker.objections() or 'no reason is told'}")
    return Trial(DENSE, f"Loaded by {runtime.title}")


def _by_compiler(made, npu):
    operators = made["npu_operators"] + made["cpu_operators"]
    reason = (
        f"On {npu}: {made['npu_operators']} of {operators} operators, {made['cycles']:,d} cycles, "
        f"{made['bytes_weights']:,d} weights in {made['bytes_encoded']:,d} bytes (by Vela, estimated)"
    )
    if not made["npu_operators"]:
        return Trial(REFUSED, f"None of its {operators} operators can run on the NPU", made)
    return Trial(PARTLY if made["cpu_operators"] else SPARSE, reason, made)
