"""A target is a runtime that a file ships to, as data: what it multiplies sparse, and where that is known from.

The numbers here are those that decide: the encoder, the rules of XNNPACK, `check` and `adapt` read them.
"""

import dataclasses
from dataclasses import dataclass

from keras_sparse.registry import did_you_mean
from keras_sparse.reports import Report
from keras_sparse.tflite.faults import averaged, broadcast, grouped, resized, shifted, strided

__all__ = [
    "NOT_SPARSE",
    "OPEN_BATCH",
    "TARGETS",
    "XNNPACK",
    "Form",
    "Sparse",
    "Statement",
    "Target",
    "chosen",
    "get",
    "pays_from",
    "targets",
]


@dataclass(frozen=True)
class Statement:
    """What is said of a target, and its source: a file of the runtime, or a measurement of ours.

    Example:

    >>> from keras_sparse.tflite.targets import Statement
    >>> Statement("It is so.", "measured").source
    'measured'
    """

    text: str
    source: str


@dataclass(frozen=True)
class Sparse:
    """A kind of weight that a target multiplies without its zeros.

    Attributes:
        operator: The operator in the file, `"CONV_2D"` (1x1 convolutions) or `"FULLY_CONNECTED"` (Dense layers).
        pattern: The pattern that its zeros must have, as `ks.patterns.get` takes it.
        sparsity: From where on it runs sparse, or pays.
        dtypes: The types of weights for which it does.
        source: Where that is known from.

    Example:

    >>> from keras_sparse.tflite.targets import get
    >>> [(kind.operator, kind.pattern) for kind in get("xnnpack").sparse]
    [('CONV_2D', 'unstructured'), ('FULLY_CONNECTED', 'block_1x4')]
    """

    operator: str
    pattern: str
    sparsity: float
    dtypes: tuple
    source: str


@dataclass(frozen=True)
class Form:
    """The form that a network must have to run its 1x1 convolutions sparse, in numbers.

    All that is said of convolutions is independent of how they are written down: as Keras layers or in a file. Paddings
    are half the kernel on each side.

    Attributes:
        entry: Rows, columns and channels of the kernel of the convolution that the network begins with.
        entry_stride: Its stride.
        depthwise: Sizes that the kernels of depthwise convolutions may have.
        depthwise_strides: Strides that these may have.

    Example:

    >>> from keras_sparse.tflite.targets import get
    >>> form = get("xnnpack").form
    >>> form.is_entry((3, 3, 3), strides=(2, 2)), form.is_entry((3, 3, 1), strides=(2, 2))
    (True, False)
    >>> form.takes_depthwise((5, 5), strides=(1, 1)), form.padding(5)
    (True, 2)
    """

    entry: tuple
    entry_stride: int
    depthwise: tuple
    depthwise_strides: tuple

    def is_entry(self, kernel, strides, dilation=(1, 1), groups=1):
        """Whether a convolution may be the one that the network begins with, if its padding is right.

        Args:
            kernel: `(rows, columns, channels)`.
            strides: Of rows and columns.
            dilation: Likewise.
            groups: Of channels.
        """
        wanted = self.entry, (self.entry_stride,) * 2, (1, 1)
        return (tuple(kernel), tuple(strides), tuple(dilation)) == wanted and groups == 1

    def takes_depthwise(self, kernel, strides, dilation=(1, 1), multiplier=1):
        """Whether a depthwise convolution may be in the network, if its padding is right."""
        size, stride = kernel[0], strides[0]
        square = (tuple(kernel), tuple(strides), tuple(dilation)) == ((size, size), (stride, stride), (1, 1))
        return square and size in self.depthwise and stride in self.depthwise_strides and multiplier == 1

    def padding(self, size):
        """Rows or columns of padding on each side of an image, for a kernel of that size."""
        return size // 2


@dataclass(frozen=True)
class Target:
    """A runtime.

    Attributes:
        name: What functions call it.
        title: What people call it.
        sparse: Tuple of `Sparse`: what it multiplies sparse.
        rules: Tuple of `Statement`: what the graph must be like for 1x1 convolutions to run sparse.
        otherwise: `Statement`: what becomes of other weights with zeros.
        form: The same rules in numbers, a `Form`; `None` where no convolution runs sparse.
        takes_sparse: Whether it reads weights that are stored without their zeros, and computes right numbers from
            them.
        runtimes: Names of the runtimes (`ks.tflite.runtimes`) that prove a file for it; none where that needs the
            device.
        measures: Names of the runtimes that `ks.tflite.benchmark` measures on for it; none where that needs the device.
        npu: What Arm's compiler calls it, where that can be asked.
        fixed_batch: Whether it wants files of a fixed batch size.
        quantize: The values of `export(quantize=...)` that it takes; empty: any.
        faults: Functions of `keras_sparse.tflite.faults` that say of a file why it computes wrong numbers from it,
            however weights are stored.
        restores: The types of weights that it restores right from storage without zeros; empty: all.

    Example:

    >>> from keras_sparse.tflite.targets import get
    >>> get("gpu").sparse
    ()
    """

    name: str
    title: str
    sparse: tuple
    rules: tuple
    otherwise: Statement
    form: Form | None = None
    takes_sparse: bool = False
    runtimes: tuple = ()
    measures: tuple = ()
    npu: str = ""
    fixed_batch: bool = False
    quantize: tuple = ()
    faults: tuple = ()
    restores: tuple = ()


