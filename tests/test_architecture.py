"""The shape of the package, read off its source.

Imports go downwards, in packages too; everything public is explained; importing is light.
"""

import ast
import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import adv2_jax

ROOT = Path(adv2_jax.__file__).parent
LAYERS = [
    {"types", "options", "errors", "precision", "cost", "devices", "hosts"},
    {"activations", "maps", "losses", "files", "identity"},
    {"capabilities", "blending", "state_dicts"},
    {"interpreters", "threats", "models", "data", "metrics"},
    {"detectors"},
    {"descent"},
    {"presets", "spectra"},
    {"crafting", "curvature"},
    {"attacks"},
    {"runs", "training"},
    {"report"},
    {"cli"},
    {"__main__"},
]
# in a package a module imports only those named before it; its `__init__` may import all of them,
# but they may import nothing from it
PACKAGES = {
    "interpreters": "base gradients path relevance activation_maps attention_maps patch_maps mask_descent masker_maps",
    "models": "layers resnet densenet vit masker convert user",
    "data": "lazy images photos shapes targets class_files folder tfds sources splits",
    "runs": "schema doubts store select run transfer detection curvature compare tables faithfulness",
    "training": "checkpoints loop robust classifier masker",
    "report": "words pictures charts tables cards labelled curvature detection figures page training comparison",
    "cli": "console arguments subject commands training entry",
}
LEVEL = {module: level for level, layer in enumerate(LAYERS) for module in layer}
SOURCES = {
    path.relative_to(ROOT): ast.parse(path.read_text(encoding="utf-8"))
    for path in ROOT.rglob("*.py")
}
MODULES = [path for path in SOURCES if path != Path("__init__.py")]


def module_of(path):
    """The first part of the name below adv2_jax: a file or a folder."""
    return path.parts[0].removesuffix(".py")


def imports(path):
    """Dotted names of everything that a file imports, `from a import b` as a.b, wherever the import stands."""
    for node in ast.walk(SOURCES[path]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def used(path):
    """The modules of the package that a file imports."""
    names = [name.split(".") for name in imports(path) if name.split(".")[0] == "adv2_jax"]
    assert ["adv2_jax"] not in names, f"{path} imports the whole package"
    return {name[1] for name in names if name[1] in LEVEL}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_go_downwards(path):
    own = module_of(path)
    assert own in LEVEL, f"{path} has no place in the layers above"
    upward = {other for other in used(path) - {own} if LEVEL[other] >= LEVEL[own]}
    assert upward == set(), f"{own} must not import {upward}"


def test_every_folder_of_modules_is_installed():
    """Setuptools leaves out a folder without `__init__.py`, and an editable install does not show it."""
    folders = {path.parent for path in SOURCES}
    assert folders == {Path("."), *map(Path, PACKAGES)}
    assert {folder for folder in folders if folder / "__init__.py" not in SOURCES} == set()


def test_the_imports_of_a_file_are_seen():
    assert used(Path("descent.py")) >= {"losses", "interpreters", "threats", "types"}
    assert siblings(Path("interpreters/gradients.py")) == {"base"}


def siblings(path):
    """What a file of a package imports from its own package: modules, or names of its `__init__`."""
    names = [name.split(".") for name in imports(path)]
    return {(*name[2:], "__init__")[0] for name in names if name[:2] == ["adv2_jax", path.parts[0]]}


@pytest.mark.parametrize("path", [path for path in MODULES if len(path.parts) > 1], ids=str)
def test_imports_in_a_package_go_downwards(path):
    package, module = path.parts[0], path.stem
    order = [*PACKAGES[package].split(), "__init__"]
    assert module in order, f"{path} has no place in PACKAGES above"
    upward = siblings(path) - set(order[: order.index(module)])
    assert upward == set(), f"{path} must not import {upward}"


def test_the_top_imports_no_more_than_it_needs():
    """The front doors and what they stand on, and `select`; figures are imported when they are drawn."""
    names = {name for name in imports(Path("__init__.py")) if name.startswith("adv2_jax.")}
    above = {name for name in names if LEVEL[name.split(".")[1]] > LEVEL["attacks"]}
    assert above == {"adv2_jax.runs.select.select", "adv2_jax.report.figures"}
    at_once = "import sys, adv2_jax; sys.exit('adv2_jax.report' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", at_once], check=False).returncode == 0


def test_no_module_is_hidden_by_another_object_of_its_name():
    """`import adv2_jax.interpreters.mask as m` would give the function `mask`, were there such a module."""
    names = [
        ".".join(("adv2_jax", *path.with_suffix("").parts))
        for path in MODULES
        if path.stem not in ("__init__", "__main__")
    ]
    for name in names:  # all of them first: an import sets the attribute of its package
        importlib.import_module(name)
    holders = [(*name.rsplit(".", 1), name) for name in names]
    hidden = [
        name
        for package, module, name in holders
        if not isinstance(getattr(sys.modules[package], module), ModuleType)
    ]
    # calls of the one and the other are documented, and nobody imports these modules by their names
    assert hidden == []


def test_the_report_computes_nothing_with_jax():
    files = [path for path in MODULES if module_of(path) == "report"]
    names = {name.split(".")[0] for path in files for name in imports(path)}
    assert names.isdisjoint({"jax", "flax", "optax"})


def public(body):
    """Functions and classes that others may call, methods included."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            yield from public(node.body) if isinstance(node, ast.ClassDef) else ()


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_everything_public_has_a_docstring(path):
    assert ast.get_docstring(SOURCES[path]), path
    assert [node.name for node in public(SOURCES[path].body) if not ast.get_docstring(node)] == []


def test_importing_the_package_loads_nothing_heavy():
    heavy = [
        "tensorflow",
        "tensorflow_datasets",
        "torch",
        "orbax",
        "PIL",
        "matplotlib",
        "safetensors",
    ]
    program = f"import sys, adv2_jax; print(*(name for name in {heavy} if name in sys.modules))"
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True
    )
    assert finished.stdout.split() == []
