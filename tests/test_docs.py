"""The Python code on the pages of the documentation runs as it stands, and the README's links lead somewhere."""

import importlib
import pathlib
import re

import pytest

import keras_sparse as ks

ROOT = pathlib.Path(__file__).parents[1]
# A block of Python. `<!-- setup` holds what a reader has already (a model, data); `<!-- not run -->` excuses the next.
BLOCK = re.compile(
    r"<!-- setup\n(?P<setup>.*?)-->|(?P<excuse><!-- not run -->\n+)?^```python\n(?P<code>.*?)^```", re.S | re.M
)
LONG = ("android", "benchmarking", "failures", "tflite", "search", "regularization")  # to run
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if BLOCK.search(path.read_text(encoding="utf-8")))


def blocks(path):
    """The code to run on a page, each block at the line where it stands, for tracebacks that lead there."""
    text = path.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        if not match["excuse"]:
            part = "setup" if match["setup"] is not None else "code"
            yield "\n" * text.count("\n", 0, match.start(part)) + match[part]


@pytest.mark.parametrize(
    "path",
    [pytest.param(page, id=page.stem, marks=[pytest.mark.slow] if page.stem in LONG else []) for page in PAGES],
)
@pytest.mark.thorough(3)
def test_code_on_the_page_runs(path, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "page"}
    ran = 0
    for code in blocks(path):
        exec(compile(code, str(path), "exec"), namespace)
        ran += 1
    assert ran == len(list(blocks(path)))
    assert "Traceback" not in capfd.readouterr().err
    check = CHECKS.get(path.stem)
    if check is not None:
        check(namespace)


def failures_are_theirs(page):
    """TensorFlow's files fail, `export`'s do not; the first four show only where sparse kernels are on."""
    theirs, ours = zip(*page["found"], strict=True)
    assert set(ours) == {"right"}
    assert "right" not in [*(theirs[:3] if page["sparse"] != "native" else ()), *theirs[4:]]
    assert theirs[3] != "right" or page["emulated"] == "native"
    assert len(theirs) == 19


CHECKS = {"failures": failures_are_theirs}


def test_readme_links_lead_to_files():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)#]+)", text) if "://" not in target]
    assert len(targets) > 5
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_figure_shows_the_numbers_of_the_benchmarks_page(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    pytest.importorskip("matplotlib")
    figure = importlib.import_module("results_figure")
    _, zeros, channels, _, _ = figure.measured()
    picture = figure.PICTURE.read_text(encoding="utf-8")
    assert [label for label, ratio in zeros + channels if f"<!-- {ratio:.2f} -->" not in picture] == []


def test_every_public_name_is_used_by_a_guide():
    pages = [ROOT / "README.md", ROOT / "docs" / "concepts.md", *(ROOT / "docs" / "guides").glob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    assert "Budget" in ks.__all__
    assert [name for name in ks.__all__ if not re.search(rf"\bks\.{name}\b", text)] == []
