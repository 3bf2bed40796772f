"""Records: strictness, schema versions, and files that survive a crash."""

import errno
import json
import multiprocessing
import os
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest

from bench import record_file as record_module
from bench.protocol import Protocol
from bench.record import SCHEMA_VERSION, DataFacts, Environment, Measurement, Record
from bench.record_file import TornLineWarning, append_record, migrate, parse_record, read_records
from bench.spec import Task, grid
from cifar.errors import ConfigError, UserError
from cifar.files import write_atomic
from cifar.serialize import to_dict, to_json

ENVIRONMENT = Environment(
    cpu_model="AMD EPYC(TM) 7B13 64-Core Processor @ 2.45GHz",
    cpu_count=2,
    memory_bytes=2**33,
    os="Linux 6.8",
    python="3.11.7",
    torch="2.15.0",
    accelerate="1.15.0",
    numpy="2.0",
    code_digest="0123456789abcdef",
    worker_env={"OMP_NUM_THREADS": "2"},
    threads=2,
    started="2026-01-01T00:00:00+00:00",
)


def latency(*ranks, **labels):
    return Measurement(
        name="inference_latency", unit="s/sample", better="lower", labels=labels, samples=ranks
    )


def rate(*ranks, **labels):
    return Measurement(
        name="train_throughput", unit="samples/s", better="higher", labels=labels, samples=ranks
    )


def make_record(**changes):
    record = Record(
        run_id="run",
        suite="quick",
        cell=grid(["resnet20"], ["fp32"])[0],
        protocol=Protocol(),
        status="ok",
        started="2026-01-01T00:00:00+00:00",
        duration_s=12.5,
        returncode=0,
        environment=ENVIRONMENT,
        data=DataFacts(
            name="shapes",
            fingerprint="f",
            train_samples=10,
            test_samples=2,
            classes=10,
            image_shape=(3, 32, 32),
        ),
        effective={"device": "cpu", "processes": 1, "wrapped": False, "scale": 1.0},
        measurements=(
            rate((0.5, 0.5), samples_per_step=128),
            latency((0.1, 0.3, 0.2), batch_size=1),
            latency((0.01,), batch_size=256),
        ),
    )
    return replace(record, **changes)


def edited(**changes):
    return json.dumps({**to_dict(make_record()), **changes})


def test_a_record_survives_json_unchanged():
    record = make_record()
    assert parse_record(to_json(record)) == record


def test_label_types_survive_json():
    effective = parse_record(to_json(make_record())).effective
    assert {name: type(value) for name, value in effective.items()} == {
        "device": str,
        "processes": int,
        "wrapped": bool,
        "scale": float,
    }


def test_the_key_is_the_tasks():
    record = make_record(repeat=2)
    assert record.key == Task(cell=record.cell, protocol=record.protocol, repeat=2).key


def test_values_are_derived_from_the_samples():
    record = make_record()
    assert record.value("train_throughput") == 256.0
    assert record.value("inference_latency", batch_size=1) == 0.2
    assert record.value("inference_latency", batch_size=256) == 0.01
    assert record.value("inference_latency", batch_size=7) is None
    assert record.value("top1") is None


def test_the_value_of_several_ranks():
    # The first rank takes 1 + 3 = 4 s, the other one 3 s: 2 x 60 samples in 4 s.
    assert rate((1.0, 3.0), (2.0, 1.0), samples_per_step=60).value == 30.0
    assert latency((1.0, 1.0), (4.0, 2.0)).value == 3.0


def test_a_record_is_finished_when_trying_again_would_change_nothing():
    absent = Measurement(name="a", unit="1", better="none", status="absent", reason="why")
    assert make_record(measurements=(absent,)).finished
    assert make_record(status="unsupported", reason="why", measurements=()).finished
    for status in ("failed", "oom", "timeout"):
        assert not make_record(status=status, reason="why").finished
    measurements = (*make_record().measurements, replace(absent, status="failed"))
    assert not make_record(measurements=measurements).finished


