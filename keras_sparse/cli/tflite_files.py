"""The commands about .tflite files and the programs that run them."""

from keras_sparse.cli.command import argument, command

__all__ = []

_FILE = argument("file", metavar="FILE.tflite")


@command()
def _targets(options, stderr):
    """List the runtimes: what each multiplies sparse, from which sparsity, and where that is known from."""
    from keras_sparse import tflite

    return tflite.targets()


@command(_FILE, example="model.tflite")
def _inspect(options, stderr):
    """List the tensors of a .tflite file: how they are stored, how sparse they are."""
    from keras_sparse import tflite

    return tflite.inspect(options.file)


@command(
    _FILE,
    argument("reference", metavar="REFERENCE", help="what it should compute: a .keras or another .tflite file"),
    argument(
        "--accelerator",
        choices="keras_sparse.tflite.verify:ACCELERATORS",
        default="cpu",
        help="where to run it (default: cpu); see `keras-sparse runtimes`",
    ),
    example="model.tflite model.keras --accelerator gpu",
)
def _verify(options, stderr):
    """Compare a .tflite file, whoever wrote it, with its model. It is run: use files that you trust."""
    from keras_sparse import tflite

    return tflite.verify(options.file, options.reference, options.accelerator)


@command(
    _FILE,
    argument("output", metavar="OUT.tflite", help="file to write; may be the input"),
    argument("--target", default="xnnpack", metavar="NAME", help="see `keras-sparse targets` (default: xnnpack)"),
    example="quantized.tflite small.tflite",
)
def _encode(options, stderr):
    """Store the zeros of a .tflite file sparsely, whoever wrote it. It is run: use files that you trust."""
    from keras_sparse import tflite

    return tflite.encode(options.file, options.output, options.target)


@command(
    _FILE,
    argument("--baseline", metavar="FILE.tflite", help="another file to compare with, run in turns"),
    argument(
        "--runtime",
        choices="keras_sparse.tflite.commands:MEASURING",
        help="this CPU (native, the default), LiteRT.js in Node, or an emulated ARM64 CPU that counts instructions",
    ),
    argument("--target", metavar="NAME", help="instead: what measures for this one of `keras-sparse targets`"),
    argument("--threads", type=int, default=1, help="threads of the interpreter (default: 1)"),
    argument("--seconds", type=float, default=1.0, help="of measuring, for each file (default: 1)"),
    example="sparse.tflite --baseline dense.tflite --runtime wasm",
)
def _benchmark(options, stderr):
    """Measure the latency of a .tflite file, or its instructions. It is run: use files that you trust."""
    from keras_sparse import tflite

    return tflite.benchmark(
        options.file,
        baseline=options.baseline,
        runtime=options.runtime,
        threads=options.threads,
        seconds=options.seconds,
        target=options.target,
    )


@command()
def _setup_arm64(options, stderr):
    """Set up the emulated ARM64 CPU of `benchmark --runtime arm64`, on Debian with qemu-user and a C compiler."""
    from keras_sparse import reports, tflite

    return reports.Report("ARM64 runtime", [{"folder": str(tflite.setup_arm64())}], {})


@command()
def _setup_gpu(options, stderr):
    """Set up a software driver for LiteRT's GPU accelerator, from Debian's package of Chromium."""
    from keras_sparse import reports, tflite

    return reports.Report("GPU runtime", [{"folder": str(tflite.setup_gpu())}], {})


@command()
def _runtimes(options, stderr):
    """List the programs that run .tflite files here: those that are installed, and what the others need."""
    from keras_sparse import reports, tflite

    titles = {name: runtime.title for name, runtime in tflite.runtimes.RUNTIMES.items()}
    missing = tflite.runtimes.available()
    rows = [{"runtime": n, "what it is": t, "installed": missing[n] is None} for n, t in titles.items()]
    notes = [f"{name}: {reason}" for name, reason in missing.items() if reason is not None]
    return reports.Report("Runtimes", rows, {}, notes)
