"""What torch.compile needs to build the code it generates, and which of it is here. No torch."""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Literal

from cifar.errors import UnsupportedError

Variable = Literal["CXX", "CC"]

_LANGUAGES: dict[Variable, tuple[str, tuple[str, ...]]] = {
    "CXX": ("C++", ("clang++" if sys.platform == "darwin" else "g++",)),
    "CC": ("C", ("gcc", "clang")),
}
"""Of each variable, what its compiler compiles and which are looked for where it is not set."""


def check_compiler(device_type: str) -> None:
    """Raise an UnsupportedError if torch.compile could not build its code for a kind of device.

    That is C++ for a CPU, and for a GPU C, with which Triton builds its launcher; both are modules
    of Python and include its header (torch._inductor.codecache, triton.runtime.build).
    """
    find_compiler("CC" if device_type == "cuda" else "CXX")
    if not _header().exists():
        raise UnsupportedError(
            "compile: True: Python.h was not found; install the headers of Python (python3-dev)"
        )


def find_compiler(variable: Variable) -> list[str]:
    """The words of the command that is called: `$CXX` by Inductor, `$CC` by Triton.

    Inductor splits its variable into words (torch._inductor.config.cpp.cxx), Triton takes its own
    for the name of one program (triton.runtime.build).

    Raises:
        UnsupportedError: there is no such program.
    """
    language, defaults = _LANGUAGES[variable]
    command = os.environ.get(variable)
    commands = [[name] for name in defaults]
    if command is not None:
        commands = [shlex.split(command) if variable == "CXX" else [command]]
    for words in commands:
        if words and shutil.which(words[0]):
            return words
    names = " or ".join(repr(" ".join(words[:1])) for words in commands)
    raise UnsupportedError(
        f"compile: True: no {language} compiler, {names} was not found; install it or set "
        f"{variable}"
    )


def check_toolkit(home: str | None, version: str | None) -> None:
    """Raise an UnsupportedError if C++ could not be built against CUDA as torch is.

    `home` is the toolkit's folder, `version` that of CUDA of which torch is built, as in `13.0`
    (None: not known). Headers of another major version may be read, and give wrong code.
    """
    if home is None:
        raise UnsupportedError("inference-backends: exported: no CUDA toolkit; set CUDA_HOME")
    include = Path(home, "include")
    for name in ("cuda.h", "cuda_runtime_api.h"):
        if not (include / name).is_file():
            raise UnsupportedError(
                f"inference-backends: exported: {include} has no {name}; install the headers of "
                "CUDA or set CUDA_HOME"
            )
    text = (include / "cuda.h").read_text(encoding="utf-8", errors="replace")
    told = re.search(r"^\s*#define\s+CUDA_VERSION\s+(\d+)", text, re.MULTILINE)
    found, wanted = told and int(told[1]) // 1000, version and int(version.partition(".")[0])
    if found and wanted and found != wanted:
        raise UnsupportedError(
            f"inference-backends: exported: {home} is CUDA {found}, and torch is built with CUDA "
            f"{wanted}; set CUDA_HOME to a toolkit of that"
        )


def compiler_versions() -> dict[str, str]:
    """What of it is here: the first line that each compiler says of itself, and Python's header.

    What is missing or does not answer is left out.
    """
    found: dict[str, str] = {}
    for variable in _LANGUAGES:
        with contextlib.suppress(UnsupportedError, OSError, subprocess.SubprocessError):
            command = [*find_compiler(variable), "--version"]
            found[variable] = _first_line(command)
    if _header().exists():
        found["Python.h"] = sysconfig.get_python_version()
    return found


def _first_line(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    return done.stdout.partition("\n")[0].strip()


def _header() -> Path:
    """Where both look for it; Debian's own scheme is not where its packages put it."""
    return Path(sysconfig.get_path("include", "posix_prefix")) / "Python.h"
