import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command, cwd):
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a clean clone: nothing that only stands in this working tree can be in it."""
    folder = tmp_path_factory.mktemp("clone")
    run("git", "clone", "--quiet", str(ROOT), "clone", cwd=folder)
    clone = folder / "clone"
    changed = run("git", "diff", "--name-only", "HEAD", cwd=ROOT).split()
    changed += run("git", "ls-files", "--others", "--exclude-standard", cwd=ROOT).split()
    for name in changed:  # the clone of what will be committed, also before it is
        source = ROOT / name
        if source.is_file() and not source.is_symlink():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            (clone / name).write_bytes(source.read_bytes())
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), cwd=clone)
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_the_mapped_packages(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for source, package in (("models", "gpipe/models"), ("partitioning", "gpipe/partitioning"), ("gpipe", "gpipe")):
        for file in (ROOT / source).glob("*.py"):
            assert f"{package}/{file.name}" in names
    assert "gpipe/training/cli.py" in names
    assert "gpipe/py.typed" in names
    native = ROOT / "gpipe" / "testing" / "accelerators" / "native"
    assert names >= {str(file.relative_to(ROOT)) for file in native.iterdir()}  # built where it is used
    assert not {name.split("/")[0] for name in names} & {"models", "partitioning", "tests", "benchmarks", "examples"}


def test_wheel_works_beside_a_users_own_models_folder(wheel, tmp_path):
    run(sys.executable, "-m", "zipfile", "-e", str(wheel), str(tmp_path / "site"), cwd=tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("mine = True\n")
    program = (
        f"import sys; sys.path[:0] = [{str(tmp_path / 'site')!r}, {str(tmp_path)!r}]\n"
        "import models, gpipe, gpipe.models.clip, gpipe.partitioning.balance\n"
        "assert models.mine\n"
        "print(gpipe.__file__, gpipe.models.clip.__file__)"
    )
    out = run(sys.executable, "-P", "-c", program, cwd=tmp_path).split()
    assert all(str(tmp_path / "site") in file for file in out)


def test_links_show_the_same_files_in_the_tree():
    assert (ROOT / "gpipe" / "models").is_symlink()
    assert (ROOT / "gpipe" / "partitioning").is_symlink()
    assert (ROOT / "gpipe" / "models").resolve() == ROOT / "models"


def test_console_script_and_version():
    script = Path(sys.executable).parent / "gpipe"
    assert run(str(script), "--version", cwd=ROOT).strip().endswith("0.1.0")
