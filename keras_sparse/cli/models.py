"""The commands that read a saved Keras model: what is sparse in it, less of it, or another form of it."""

from keras_sparse.cli.command import argument, command, drawing, saved_model

__all__ = []

_OUTPUT = argument("-o", "--output", metavar="OUT.keras", required=True, help="file to write; may be the input")


@command(
    saved_model,
    argument("--sparsity", type=float, help="share of weights to prune, in [0, 1); a pattern such as 2:4 has its own"),
    argument(
        "--filters",
        nargs="+",
        action="extend",
        metavar="REGEX",
        help="prune only weights whose path a regular expression matches (default: all that multiply inputs, but for "
        "depthwise kernels and embeddings)",
    ),
    argument(
        "--allocation",
        choices="keras_sparse.pruning.allocation:ALLOCATIONS",
        default="uniform",
        help="how the share is spread over the weights (default: uniform)",
    ),
    argument(
        "--floor", type=float, metavar="SHARE", help="what stays of each weight at least, with --allocation global"
    ),
    argument("--pattern", help="unstructured (default), channel, or such as block_1x4 or 2:4"),
    argument(
        "--budget",
        nargs="+",
        metavar="NAME=AMOUNT",
        help="in place of --sparsity, with --pattern channel: macs, parameters or bytes that may be left after "
        "`shrink`, as a share (macs=0.5) or an amount (bytes=200000), or milliseconds, measured on runtime=native; "
        "round_to=8 counts multiples of 8 channels",
    ),
    argument(
        "--criterion",
        choices="keras_sparse.criteria:CRITERIA",
        default="magnitude",
        help="which weights matter (default: magnitude); those that use gradients or inputs need --data",
    ),
    argument(
        "--data",
        metavar="FILE.npz",
        help="arrays `x` and `y` to take gradients on; for obs, wanda and --repair inputs, by name or as `x`; "
        "--allocation dynamic measures the loss if there is a `y`, else the outputs",
    ),
    argument(
        "--repair",
        action="store_true",
        default=None,
        help="solve for the weights that stay, on the inputs in --data (obs does so anyway)",
    ),
    _OUTPUT,
    example="model.keras --sparsity 0.9 --filters conv dense_1 -o sparse.keras",
)
def _prune(options, stderr):
    """Prune a saved model in one shot, without training."""
    from keras_sparse import files, pruning

    allocation = options.allocation
    if options.floor is not None:
        if allocation != "global":
            raise ValueError(f"`--floor` goes with `--allocation global`. Received: --allocation {allocation}")
        allocation = pruning.Global(options.floor)
    target = options.sparsity
    if options.budget:
        if target is not None:
            raise ValueError(f"`--budget` stands in place of `--sparsity`. Received: --sparsity {target} as well")
        target = _budget(options.budget)
    with files.replacing(options.output, ".keras") as path:
        model, notes = _load_compiled(options.model)
        report = pruning.prune(
            model,
            target,
            criterion=options.criterion,
            pattern=options.pattern,
            allocation=allocation,
            filters=options.filters,
            data=_data(options, model, notes),
            repair=options.repair,
        )
        model.save(path)
    report.notes += [*notes, f"Written: {options.output}"]
    return report


@command(
    saved_model,
    argument(
        "--data",
        metavar="FILE.npz",
        required=True,
        help="inputs, by name or as `x`, some hundred samples; with targets `y` the loss is measured that the model "
        "was compiled with, else the change of its outputs",
    ),
    argument("--levels", nargs="+", type=float, metavar="SHARE", help="sparsities to measure, rising"),
    argument(
        "--criterion",
        choices="keras_sparse.criteria:CRITERIA",
        default="magnitude",
        help="which weights matter (default: magnitude); none that uses gradients",
    ),
    argument("--pattern", help="unstructured (default), or such as block_1x4"),
    drawing("the loss of each weight"),
    example="model.keras --data x.npz --plot sensitivity.png",
)
def _sensitivity(options, stderr):
    """Measure what sparsity costs a saved model, weight by weight."""
    from keras_sparse import pruning

    model, notes = _load_compiled(options.model)
    data = _measured_on(options.data, model, notes)
    levels = {"levels": options.levels} if options.levels else {}
    report = pruning.sensitivity(model, data, **levels, criterion=options.criterion, pattern=options.pattern)
    report.notes += notes
    return report


def _budget(texts):
    """The `Budget` that texts such as `macs=0.5` say."""
    from keras_sparse import pruning

    amounts = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            amounts[name] = value if name == "runtime" else int(value) if value.isdigit() else float(value)
        except ValueError:
            raise ValueError(f"`--budget` takes such as macs=0.5 or bytes=200000. Received: {text}") from None
    if not amounts.keys() <= {"macs", "parameters", "bytes", "milliseconds", "runtime", "round_to"}:
        raise ValueError(
            "`--budget` knows macs, parameters, bytes and milliseconds, runtime and round_to. "
            f"Received: {' '.join(texts)}"
        )
    return pruning.Budget(**amounts)


def _data(options, model, notes):
    """What `--data` holds: inputs and targets for a criterion that ranks by gradients, else inputs."""
    from keras_sparse import criteria, files, pruning

    if not options.data:
        return None
    criterion = criteria.get(options.criterion)
    if criterion.statistic is None:
        if pruning.allocation.get(options.allocation).measures:
            return _measured_on(options.data, model, notes)
        if criterion.of_inputs or options.repair:
            return files.load_arrays(options.data, "inputs, by name or as `x`", files.inputs)
    return files.load_arrays(options.data)


