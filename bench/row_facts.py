"""What a row says of its cell: what was run, on what, with which software and images."""

from dataclasses import asdict

from bench.published import PUBLISHED
from bench.record import DataFacts, Environment, Record
from bench.spec import Cell
from cifar.recipes import get_config

Row = dict[str, str | int | float | None]
"""Column name to raw value; None: not measured."""


def what(record: Record, cell_key: str) -> Row:
    """The part of a row that says what was run, on what; `cell_key` is the cell's of all seeds."""
    cell, train, environment, data = (
        record.cell,
        record.cell.train,
        record.environment,
        record.data,
    )
    return {
        "hardware": environment.hardware if environment else "unknown",
        "precision": cell.precision,
        "model": train.model.label,
        "layout": cell.layout,
        "compile": cell.compiled,
        "batch_size": train.recipe.global_batch_size,
        "num_processes": cell.num_processes,
        "launcher": cell.launcher,
        **_exchange(cell),
        "accumulation_steps": train.accumulation_steps,
        "data": train.data.source,
        "recipe": train.recipe.name,
        "train_samples": record.protocol.train_samples,
        **_published(record),
        "torch": environment.torch if environment else None,
        "code": environment.code_digest[:8] if environment else None,
        "cell": cell_key,
        "protocol": record.protocol.digest,
        "machine": _machine(environment) if environment else None,
        "worker": _worker(environment) if environment else None,
        "software": _software(environment) if environment else None,
        "packages": _packages(environment) if environment else None,
        "source": _source(environment) if environment else None,
        "data_set": data_set_text(data) if data else None,
    }


def _exchange(cell: Cell) -> Row:
    """What several processes exchange and when, where it is not DDP's own way."""
    label = cell.train.parallel.label
    return {"exchange": label} if label else {}


def _published(record: Record) -> Row:
    """The figures of the project that a recipe is made after, where there is one.

    They are of the recipe's own network on CIFAR-10's test images.
    """
    train, name = record.cell.train, record.cell.train.recipe.name
    figures = PUBLISHED.get(name)
    if figures is None or record.protocol.validation_alone or train.data.source != "cifar10":
        return {}
    if train.model.label != get_config(name).model.label:
        return {}
    return {f"published_{name}": each for name, each in asdict(figures).items()}


def _machine(environment: Environment) -> str:
    gpus = (
        [f"{environment.gpu_count} x {environment.gpu_names[0]}, driver {environment.driver}"]
        if environment.gpu_names
        else []
    )
    if watts := sorted({limit for limit in environment.gpu_power_limits if limit}):
        gpus.append(f"at most {' or '.join(map(str, watts))} W")
    if clocks := sorted({each for each in environment.gpu_application_clocks if each}):
        told = " or ".join(f"{graphics} and {memory}" for graphics, memory in clocks)
        gpus.append(f"application clocks {told} MHz")
    cpu = f"{environment.cpu_model}, {environment.cpu_count} cores"
    return ", ".join([*gpus, cpu, f"{environment.memory_bytes / 2**30:.0f} GiB of memory"])


def _worker(environment: Environment) -> str:
    threads = f"{environment.threads} thread" + ("s" if environment.threads > 1 else "")
    variables = sorted(environment.settings.items())
    text = " ".join([threads, *(f"{name}={value}" for name, value in variables)])
    beside = environment.side_by_side
    return f"{text}, {beside} devices side by side" if beside > 1 else text


def _software(environment: Environment) -> str:
    versions = (
        ("", environment.os),
        ("Python", environment.python),
        ("torch", environment.torch),
        ("accelerate", environment.accelerate),
        ("CUDA", environment.cuda),
        ("cuDNN", environment.cudnn),
    )
    return ", ".join(f"{name} {version}".strip() for name, version in versions if version)


def _packages(environment: Environment) -> str:
    """All of the software that has to be equal for records to share a row, name by name."""
    known = (
        ("torchvision", environment.torchvision),
        ("numpy", environment.numpy),
        ("driver", environment.driver),
        *sorted(environment.tools.items()),
    )
    further = [f"{name} {version}" for name, version in known if version]
    return ", ".join([_software(environment), *further])


def _source(environment: Environment) -> str:
    state = " with uncommitted changes" if environment.git_dirty else ""
    commit = (
        f"git {environment.git_sha[:12]}{state}"
        if environment.git_sha
        else (f"no git commit ({environment.git_reason})")
    )
    return f"{commit}, sources {environment.code_digest[:8]}"


def data_set_text(data: DataFacts) -> str:
    """What the column `data_set` says of images."""
    return (
        f"{data.name}, {data.train_samples:,} training and {data.test_samples:,} test images of "
        f"{data.classes} classes, fingerprint {data.fingerprint}"
    )