def test_what_is_absent_has_no_value_but_a_reason():
    absent = Measurement(
        name="top1", unit="fraction", better="higher", status="absent", reason="not trained"
    )
    assert absent.value is None
    with pytest.raises(ConfigError, match=r"^top1 reason: '': say why it is absent$"):
        replace(absent, reason="")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e308, -1e101])
def test_a_sample_out_of_all_measure_is_refused_when_made(value):
    message = r"^inference_latency samples: .*: must be finite, up to 1e\+100$"
    with pytest.raises(ValueError, match=message):
        latency((0.1, value))


@pytest.mark.parametrize("name", ["", "Top1", "a b", "[red]", "1st"])
def test_a_measurement_has_a_name_that_a_column_can_have(name):
    with pytest.raises(ConfigError, match=r"measurement: .*: name it in small letters, "):
        replace(latency((0.1,)), name=name)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"duration_s": 1e308}, "duration_s"),
        ({"duration_s": -1.0}, "duration_s"),
        ({"environment": {**to_dict(ENVIRONMENT), "memory_bytes": 10**400}}, "memory"),
    ],
)
def test_numbers_that_nothing_can_have_are_refused_when_read(change, field):
    with pytest.raises(UserError, match=rf"{field}: .*: give "):
        parse_record(edited(**change))


def test_a_record_without_a_version_is_refused():
    fields = to_dict(make_record())
    del fields["schema_version"]
    with pytest.raises(UserError, match="schema_version: None: must be an integer; measure anew"):
        parse_record(json.dumps(fields))


@pytest.mark.parametrize("samples", [(), ((),), ((1.0,), ())])
def test_a_rank_without_samples_is_refused(samples):
    with pytest.raises(ConfigError, match="needs one or more from every rank"):
        latency(*samples)


def test_a_rate_needs_samples_per_step_and_equal_steps():
    with pytest.raises(ConfigError, match="a rate needs samples_per_step"):
        rate((1.0,))
    for none in ("x", 0, -1, 10**400):
        with pytest.raises(ConfigError, match="a rate needs samples_per_step"):
            rate((1.0,), samples_per_step=none)
    with pytest.raises(ConfigError, match="needs as many from every rank"):
        rate((1.0, 1.0), (1.0,), samples_per_step=1)


@pytest.mark.parametrize("nothing", [0.0, -1.0, 1e-320])
def test_seconds_that_are_none_are_refused(nothing):
    for name, make in (("inference_latency", latency), ("train_throughput", rate)):
        message = rf"^{name} samples: .*: needs seconds above 0"
        with pytest.raises(ConfigError, match=message):
            make((0.1, nothing), samples_per_step=1)


def test_a_mark_of_the_encoding_is_no_part_of_a_record(tmp_path):
    path = tmp_path / "marked.jsonl"
    path.write_text(to_json(make_record()) + "\n", encoding="utf-8-sig")
    assert read_records(path) == [make_record()]


def test_nan_is_refused_when_written_and_when_read():
    with pytest.raises(ValueError, match="Out of range float"):
        to_json(make_record(effective={"scale": float("nan")}))
    text = to_json(make_record()).replace("12.5", "NaN")
    with pytest.raises(UserError, match=r"^file:3: NaN: is not a number .*; remove"):
        parse_record(text, source="file:3")


