"""The public names, what importing them costs, and who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gpipe

ROOT = Path(__file__).parent.parent
RUNTIME = sorted((ROOT / "gpipe").glob("*.py"))
TRAINING = sorted((ROOT / "gpipe" / "training").glob("*.py"))
PARTITIONING = sorted((ROOT / "partitioning").glob("*.py"))
MODELS = sorted((ROOT / "models").glob("*.py"))
_PURE = (
    "schedule schedules actions costs figure grid legality notation order recompute rows simulate spans timeline trace"
)
PURE = [ROOT / "gpipe" / f"{name}.py" for name in _PURE.split()]


def imports(file):
    """What a file imports, by its full name: of other packages at its top level, of gpipe anywhere in it."""
    tree = ast.parse(file.read_text())
    return names(tree.body) | {name for name in names(ast.walk(tree)) if name.split(".")[0] == "gpipe"}


def names(nodes):
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "no file imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found - {"__future__.annotations"}


def outside(file, *allowed):
    """Imports of a file that are neither the standard library's nor allowed."""
    stdlib = sys.stdlib_module_names
    return sorted(
        name
        for name in imports(file)
        if name.split(".")[0] not in stdlib and not any(name == a or name.startswith(f"{a}.") for a in allowed)
    )


def test_all_names_can_be_imported():
    assert sorted(gpipe.__all__) == gpipe.__all__
    assert all(hasattr(gpipe, name) for name in gpipe.__all__)


@pytest.mark.parametrize("file", [f for f in RUNTIME if f.name != "__main__.py"], ids=lambda f: f.name)
def test_the_runtime_needs_torch_alone(file):
    assert outside(file, "torch", "numpy", "gpipe") == []
    foreign = [n for n in imports(file) if n.startswith(("gpipe.training", "gpipe.models"))]
    assert foreign == []


@pytest.mark.parametrize("file", PURE, ids=lambda f: f.name)
def test_schedules_know_no_torch(file):
    assert (
        outside(file, "numpy", "matplotlib", "gpipe.partitioning.cost", *(f"gpipe.{name}" for name in _PURE.split()))
        == []
    )


@pytest.mark.parametrize("file", PARTITIONING, ids=lambda f: f.name)
def test_partitioning_knows_nothing_of_the_runtime(file):
    assert outside(file, "torch", "numpy", "gpipe.partitioning") == []


@pytest.mark.parametrize("file", MODELS, ids=lambda f: f.name)
def test_models_know_nothing_of_the_pipeline(file):
    assert outside(file, "torch", "torchvision", "gpipe.models", "gpipe.skip") == []


@pytest.mark.parametrize("file", TRAINING, ids=lambda f: f.name)
def test_training_reaches_models_by_dotted_path_only(file):
    models = [n for n in imports(file) if n.startswith("gpipe.models") and "tokenizer" not in n]
    assert models == []


def test_import_gpipe_needs_torch_and_numpy_alone():
    program = (
        "import sys, torch, numpy; before = set(sys.modules); import gpipe; print(*sorted(set(sys.modules) - before))"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    roots = {name.split(".")[0] for name in out.split()} - sys.stdlib_module_names
    assert roots <= {"gpipe", "torch", "numpy"}
    assert "gpipe.training" not in out


def test_testing_comes_with_the_package():
    run = subprocess.run([sys.executable, "-c", "import gpipe; gpipe.testing.assert_exact"], capture_output=True)
    assert run.returncode == 0, run.stderr
