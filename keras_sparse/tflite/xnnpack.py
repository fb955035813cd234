"""What XNNPACK and TFLite's own kernels do with the sparse-encoded weights of a file, operator by operator.

The rules are those of XNNPACK's `xnn_subgraph_rewrite_for_nchw` (src/subgraph.c), which rewrites a cluster of
operators to channel-first sparse kernels on CPUs without AVX (ARM, WebAssembly, old x86), and of TFLite's sparse
`FullyConnected`. Observed with ai-edge-litert 2.3.0 and LiteRT.js 2.5.3.
"""

from dataclasses import dataclass

from keras_sparse.tflite.flatmodel import UNPACK
from keras_sparse.tflite.targets import XNNPACK, pays_from

__all__ = ["Use", "hazard", "touched", "uses", "violations"]

_SAME, _VALID = 0, 1  # schema.fbs, enum Padding
# Element by element on 4-D tensors; the layout does not matter to them.
_UNARY = {"RELU", "RELU6", "HARD_SWISH", "LOGISTIC", "ELU", "LEAKY_RELU", "GELU", "RESIZE_BILINEAR"}
_BINARY = {"ADD", "MUL"}
_REDUCTIONS = {"MEAN", "SUM", "DEPTH_TO_SPACE"}  # where XNNPACK may return to channels-last
_ADAPT = "ks.tflite.adapt: it brings the model into the form that is needed"
_POOL = "end in GlobalAveragePooling2D()"
_THRESHOLD = pays_from("CONV_2D", "unstructured")  # above it, summed over the cluster's 1x1 convolutions


@dataclass(frozen=True)
class Use:
    """How one sparse-encoded tensor will be used when the model runs.

    Attributes:
        tensor: The `Tensor`.
        operator: The operator that multiplies it, such as `"CONV_2D"`.
        sparse: Whether the multiplication itself skips zeros on some runtime.
        where: In words: which runtime skips zeros, or that none does.

    Example:

    >>> Use(None, "CONV_2D", sparse=False, where="stored compressed").operator
    'CONV_2D'
    """

    tensor: object
    operator: str
    sparse: bool
    where: str


def uses(model, fixed_batch=False):
    """For each sparse-encoded tensor of a `FlatModel`, say what will run it and where its zeros are skipped.

    Args:
        model: A `FlatModel`.
        fixed_batch: Whether to answer for the same file with a fixed batch size.

    Returns:
        List of `Use`.

    Example:

    >>> from keras_sparse.tflite.flatmodel import FlatModel
    >>> from keras_sparse.tflite.xnnpack import uses
    >>> uses(FlatModel(subgraphs=[], content=b""))
    []
    """
    found = {}
    for subgraph in model.subgraphs:
        graph = _Graph(subgraph, fixed_batch)
        cluster = graph.cluster() if graph.densifies() else _Cluster()
        for operator in subgraph.operators:
            if operator.name in UNPACK:
                continue
            for number in operator.inputs:
                constant = graph.constant(number)
                if constant is None or constant.levels is None or id(constant) in found:
                    continue
                if graph.producer(number) is None:
                    use = Use(constant, operator.name, True, "sparse kernel of TFLite's FullyConnected, on every CPU")
                elif operator in cluster.pointwise and cluster.engages:
                    where = "XNNPACK sparse kernel on ARM, WebAssembly and x86 without AVX; as dense on x86 with AVX"
                    use = Use(constant, operator.name, True, where)
                else:
                    use = Use(constant, operator.name, False, "stored compressed, restored when the model loads")
                found[id(constant)] = use
    return list(found.values())


def hazard(model, fixed_batch=False):
    """Why a sparse-encoded file cannot be trusted to compute right numbers on every CPU, or `None` if it can.

    A native run on x86 with AVX does not show these faults. The answer errs on the safe side: `None` means that no
    known fault can occur.

    Args:
        model: A `FlatModel` of a sparse-encoded file.
        fixed_batch: Whether to answer for the same file with a fixed batch size.

    Returns:
        A sentence, or `None`.

    Example:

    >>> from keras_sparse.tflite.flatmodel import FlatModel
    >>> from keras_sparse.tflite.xnnpack import hazard
    >>> hazard(FlatModel(subgraphs=[], content=b"")) is None
    True
    """
    for subgraph in model.subgraphs:
        graph = _Graph(subgraph, fixed_batch)
        for operator in subgraph.operators:
            if operator.name in ("DENSIFY", "FULLY_CONNECTED"):
                continue
            if any(n >= 0 and subgraph.tensors[n].levels is not None for n in operator.inputs):
                return f"{operator.name} would read sparse-encoded weights as dense ones (float16 in 1x4 blocks)"
        # XNNPACK (ai-edge-litert 2.3.0) computes NaN from float16 weights that are unpacked twice, native x86 included.
        if any(o.name == "TRANSPOSE_CONV" and graph.is_sparse_half(o.inputs[1]) for o in subgraph.operators):
            return "TRANSPOSE_CONV with sparse-encoded float16 weights computes NaN under XNNPACK"
        if graph.densifies():
            reason = graph.cluster().broken
            if reason:
                return f"XNNPACK's sparse kernels would {reason}"
    return None