def test_status_needs_a_reason():
    with pytest.raises(ConfigError, match=r"^reason: '': say why the record is oom$"):
        make_record(status="oom")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (edited(colour="red"), "file:1: colour: 'red': no such field: remove it, or use the"),
        (edited(status="fine"), "file:1: status: 'fine': Input should be 'ok', 'failed'"),
        (edited(status="oom"), "file:1: reason: '': say why the record is oom"),
        (edited(repeat="0"), "file:1: repeat: '0': Input should be a valid integer; correct it"),
        (edited(schema_version=None), "file:1: schema_version: None: must be an integer"),
        (edited(schema_version=True), "file:1: schema_version: True: must be an integer"),
        (edited(schema_version=SCHEMA_VERSION + 1),
         f"file:1: schema_version: {SCHEMA_VERSION + 1}: this program reads up to"),
        (edited(schema_version=-1), "file:1: schema_version: -1: too old to read"),
        ("[1]", "file:1: '[1]': must be a JSON object"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named_with_file_line_and_key(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "file"
    path.write_text(text + "\n" + to_json(make_record()) + "\n")
    with pytest.raises(UserError) as caught:
        read_records(path.relative_to(tmp_path))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_nested_unknown_keys_are_named():
    fields = to_dict(make_record())
    fields["cell"]["train"]["recipe"]["speed"] = 1
    with pytest.raises(UserError, match=r"^record: cell\.train\.recipe\.speed: 1: no such field"):
        parse_record(json.dumps(fields))


def test_older_records_are_migrated_step_by_step(monkeypatch):
    def rename_state(fields):
        return {"status" if key == "state" else key: value for key, value in fields.items()}

    def seconds(fields):
        return {**fields, "duration_s": fields["duration_s"] / 1000}

    monkeypatch.setitem(record_module.MIGRATIONS, SCHEMA_VERSION - 2, rename_state)
    monkeypatch.setitem(record_module.MIGRATIONS, SCHEMA_VERSION - 1, seconds)
    old = to_dict(make_record(duration_s=12_500.0))
    old["state"] = old.pop("status")
    old["schema_version"] = SCHEMA_VERSION - 2
    assert parse_record(json.dumps(old)) == make_record(duration_s=12.5)
    current = to_dict(make_record())
    assert migrate(current) is current


def test_append_then_read(tmp_path):
    path = tmp_path / "records.jsonl"
    records = [make_record(repeat=repeat) for repeat in range(3)]
    for record in records:
        append_record(path, record)
    assert read_records(path) == records


@pytest.mark.parametrize("kept", [1, 200, -2, -1])
def test_a_torn_last_line_is_left_out_with_a_warning(tmp_path, kept):
    path = tmp_path / "records.jsonl"
    append_record(path, make_record())
    with path.open("a") as file:
        file.write(to_json(make_record(repeat=1))[:kept])
    with pytest.warns(TornLineWarning, match=r"records\.jsonl:2: the last line is incomplete"):
        assert read_records(path) == [make_record()]


def test_a_record_that_finds_no_room_leaves_nothing(tmp_path, monkeypatch):
    """The disk fills up in the middle of it."""
    path, write = tmp_path / "r.jsonl", os.write
    append_record(path, make_record())
    before, room = path.read_bytes(), [100]

    def full(descriptor, text):
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, text[: room.pop()])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        append_record(path, make_record(repeat=1))
    assert path.read_bytes() == before


def test_a_record_that_is_written_in_parts_is_whole(tmp_path, monkeypatch):
    path, write = tmp_path / "r.jsonl", os.write
    monkeypatch.setattr(os, "write", lambda descriptor, text: write(descriptor, text[:100]))
    append_record(path, make_record())
    assert read_records(path) == [make_record()]


def test_appending_removes_a_torn_line(tmp_path):
    path = tmp_path / "records.jsonl"
    append_record(path, make_record())
    for garbage in ('{"schema_version": 1, "run', "\0\0\0\n", "{\n"):
        with path.open("a") as file:
            file.write(garbage)
        append_record(path, make_record(repeat=1))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert read_records(path)[-1].repeat == 1
    assert len(read_records(path)) == 4


def test_appending_keeps_a_whole_line_that_only_lacks_its_newline(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text(to_json(make_record()))
    assert read_records(path) == [make_record()]
    append_record(path, make_record(repeat=1))
    assert [record.repeat for record in read_records(path)] == [0, 1]


def test_a_torn_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"half\n' + to_json(make_record()) + "\n")
    with pytest.raises(UserError, match=r"records\.jsonl:1: .*: remove or repair this line$"):
        read_records(path)


@pytest.mark.parametrize("line", ['{"a": ' + "1" * 5000 + "}", "[" * 100_000 + "]" * 100_000])
def test_a_line_out_of_all_measure_is_an_error_and_stays(tmp_path, line):
    path = tmp_path / "records.jsonl"
    path.write_text(line)
    append_record(path, make_record())
    assert path.read_text() == f"{line}\n{to_json(make_record())}\n"
    with pytest.raises(UserError, match=r"records\.jsonl:1: .*: is no record; remove this line$"):
        read_records(path)


def test_a_missing_file_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match=r"^records: .*none\.jsonl: No such file or directory"):
        read_records(tmp_path / "none.jsonl")


def test_an_empty_file_has_no_records(tmp_path):
    path = tmp_path / "records.jsonl"
    path.touch()
    assert read_records(path) == []


def _append_many(path, run):
    for repeat in range(20):
        append_record(path, make_record(run_id=run, repeat=repeat))


@pytest.mark.multiprocess
def test_several_writers_lose_nothing(tmp_path):
    path = tmp_path / "records.jsonl"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_append_many, args=(path, str(run))) for run in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    found = {(record.run_id, record.repeat) for record in read_records(path)}
    assert found == {(str(run), repeat) for run in range(3) for repeat in range(20)}


