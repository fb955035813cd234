"""A trial loads a file where a target would run it, and tells how it runs there."""

from dataclasses import dataclass

from keras_sparse.tflite.commands import COMPILERS, RUNTIMES, RuntimeMissing
from keras_sparse.tflite.runtimes import Worker

__all__ = ["DENSE", "PARTLY", "REFUSED", "SPARSE", "UNKNOWN", "Trial", "tried"]

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
    made: dict = ()

    def __post_init__(self):
        object.__setattr__(self, "made", dict(self.made))


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
    try:
        for name in target.runtimes:
            made = _loaded(content, RUNTIMES[name])
            if made.verdict in (REFUSED, PARTLY):
                return made
        if target.npu:
            return _compiled(content, target)
    except (RuntimeMissing, TimeoutError) as error:
        return Trial(UNKNOWN, str(error))
    return made


def _loaded(content, runtime):
    try:
        with Worker(content, runtime.name) as worker:
            if worker.accelerated is False:
                return Trial(PARTLY, f"Without a CPU it is refused: {worker.objections() or 'no reason is told'}")
    except ValueError as error:
        return Trial(REFUSED, str(error).partition(" (")[2].rstrip(")"))
    return Trial(DENSE, f"Loaded by {runtime.title}")


def _compiled(content, target):
    try:
        with Worker(content, COMPILERS[0].name) as worker:
            made = worker.compile(target.npu)
    except ValueError as error:
        return Trial(REFUSED, str(error).partition(" (")[2].rstrip(")"))
    operators = made["npu_operators"] + made["cpu_operators"]
    reason = (
        f"On {target.npu}: {made['npu_operators']} of {operators} operators, {made['cycles']:,d} cycles, "
        f"{made['bytes_weights']:,d} weights in {made['bytes_encoded']:,d} bytes (by Vela, estimated)"
    )
    if not made["npu_operators"]:
        return Trial(REFUSED, f"None of its {operators} operators can run on the NPU", made)
    return Trial(PARTLY if made["cpu_operators"] else SPARSE, reason, made)
