"""Damaged .tflite files, and what may come of reading and running one: an answer that makes sense, or a clean error."""

import random

import keras_sparse as ks

WILD = (0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFC)


def mutate(content, seed):
    """A damaged copy of a file's content, the same for the same seed."""
    rng = random.Random(seed)
    damaged = bytearray(content)
    kind = rng.choice(("bits", "bits", "truncated", "offsets", "offsets", "blank", "moved"))
    if kind == "bits":
        for _ in range(rng.choice((1, 2, 8, 64))):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    elif kind == "truncated":
        del damaged[rng.randrange(len(damaged)) :]
    elif kind == "offsets":  # flatbuffers are held together by 32-bit offsets and lengths
        for _ in range(rng.choice((1, 2, 4))):
            position = 4 * rng.randrange(len(damaged) // 4)
            value = rng.choice((*WILD, rng.randrange(len(damaged)), rng.getrandbits(32)))
            damaged[position : position + 4] = value.to_bytes(4, "little")
    else:
        start, length = rng.randrange(len(damaged)), rng.choice((4, 16, 256))
        other = rng.randrange(len(damaged))
        damaged[start : start + length] = bytes(length) if kind == "blank" else damaged[other : other + length]
    return bytes(damaged)


def outcome(path, timeout=20, **options):
    """Inspect and benchmark a file of unknown content: `(what inspect did, what benchmark did)`, in one word each."""
    return attempt(inspected, path), attempt(lambda: _benchmark(path, timeout, **options))


def attempt(function, *arguments):
    """What came of a call, in one word: `"answer"`, or the name of a clean error. Any other error is raised."""
    try:
        function(*arguments)
    except (ValueError, OSError) as error:
        assert "Received" in str(error), error
        return type(error).__name__
    return "answer"


def inspected(path):
    """Inspect a file: what is said must make sense."""
    report = ks.tflite.inspect(path)
    assert report.totals["bytes"] == path.stat().st_size
    assert all(row["zeros"] is None or 0 <= row["zeros"] for row in report.rows)
    assert str(report) and report.to_json()


def _benchmark(path, timeout, **options):
    report = ks.tflite.benchmark(path, seconds=0.01, timeout=timeout, **options)
    (row,) = report.rows
    assert 0 < row["p25"] <= row["median"] <= row["p75"]
    assert str(report) and report.to_json()
