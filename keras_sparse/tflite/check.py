"""A check says before training what a model will gain on a target, what stands in its way, and what to train for."""

import re

import keras
import numpy as np

from keras_sparse import patterns, selection
from keras_sparse.graph import kind_of, operator_axes
from keras_sparse.reports import Report
from keras_sparse.tflite.convert import convert
from keras_sparse.tflite.editing import File
from keras_sparse.tflite.encoding import OUTWEIGHED, encode
from keras_sparse.tflite.flatmodel import read
from keras_sparse.tflite.signatures import output_names, signature
from keras_sparse.tflite.targets import get
from keras_sparse.tflite.xnnpack import hazard, uses, violations

__all__ = ["CheckReport", "check"]

_UNITS = 16  # output units in which a tensor is compared with a weight


class CheckReport(Report):
    """What a model will gain on a target.

    Rows: one for each weight in the file that multiplies inputs. `runs`: `"sparse"`, or what becomes of its zeros;
    `pattern` and `from_sparsity`: what to train it for.

    Attributes:
        violations: List of `{"layer", "violation", "mend"}`: what keeps 1x1 convolutions from running sparse.
        target_sparsity: `{regex: (sparsity, pattern)}` for `Pruning` and `ks.prune`: all weights that can run sparse.
        filters: Regexes of the weights with the pattern that most weights need.
        pattern: That pattern.
        bytes_dense: Predicted size of the file with dense weights.
        bytes_sparse: Predicted size with the weights of `target_sparsity` pruned.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64), keras.layers.Dense(10)])
    >>> report = ks.tflite.check(model, "xnnpack-x86")
    >>> report.pattern, len(report.filters), report.bytes_sparse < report.bytes_dense
    ('block_1x4', 2, True)
    """

    def __init__(self, title, rows, totals, notes, found, target_sparsity):
        formats = dict.fromkeys(("size", "bytes_dense", "bytes_sparse"), ",d")
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

    def to_dict(self):
        """The report as plain data, with `violations` and `target_sparsity`."""
        return super().to_dict() | {"violations": self.violations, "target_sparsity": self.target_sparsity}


def check(model, target="xnnpack", sparsity=0.9):
    """Say what a model would gain on a target if it were pruned, as TFLite's converter will see it.

    The model is converted, the weights that the target could run sparse are pruned in the file by magnitude, in the
    pattern they need, and the file is looked at with the rules of `keras_sparse.tflite.xnnpack`. Nothing is trained or
    run, and the model is left as it is.

    Args:
        model: A built Keras model on any backend.
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
    >>> adapted = ks.tflite.adapt(model, verbose=0)
    >>> report = ks.tflite.check(adapted)
    >>> report.violations, report.pattern
    ([], 'unstructured')
    """
    wanted = get(target)
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 < sparsity < 1:
        raise ValueError(f"`sparsity` must be a number between 0 and 1. Received: sparsity={sparsity!r}")
    selection.check_model(model)
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a `keras.Model`. Received: {type(model).__name__}")
    dense = convert(model, signature(model)).content
    kinds = {kind.operator: kind for kind in wanted.sparse if "float32" in kind.dtypes}
    encoded = encode(_pruned(dense, kinds, sparsity))
    flat = read(encoded.content)
    whole = {tensor.name: tensor for graph in read(dense).subgraphs for tensor in graph.tensors}
    how = {use.tensor.name: use for use in uses(flat, fixed_batch=True)}
    names = _Layers(model)
    rows, goals, able = [], {}, set()
    for operator, tensor in _kernels(flat):
        use, kind = how.get(tensor.name), kinds.get(operator)
        runs = kind is not None and use is not None and use.sparse
        able |= {tensor.name} if runs else set()
        weight = names.weight(operator, whole[tensor.name])
        rows.append(
            {
                "weight": weight.path if weight else tensor.name,
                "operator": operator,
                "shape": list(tensor.shape),
                "size": tensor.size,
                "runs": "sparse" if runs else "stored compressed" if use is not None else "dense",
                "pattern": kind.pattern if runs else "",
                "from_sparsity": kind.sparsity if runs else None,
            }
        )
        if runs and weight is not None:
            goals[selection.only(weight.path)] = (sparsity, kind.pattern)
    found = []
    if "CONV_2D" in kinds:
        for operator, name, text, mend in violations(flat):
            violation = f"{operator}: {text}" if operator else text
            row = {"layer": names.layer(operator, name), "violation": violation, "mend": mend}
            found += [] if row in found else [row]
    totals = {
        "target": wanted.name,
        "runs_sparse": sum(row["size"] for row in rows if row["runs"] == "sparse")
        / max(1, sum(r["size"] for r in rows)),
        "bytes_dense": len(dense),
        "bytes_sparse": min(len(encode(_pruned(dense, kinds, sparsity, able)).content), len(dense)),
    }
    notes = [f"{one['layer']}: {one['violation']}. Mend: {one['mend']}." for one in found]
    fault, of_open_batch = hazard(flat, fixed_batch=True), hazard(flat)
    if fault:
        notes.append(f"As it is, {fault}. `ks.tflite.export` keeps the file out of them.")
    elif of_open_batch:
        notes.append(f"As it is, {of_open_batch}.")
    if encoded.outweighed:
        notes.append(f"{OUTWEIGHED}: they need a number of inputs that 4 divides.")
    if not goals:
        notes.append(f"Nothing would run sparse on {wanted.title}. {wanted.otherwise.text}.")
    return CheckReport(f"{model.name} at {sparsity:.0%} on {wanted.title}", rows, totals, notes, found, goals)


