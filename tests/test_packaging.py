"""An ordinary installation holds every package, the launch yamls and both programs."""

import os
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

from bench.launchers import config_for
from cifar.strategy import STRATEGIES

ROOT = Path(__file__).parent.parent
PACKAGES = ("bench", "cifar", "launch")
PIP = [sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check", "--quiet"]


def run(argv: list[str], cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        argv,
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy of the sources, without network."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in (*PACKAGES, "tests", "results"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", "dist"]
    run([*PIP, "wheel", *options, "."], source)
    (path,) = (source / "dist").glob("*.whl")
    return path


def test_a_wheel_holds_the_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix == ".py" or (package == "launch" and path.suffix in (".sbatch", ".yaml"))
    }
    assert files == expected
    assert {"launch/ddp.yaml", "launch/slurm.sbatch"} <= files
    assert "cifar/models/__init__.py" in files


def test_a_wheel_names_both_programs_and_the_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        parser = ConfigParser()
        parser.read_string(archive.read(entry_points).decode())
        licences = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    assert dict(parser["console_scripts"]) == {
        "bench": "bench.__main__:main",
        "cifar": "cifar.__main__:main",
    }
    assert licences


def test_an_installed_suite_finds_its_launch_configurations(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run([*PIP, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)], elsewhere)
    for name in STRATEGIES:
        for processes in (1, 2):
            config = config_for(name, processes)
            argv = ["run", "--models", "resnet20", "--launcher", name, "--dry-run"]
            plan = run(
                [sys.executable, "-m", "bench", *argv, "--num-processes", str(processes)],
                elsewhere,
                PYTHONPATH=str(site),
            )
            assert str(site / "launch" / config) in plan
            assert (site / "launch" / config).is_file()
