"""Which process of how many this is, as its launcher says in the environment. No torch in here.

The names and their order are Accelerate's (`accelerate.utils.environment`): torchrun's first, then
those of MPI launchers. Without a number of processes this one is alone, and the first.
"""

from collections.abc import Mapping

from cifar.errors import ConfigError

_RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_WORLD_SIZE = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_LOCAL_WORLD_SIZE = (
    *("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS"),
    *("OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
)
_REMEDY = "start by accelerate launch or torchrun, or unset it"
_LARGEST = 2**31 - 1
_MOST_PROCESSES = 2**16
"""Of a job: rank 0 greets each of them."""


def world_size(environ: Mapping[str, str]) -> int:
    """Processes of the job; 1 without a launcher.

    Raises:
        ConfigError: not a number of processes.
    """
    return _first_number(_WORLD_SIZE, environ, 1, _MOST_PROCESSES, 1)


def local_world_size(environ: Mapping[str, str]) -> int:
    """Processes of the job on this machine; 1 without a launcher; raises as `world_size` does."""
    return _first_number(_LOCAL_WORLD_SIZE, environ, 1, _LARGEST, 1)


def local_rank(environ: Mapping[str, str]) -> int:
    """The number of this process among those on this machine; -1 without a launcher.

    Raises:
        ConfigError: not such a number, or not below `LOCAL_WORLD_SIZE`.
    """
    if "LOCAL_RANK" not in environ:
        return -1
    is_counted = any(name in environ for name in _LOCAL_WORLD_SIZE)
    most = local_world_size(environ) - 1 if is_counted else _LARGEST
    return _number("LOCAL_RANK", environ, -1, most)


def rank(environ: Mapping[str, str]) -> int:
    """The number of this process among all, from 0.

    Raises:
        ConfigError: there are several processes and no rank below their number, or no number.
    """
    size = world_size(environ)
    if size == 1:
        return 0
    if not any(name in environ for name in _RANK):
        raise ConfigError(
            f"RANK: not set: must be given where {size} processes run together; start by "
            "accelerate launch or torchrun, or unset WORLD_SIZE"
        )
    return _first_number(_RANK, environ, 0, size - 1, 0)


def is_first(environ: Mapping[str, str]) -> bool:
    """Whether this is the process that writes and prints; raises as `rank` does."""
    return rank(environ) == 0


def note_on_tasks(environ: Mapping[str, str]) -> str:
    """What to say where srun has started programs that know nothing of each other, "" elsewhere."""
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks == "1" or world_size(environ) > 1:
        return ""
    return (
        f"SLURM_STEP_NUM_TASKS: {tasks}: each of srun's tasks trains by itself; for one training "
        "by all start one torchrun on a node, as launch/slurm.sbatch does"
    )


def check_rendezvous(environ: Mapping[str, str], *, cpu: bool) -> None:
    """Raise a ConfigError where the processes of a job could not find each other.

    Torch would end in a traceback or wait for a process that never comes. Accelerate forms a group
    of even one process that has a `LOCAL_RANK`; for CPUs it fills in what else than the address is
    missing.
    """
    size = world_size(environ)
    if local_rank(environ) < 0 and size == 1:
        _check_alone(environ)
        return
    on_gpus = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    for name in ("MASTER_ADDR",) if cpu else on_gpus:
        if not environ.get(name):
            raise ConfigError(
                f"{name}: not set: needed for processes to find each other; start by accelerate "
                "launch or torchrun, or unset WORLD_SIZE and LOCAL_RANK"
            )
    _first_number(_RANK, environ, 0, size - 1, 0)
    if environ.get("MASTER_PORT"):
        remedy = "give a free one, or start by torchrun --standalone"
        _number("MASTER_PORT", environ, 1, 65_535, remedy)


def _check_alone(environ: Mapping[str, str]) -> None:
    """Raise a ConfigError where a rank was given, and not of how many it is one."""
    if number := _first_number(_RANK, environ, 0, _LARGEST, 0):
        raise ConfigError(
            f"WORLD_SIZE: {environ.get('WORLD_SIZE', 'not set')}: a process has rank {number}; "
            "give the number of all processes, start by accelerate launch or torchrun, or unset "
            "its rank"
        )


def _first_number(
    names: tuple[str, ...], environ: Mapping[str, str], least: int, most: int, default: int
) -> int:
    """The first of these variables that is set."""
    name = next((each for each in names if each in environ), None)
    return default if name is None else _number(name, environ, least, most)


def _number(
    name: str, environ: Mapping[str, str], least: int, most: int, remedy: str = _REMEDY
) -> int:
    try:
        value = int(environ[name])
    except ValueError:
        value = least - 1
    if not least <= value <= most:
        upper = "or more" if most == _LARGEST else f"to {most}"
        shown = max(least, 0)  # -1 stands for no launcher
        raise ConfigError(f"{name}: {environ[name]!r}: must be {shown} {upper}; {remedy}")
    return value
