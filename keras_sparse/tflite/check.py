"""A check says before training what a model will gain on a target, what stands in its way, and what to train for."""

import numpy as np

from keras_sparse import patterns, selection
from keras_sparse.reports import Report
from keras_sparse.tflite import signatures
from keras_sparse.tflite.acceptance import accepted
from keras_sparse.tflite.commands import RUNTIMES
from keras_sparse.tflite.convert import convert
from keras_sparse.tflite.editing import File
from keras_sparse.tflite.encoding import OUTWEIGHED, encode
from keras_sparse.tflite.errors import ExportError
from keras_sparse.tflite.flatmodel import read
from keras_sparse.tflite.inputs import random_batches
from keras_sparse.tflite.job import Job
from keras_sparse.tflite.matching import LayerNames, match, readers
from keras_sparse.tflite.samples import in_batches_of
from keras_sparse.tflite.targets import get
from keras_sparse.tflite.trial import DENSE, PARTLY, REFUSED, SPARSE, UNKNOWN, Trial, compiled, tried
from keras_sparse.tflite.verification import Verification
from keras_sparse.tflite.xnnpack import hazard, uses, violations

__all__ = ["CheckReport", "check"]

_COMPRESSED = ("CONV_2D", "FULLY_CONNECTED")  # whose weights a compiler for an NPU compresses
_FEW = 0.05  # a share of zeros that a model may have by chance


class CheckReport(Report):
    """What a model will gain on a target.

    Rows: one for each weight in the file that multiplies inputs. `runs`: `"sparse"`, or what becomes of its zeros;
    `pattern` and `from_sparsity`: what to train it for.

    Attributes:
        violations: List of `{"layer", "violation", "mend"}`: what keeps 1x1 convolutions from running sparse.
        target_sparsity: `{regex: (sparsity, pattern)}` for `Pruning` and `ks.prune`: all weights that can run sparse.
        filters: Regexes of the weights with the pattern that most weights need.
        pattern: That pattern.
        verdict: How the model will run there: `"runs sparse"`, if it is pruned as `target_sparsity` says;
            `"runs dense"`, `"in part on the CPU"` or `"refused"`, found by running it where the target's runtime is
            installed; else `"not tried"`. Wrong numbers count as refused.
        bytes_dense: Predicted size of the file with dense weights.
        bytes_sparse: Predicted size with the weights of `target_sparsity` pruned; `bytes_dense` where the target
            takes no weights that are stored without their zeros.
        cycles: For an NPU whose compiler is installed, `(dense, sparse)`: cycles of one inference by its estimate, of
            the network as it is and with each weight of a Dense layer or convolution pruned to `sparsity`; else `None`.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64), keras.layers.Dense(10)])
    >>> report = ks.tflite.check(model, "xnnpack-x86")
    >>> report.pattern, len(report.filters), report.bytes_sparse < report.bytes_dense
    ('block_1x4', 2, True)
    """

    def __init__(self, title, rows, totals, notes, found, target_sparsity):
        formats = dict.fromkeys(("size", "bytes_dense", "bytes_sparse", "cycles_dense", "cycles_sparse"), ",d")
        formats |= {
            "shape": lambda shape: "x".join(map(str, shape)),
            "from_sparsity": lambda s: f"{s:.0%}" if s else "",
        }
        super().__init__(title, rows, totals, notes, formats)
        self.violations = found
        self.target_sparsity = target_sparsity
        sizes = {}
        for row in rows:
            if row["runs"] == "sparse":
                sizes[row["pattern"]] = sizes.get(row["pattern"], 0) + row["size"]
        self.pattern = max(sizes, key=sizes.get, default=None)
        self.filters = [regex for regex, (_, pattern) in target_sparsity.items() if pattern == self.pattern]
        self.bytes_dense, self.bytes_sparse = totals["bytes_dense"], totals["bytes_sparse"]
        self.verdict = totals["verdict"]
        cycles = totals.get("cycles_dense"), totals.get("cycles_sparse")
        self.cycles = None if None in cycles else cycles

    def to_dict(self):
        """The report as plain data, with `violations` and `target_sparsity`."""
        return super().to_dict() | {"violations": self.violations, "target_sparsity": self.target_sparsity}