# What users must know of two kinds of files, wherever these are reported.
NOT_SPARSE = (
    "For CPUs only, because weights are stored without zeros: LiteRT's GPU accelerator computes wrong numbers from "
    "such a file without an error, TFLite Micro refuses it or computes wrong ones, NPU compilers refuse it"
)
OPEN_BATCH = (
    "The batch size is open: LiteRT.js and LiteRT's GPU accelerator refuse some such files, or run one sample at a "
    "time. For browsers, GPUs and NPUs use batch_size=1"
)
_SUBGRAPH = "XNNPACK src/subgraph.c, xnn_subgraph_rewrite_for_nchw"
_CHECK = "XNNPACK src/subgraph.c, xnn_check_nchw_compatibility"
_FULLY_CONNECTED = "tensorflow/lite/kernels/fully_connected.cc"
XNNPACK = Form(entry=(3, 3, 3), entry_stride=2, depthwise=(3, 5), depthwise_strides=(1, 2))
_RULES = (  # what `XNNPACK` says in numbers, and what keras_sparse.tflite.xnnpack looks for in a graph
    Statement(
        "The network begins with a 3x3 convolution of three channels, stride 2, padding 1 on each side, without groups "
        "or dilation, on images of even size",
        _CHECK + "; TFLite's converter takes the padding back at odd sizes (measured, tensorflow 2.21)",
    ),
    Statement(
        "then 1x1 convolutions (stride 1), and depthwise convolutions 3x3 with padding 1 or 5x5 with padding 2, stride "
        "1 or 2, multiplier 1; no other convolution, and no pooling of windows",
        _CHECK,
    ),
    Statement(
        "Add, Multiply, ReLU, ReLU6, hard swish, swish, sigmoid, ELU, leaky ReLU, GELU, bilinear resizing; "
        "squeeze-and-excite by sigmoid, in a file of fixed batch size; no constants in Add and Multiply",
        _CHECK + "; constants: measured, MobileNetV3's hard sigmoid does not run sparse; batch: measured, wrong "
        "numbers",
    ),
    Statement(
        "It ends in global average pooling without keepdims=True, and none of its values before that is an output",
        _SUBGRAPH + "; keepdims: measured, wrong numbers",
    ),
    Statement(
        "More than two thirds of all weights of its 1x1 convolutions are zero", _SUBGRAPH + "; measured at 66.5 %"
    ),
)
_RESTORED = Statement(
    "Stored without zeros, restored when the model loads, multiplied dense: a smaller file, nothing faster",
    "tensorflow/lite/kernels/densify.cc; measured, ratio 1.00 to 1.02",
)


def _xnnpack(name, title, convolutions, dense_source, dense_from=0.85, **proof):
    sparse = (Sparse("FULLY_CONNECTED", "block_1x4", dense_from, ("float32",), dense_source),)
    if convolutions:
        first = Sparse("CONV_2D", "unstructured", 2 / 3, ("float32", "float16"), convolutions)
        return Target(name, title, (first, *sparse), _RULES, _RESTORED, XNNPACK, takes_sparse=True, **proof)
    return Target(name, title, sparse, (), _RESTORED, takes_sparse=True, **proof)


_TABLE = "the table of operators at ai.google.dev/edge/litert/inference, which has no DENSIFY there; read"
_REMOVE = (
    "Multiplied dense; weights that are stored without zeros are refused. Removed channels (`ks.shrink`) are faster"
)
_ETHOS = (
    "A plain int8 file: zeros are compressed; where reading weights takes the time, as in Dense layers, also fewer "
    "cycles"
)


def _ethos(generation, npu, measured):
    source = f"measured with Vela 5.2.0 for {npu}: 784-512-256-10 at 95 %, {measured}"
    proof = {
        "runtimes": ("micro",),
        "measures": ("ethos-u",),
        "npu": npu,
        "fixed_batch": True,
        "quantize": ("int8", "int16x8"),
        "faults": (resized,),  # what the NPU does not take TFLite Micro computes
    }
    return f"ethos-{generation}", f"Arm's Ethos-{generation.upper()} NPUs", Statement(_ETHOS, source), proof


