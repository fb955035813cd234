"""The rules of the code base, read from its syntax trees: who may import whom, what every module must come with."""

import ast
import doctest
import functools
import importlib
import json
import pathlib
import re
import subprocess
import sys
import types

import keras
import pytest

from keras_sparse.tflite.commands import RUNTIMES
from keras_sparse.tflite.targets import TARGETS

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "keras_sparse"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8"), str(path)) for path in FILES}
# `tflite.export` for keras_sparse/tflite/export.py; packages and `python -m` entry points define nothing themselves.
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in FILES
    if path.name not in ("__init__.py", "__main__.py")
}

# A module imports only from rows above its own; inside a package, neighbours may import each other.
MAP = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
ROWS = [set(re.findall(r"`(\w+)`", rooms)) for rooms in re.findall(r"^\| \d+ \| ([^|]*) \|", MAP, re.MULTILINE)]
LEVEL = {name: level for level, row in enumerate(ROWS) for name in row}
# These work on NumPy arrays alone, so that a mask is the same on every backend.
NUMPY_ONLY = {"registry", "schedules", "patterns", "criteria"}

# Private names of others that we use, each with its reason.
PRIVATE = {
    # How the Keras optimizers assign within a replica; no public call does it in every strategy.
    ("optimizers", "__internal__"): "tf.__internal__.distribute.interim.maybe_merge_call",
}

# Registered classes that others may ask for: an optimizer and a layer are told from those of Keras.
ASKED_FOR = {"L0", "SparseOptimizer"}

VAGUE = {"utils", "util", "common", "base", "helpers", "helper", "manager", "misc", "core"}


