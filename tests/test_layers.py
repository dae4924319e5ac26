"""Imports point one way: jobs -> pipeline -> objdyn; inside objdyn, models -> layers and pure functions."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("objdyn", "pipeline", "jobs", "tests")
LEAVES = ("layers", "distributions", "losses", "kalman")
# A family may import the family that it contains whole, and its own further files.
CONTAINS = {
    "ddlp": {"dlp", "pint"},
    "pint": {"dlp"},
    "what_if": {"dlp"},
    "provide": {"iodine"},
    "oddn": {"iodine"},
}
FORBIDDEN_IN_OBJDYN = {"ray", "pyarrow", "fsspec", "s3fs", "optuna", "tyro"}
# Modules that work on a machine without these packages.
LIGHT = {
    ("pipeline.loop", "pipeline.reader", "pipeline.presets", "pipeline.checkpoint"): (
        {"ray", "pyarrow", "tyro", "fsspec", "s3fs", "webdataset", "zstandard", "tensorboard", "scipy", "PIL", "h5py"}
    ),
    ("pipeline.tables",): {"ray", "tyro", "torch"},
    ("pipeline.store", "pipeline.cli"): {"ray", "pyarrow", "tyro", "fsspec", "s3fs", "torch"},
}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every absolute module name that a file imports anywhere, ``from a import b`` as both ``a`` and ``a.b``."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import; write it absolute"
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def modules_after_importing(*names: str) -> set[str]:
    """Top-level packages that a fresh process has loaded after importing ``names``."""
    program = (
        "import importlib, json, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "print(json.dumps(sorted({m.partition('.')[0] for m, module in sys.modules.items() if module})))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_importing_all_of_objdyn_loads_no_ray_storage_or_cli():
    loaded = modules_after_importing(*(module_name(path) for path in sources("objdyn")))
    assert "torch" in loaded
    assert not loaded & (FORBIDDEN_IN_OBJDYN | {"pipeline"})


def test_objdyn_never_names_ray_storage_or_cli():
    for path in sources("objdyn"):
        tops = {name.partition(".")[0] for name in imports(path)}
        assert not tops & (FORBIDDEN_IN_OBJDYN | {"pipeline", "jobs"}), path


@pytest.mark.parametrize("names", LIGHT, ids=lambda names: names[0])
def test_light_modules_load_without_heavy_packages(names):
    assert not modules_after_importing(*names) & LIGHT[names]


def test_pipeline_never_imports_jobs():
    for path in sources("pipeline"):
        assert not {name for name in imports(path) if name.partition(".")[0] == "jobs"}, path


def test_models_import_only_leaves_and_the_family_they_contain():
    for path in sources("objdyn/models"):
        family = path.relative_to(ROOT / "objdyn/models").parts[0].removesuffix(".py")
        allowed = {"interface", *LEAVES}
        for name in imports(path):
            parts = name.split(".")
            if parts[0] != "objdyn" or len(parts) == 1:
                continue
            if parts[1] == "models":
                assert len(parts) == 2 or parts[2] in {family, *CONTAINS.get(family, ())}, f"{path} imports {name}"
            else:
                assert parts[1] in allowed, f"{path} imports {name}"


def test_leaves_import_nothing_of_objdyn_but_themselves():
    for leaf in LEAVES:
        files = sources(f"objdyn/{leaf}") + [f for f in [ROOT / f"objdyn/{leaf}.py"] if f.exists()]
        for path in files:
            ours = {name for name in imports(path) if name.startswith("objdyn.")}
            assert all(name.split(".")[1] == leaf for name in ours), f"{path} imports {ours}"


def test_no_room_without_a_subject():
    names = {"utils", "helpers", "common", "base", "misc"}
    rooms = [path for package in PACKAGES for path in sources(package) if names & {path.stem, path.parent.name}]
    assert not rooms


@pytest.mark.parametrize("path", sources("jobs"), ids=lambda path: path.name)
def test_job_is_short_and_executable(path):
    lines = path.read_text().splitlines()
    assert len(lines) < 40
    assert lines[0] == "#!/usr/bin/env python"
    assert path.stat().st_mode & 0o111 == 0o111
