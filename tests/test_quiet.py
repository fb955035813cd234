import logging
import os
import subprocess
import sys
import warnings

import pytest

from keras_sparse.quiet import quiet


def test_nothing_from_inside_reaches_the_terminal(capfd):
    print("before")
    with quiet():
        print("Python's stdout")
        print("Python's stderr", file=sys.stderr)
        os.write(1, b"descriptor 1\n")
        os.write(2, b"descriptor 2\n")
        logging.getLogger("tensorflow").error("a log line")
        warnings.warn("a warning", stacklevel=1)
    print("after")
    assert capfd.readouterr() == ("before\nafter\n", "")


@pytest.mark.lengthy(0)
def test_the_yielded_streams_reach_the_terminal():
    code = (
        "import sys\nfrom keras_sparse.quiet import quiet\n"
        "with quiet() as (out, err), quiet() as inner:\n"
        "    print('lost'); print('\u2713 out', file=out); print('err', file=err); print('lost too', file=inner[0])\n"
        "print('after')"
    )
    environment = os.environ | {"PYTHONIOENCODING": "utf-8", "TF_CPP_MIN_LOG_LEVEL": "3"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=environment, encoding="utf-8", check=True
    )
    assert run.stdout == "\u2713 out\nafter\n"
    assert run.stderr.splitlines()[-1] == "err"


def test_streams_of_a_notebook_are_yielded_as_they_are(capsys):
    # capsys replaces sys.stdout by an object without a descriptor, as a notebook does.
    with quiet() as (out, err):
        print("out", file=out)
        print("err", file=err)
        print("lost")
    assert capsys.readouterr() == ("out\n", "err\n")


def test_everything_is_put_back_after_an_error(capfd):
    streams, level = (sys.stdout, sys.stderr), logging.getLogger("absl").level
    descriptors = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
    with pytest.raises(KeyError), quiet():
        raise KeyError("passes")
    os.write(1, b"visible\n")
    assert capfd.readouterr().out == "visible\n"
    assert (sys.stdout, sys.stderr) == streams
    assert logging.getLogger("absl").level == level
    assert not descriptors or len(os.listdir("/proc/self/fd")) == len(descriptors)


@pytest.mark.lengthy(0)
def test_importing_the_library_leaves_the_descriptors_alone():
    code = "import os\ndel os.dup2\nimport keras_sparse\nassert callable(keras_sparse.prune)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-"])
def test_a_process_without_a_terminal(closed, tmp_path):
    done = tmp_path / "done"
    code = f"from keras_sparse.quiet import quiet\nwith quiet():\n    print('lost')\nopen({str(done)!r}, 'w').close()"
    run = subprocess.run(f'"{sys.executable}" -c "$CODE" {closed}', shell=True, env=os.environ | {"CODE": code})
    assert run.returncode == 0
    assert done.exists()