def module_of(path):
    """The top-level module of the package that a file belongs to; `None` for keras_sparse/__init__.py itself."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return None if first in ("__init__", "__main__") else first


def imports(tree):
    """Yield `(dotted name, node)` for each import, `from a import b` as `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports in full"
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)


def in_functions(tree):
    """The nodes that run only when a function is called."""
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return {id(inner) for function in functions for inner in ast.walk(function) if inner is not function}


def public(tree):
    """Yield `(name, node)` for the classes and functions in `__all__` that the module itself defines."""
    names = None
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            names = ast.literal_eval(node.value)
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            if node.name in names if names is not None else not node.name.startswith("_"):
                yield node.name, node


def code_lines(path):
    """The numbers of the lines that are code: not blank, no comments, no docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    text = path.read_text(encoding="utf-8")
    docstrings = [node.body[0] for node in ast.walk(ast.parse(text)) if isinstance(node, documented) and has_doc(node)]
    inside = {number for node in docstrings for number in range(node.lineno, node.end_lineno + 1)}
    lines = enumerate(text.splitlines(), 1)
    return [number for number, line in lines if line.strip() and line.strip()[0] != "#" and number not in inside]


def has_doc(node):
    return ast.get_docstring(node) is not None


def where(path, node):
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def each_file(test):
    return pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))(test)


def each_module(test):
    return pytest.mark.parametrize("module", sorted(MODULES))(test)


# Their examples adapt a network, make many files, or measure one.
LENGTHY = {"tflite.adapt", "tflite.faults", "tflite.timing"}
BY_LENGTH = [pytest.param(name, marks=[pytest.mark.slow] * (name in LENGTHY)) for name in sorted(MODULES)]


def test_the_package_was_found():
    assert {"schedules", "optimizers.sparse", "pruning.plan", "callbacks.fit", "tflite.export"} <= set(MODULES)


@each_file
def test_imports_go_down_only(path):
    own = module_of(path)
    if own is None:
        return
    assert own in LEVEL, f"Place the new module {own!r} in a row of docs/architecture.md."
    for name, node in imports(TREES[path]):
        parts = name.split(".")
        if parts[0] != "keras_sparse":
            continue
        assert len(parts) > 1, f"{where(path, node)}: import the module, not the package, which imports everything"
        assert parts[1] in LEVEL, f"{where(path, node)}: {parts[1]} is in no row"
        allowed = LEVEL[parts[1]] < LEVEL[own] or parts[1] == own
        assert allowed, f"{where(path, node)}: {own} may not import {parts[1]}"


def test_the_map_is_that_of_the_house():
    rooms = {module_of(path) for path in FILES} - {None}
    unbuilt = {"compat"}
    assert len(ROWS) == 11
    assert set(LEVEL) - unbuilt == rooms - unbuilt
    assert sum(map(len, ROWS)) == len(LEVEL)


@each_file
def test_tensorflow_only_where_it_must_be(path):
    own, late = module_of(path), in_functions(TREES[path])
    for name, node in imports(TREES[path]):
        if name.split(".")[0] in ("tensorflow", "tf_keras", "tensorflow_model_optimization", "ai_edge_litert"):
            needs_it = own == "optimizers" and id(node) in late and name == "tensorflow"
            assert own in ("tflite", "compat") or needs_it, f"{where(path, node)}: imports {name}"


@each_file
def test_lowest_rows_know_only_numpy(path):
    own = module_of(path)
    if own not in NUMPY_ONLY:
        return
    for name, node in imports(TREES[path]):
        top = name.split(".")[0]
        # The registry registers classes with Keras; the others have no business with tensors.
        known = {"keras_sparse", "numpy"} | ({"keras"} if own == "registry" else set())
        assert top in known or top in sys.stdlib_module_names, f"{where(path, node)}: imports {name}"


@each_file
def test_nothing_private_of_others(path):
    own = module_of(path)
    for name, node in imports(TREES[path]):
        assert not re.match(r"keras\.src\b|tensorflow\.python\b|tf_keras\.src\b", name), f"{where(path, node)}: {name}"
        foreign = [part for part in name.split(".") if part.startswith("_") and part != "__version__"]
        assert not foreign, f"{where(path, node)}: imports {name}"
    for node in ast.walk(TREES[path]):
        if not isinstance(node, ast.Attribute) or not node.attr.startswith("_"):
            continue
        python = any(hasattr(kind, node.attr) for kind in (type, types.FunctionType, list, property))
        if node.attr in ("__all__", "__version__", "__signature__") or python:
            continue  # `__name__` and its like are Python's, and public.
        owner = node.value
        ours = isinstance(owner, ast.Name) and owner.id in ("self", "cls")
        ours |= isinstance(owner, ast.Call) and isinstance(owner.func, ast.Name) and owner.func.id == "super"
        assert ours or (own, node.attr) in PRIVATE, f"{where(path, node)}: uses {ast.unparse(node)}"


def test_every_exception_is_needed():
    nodes = [(module_of(path), node) for path in FILES for node in ast.walk(TREES[path])]
    used = {(module, node.attr) for module, node in nodes if isinstance(node, ast.Attribute)}
    assert set(PRIVATE) <= used, "An exception in PRIVATE is no longer needed: remove it."


def names_in(node):
    """The names that an expression mentions, without the modules that they are in."""
    return {getattr(part, "attr", getattr(part, "id", None)) for part in ast.walk(node)}


@functools.cache
def registered():
    """Names of our classes that strings or configs stand for: `@serializable`, or `@TABLE.register("name")`."""
    classes = [node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return {
        node.name for node in classes if {"register", "serializable"} & set().union(*map(names_in, node.decorator_list))
    }


@each_file
def test_nobody_asks_which_registered_class_an_object_is_of(path):
    ours = registered() - ASKED_FOR
    assert {"Unstructured", "Global", "Pruning", "Budget", "Fisher"} <= ours
    for node in ast.walk(TREES[path]):
        kind = (
            node.args[1]
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass")
            else None
        )
        if isinstance(node, ast.Compare) and "type(" in ast.unparse(node):
            kind = node
        asked = ours & names_in(kind) if kind is not None else ()
        assert not asked, f"{where(path, node)}: {ast.unparse(node)}; ask the object for an attribute"


@each_file
def test_nobody_compares_the_name_of_a_runtime_or_target(path):
    names = {*RUNTIMES, *(target.name for target in TARGETS)}
    for node in ast.walk(TREES[path]):
        if isinstance(node, (ast.Compare, ast.match_case)):
            texts = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
            assert not texts & names, f"{where(path, node)}: {ast.unparse(node)}; ask the `Runtime` or `Target`"


@each_file
def test_size_and_names(path):
    lines = len(code_lines(path))
    assert lines <= 350, f"{path.relative_to(ROOT)} has {lines} lines of code: is it one idea?"
    assert path.stem.strip("_") not in VAGUE, "Name the module for what it is about."
    assert ast.get_docstring(TREES[path]), "The first line of a module's docstring defines its noun."


@each_module
def test_each_module_has_tests(module):
    # A package that is tested as a whole has one file for all of its modules.
    names = f"test_{module.replace('.', '_')}.py", f"test_{module.split('.')[0]}.py"
    files = [ROOT / "tests" / name for name in names if (ROOT / "tests" / name).exists()]
    assert files, f"tests/{names[0]} is missing"
    assert any("\ndef test_" in file.read_text(encoding="utf-8") for file in files)


@each_module
def test_each_module_has_a_docs_page(module):
    page = ROOT / "docs" / "api" / f"{module.split('.')[0]}.md"
    assert page.exists(), f"{page.relative_to(ROOT)} is missing"
    assert f"{{eval-rst}}\n.. automodule:: keras_sparse.{module}\n" in page.read_text(encoding="utf-8")


@each_module
def test_each_public_docstring_has_an_example(module):
    for name, node in public(TREES[MODULES[module]]):
        assert ">>> " in (ast.get_docstring(node) or ""), f"keras_sparse.{module}.{name} has no example"


@pytest.mark.parametrize("module", BY_LENGTH)
def test_examples_run(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for example in doctest.DocTestFinder().find(importlib.import_module(f"keras_sparse.{module}")):
        keras.utils.clear_session(free_memory=False)  # Names of layers start anew in each docstring.
        runner.run(example)
    assert runner.tries or not list(public(TREES[MODULES[module]]))
    assert runner.failures == 0


@pytest.mark.parametrize(
    ("table", "package"),
    [("patterns.shapes:PATTERNS", "patterns"), ("pruning.allocation:ALLOCATIONS", "pruning")],
)
def test_what_is_registered_is_a_name_of_its_package(table, package):
    module, _, name = table.partition(":")
    classes = getattr(importlib.import_module(f"keras_sparse.{module}"), name).classes.values()
    own = [one for one in classes if one.__module__ == f"keras_sparse.{module}"]
    public = importlib.import_module(f"keras_sparse.{package}")
    assert len(own) >= 3
    assert {one.__name__ for one in own} <= set(public.__all__)
    assert [getattr(public, one.__name__) for one in own] == own


def test_size_of_tests():
    lines = {path.name: len(code_lines(path)) for path in (ROOT / "tests").rglob("*.py")}
    assert {name: count for name, count in lines.items() if count > 350} == {}


def test_tests_assert():
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                body = ast.unparse(node)
                asserts = re.search(r"\bassert\b|pytest\.(raises|warns)|\b(assert|check)_\w+\(", body)
                assert asserts, f"{where(path, node)}: {node.name} asserts nothing"


@functools.cache
def modules_after(*statements):
    """The modules that are there after each of some statements: one process for all tests of it."""
    tell = "import json, sys\nprint(json.dumps(sorted(sys.modules)))"
    code = "\n".join(f"{statement}\n{tell}" for statement in statements)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return [set(json.loads(line)) for line in result.stdout.splitlines()[-len(statements) :]]


IN_STEPS = "import keras, numpy", "import keras_sparse as ks", "assert callable(ks.tflite.export)"


def test_import_brings_nothing_but_keras_and_the_standard_library():
    before, after, _ = modules_after(*IN_STEPS)
    foreign = {name for name in after - before if name.split(".")[0] not in sys.stdlib_module_names | {"keras_sparse"}}
    assert "keras_sparse.callbacks" in after
    assert not foreign, "Import these where they are needed: `import keras_sparse` is to cost next to nothing."
    assert "keras_sparse.tflite" not in after


def test_lazy_submodule_is_an_attribute():
    assert "keras_sparse.tflite.export" in modules_after(*IN_STEPS)[-1]


def test_version_can_be_read_without_importing():
    tree = TREES[PACKAGE / "__init__.py"]
    versions = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    ]
    assert len(versions) == 1
    assert re.fullmatch(r"\d+\.\d+\.\d+", versions[0])