def test_atomic_write_replaces_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "record.json"
    write_atomic(path, "1")
    write_atomic(path, "2")
    assert path.read_text() == "2"
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]


def test_a_failed_atomic_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "record.json"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "new \udc80")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]


def test_hardware_is_named_without_marketing():
    assert ENVIRONMENT.hardware == "amd-epyc-7b13-2c"
    gpu = replace(ENVIRONMENT, gpu_names=("NVIDIA H200", "NVIDIA H200"))
    assert gpu.hardware == "nvidia-h200-x2"
    assert (ENVIRONMENT.device, gpu.device) == ("cpu", "cuda")
    assert replace(ENVIRONMENT, cpu_model="").hardware == "unknown-2c"


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("code", {"code_digest": "other"}),
        ("software", {"torch": "2.16.0"}),
        ("software", {"driver": "550"}),
        ("software", {"tools": {"CXX": "g++ 12"}}),
        ("hardware", {"cpu_count": 4}),
        ("hardware", {"gpu_names": ("NVIDIA H200",)}),
        ("hardware", {"gpu_power_limits": (500,)}),
        ("hardware", {"gpu_power_limits": (None, 500)}),
        ("hardware", {"gpu_application_clocks": ((1980, 2619),)}),
        ("worker environment", {"threads": 1}),
        ("worker environment", {"worker_env": {"OMP_NUM_THREADS": "1"}}),
    ],
)
def test_environment_keys_differ_in_the_part_that_differs(part, change):
    before, after = ENVIRONMENT.key(), replace(ENVIRONMENT, **change).key()
    assert {name for name in before if before[name] != after[name]} == {part}


def test_environment_key_ignores_time_host_and_commit():
    other = replace(ENVIRONMENT, started="later", host="b", git_sha="c", memory_bytes=1)
    assert other.key() == ENVIRONMENT.key()


def test_limits_that_nobody_tells_are_those_of_older_records():
    untold = replace(ENVIRONMENT, gpu_power_limits=(None,), gpu_application_clocks=(None,))
    assert untold.key() == ENVIRONMENT.key()


def test_limits_of_gpus_survive_json():
    limits = {"gpu_power_limits": (700, None), "gpu_application_clocks": ((1980, 2619), None)}
    environment = replace(ENVIRONMENT, gpu_names=("NVIDIA H200",) * 2, **limits)
    again = parse_record(to_json(replace(make_record(), environment=environment))).environment
    assert again is not None
    assert again.key() == environment.key() != ENVIRONMENT.key()
    assert again.gpu_power_limits == (700, None)


def test_environment_key_survives_json():
    again = parse_record(to_json(make_record())).environment
    assert again is not None
    assert again.key() == ENVIRONMENT.key()


@pytest.mark.parametrize("module", ["bench.table", "bench.suites", "bench.estimate"])
def test_the_torch_free_half_imports_no_torch(module):
    code = (
        f"import sys, {module}; "
        "print({'torch', 'torchvision', 'accelerate', 'pandas'} & set(sys.modules) or 'none')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "none\n"