def _npu(name, title, source=_TABLE):
    return name, title, Statement(_REMOVE, source), {"fixed_batch": True}


_DENSE = (  # name, title, what becomes of zeros, and what else is known of targets that read dense weights only
    (
        "gpu",
        "LiteRT's GPU accelerator (ML Drift: OpenCL, Metal, WebGPU)",
        Statement(
            "Multiplied dense; from weights that are stored without zeros it computes wrong numbers, without an error. "
            "Removed channels (`ks.shrink`) are faster, and quantize='float16' halves the file",
            "measured, ai-edge-litert 2.3.0",
        ),
        {
            "runtimes": ("gpu-cpu",),
            "measures": ("gpu-cpu",),
            "fixed_batch": True,
            "faults": (shifted, grouped, broadcast, strided),
        },
    ),
    (
        "ynnpack",
        "LiteRT on CPUs by YNNPACK (optional, off by default)",
        Statement("Multiplied dense; Dense layers in blocks, too", "LiteRT's sources of mid-2026; read"),
        {"takes_sparse": True},
    ),
    (
        "micro",
        "TFLite Micro on microcontrollers",
        Statement(
            "Multiplied dense; files with DENSIFY do not load, and from weights in sparse blocks it computes wrong "
            "numbers. Removed channels (`ks.shrink`) are faster and smaller",
            "measured, tflite-micro of 2026-10",
        ),
        {
            "runtimes": ("micro",),
            "fixed_batch": True,
            "quantize": (None, "int8", "int16x8"),
            "faults": (resized,),
        },
    ),
    _ethos("u55", "ethos-u55-128", "0.063 of the bytes of weights"),
    _ethos("u65", "ethos-u65-256", "0.063 of the bytes of weights"),
    _ethos("u85", "ethos-u85-128", "0.063 of the bytes of weights, 0.29 of the cycles"),
    _npu("google-tensor", "Google Tensor's TPU", "LiteRT, litert/vendors/google_tensor/compiler, no DENSIFY; read"),
    _npu("qualcomm", "Qualcomm's NPUs (AI Engine Direct)"),
    _npu("mediatek", "MediaTek's NPUs (NeuroPilot)"),
    _npu("samsung", "Samsung's NPUs (Exynos)"),
    _npu("intel", "Intel's NPUs (OpenVINO)"),
    (
        "edgetpu",
        "Edge TPU",
        Statement(
            "Multiplied dense; the compiler takes int8 files with dense weights, of fixed batch size",
            "coral.ai/docs/edgetpu/models-intro, whose list of operators has no DENSIFY; read",
        ),
        {"fixed_batch": True, "quantize": ("int8",)},
    ),
    (
        "nnapi",
        "Android's NNAPI delegate (deprecated since Android 15)",
        Statement("Multiplied dense", "tensorflow/lite/delegates/nnapi/nnapi_delegate.cc, IsDensifyConstTensor; read"),
        {"fixed_batch": True},
    ),
    (
        "coreml",
        "TFLite's Core ML delegate (deprecated: iPhones' GPUs are 'gpu')",
        Statement(
            "Multiplied dense; operators with restored weights stay on the CPU",
            "tensorflow/lite/delegates/coreml/README.md, whose list of operators has no DENSIFY; read",
        ),
        {"fixed_batch": True},
    ),
    (
        "qnn",
        "Qualcomm's delegates (QNN; Hexagon before); see 'qualcomm'",
        Statement(_REMOVE, "tensorflow/lite/delegates/hexagon/README.md, no DENSIFY; read"),
        {"fixed_batch": True},
    ),
)
TARGETS = (
    _xnnpack(
        "xnnpack",
        "LiteRT on ARM64 CPUs (XNNPACK)",
        _SUBGRAPH + "; measured, 0.30 of the dense instructions at 90 %",
        _FULLY_CONNECTED + "; measured, 0.77 of the dense instructions at 90 %, 0.43 at 95 %",
        0.9,
        runtimes=("native",),
        measures=("arm64",),
    ),
    _xnnpack(
        "xnnpack-wasm",
        "LiteRT.js in browsers (XNNPACK, WebAssembly)",
        _SUBGRAPH + "; measured, 0.28 of the dense time at 90 % in Chromium",
        _FULLY_CONNECTED + "; measured, 0.71 of the dense time at 90 %, 0.39 at 95 %",
        0.9,
        runtimes=("wasm",),
        measures=("wasm",),
        fixed_batch=True,
        # Measured, LiteRT.js 2.5.3: transposed convolutions with weights of 8 bits are wrong.
        restores=("float32", "float16"),
        faults=(averaged,),
    ),
    _xnnpack(
        "xnnpack-x86",
        "LiteRT on x86 CPUs with AVX (XNNPACK): PCs, Colab",
        None,  # off by design where there is AVX: measured, ratio 1.00
        _FULLY_CONNECTED + "; measured, 0.36 of the dense time at 90 %, 1.17 at 80 %",
        runtimes=("native",),
        measures=("native", "compiled-cpu"),
    ),
    Target(
        "builtin",
        "TFLite's own CPU kernels, without XNNPACK",
        (
            Sparse("FULLY_CONNECTED", "block_1x4", 0.85, ("float32",), _FULLY_CONNECTED + ", EvalFloat; read"),
            Sparse("FULLY_CONNECTED", "block_1x16", 0.95, ("int8",), _FULLY_CONNECTED + ", EvalQuantized; read"),
        ),
        (),
        _RESTORED,
        takes_sparse=True,
    ),
    *(Target(name, title, (), (), statement, **more) for name, title, statement, more in _DENSE),
)