def touched(model):
    """Whether XNNPACK's sparse kernels could take a part of the file, by a wider rule than `uses` and `hazard` follow.

    They look for clusters as soon as one weight is unpacked by `DENSIFY`, and each begins at a 3x3 convolution of three
    channels with stride 2, here with any padding.

    Args:
        model: A `FlatModel`.

    Example:

    >>> from keras_sparse.tflite.flatmodel import FlatModel
    >>> from keras_sparse.tflite.xnnpack import touched
    >>> touched(FlatModel(subgraphs=[], content=b""))
    False
    """
    graphs = [_Graph(subgraph) for subgraph in model.subgraphs]
    entries = (graph.may_be_entry(operator) for graph in graphs if graph.densifies() for operator in graph.operators)
    return any(use.sparse for use in uses(model)) or any(entries)


def violations(model, form=XNNPACK):
    """List what keeps the 1x1 convolutions of a `FlatModel` from running sparse under XNNPACK, but for their zeros.

    Args:
        model: A `FlatModel`.
        form: The `Form` that the target wants.

    Returns:
        List of `(operator, name of the tensor that it computes, what is wrong, how to mend it)`.

    Example:

    >>> from keras_sparse.tflite.flatmodel import FlatModel
    >>> from keras_sparse.tflite.xnnpack import violations
    >>> violations(FlatModel(subgraphs=[], content=b""))
    []
    """
    return [violation for subgraph in model.subgraphs[:1] for violation in _Graph(subgraph, form=form).violations()]


@dataclass
class _Cluster:
    """What XNNPACK would rewrite: its 1x1 convolutions, whether it does so, and why the result would be wrong."""

    pointwise: list = ()
    engages: bool = False
    broken: str | None = None  # goes on after "would"


def _partial(reason):
    return _Cluster(broken=f"take a part of the graph and compute wrong numbers: {reason}")


