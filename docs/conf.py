"""Sphinx configuration: MyST pages, API pages from docstrings, no network."""

import ast
import base64
import importlib
import json
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")


def import_quietly(name):
    """Import a module that prints from C++, to file descriptor 2, which `-W` builds should not be cluttered with."""
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        importlib.import_module(name)
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


import_quietly("keras")
notebook_scripts = importlib.import_module("notebook_scripts")

project = "keras_sparse"
author = "The keras_sparse authors"
copyright = "2026, the keras_sparse authors. Apache License 2.0"
# Read, not imported: `version` is needed before autodoc imports anything.
release = version = next(
    ast.literal_eval(node.value)
    for node in ast.parse((ROOT / "keras_sparse" / "__init__.py").read_text(encoding="utf-8")).body
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
)

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "sphinx_design"]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
nb_execution_mode = "off"  # the outputs are those of the notebooks as they are; CI executes them
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
myst_links_external_new_tab = False

autodoc_default_options = {"members": True, "member-order": "bysource", "show-inheritance": True}
autodoc_inherit_docstrings = False
autodoc_typehints = "none"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
# A type in a dataclass is looked up as a name of ours otherwise: `bytes` is an attribute, too.
napoleon_attr_annotations = False
default_role = "code"  # Docstrings are written with Markdown's single backquotes.

html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["custom.css"]
html_extra_path = ["web", "_build/scripts"]  # beside the pages: speed.html, and the notebooks as scripts
html_title = f"keras_sparse {release}"

# Made of the notebooks: the third picture of a tutorial, which shows what it ends with, and scripts to download.
BUILT = ROOT / "docs" / "_build"
(BUILT / "pictures").mkdir(parents=True, exist_ok=True)
(BUILT / "scripts").mkdir(exist_ok=True)
for path in (ROOT / "notebooks").glob("*.ipynb"):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    found = [output.get("data", {}).get("image/png") for cell in cells for output in cell.get("outputs", [])]
    for picture in list(filter(None, found))[2:3]:
        (BUILT / "pictures" / f"{path.stem}.png").write_bytes(base64.b64decode(picture))
    (BUILT / "scripts" / f"{path.stem}.py").write_text(notebook_scripts.script(path), encoding="utf-8")