def check(model, target="xnnpack", sparsity=0.9):
    """Say what a model would gain on a target if it were pruned, as TFLite's converter will see it.

    The model is converted, the weights that the target could run sparse are pruned in the file by magnitude, in the
    pattern they need, and the file is looked at with the rules of `keras_sparse.tflite.xnnpack`. Where a runtime of the
    target is installed, it loads the dense file, in a process of its own; Arm's compiler for Ethos-U NPUs gets one in
    integers. Nothing is trained, and the model is left as it is.

    Args:
        model: A built Keras model on any backend, or the path of a .keras file.
        target: Name of a target, see `ks.tflite.targets`.
        sparsity: The sparsity to look at. 1x1 convolutions run sparse above two thirds, Dense layers in blocks pay
            from 85 to 90 %.

    Returns:
        A `CheckReport`: `Pruning(0.9, filters=report.filters, pattern=report.pattern)` or
        `Pruning(report.target_sparsity)` trains for it.

    Raises:
        ExportError: If the model cannot be converted; a `ValueError`.
        ValueError: If `target` or `sparsity` is none.
        TypeError: If `model` is no Keras 3 model.

    Example:

    >>> import keras, keras_sparse as ks
    >>> stem = keras.layers.Conv2D(8, 3, strides=2, padding="same", name="stem")
    >>> body = [stem, keras.layers.Conv2D(64, 1), keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(4)]
    >>> model = keras.Sequential([keras.Input((32, 32, 3)), *body])
    >>> report = ks.tflite.check(model)
    >>> report.violations[0]["layer"], report.violations[0]["mend"][:16]
    ('stem', 'ks.tflite.adapt:')
    >>> adapted, _ = ks.tflite.adapt(model)
    >>> report = ks.tflite.check(adapted)
    >>> report.violations, report.pattern
    ([], 'unstructured')
    """
    wanted = get(target)
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 < sparsity < 1:
        raise ValueError(f"`sparsity` must be a number between 0 and 1. Received: sparsity={sparsity!r}")
    model = accepted(model)
    dense = convert(Job(model)).content
    kinds = {kind.operator: kind for kind in wanted.sparse if "float32" in kind.dtypes}
    shapes = {operator: kind.pattern for operator, kind in kinds.items()}
    encoded = encode(_pruned(dense, shapes, sparsity))
    flat = read(encoded.content)
    whole = {tensor.name: tensor for graph in read(dense).subgraphs for tensor in graph.tensors}
    how = {use.tensor.name: use for use in uses(flat, fixed_batch=True)}
    names = LayerNames(model)
    kernels = _kernels(flat)
    weights = [weight for weight in selection.weights(model) if weight.kernel]
    held = match(model, [(operator, whole[tensor.name]) for operator, tensor in kernels], weights)
    rows, goals, able = [], {}, set()
    for (operator, tensor), weight in zip(kernels, held, strict=True):
        use, kind = how.get(tensor.name), kinds.get(operator)
        runs = kind is not None and use is not None and use.sparse
        stored = wanted.takes_sparse and use is not None
        able |= {tensor.name} if runs else set()
        rows.append(
            {
                "weight": weight.path if weight else tensor.name,
                "operator": operator,
                "shape": list(tensor.shape),
                "size": tensor.size,
                "runs": "sparse" if runs else "stored compressed" if stored else "dense",
                "pattern": kind.pattern if runs else "",
                "from_sparsity": kind.sparsity if runs else None,
            }
        )
        if runs and weight is not None:
            goals[selection.only(weight.path)] = (sparsity, kind.pattern)
    found = []
    if wanted.form is not None:
        for operator, name, text, mend in violations(flat, wanted.form):
            violation = f"{operator}: {text}" if operator else text
            row = {"layer": names.layer(operator, name), "violation": violation, "mend": mend}
            found += [] if row in found else [row]
    trial, pruned = _trial(model, wanted, dense, sparsity)
    totals = {
        "target": wanted.name,
        "verdict": SPARSE if goals and trial.verdict not in (REFUSED, PARTLY) else trial.verdict,
        "runs_sparse": sum(row["size"] for row in rows if row["runs"] == "sparse")
        / max(1, sum(r["size"] for r in rows)),
        "bytes_dense": len(dense),
        "bytes_sparse": len(dense),
    }
    if wanted.takes_sparse:
        smaller = len(encode(_pruned(dense, shapes, sparsity, able)).content)
        totals["bytes_sparse"] = min(smaller, len(dense))
    if pruned.made:
        totals |= {"cycles_dense": trial.made["cycles"], "cycles_sparse": pruned.made["cycles"]}
    notes = [f"{one['layer']}: {one['violation']}. Mend: {one['mend']}." for one in found]
    fault, of_open_batch = hazard(flat, fixed_batch=True), hazard(flat)
    if fault:
        notes.append(f"As it is, {fault}. `ks.tflite.export` keeps the file out of them.")
    elif of_open_batch:
        notes.append(f"As it is, {of_open_batch}.")
    if encoded.outweighed:
        notes.append(f"{OUTWEIGHED}: they need a number of inputs that 4 divides.")
    if trial.reason and trial.verdict != DENSE:
        notes.append(f"{trial.verdict[0].upper()}{trial.verdict[1:]}. {trial.reason.rstrip('.')}.")
    if pruned.made:
        share = pruned.made["cycles"] / max(1, trial.made["cycles"])
        notes.append(
            f"With {sparsity:.0%} zeros in each weight: {pruned.made['cycles']:,d} cycles, {share:.2f} of the dense "
            f"ones, weights in {pruned.made['bytes_encoded']:,d} bytes (by Vela, estimated)."
        )
    if not goals:
        nothing = f"Nothing would run sparse on {wanted.title}. " if not wanted.npu else ""
        zeros = sum(int(np.sum(weight.numpy() == 0)) for weight in weights) / max(1, sum(r["size"] for r in rows))
        lost = zeros > _FEW and not wanted.takes_sparse and not wanted.npu
        gain = f" The {zeros:.0%} zeros that the model has now gain nothing there." if lost else ""
        notes.append(f"{nothing}{wanted.otherwise.text}.{gain}")
    return CheckReport(f"{model.name} at {sparsity:.0%} on {wanted.title}", rows, totals, notes, found, goals)


