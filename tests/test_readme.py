"""What the documents say is so: commands parse, files exist, tables are those of the records."""

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_worker import environment

import bench.commands as bench_program
import cifar.commands as cifar_program
from bench import frontier_command, run_command, tuning_command, tuning_options
from bench.frontier_command import FrontierOptions, build_searches
from bench.options import RunOptions, build_suite
from bench.preflight import Examined
from bench.tuning_options import SearchOptions, build_search
from cifar import evaluate_options, lr_find_options, run_folder, train_options
from cifar.cli import parse
from cifar.config import RunConfig, TrainConfig
from cifar.errors import ConfigError

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = (
    *("README.md", "CONTRIBUTING.md", "bench/README.md", "cifar/README.md"),
    *("launch/README.md", "results/README.md"),
)
PROGRAMS = {"bench": bench_program, "cifar": cifar_program}
SHELL = {"cd", "git", "pip", "source", "."}
"""Words that begin a command of which only the user's machine can tell if it works."""


def text_of(path: Path) -> str:
    assert path.is_file(), f"{path.name} is missing"
    return path.read_text(encoding="utf-8")


def fenced(text: str, language: str) -> list[str]:
    """The contents of the fenced blocks in that language ("" for none)."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for name, block in blocks if name == language]


def commands(text: str) -> Iterator[list[str]]:
    """The commands in shell text, without variables before them and comments behind."""
    for line in text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        for word in [*lexer, ";"]:
            if set(word) <= set("&|;"):
                if words:
                    yield words
                words = []
            elif words or not re.match(r"\w+=", word):
                words.append(word)


class Parsed(Exception):
    """A program would run now with these options."""


@pytest.fixture
def check(monkeypatch) -> Callable[[list[str]], None]:
    """Checks a command up to where it would start to work."""

    def stop(cls, argv, **settings):
        raise Parsed(parse(cls, argv, **settings))

    commands = (
        *(frontier_command, run_command, tuning_command),
        *(train_options, evaluate_options, lr_find_options),
    )
    for module in (*PROGRAMS.values(), *commands):
        monkeypatch.setattr(module, "parse", stop)
    monkeypatch.setattr(tuning_options, "examine", lambda data: Examined(50_000, (32, 32), 3, ""))
    stored = SimpleNamespace(train=TrainConfig(), run=RunConfig())
    monkeypatch.setattr(run_folder, "read_config", lambda folder: stored)
    return check_command


def check_command(words: list[str]) -> None:
    name, rest = Path(words[0]).name if "/" in words[0] else words[0], words[1:]
    if name in PROGRAMS:
        check_program(name, rest)
    elif name == "make":
        targets = re.findall(r"^([a-z]+):", text_of(ROOT / "Makefile"), re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= set(targets)
    elif words[:2] == ["accelerate", "launch"]:
        check_launch(rest[1:])
    elif name == "torchrun":
        from torch.distributed.run import get_args_parser

        options = get_args_parser().parse_args(rest)
        assert options.module
        check_program(options.training_script, options.training_script_args)
    elif name == "python":
        assert rest[0] == "-m"
        check_program(rest[1], rest[2:])
    elif name == "sbatch":
        assert any((ROOT / word).is_file() for word in rest)
    elif "/" in words[0]:
        assert (ROOT / words[0]).is_file()
    else:
        assert name in SHELL, f"what is {name}?"


def check_launch(words: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    options = launch_command_parser().parse_args(words)
    assert options.module
    assert (ROOT / options.config_file).is_file()
    check_program(options.training_script, options.training_script_args)


def check_program(name: str, words: list[str]) -> None:
    command = PROGRAMS[name].COMMANDS[words[0]]
    with pytest.raises(Parsed) as stopped:
        command.run(words[1:])
    (options,) = stopped.value.args
    if isinstance(options, RunOptions) and options.resume is None:
        build_suite(options)
    if isinstance(options, FrontierOptions) and options.resume is None:
        build_searches(options, lambda count: environment(gpu_names=("H200",)))
    if isinstance(options, SearchOptions) and options.resume is None:
        build_search(options)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_command_parses(name, check):
    for block in fenced(text_of(ROOT / name), "bash"):
        for words in commands(block):
            check(words)


def test_the_readme_shows_the_main_commands():
    found = [words[:2] for block in fenced(text_of(README), "bash") for words in commands(block)]
    for words in ("make bench", "make test", "cifar train", "bench run", "accelerate launch"):
        assert words.split() in found


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_example_of_the_help_parses(name, check):
    examples = PROGRAMS[name].SUMMARY.partition("examples:\n")[2]
    found = list(commands(examples))
    assert len(found) > 3
    for words in found:
        check(words)


HELPED = [(name, command) for name, program in PROGRAMS.items() for command in program.COMMANDS]


@pytest.mark.parametrize(("name", "command"), HELPED)
def test_the_help_of_every_command_has_an_example_that_parses(name, command, check, capsys):
    with pytest.raises(SystemExit) as stopped:
        PROGRAMS[name].COMMANDS[command].run(["--help"])
    assert stopped.value.code in (0, None)
    shown = re.search(r"^example:\n  (.+)$", capsys.readouterr().out, re.MULTILINE)
    assert shown is not None
    (words,) = commands(shown[1])
    assert words[:2] == [name, command]
    check(words)


def tree_paths(block: str) -> Iterator[str]:
    """The paths in a drawn tree: names of files and folders, children indented below theirs."""
    folders: list[tuple[int, str]] = []
    for line in filter(str.strip, block.splitlines()):
        indent = len(line) - len(line.lstrip())
        folders = [(depth, name) for depth, name in folders if depth < indent]
        around = "".join(name for _, name in folders)
        for word in line.split():
            if not re.fullmatch(r"[\w.-]+(\.\w+|/)", word):
                break
            yield around + word
            if word.endswith("/"):
                folders.append((indent, word))


def test_every_path_of_the_tree_exists():
    trees = [
        block
        for package in ("bench", "cifar")
        for block in fenced(text_of(ROOT / package / "README.md"), "")
        if block.startswith(f"{package}/")
    ]
    paths = [path for block in trees for path in tree_paths(block)]
    assert {"bench/", "cifar/", "cifar/config/", "bench/spec.py"} <= set(paths)
    assert not [path for path in paths if not (ROOT / path).exists()]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_is_mentioned_exists(document):
    text, folder = text_of(ROOT / document), (ROOT / document).parent
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert "://" in link or (folder / link).exists(), link
    for name, member in re.findall(r"`((?:bench|cifar|launch|tests)/[\w/.-]+)(?:: (\w+))?`", text):
        assert (ROOT / name).exists(), name
        assert not member or re.search(rf"^{member}\b", text_of(ROOT / name), re.MULTILINE), member


def test_the_tables_are_those_of_the_results():
    tables = re.findall(r"<!-- table: (\S+) -->\n(.*?)<!-- /table -->", text_of(README), re.DOTALL)
    assert tables, "README.md shows no table between <!-- table: PATH --> and <!-- /table -->"
    for name, shown in tables:
        stored = text_of(ROOT / name).splitlines()
        lines = [line for line in shown.splitlines() if line]
        assert any(line.startswith("|") for line in lines), name
        assert not [line for line in lines if line not in stored], name


def test_the_splitter_knows_the_shell():
    text = 'A=1 cifar train \\\n  -b 8 # why\n\ncd x && make test ARGS="-k a b"; pip install .\n'
    assert list(commands(text)) == [
        ["cifar", "train", "-b", "8"],
        ["cd", "x"],
        ["make", "test", "ARGS=-k a b"],
        ["pip", "install", "."],
    ]


@pytest.mark.parametrize(
    "line",
    [
        "cifar train --no-such-option 1",
        "accelerate launch --config_file launch/ddp.yaml --num_processes 2 -m cifar train --bad",
        "torchrun --nproc_per_node 2 -m cifar train --model resnet19",
        "bench run nosuch",
        "bench table --sort",
    ],
)
def test_a_wrong_option_is_found(line, check):
    with pytest.raises(ConfigError):
        check(line.split())


@pytest.mark.parametrize("line", ["make nosuch", "nosuch", "launch/nosuch.sh"])
def test_a_wrong_command_is_found(line, check):
    with pytest.raises(AssertionError):
        check(line.split())


def test_a_drawn_tree_is_read():
    block = "a/   text\n  b.py c.py  more text\n  d/\n    e.yaml f.md the rest.\n  g.toml\nh/\n"
    assert list(tree_paths(block)) == [
        "a/", "a/b.py", "a/c.py", "a/d/", "a/d/e.yaml", "a/d/f.md", "a/g.toml", "h/"
    ]  # fmt: skip