def _measured_on(path, model, notes):
    """What sensitivity is measured on: inputs, and targets if there are some and the model has a loss."""
    from keras_sparse import files

    data = files.load_arrays(path, "inputs, by name or as `x`", files.with_targets_if_any)
    if isinstance(data, tuple) and not (model.compiled and model.loss is not None):
        notes.append("`y` was left out: the model has no loss. Measured is the change of its outputs.")
        return data[0]
    return data


def _load_compiled(path):
    """The model, with its optimizer and losses if they can be loaded, and notes."""
    from keras_sparse import comparison

    try:
        return comparison.load(path, compile=True), []
    except ValueError as error:
        reason = " ".join(str(error).split())
    return comparison.load(path), [f"Optimizer and losses were left out, because they cannot be loaded. {reason}"]


@command(
    saved_model,
    argument("output", metavar="OUT.keras", help="file to write; may be the input"),
    argument("--round-to", type=int, default=1, metavar="N", help="keep multiples of so many channels (default: 1)"),
    example="pruned.keras small.keras",
)
def _shrink(options, stderr):
    """Remove the dead channels of a saved model: fewer filters, units and heads, the same outputs."""
    from keras_sparse import channels, files

    with files.replacing(options.output, ".keras") as path:
        model, notes = _load_compiled(options.model)
        small, report = channels.shrink(model, options.round_to, verbose=0, return_report=True)
        small.save(path)
    report.notes += [*notes, f"Written: {options.output}"]
    return report


@command(
    saved_model, drawing("the sparsity of each weight"), example="model.keras --html report.html --plot report.png"
)
def _report(options, stderr):
    """Tell what is sparse in a saved model, what is not, and why."""
    from keras_sparse import comparison, reports

    return reports.report(comparison.load(options.model))


@command(
    saved_model,
    argument(
        "--target",
        choices="keras_sparse.tflite.targets:TARGETS",
        default="xnnpack",
        help="see `keras-sparse targets` (default: xnnpack)",
    ),
    argument("--sparsity", type=float, default=0.9, help="to look at (default: 0.9)"),
    example="model.keras --target xnnpack",
)
def _check(options, stderr):
    """Say what a saved model would gain on a target if it were pruned, and what stands in its way."""
    from keras_sparse import comparison, tflite

    return tflite.check(comparison.load(options.model), options.target, options.sparsity)


@command(
    saved_model,
    _OUTPUT,
    argument(
        "--target",
        choices="keras_sparse.tflite.targets:TARGETS",
        default="xnnpack",
        help="where it should run sparse, or right (default: xnnpack)",
    ),
    example="model.keras -o adapted.keras",
)
def _adapt(options, stderr):
    """Bring a saved model into the form that a target runs sparse, or right; the weights stay the same."""
    from keras_sparse import comparison, files, tflite

    with files.replacing(options.output, ".keras") as path:
        model, report = tflite.adapt(comparison.load(options.model), options.target)
        model.save(path)
    report.notes.append(f"Written: {options.output}")
    return report


@command(
    saved_model,
    argument("output", metavar="OUT.tflite", help="file to write"),
    argument(
        "--target",
        action="append",
        metavar="NAME",
        help="what the file is for, may be repeated; see `keras-sparse targets` (default: all, with dense weights)",
    ),
    argument("--dense", action="store_true", help="do not use a sparse encoding, however small"),
    argument(
        "--quantize",
        choices="keras_sparse.tflite.job:QUANTIZE",
        help="how to store the weights (default: float32); int8 and int16x8 need --representative-data",
    ),
    argument(
        "--inference-type",
        choices="keras_sparse.tflite.export:INFERENCE_TYPES",
        help="of inputs and outputs, as integers (default: float32)",
    ),
    argument("--batch-size", type=int, metavar="N", help="of the file (default: what its targets need)"),
    argument(
        "--representative-data",
        metavar="FILE.npz",
        help="inputs, by name or as `x`, to compare on and to calibrate int8",
    ),
    argument(
        "--verify",
        choices="keras_sparse.tflite.verification:VERIFY",
        default="auto",
        help="strict: runtimes with sparse kernels must agree (default: auto)",
    ),
    example="model.keras model.tflite --target xnnpack --quantize float16",
)
def _export(options, stderr):
    """Write a saved model as a .tflite file that is verified against it."""
    from keras_sparse import comparison, files, tflite

    data = None
    if options.representative_data:
        data = files.load_arrays(options.representative_data, "inputs, by name or as `x`", files.inputs)
    return tflite.export(
        comparison.load(options.model),
        options.output,
        target=options.target,
        sparse=not options.dense,
        quantize=options.quantize,
        representative_data=data,
        verify=options.verify,
        inference_type=options.inference_type,
        batch_size=options.batch_size,
    )


@command(
    argument("model", metavar="OLD.h5", help="a file that Keras 2 (tf_keras) saved, with wrappers of tfmot or without"),
    argument("output", metavar="NEW.keras", help="file to write"),
    argument("--unsafe", action="store_true", help="load Lambda layers, which run code from the file"),
    example="pruned.h5 pruned.keras",
)
def _convert_tfmot(options, stderr):
    """Read an .h5 file of Keras 2 and tfmot, and write a plain Keras 3 model."""
    from keras_sparse import files, reports
    from keras_sparse.compat import tfmot

    model = tfmot.load(options.model, safe_mode=not options.unsafe)
    with files.replacing(options.output, ".keras") as path:
        model.save(path)
    report = reports.report(model)
    report.notes.append(f"Written: {options.output}")
    return report