def _trial(model, target, dense, sparsity):
    """How a file as the target wants it is loaded there, and what the compiler of an NPU makes of one with zeros."""
    nothing = Trial(UNKNOWN, "")
    if target.takes_sparse and not target.fixed_batch:
        return Trial(DENSE, ""), nothing  # on this kind of CPU all loads that was converted
    if not target.runtimes:
        return tried(dense, target), nothing
    signature = signatures.signature(model)
    if target.fixed_batch:
        signature = signature.with_batch(1)
    opened = [leaf for leaf in signature.inputs if None in leaf.shape[1:]]
    if opened and not all(RUNTIMES[name].resizes for name in target.runtimes):
        sizes = " and ".join(f"{leaf.name!r} of {leaf.shape}" for leaf in opened)
        return Trial(REFUSED, f"It runs files of fixed sizes only: give `keras.Input` a whole shape ({sizes})"), nothing
    samples, mode = [], target.quantize[0] if target.quantize else None
    if mode is not None:  # what runs where does not depend on the ranges
        samples = in_batches_of(1, random_batches(model, signature))
    job = Job(model, signature, mode, samples, mode)
    try:
        conversion = convert(job)
    except ExportError as error:
        return Trial(REFUSED, str(error)), nothing
    trial = tried(conversion.content, target)
    if mode is None and trial.verdict != REFUSED:  # what loads may be wrong; integers depend on the data
        fault = _fault(job, conversion, target)
        trial = Trial(REFUSED, fault) if fault else trial
    if not trial.made or trial.verdict == REFUSED:
        return trial, nothing
    pruned = _pruned(conversion.content, dict.fromkeys(_COMPRESSED, "unstructured"), sparsity)
    return trial, compiled(pruned, target.npu)


def _fault(job, conversion, target):
    """What is wrong with what a target computes from a file that it loads, as far as can be told here; or `None`."""
    try:
        verification = Verification.of(job, conversion)
    except ExportError:  # the model fails on random inputs
        return None
    try:
        right, parity = verification.dense()
    except ExportError as error:  # not even this machine runs it
        return str(error).partition("Received: ")[2]
    return verification.unfit(target) if right else verification.why_wrong(parity)


def _pruned(content, shapes, sparsity, only=None):
    """The file with the smallest weights at zero, in the pattern that `shapes` tells for their operator.

    Of floats, those that some kernel multiplies sparse; with `only`, of the tensors of these names.
    """
    file = File(content)
    for graph in file.model.subgraphs:
        for operator in graph.operators:
            name = file.name(operator)
            if name not in shapes:
                continue
            tensor = graph.tensors[int(operator.inputs[1])]
            data, shape = file.data(tensor), tuple(int(n) for n in tensor.shape)
            if only is not None and tensor.name.decode("utf8", "replace") not in only:
                continue
            dtype = {"float32": "<f4", "int8": "i1"}.get(file.dtype(tensor))
            if data is None or dtype is None or (dtype == "<f4" and name == "CONV_2D" and shape[1:3] != (1, 1)):
                continue
            values = np.frombuffer(data.tobytes(), dtype).reshape(shape[0], -1)
            sizes = np.abs(values.astype("float32"))
            if dtype == "i1":
                sizes *= np.asarray(tensor.quantization.scale, "float32").reshape(-1, 1)
            mask = patterns.get(shapes[name]).mask(sizes, sparsity, output_axes=(0,))
            file.store(tensor, np.where(mask, values, 0).astype(dtype))
    return file.pack()


def _kernels(flat):
    """Pairs of an operator's name and the stored tensor that it multiplies with, each tensor once."""
    found = []
    for graph in flat.subgraphs:
        for number, (operator, position) in readers(graph).items():
            tensor = graph.tensors[number] if number >= 0 and position == 1 else None
            stored = tensor is not None and tensor.stored is not None and tensor.dtype.startswith("float")
            if stored and len(tensor.shape) >= 2:
                found.append((operator, tensor))
    return found