def _pruned(content, kinds, sparsity, only=None):
    """The file with the smallest weights at zero, in the pattern that the target needs for their operator.

    With `only`, of the tensors of these names.
    """
    file = File(content)
    for graph in file.model.subgraphs:
        for operator in graph.operators:
            name = file.name(operator)
            if name not in kinds:
                continue
            tensor = graph.tensors[int(operator.inputs[1])]
            data, shape = file.data(tensor), tuple(int(n) for n in tensor.shape)
            if only is not None and tensor.name.decode("utf8", "replace") not in only:
                continue
            if data is None or file.dtype(tensor) != "float32" or (name == "CONV_2D" and shape[1:3] != (1, 1)):
                continue
            values = np.frombuffer(data.tobytes(), "<f4").reshape(shape[0], -1)
            mask = patterns.get(kinds[name].pattern).mask(np.abs(values), sparsity)
            file.store(tensor, np.where(mask, values, 0).astype("<f4"))
    return file.pack()


def _kernels(flat):
    """Pairs of an operator's name and the stored tensor that it multiplies with, each tensor once."""
    seen, found = set(), []
    for graph in flat.subgraphs:
        made = {n: operator for operator in graph.operators for n in operator.outputs}
        for operator in graph.operators:
            for number in operator.inputs[1:2]:
                while number in made and made[number].name in ("DENSIFY", "DEQUANTIZE"):
                    number = made[number].inputs[0]
                tensor = graph.tensors[number] if number >= 0 else None
                stored = tensor is not None and tensor.stored is not None and tensor.dtype.startswith("float")
                if stored and len(tensor.shape) >= 2 and id(tensor) not in seen:
                    seen.add(id(tensor))
                    found.append((operator.name, tensor))
    return found


class _Layers:
    """Finds the layers and weights of a model in a file: by what a weight holds, and by the names of tensors."""

    def __init__(self, model):
        self._kinds = {layer.name: kind_of(layer) for layer in selection.layers(model) if layer is not model}
        self._weights = [weight for weight in selection.weights(model) if weight.kernel]
        self._outputs = _output_layers(model)

    def layer(self, operator, name):
        """The layer that a tensor comes from, of those that the converter melted into one; or the tensor's name."""
        found = self._candidates(name)
        if not found and name in self._outputs:
            return self._outputs[name]
        return next((one for one in found if operator in self._kinds[one].operators), found[0] if found else name)

    def weight(self, operator, tensor):
        """The weight that a tensor holds, each once, or `None`: the one of the same values, else of the same name."""
        fits = [weight for weight in self._weights if weight.size == tensor.size]
        named = self._candidates(tensor.name)
        found = [weight for weight in fits if _holds(operator, tensor, weight)]
        found = found or [weight for weight in fits if weight.layer.name in named]
        if not found:
            return None
        best = min(found, key=lambda weight: weight.layer.name not in named)
        self._weights.remove(best)
        return best

    def _candidates(self, name):
        found = []
        for part in re.split("[/;]", name):
            for one in (part, re.sub(r"_\d+$", "", part)):
                if one in self._kinds and one not in found:
                    found.append(one)
        return found


def _output_layers(model):
    """What computes each output of a model that knows its layers: `{name that the converter gives it: layer}`."""
    if isinstance(model, keras.Sequential):
        names, layers = output_names(model.outputs[0]), [model.layers[-1].name]
    elif getattr(model, "outputs", None) and hasattr(model, "output_names"):
        names, layers = output_names(model.output), model.output_names
    else:
        return {}
    order = sorted(range(len(names)), key=names.__getitem__)  # a SavedModel sorts its outputs by name
    return {f"StatefulPartitionedCall_1:{number}": layers[i] for number, i in enumerate(order)}


def _holds(operator, tensor, weight):
    """Whether a tensor holds a weight, but for a factor for each output unit: of a normalization that was folded in."""
    ours = patterns.to_matrix(weight.numpy(), weight.output_axes)
    theirs = patterns.to_matrix(tensor.values(), operator_axes().get(operator, (0,)))
    if ours.shape != theirs.shape:
        return False
    ours, theirs = ours[:_UNITS].astype("float64"), theirs[:_UNITS].astype("float64")
    cosines = np.abs((ours * theirs).sum(axis=1))
    return bool((cosines >= (1 - 1e-5) * np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)).all())
