"""Ways to run the same weights for inference: eager, compiled, exported, ONNX Runtime.

A backend is built for one batch of example images and runs batches of their shape and layout. What
this machine lacks for it is an UnsupportedError; whatever else goes wrong is the library's own.
"""

import contextlib
import copy
import importlib
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cifar import compilation
from cifar.compilers import check_compiler, check_toolkit, find_compiler
from cifar.config import PRECISIONS
from cifar.errors import UnsupportedError

Run = Callable[[Tensor], Tensor]
"""Images `[B, C, H, W]` to fp32 logits `[B, K]`, both on the device."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """The network to run, in eval mode, and in which precision and where."""

    module: nn.Module
    precision: str
    device: torch.device
    compile_mode: str = "default"
    """Of torch.compile, for the backend that uses it."""


Factory = Callable[[Source, Tensor], Run]


class Autocast(nn.Module):
    """A network under autocast: images `[B, C, H, W]` to fp32 logits `[B, K]`."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.module = module
        self._dtype, self._device_type = dtype, device.type

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[B, K]`."""
        with torch.autocast(self._device_type, self._dtype):
            logits: Tensor = self.module(images)
        return logits.float()


def plain(source: Source) -> nn.Module:
    """The network with the same weights, but without Accelerate's wrapper of its `forward`.

    In a reduced precision it comes under `torch.autocast` instead, which every compiler can see
    through.
    """
    bare = copy.copy(source.module)
    for name in ("forward", "_original_forward"):
        bare.__dict__.pop(name, None)
    autocast = PRECISIONS[source.precision].autocast
    if autocast is None:
        return bare
    return Autocast(bare, getattr(torch, autocast), source.device).eval()


def eager(source: Source, images: Tensor) -> Run:  # noqa: ARG001 - any shape will do
    """The network as it is."""
    return plain(source)


def compiled(source: Source, images: Tensor) -> Run:  # noqa: ARG001 - the first call tells
    """`torch.compile` of the whole network for one shape; it compiles in the first call.

    Raises:
        UnsupportedError: no compiler.
    """
    check_compiler(source.device.type)
    run: Run = compilation.compiled(
        plain(source), source.compile_mode, dynamic=False, fullgraph=True
    )
    return run


def exported(source: Source, images: Tensor) -> Run:
    """`torch.export` and AOTInductor: a shared library that runs without Python.

    https://docs.pytorch.org/docs/stable/torch.compiler_aot_inductor.html

    Raises:
        UnsupportedError: no compiler, C++ on every device, or no CUDA toolkit for a GPU that suits
            torch.
    """
    find_compiler("CXX")
    if source.device.type == "cuda":
        check_compiler("cuda")
        from torch.utils.cpp_extension import CUDA_HOME  # imports setuptools

        check_toolkit(CUDA_HOME, torch.version.cuda)
    program = torch.export.export(plain(source), (images,))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(Path(folder) / "model.pt2")
        )
        index = -1 if source.device.index is None else source.device.index
        run: Run = torch._inductor.aoti_load_package(package, device_index=index)
        return run


def onnxruntime(source: Source, images: Tensor) -> Run:
    """`torch.onnx.export` and an ONNX Runtime session on the same device and threads.

    It takes NCHW alone, so images in another layout are reordered in every call.

    Raises:
        UnsupportedError: a package or the device's execution provider is missing, or the precision
            is a reduced one.
    """
    if PRECISIONS[source.precision].autocast is not None:
        raise UnsupportedError(
            f"precision: '{source.precision}': ONNX knows no autocast; use fp32 for onnxruntime"
        )
    for name in ("onnxruntime", "onnx", "onnxscript"):
        if importlib.util.find_spec(name) is None:
            raise UnsupportedError(
                f"inference-backends: onnxruntime: {name} is not installed; install it"
            )
    session = _onnx_session(plain(source), images.contiguous(), source)
    return _bound(session, source.device)


def _onnx_session(module: nn.Module, images: Tensor, source: Source) -> Any:
    """An `onnxruntime.InferenceSession` on the source's device."""
    ort: Any = importlib.import_module("onnxruntime")
    name, options = _provider(source)
    if name not in ort.get_available_providers():
        raise UnsupportedError(
            f"inference-backends: onnxruntime: was built without {name}; install one with it"
        )
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.onnx")
        names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
        torch.onnx.export(module, (images,), path, dynamo=True, verbose=False, **names)
        session = ort.InferenceSession(path, settings, providers=[(name, options)])
    if session.get_providers()[0] != name:  # it takes the CPU without a word
        raise UnsupportedError(
            f"inference-backends: onnxruntime: {name} cannot be loaded; install what it needs"
        )
    return session


def _provider(source: Source) -> tuple[str, dict[str, str]]:
    """ONNX Runtime's name for the device, and its options; TF32 is on unless it is told."""
    if source.device.type == "cpu":
        return "CPUExecutionProvider", {}
    tf32 = PRECISIONS[source.precision].tf32
    index = source.device.index or 0
    return "CUDAExecutionProvider", {"device_id": str(index), "use_tf32": str(int(tf32))}


def _bound(session: Any, device: torch.device) -> Run:
    """Calls of a session that read and write torch's memory in place, on any device."""
    classes = session.get_outputs()[0].shape[1]
    place = (device.type, device.index or 0)

    def run(images: Tensor) -> Tensor:
        images = images.contiguous()
        logits = torch.empty(len(images), classes, device=device)
        binding = session.io_binding()
        for bind, name, tensor in (
            (binding.bind_input, "images", images),
            (binding.bind_output, "logits", logits),
        ):
            bind(name, *place, "float32", tuple(tensor.shape), tensor.data_ptr())
        if device.type == "cuda":  # the session's stream does not wait for torch's
            torch.cuda.current_stream(device).synchronize()
        session.run_with_iobinding(binding)
        return logits

    return run


BACKENDS: dict[str, Factory] = {
    "eager": eager,
    "compiled": compiled,
    "exported": exported,
    "onnxruntime": onnxruntime,
}


@contextlib.contextmanager
def compiling_apart() -> Iterator[None]:
    """Compile for inference as if nothing else had been compiled in this process.

    Every shape is compiled, however many there are (by default torch goes on in eager mode, without
    an error, after 8), and torch's counts of graphs stay those of the training.
    """
    from torch._dynamo.utils import counters

    kept = copy.deepcopy(counters)
    try:
        with torch._dynamo.config.patch(recompile_limit=1_000, fail_on_recompile_limit_hit=True):
            yield
    finally:
        counters.clear()
        counters.update(kept)


@contextlib.contextmanager
def cold_caches() -> Iterator[None]:
    """Empty compiler caches on disk and in memory; what is compiled within stays usable."""
    from torch._inductor.utils import fresh_cache

    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with folder as path, fresh_cache(dir=path):
        yield