def get(name):
    """Return the `Target` of a name.

    Raises:
        ValueError: If there is no such target.

    Example:

    >>> from keras_sparse.tflite.targets import get
    >>> get("xnnpack-wasm").title
    'LiteRT.js in browsers (XNNPACK, WebAssembly)'
    """
    found = [target for target in TARGETS if isinstance(name, str) and target.name == name]
    if not found:
        names = [target.name for target in TARGETS]
        received = f"target={name!r}" if isinstance(name, str) else f"a target of type {type(name).__name__}"
        raise ValueError(
            f"`target` must be one of {', '.join(map(repr, names))}. Received: {received}{did_you_mean(name, names)}"
        )
    return found[0]


def chosen(names):
    """The targets that a file is meant for.

    Args:
        names: A name, a list or tuple of names, or `None` for no target in particular.

    Returns:
        Tuple of `Target` objects.

    Raises:
        ValueError: If a name is none of a target.
        TypeError: If `names` is something else.

    Example:

    >>> from keras_sparse.tflite.targets import chosen
    >>> [target.name for target in chosen(["xnnpack", "gpu"])], chosen(None)
    (['xnnpack', 'gpu'], ())
    """
    if names is None:
        return ()
    if not isinstance(names, (str, list, tuple)):
        raise TypeError(f"`target` must be the name of a target, a list of names or None. Received: target={names!r}")
    found = [get(name) for name in ([names] if isinstance(names, str) else names)]
    return tuple({target.name: target for target in found}.values())


def pays_from(operator, pattern):
    """From which sparsity on a sparse kernel is used, or is faster than the dense one, on some target.

    Args:
        operator: The operator in the file, as in `Sparse`.
        pattern: The pattern of its zeros.

    Raises:
        ValueError: If no target has such a kernel.

    Example:

    >>> from keras_sparse.tflite.targets import pays_from
    >>> pays_from("FULLY_CONNECTED", "block_1x4")
    0.85
    """
    kernels = [kind for target in TARGETS for kind in target.sparse]
    found = [kind.sparsity for kind in kernels if (kind.operator, kind.pattern) == (operator, pattern)]
    if not found:
        raise ValueError(f"No target has a sparse kernel for {operator}. Received: pattern={pattern!r}")
    return min(found)


def targets():
    """List the targets: what each multiplies sparse, from which sparsity, and where that is known from.

    Returns:
        A `Report` with a row for each kind of weight that a target runs sparse, or one for a target that runs none.
        `to_dict()["targets"]` holds all statements.

    Example:

    >>> import keras_sparse as ks
    >>> {row["target"] for row in ks.tflite.targets().rows} >= {"xnnpack", "gpu", "micro"}
    True
    """
    return _TargetsReport()


class _TargetsReport(Report):
    def __init__(self):
        rows = []
        for target in TARGETS:
            for kind in target.sparse:
                what = "1x1 convolutions" if kind.operator == "CONV_2D" else "Dense layers"
                rows.append(_row(target, what, kind.pattern, f"{kind.sparsity:.0%}", kind.dtypes, kind.source))
            if not target.sparse:
                rows.append(_row(target, "nothing", "", "", (), f"{target.otherwise.text}. {target.otherwise.source}"))
        notes = [f"1x1 convolutions, {number}: {rule.text}." for number, rule in enumerate(_RULES, 1)]
        notes.append(f"All else: {_RESTORED.text}.")
        columns = [name for name in rows[0] if name != "source"]
        super().__init__("Targets: what runs sparse where", rows, {}, notes, columns=columns)

    def to_dict(self):
        return super().to_dict() | {"targets": [_as_dict(target) for target in TARGETS]}


def _as_dict(target):
    return dataclasses.asdict(target) | {"faults": [fault.__name__ for fault in target.faults]}


def _row(target, what, pattern, sparsity, dtypes, source):
    return {
        "target": target.name,
        "runtime": target.title,
        "runs sparse": what,
        "pattern": pattern,
        "from": sparsity,
        "weights": ", ".join(dtypes),
        "source": source,
    }
