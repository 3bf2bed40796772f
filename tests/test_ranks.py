"""What launchers say in the environment, and bad values as one line, not a traceback or a hang."""

import os
from pathlib import Path
from unittest import mock

import pytest
from training import TINY_OPTIONS, cifar, complaints, finish, start, train

from cifar.errors import ConfigError
from cifar.ranks import (
    check_rendezvous,
    is_first,
    local_world_size,
    note_on_tasks,
    rank,
    world_size,
)

MET = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1, 1)),
        ({"RANK": "1"}, (0, 1, 1)),
        ({"RANK": "abc", "WORLD_SIZE": "1"}, (0, 1, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, (3, 4, 2)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALNRANKS": "2"}, (1, 2, 2)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "3"}, (1, 3, 1)),
        ({"RANK": "0", "WORLD_SIZE": "2", "PMI_RANK": "1", "PMI_SIZE": "1"}, (0, 2, 1)),
    ],
)
def test_rank_and_numbers_of_processes(
    environment: dict[str, str], expected: tuple[int, int, int]
) -> None:
    found = rank(environment), world_size(environment), local_world_size(environment)
    assert found == expected
    assert is_first(environment) is (expected[0] == 0)


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        (
            {"WORLD_SIZE": "abc"},
            r"^WORLD_SIZE: 'abc': must be 1 to 65536; start by .* or unset it$",
        ),
        ({"WORLD_SIZE": "0"}, "^WORLD_SIZE: '0': must be 1 to 65536"),
        ({"WORLD_SIZE": ""}, "^WORLD_SIZE: '': must be 1 to 65536"),
        ({"WORLD_SIZE": "65537"}, "^WORLD_SIZE: '65537': must be 1 to 65536"),
        ({"WORLD_SIZE": "2"}, "^RANK: not set: .* 2 processes"),
        ({"WORLD_SIZE": "2", "RANK": "abc"}, "^RANK: 'abc': must be 0 to 1; start by"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "^RANK: '2': must be 0 to 1"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "^RANK: '-1': must be 0 to 1"),
        ({"PMI_SIZE": "2", "PMI_RANK": "2"}, "^PMI_RANK: '2': must be 0 to 1"),
    ],
)
def test_a_rank_that_cannot_be_is_refused(environment: dict[str, str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        rank(environment)


def test_a_number_of_local_processes_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^LOCAL_WORLD_SIZE: 'x': must be 1 or more"):
        local_world_size({"LOCAL_WORLD_SIZE": "x"})


TWO = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("environment", "cpu"),
    [
        ({}, False),
        ({"RANK": "0"}, False),
        ({"LOCAL_RANK": "-1"}, False),
        ({**TWO, **MET}, False),
        ({**TWO, "MASTER_ADDR": "node1"}, True),
        ({"PMI_SIZE": "2", "PMI_RANK": "1", "MASTER_ADDR": "node1"}, True),
    ],
)
def test_processes_that_can_meet_pass(environment: dict[str, str], cpu: bool) -> None:
    check_rendezvous(environment, cpu=cpu)


@pytest.mark.parametrize(
    ("environment", "cpu", "named"),
    [
        (TWO, True, "MASTER_ADDR: not set"),
        ({**TWO, "MASTER_ADDR": "node1"}, False, "MASTER_PORT: not set"),
        ({**TWO, **MET, "MASTER_PORT": "abc"}, True, "MASTER_PORT: 'abc': must be 1 to 65535"),
        ({**TWO, **MET, "RANK": "2"}, True, "RANK: '2': must be 0 to 1"),
        ({**TWO, **MET, "LOCAL_RANK": "x"}, True, "LOCAL_RANK: 'x'"),
        ({"LOCAL_RANK": "0"}, True, "MASTER_ADDR: not set"),
        ({"LOCAL_RANK": "0"}, False, "WORLD_SIZE: not set"),
        ({"LOCAL_RANK": "0", "RANK": "1", **MET}, True, "RANK: '1': must be 0 to 0"),
        ({"RANK": "1"}, True, "WORLD_SIZE: not set: a process has rank 1; give the number of all"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, True, "WORLD_SIZE: 1: a process has rank 1; give the"),
        ({"RANK": "abc"}, True, "RANK: 'abc': must be 0 or more"),
    ],
)
def test_processes_that_could_not_meet_are_refused(
    environment: dict[str, str], cpu: bool, named: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{named}"):
        check_rendezvous(environment, cpu=cpu)


def test_a_rank_of_nobody_knows_how_many_does_not_train_alone(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert train(npz, tmp_path / "run", "--epochs", "1") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cifar: WORLD_SIZE: not set: a process has rank 1; give the number")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({}, ""),
        ({"SLURM_STEP_NUM_TASKS": "1"}, ""),
        ({"SLURM_STEP_NUM_TASKS": "2", **TWO}, ""),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS: 2: each of srun's tasks trains by"),
    ],
)
def test_tasks_that_know_nothing_of_each_other_are_told(
    environment: dict[str, str], told: str
) -> None:
    found = note_on_tasks(environment)
    assert found.startswith(told) and bool(found) == bool(told)


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE: 'abc'"),
        ({"WORLD_SIZE": "2", "RANK": "abc"}, "RANK: 'abc'"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK: '2'"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR: not set"),
    ],
)
def test_bad_variables_are_one_line_and_leave_nothing(
    environment: dict[str, str], named: str, npz: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with mock.patch.dict(os.environ, environment):
        assert train(npz, tmp_path / "run") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"cifar: {named}")
    assert not (tmp_path / "run").exists()


def test_a_bad_number_of_local_processes_is_one_line_before_the_program_starts_anew() -> None:
    process = start("cifar", "train", *TINY_OPTIONS, environment={"LOCAL_WORLD_SIZE": "x"})
    code, _, err = finish(process)
    assert (code, err.splitlines()) == (2, complaints(err))
    assert "LOCAL_WORLD_SIZE: 'x'" in err


def test_an_evaluation_refuses_a_bad_number_of_processes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "abc")
    assert cifar("evaluate", "absent") == 2
    assert "WORLD_SIZE: 'abc'" in capsys.readouterr().err
