"""The notebooks run from top to bottom without network, and show nothing but what they mean to show."""

import ast
import importlib
import os
import pathlib
import re
import subprocess
import sys

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# The tutorials: what each reads below the folder that KERAS_SPARSE_DATA names.
DATA = {
    "07_vision": "cifar10/*.npz",
    "08_language": "sms-spam/SMSSpamCollection",
    "09_speech": "fsdd/fsdd.npz",
    "10_recommendation": "movielens/movielens.pkl.compress",
    "11_medicine": "pneumoniamnist/*.npz",
}
COLAB = "https://colab.research.google.com/github/keras-sparse/keras_sparse/blob/main/notebooks"


def each_notebook(test):
    return pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)(test)


def test_the_notebooks_were_found():
    assert NOTEBOOKS


@each_notebook
def test_colab_badge_comes_first(path):
    first = nbformat.read(path, as_version=4).cells[0]
    assert first.cell_type == "markdown"
    assert first.source.splitlines()[0].endswith(f"({COLAB}/{path.name})")


@each_notebook
def test_committed_without_outputs_or_with_all_of_a_tutorial(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    if path.stem not in DATA:
        assert [cell.outputs for cell in cells if cell.outputs] == []
        return
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert path.stat().st_size < 300_000
    assert check(cells) == (True, True)


@pytest.mark.parametrize("name", DATA)
def test_a_tutorial_can_be_repeated_with_other_seeds(name):
    cells = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells
    lines = [line for cell in cells if cell.cell_type == "code" for line in cell.source.splitlines()]
    assert lines.count("SEED = 0") == 1
    assert any(line.startswith("results = ") for line in lines)
    assert "set_random_seed(SEED)" in "".join(lines)


@each_notebook
def test_as_a_script(path, monkeypatch):
    """It is Python, and what a cell shows at its end is printed."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    script = importlib.import_module("notebook_scripts").script(path)
    assert "%pip" not in script and "raise SystemExit('Run first: pip install" in script
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    tree = ast.parse(script)
    shown = [node for node in tree.body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Name)]
    assert shown == [] and script.count("# %%\n") == len(cells)


@pytest.mark.slow
def test_a_script_runs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [
        nbformat.v4.new_markdown_cell("# A report\n\nand its picture"),
        nbformat.v4.new_code_cell(
            "try:\n    import keras_sparse as ks\nexcept ImportError:\n    %pip install keras_sparse"
        ),
        nbformat.v4.new_code_cell(
            "import keras\n\nmodel = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])"
        ),
        nbformat.v4.new_code_cell("ks.prune(model, 0.5);"),
        nbformat.v4.new_code_cell("report = ks.report(model)\nreport"),
        nbformat.v4.new_code_cell("report.plot()"),
        nbformat.v4.new_code_cell("print('the end')"),
    ]
    nbformat.write(notebook, tmp_path / "report.ipynb")
    text = importlib.import_module("notebook_scripts").script(tmp_path / "report.ipynb")
    (tmp_path / "script.py").write_text(text)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    command = [sys.executable, "script.py"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.count("Sparsity of") == 1 and "Figure(" in run.stdout and run.stdout.endswith("the end\n")


def missing(path):
    """Why a notebook cannot run here, or None: the tests take no data from the network."""
    if path.stem not in DATA:
        return None
    folder = os.environ.get("KERAS_SPARSE_DATA")
    if folder and any(pathlib.Path(folder).glob(DATA[path.stem])):
        return None
    return f"KERAS_SPARSE_DATA must name a folder with {DATA[path.stem]}. Received: {folder}"


def check(cells):
    """Assert that nothing shows that nobody meant to show; return whether there is a picture, and a table."""
    outputs = [output for cell in cells for output in cell.outputs]
    assert [output for output in outputs if output.output_type == "error"] == []
    assert [output.text for output in outputs if output.output_type == "stream" and output.name == "stderr"] == []
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert not re.search(r"^[IWE]0000|TensorFlow Lite XNNPACK delegate|Saved artifact|oneDNN", printed, re.M)
    shown = [output.get("data", {}) for output in outputs]
    return any("image/png" in data for data in shown), any("<table" in data.get("text/html", "") for data in shown)


@pytest.mark.slow
@each_notebook
def test_runs(path, tmp_path, monkeypatch):
    if reason := missing(path):
        pytest.skip(reason)
    # The package of this tree, wherever the kernel starts.
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # As users run it: without what quiets TensorFlow in the other tests.
    for name in ("CUDA_VISIBLE_DEVICES", "MPLBACKEND", "TF_CPP_MIN_LOG_LEVEL", "TF_ENABLE_ONEDNN_OPTS"):
        monkeypatch.delenv(name, raising=False)
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    assert check([cell for cell in notebook.cells if cell.cell_type == "code"]) == (True, True)
