"""Which compilers torch.compile would call, and what is said where they are missing."""

import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import pytest

from bench import environment
from cifar import compilers
from cifar.compilers import check_compiler, check_toolkit, compiler_versions, find_compiler
from cifar.errors import UnsupportedError

CXX = "clang++" if sys.platform == "darwin" else "g++"


@pytest.fixture(autouse=True)
def only_here(tmp_path: Path) -> Iterator[None]:
    """No other programs than those a test puts into its folder, and Python's header."""
    (tmp_path / "Python.h").touch()
    with (
        mock.patch.dict(os.environ, PATH=str(tmp_path)),
        mock.patch.object(compilers, "_header", return_value=tmp_path / "Python.h"),
    ):
        for variable in ("CC", "CXX"):
            os.environ.pop(variable, None)
        yield


def put(folder: Path, name: str, says: str = "", code: int = 0) -> None:
    program = folder / name
    program.write_text(f"#!/bin/sh\n[ $# = 1 ] && echo '{says}'\necho more\nexit {code}\n")
    program.chmod(0o755)


def test_the_compiler_is_the_one_that_torch_will_call(tmp_path: Path) -> None:
    """A clang++ that torch does not look for is as good as none."""
    put(tmp_path, "clang++" if CXX == "g++" else "g++")
    put(tmp_path, "elsewhere++")
    with pytest.raises(UnsupportedError, match=r"no C\+\+ compiler, '.*\+\+' was not found"):
        check_compiler("cpu")
    os.environ["CXX"] = "elsewhere++ -std=c++20"
    check_compiler("cpu")
    assert find_compiler("CXX") == ["elsewhere++", "-std=c++20"]


def test_a_gpu_needs_the_c_compiler_that_triton_will_call(tmp_path: Path) -> None:
    put(tmp_path, CXX)
    with pytest.raises(UnsupportedError, match=r"no C compiler, 'gcc' or 'clang' .* set CC"):
        check_compiler("cuda")
    put(tmp_path, "clang")
    check_compiler("cuda")
    assert find_compiler("CC") == ["clang"]
    os.environ["CC"] = "absent"
    with pytest.raises(UnsupportedError, match="'absent' was not found"):
        check_compiler("cuda")


def test_triton_takes_its_variable_for_one_program(tmp_path: Path) -> None:
    put(tmp_path, "ccache")
    put(tmp_path, "gcc")
    os.environ["CC"] = os.environ["CXX"] = "ccache gcc"
    assert find_compiler("CXX") == ["ccache", "gcc"]
    with pytest.raises(UnsupportedError, match="'ccache gcc' was not found"):
        find_compiler("CC")


@pytest.mark.parametrize("variable", ["CC", "CXX"])
def test_an_empty_variable_names_no_compiler(tmp_path: Path, variable: str) -> None:
    put(tmp_path, "gcc")
    put(tmp_path, CXX)
    os.environ[variable] = ""
    with pytest.raises(UnsupportedError, match=f"set {variable}"):
        find_compiler(variable)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_without_python_s_header_nothing_can_be_built(tmp_path: Path, device: str) -> None:
    put(tmp_path, "gcc")
    put(tmp_path, CXX)
    check_compiler(device)
    (tmp_path / "Python.h").unlink()
    with pytest.raises(UnsupportedError, match=r"Python\.h was not found; install"):
        check_compiler(device)


def test_what_is_installed_is_told_by_its_first_line(tmp_path: Path) -> None:
    put(tmp_path, CXX, says="a compiler 12.2")
    put(tmp_path, "gcc", says="never heard", code=1)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert compiler_versions() == {"CXX": "a compiler 12.2", "Python.h": python}
    (tmp_path / "Python.h").unlink()
    os.environ["CXX"], os.environ["CC"] = "absent", "gcc"
    assert compiler_versions() == {}


def test_an_environment_has_the_compilers_and_the_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = environment.collect()
    monkeypatch.setattr(environment, "_TOOLS", ("pytest", "no-such-package"))
    put(tmp_path, CXX, says="a compiler 12.2")
    after = environment.collect()
    assert after.tools["CXX"] == "a compiler 12.2"
    assert after.tools["pytest"] == version("pytest")
    assert "no-such-package" not in after.tools
    assert before.key()["software"] != after.key()["software"], "so what it lacked is tried again"


def toolkit(folder: Path, version: int) -> str:
    include = folder / "cuda" / "include"
    include.mkdir(parents=True)
    (include / "cuda.h").write_text(f"/* of CUDA */\n#define CUDA_VERSION {version}\n")
    (include / "cuda_runtime_api.h").touch()
    return str(folder / "cuda")


def test_a_toolkit_of_torch_s_major_version_will_do(tmp_path: Path) -> None:
    home = toolkit(tmp_path, 13000)
    check_toolkit(home, "13.2")
    check_toolkit(home, None)
    with pytest.raises(UnsupportedError, match=r"cuda is CUDA 13, and torch is .* CUDA 12; set"):
        check_toolkit(home, "12.9")


def test_a_toolkit_without_headers_is_none(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="exported: no CUDA toolkit; set CUDA_HOME"):
        check_toolkit(None, "13.2")
    home = toolkit(tmp_path, 13000)
    for name in ("cuda_runtime_api.h", "cuda.h"):
        Path(home, "include", name).unlink()
        with pytest.raises(UnsupportedError, match=rf"include has no {name}; install"):
            check_toolkit(home, "13.2")