class _Graph:
    """A subgraph with the questions that the rules ask of it."""

    def __init__(self, subgraph, fixed_batch=False, form=XNNPACK):
        self._form = form
        self.tensors, self.operators = subgraph.tensors, subgraph.operators
        self._open_batch = not fixed_batch and any(0 in self.tensors[n].opened for n in subgraph.inputs)
        self.outputs = set(subgraph.outputs)
        self._producers = {n: operator for operator in self.operators for n in operator.outputs}
        self._consumers = {}
        for operator in self.operators:
            for n in operator.inputs:
                self._consumers.setdefault(n, []).append(operator)

    def producer(self, number):
        return self._producers.get(number)

    def densifies(self):
        """Whether XNNPACK is told to look for sparse clusters: it is as soon as one weight is unpacked by DENSIFY."""
        return any(operator.name == "DENSIFY" for operator in self.operators)

    def constant(self, number):
        """The stored tensor behind an input, through the operators that unpack it; `None` if it is computed."""
        while number in self._producers and self._producers[number].name in UNPACK:
            number = self._producers[number].inputs[0]
        if number < 0 or self.tensors[number].stored is None:
            return None
        return self.tensors[number]

    def is_sparse_half(self, number):
        constant = self.constant(number)
        return constant is not None and constant.levels is not None and constant.dtype == "float16"

    def weights(self, number):
        """The constant behind an input if XNNPACK takes it for one: it unpacks float32 and float16, not integers."""
        constant = self.constant(number)
        return constant if constant is not None and constant.dtype in ("float32", "float16") else None

    def cluster(self):
        """Follow the graph from the entry convolutions to the exits; see the module's docstring for the rules."""
        entries = [operator for operator in self.operators if self._is_entry(operator)]
        pointwise = [operator for operator in self.operators if self._is_pointwise(operator)]
        reductions = [operator for operator in self.operators if self._reduces(operator)]
        # A cluster begins at an entry, is closed by an exit, and has more zeros than its least sparse convolution:
        # where one of the three cannot be, nothing is rewritten.
        if not entries or not reductions or not any(self._mostly_zero([operator]) for operator in pointwise):
            return _Cluster()
        exits = [operator for operator in reductions if not self._pools_inside(operator)]
        inside, pending = [], list(entries)
        while pending:
            operator = pending.pop()
            if operator in inside:
                continue
            inside.append(operator)
            if operator not in exits:
                if any(n in self.outputs for n in operator.outputs):
                    return _partial(f"the output of {self._label(operator)} is an output of the model")
                pending.extend(c for n in operator.outputs for c in self._following(n))
        produced = {n for operator in inside if operator not in exits for n in operator.outputs}
        for operator in inside:
            if operator in exits:
                if not self._is_exit(operator):
                    return _partial(f"{self._label(operator)} is not a global average pooling")
                # What reads a shape of four axes, such as a Dense layer's reshaping, reads it channel-first.
                if operator.name == "MEAN" and self._rank(operator.outputs[0]) == 4:
                    return _partial(f"{self._label(operator)} keeps the axes that it pools (`keepdims=True`)")
            elif operator not in entries:
                if not self._is_compatible(operator):
                    return _partial(f"{self._label(operator)} has no channel-first form")
                if any(self.constant(n) is None and n not in produced for n in self._data_inputs(operator)):
                    return _partial(f"{self._label(operator)} joins a branch from outside the sparse part")
        own = [operator for operator in pointwise if operator in inside]
        # XNNPACK counts who reads a tensor; an operator that reads one twice makes it give up (seen, for x + x).
        twice = any(self._reads_twice(operator) for operator in inside)
        engages = not twice and self._mostly_zero(own)
        excited = next((operator for operator in inside if self._pools_inside(operator)), None)
        if engages and excited is not None and self._open_batch:
            return _Cluster(
                broken=f"be right for one sample only: {self._label(excited)} begins a squeeze-and-excite branch, and "
                "the batch size is open; `export(..., batch_size=1)` makes a file that runs sparse"
            )
        return _Cluster(pointwise=own, engages=engages)

    def _reads_twice(self, operator):
        return operator.name in _BINARY and operator.inputs[0] == operator.inputs[1]

    def violations(self):
        entries = [operator for operator in self.operators if self.may_be_entry(operator)]
        if not any(self._is_pointwise(operator) for operator in self.operators):
            return []
        if not entries:
            text = "the network does not begin with a 3x3 convolution of three channels and stride 2"
            return [("", "model", text, "begin with one")]
        found, inside, pending = [], [], list(entries)
        for entry in entries:
            if not self._is_entry(entry):
                found.append(self._violation(entry, "a padding other than 1 on each side", _ADAPT))
        while pending:
            operator = pending.pop()
            if any(operator is one for one in inside):
                continue
            inside.append(operator)
            if self._reduces(operator) and not self._pools_inside(operator):
                if not self._is_exit(operator):
                    found.append(self._violation(operator, "no global average pooling", _POOL))
                elif operator.name == "MEAN" and self._rank(operator.outputs[0]) == 4:
                    mend = f"{_ADAPT}; in a squeeze-and-excite branch, 1x1 convolutions must come behind it"
                    found.append(self._violation(operator, "pooling that keeps its axes", mend))
                continue
            if operator not in entries and not self._is_compatible(operator):
                found.append(self._violation(operator, *self._objection(operator)))
                if self._rank(operator.outputs[0]) != 4:
                    continue
            if self._reads_twice(operator):
                found.append(self._violation(operator, "one tensor read twice", "put a layer of its own before one"))
            if any(n in self.outputs for n in operator.outputs):
                found.append(self._violation(operator, "an output of the model before the pooling", _POOL))
            pending.extend(c for n in operator.outputs for c in self._following(n))
        return found

    def _violation(self, operator, text, mend):
        return operator.name, self.tensors[operator.outputs[0]].name, text, mend

    def _objection(self, operator):
        if operator.name == "DEPTHWISE_CONV_2D" and self._strides(operator) == (2, 2):
            return "stride 2 and a padding other than half the kernel on each side, or an odd size", _ADAPT
        if operator.name == "DEPTHWISE_CONV_2D":
            return "not 3x3 or 5x5 with padding of half the kernel and multiplier 1", "use such a one"
        if operator.name == "CONV_2D":
            return "not 1x1 with stride 1", "use a depthwise and a 1x1 convolution"
        if operator.name in _BINARY:
            return "a constant, or tensors of different rank", "use sigmoid or swish in place of a hard sigmoid"
        if operator.name in ("MAX_POOL_2D", "AVERAGE_POOL_2D"):
            return "pooling of windows", "use a depthwise convolution of stride 2"
        if operator.name in ("SHAPE", "RESHAPE"):
            return "a change of shape, before the global pooling or behind one that keeps its axes", _ADAPT
        return "no channel-first form", "use convolutions, ReLU6, swish, Add and Multiply up to the global pooling"

    def _reduces(self, operator):
        return operator.name in _REDUCTIONS and self._rank(operator.inputs[0]) == 4

    def _pools_inside(self, operator):
        """Whether a pooling keeps its axes and goes on channel-first, as that of a squeeze-and-excite branch does.

        1x1 convolutions must read it: a Multiply with the pooled image itself does not load.
        """
        after = [c for n in operator.outputs for c in self._following(n)]
        keeps = operator.name == "MEAN" and self._rank(operator.outputs[0]) == 4 and self._is_exit(operator)
        return keeps and bool(after) and all(self._is_pointwise(c) for c in after)

    def _following(self, number):
        """Consumers of a tensor; a padding that XNNPACK melts into the next convolution counts as part of that."""
        for operator in self._consumers.get(number, ()):
            after = [c for n in operator.outputs for c in self._consumers.get(n, ())]
            if operator.name == "PAD" and len(after) == 1 and self._padding(after[0]) is not None:
                yield after[0]
            else:
                yield operator

    def _data_inputs(self, operator):
        first = self._producers.get(operator.inputs[0])
        if first is not None and first.name == "PAD":
            return [first.inputs[0]]
        return [n for n in operator.inputs if n >= 0]

    def _padding(self, operator):
        """Explicit padding (top, bottom, left, right) of a convolution, or `None` where TFLite's SAME rule applies."""
        options = operator.options
        if options.get("Padding") != _VALID:
            return None
        before = self._producers.get(operator.inputs[0])
        if before is None or before.name not in ("PAD", "PADV2"):
            return (0, 0, 0, 0)
        amounts = self.constant(before.inputs[1])
        if amounts is None or amounts.size != 8:
            return None
        batch, height, width, channels = amounts.values().reshape(4, 2).tolist()
        return (*height, *width) if not any(batch + channels) else None

    def _kernel(self, operator):
        weights = self.weights(operator.inputs[1])
        if weights is None or len(weights.shape) != 4:
            return (0, 0, 0, 0)
        channels = self.tensors[operator.inputs[0]].shape[-1]
        # A convolution in groups has fewer channels in its kernel: no sparse kernel takes it.
        grouped = operator.name == "CONV_2D" and weights.shape[3] != channels
        return (0, 0, 0, 0) if grouped else weights.shape

    def _strides(self, operator):
        undilated = operator.options.get("DilationHFactor") == operator.options.get("DilationWFactor") == 1
        return (operator.options["StrideH"], operator.options["StrideW"]) if undilated else (0, 0)

    def may_be_entry(self, operator):
        """Whether an operator is an entry, but for its padding."""
        return operator.name == "CONV_2D" and self._form.is_entry(self._kernel(operator)[1:], self._strides(operator))

    def _is_entry(self, operator):
        return self.may_be_entry(operator) and self._pads_half(operator)

    def _pads_half(self, operator):
        return self._padding(operator) == (self._form.padding(self._kernel(operator)[1]),) * 4

    def _is_pointwise(self, operator):
        if operator.name != "CONV_2D" or self._kernel(operator)[1:3] != (1, 1):
            return False
        unpadded = operator.options["Padding"] == _SAME or self._padding(operator) == (0, 0, 0, 0)
        return self._strides(operator) == (1, 1) and unpadded

    def _is_depthwise(self, operator):
        if operator.name != "DEPTHWISE_CONV_2D":
            return False
        kernel, strides = self._kernel(operator)[1:3], self._strides(operator)
        if not self._form.takes_depthwise(kernel, strides, multiplier=operator.options["DepthMultiplier"]):
            return False
        return strides == (1, 1) if operator.options["Padding"] == _SAME else self._pads_half(operator)

    def _is_compatible(self, operator):
        """Whether XNNPACK has the operator in channel-first form and no rule speaks against it."""
        if operator.name in _UNARY:
            return self._rank(operator.inputs[0]) == 4
        if operator.name in _BINARY:
            return all(self._rank(n) == 4 and self.constant(n) is None for n in operator.inputs)
        if self._reduces(operator):
            return self._pools_inside(operator)
        return self._is_pointwise(operator) or self._is_depthwise(operator)

    def _is_exit(self, operator):
        if operator.name == "DEPTH_TO_SPACE":
            return True
        axes = self.constant(operator.inputs[1])
        return operator.name == "MEAN" and axes is not None and sorted(axes.values().ravel() % 4) == [1, 2]

    def _mostly_zero(self, operators):
        weights = [self.constant(operator.inputs[1]) for operator in operators]
        zeros, size = sum(w.zeros for w in weights), sum(w.size for w in weights)
        return size > 0 and zeros / size > _THRESHOLD

    def _rank(self, number):
        return len(self.tensors[number].shape)

    def _label(self, operator):
        return f"{operator.name} (operator {self.operators.index(operator)}, {self.tensors[operator.outputs[0]].name})"
