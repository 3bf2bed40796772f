"""Imports go one way, and half of the modules need no torch.

A new module is classified here: in FREE_NAMES if importing it must stay possible without torch
(plans, records, tables, command lines), else in TORCH_NAMES.
"""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("bench", "cifar", "launch")
HEAVY = {"accelerate", "deepspeed", "pandas", "timm", "torch", "torchvision"}
"""What the torch-free half does without: each takes longer to import than the programs may."""

FREE_NAMES = """
    bench bench.__main__ bench.attempt bench.best bench.cluster bench.columns bench.commands
    bench.console bench.cores bench.counters bench.device_lock bench.devices bench.display
    bench.efficiency bench.estimate bench.execution bench.failure bench.frontier
    bench.frontier_command bench.frontier_search bench.job bench.job_runner bench.judge
    bench.launchers bench.nvml bench.option_types bench.options bench.overrides bench.place_options
    bench.preflight
    bench.pool bench.present bench.probes bench.processes bench.progress bench.protocol
    bench.published bench.record bench.record_file bench.repeats bench.row_facts bench.rows
    bench.run_command bench.runs bench.sampler bench.save bench.scaling bench.scaling_plot
    bench.selection bench.selfcheck bench.slurm bench.slurm_config bench.space bench.spec
    bench.stats bench.suites bench.table bench.trial_plan bench.trial_rows bench.trials bench.tuning
    bench.tuning_command bench.tuning_options bench.unfinished bench.validity cifar cifar.__main__
    cifar.agreement cifar.architectures cifar.cli cifar.commands cifar.comparison cifar.compilers
    cifar.config cifar.config.checks cifar.config.distillation cifar.config.model
    cifar.config.parallel cifar.config.precision cifar.config.pretrained cifar.config.recipe
    cifar.config.train cifar.cost cifar.data cifar.data.archives cifar.data.arrays cifar.data.config
    cifar.data.dataset cifar.data.division cifar.data.download cifar.data.folder cifar.data.images
    cifar.data.shapes cifar.data.sources cifar.data.test_set cifar.data.tiny_imagenet
    cifar.data.unpickle cifar.errors cifar.evaluate_options cifar.figures cifar.files
    cifar.interface cifar.interval cifar.lr_find_options cifar.memory cifar.predictions
    cifar.process
    cifar.progress cifar.pulse cifar.range_test cifar.ranks cifar.recipes cifar.restart
    cifar.run_folder cifar.serialize cifar.signals cifar.strategy cifar.train_options cifar.weights
    launch
"""
TORCH_NAMES = """
    bench.cold bench.environment bench.faults bench.kernels bench.limits bench.measure
    cifar.compilation
    bench.measure.anatomy bench.measure.augmentation_cost bench.measure.backends
    bench.measure.batches bench.measure.clock bench.measure.cold bench.measure.comparison
    bench.measure.compilation bench.measure.energy bench.measure.inference bench.measure.memory
    bench.measure.monitor bench.measure.outcome bench.measure.pipeline bench.measure.ranks
    bench.measure.subject bench.measure.training bench.measure.utilization bench.measure.validation
    bench.observe bench.placement bench.worker cifar.accelerator cifar.checkpoint cifar.data.augment
    cifar.data.draws cifar.data.gallery cifar.data.loader cifar.data.mixing cifar.data.operations
    cifar.data.policies cifar.device_memory cifar.distributed cifar.emulation cifar.engine
    cifar.engines cifar.evaluation cifar.exchange cifar.fine_tuning cifar.fsdp cifar.latency
    cifar.losses cifar.lr_finder cifar.meeting cifar.meter cifar.models cifar.models.libraries
    cifar.models.meta cifar.models.pretrained cifar.models.resnet cifar.models.resnet9
    cifar.models.summary cifar.models.weights cifar.muon cifar.network cifar.optim cifar.outcome
    cifar.precision
    cifar.rendezvous cifar.report cifar.roles cifar.run cifar.scoring cifar.selection cifar.session
    cifar.store cifar.sync_batch_norm cifar.teacher cifar.trainer cifar.training_data
    cifar.training_state
    cifar.updates cifar.watchdog cifar.zero
"""
FREE, TORCH = set(FREE_NAMES.split()), set(TORCH_NAMES.split())

CHAINS = (
    "cifar.config bench.protocol bench.spec",
    "cifar.config cifar.recipes bench.spec bench.record bench.launchers bench.runs bench.commands",
    "bench.spec bench.record bench.rows bench.columns bench.table bench.save",
    "bench.spec bench.record bench.row_facts bench.rows bench.efficiency bench.save",
    "bench.rows bench.selection bench.commands",
    "bench.rows bench.frontier bench.frontier_command bench.commands",
    "bench.spec bench.frontier_search bench.runs bench.probes bench.frontier_command "
    "bench.commands",
    "bench.spec bench.space bench.tuning bench.runs bench.trial_plan bench.trials "
    "bench.tuning_options bench.tuning_command bench.commands",
    "bench.tuning bench.sampler bench.trial_plan",
    "bench.tuning bench.best bench.tuning_command",
    "bench.space bench.columns bench.tuning_command",
    "bench.rows bench.trial_rows bench.tuning_command",
    "bench.processes bench.launchers bench.present bench.devices bench.pool bench.execution "
    "bench.slurm bench.run_command bench.commands",
    "bench.cores bench.devices bench.console",
    "bench.slurm_config bench.runs bench.place_options bench.options bench.run_command",
    "bench.launchers bench.present bench.preflight bench.run_command",
    "bench.attempt bench.job_runner bench.slurm",
    "bench.record bench.runs bench.rows bench.frontier bench.save",
    "bench.spec bench.launchers bench.scaling bench.suites",
    "bench.record bench.judge bench.placement bench.observe bench.measure bench.worker",
    "bench.judge bench.kernels bench.observe",
    "bench.record bench.unfinished bench.launchers bench.runs",
    "bench.stats bench.record",
    "cifar.config cifar.models cifar.trainer bench.measure bench.worker",
    "cifar.data.dataset cifar.data.loader cifar.training_data cifar.trainer cifar.training_state "
    "cifar.outcome cifar.session cifar.run",
    "cifar.predictions cifar.figures cifar.report cifar.outcome",
    "cifar.comparison bench.columns",
    "cifar.comparison cifar.report cifar.outcome",
    "cifar.config cifar.range_test cifar.figures cifar.report cifar.lr_finder cifar.run",
    "cifar.trainer cifar.lr_finder",
    "cifar.optim cifar.engine cifar.fsdp cifar.engines cifar.trainer",
    "cifar.engine cifar.zero cifar.engines",
    "cifar.config cifar.strategy cifar.accelerator cifar.engine",
    "cifar.config cifar.precision cifar.accelerator",
    "cifar.precision cifar.emulation",
    "cifar.models.meta cifar.roles cifar.optim",
    "cifar.optim cifar.exchange cifar.trainer",
    "cifar.interval cifar.trainer",
    "cifar.run_folder cifar.agreement cifar.meeting",
    "cifar.ranks cifar.interface cifar.store cifar.meeting cifar.rendezvous cifar.distributed "
    "cifar.accelerator cifar.trainer",
    "cifar.pulse cifar.watchdog cifar.distributed",
    "cifar.meeting cifar.watchdog",
    "cifar.run_folder cifar.restart cifar.train_options",
    "cifar.data.operations cifar.data.policies cifar.data.augment cifar.data.loader cifar.losses "
    "cifar.trainer",
    "cifar.updates cifar.trainer",
    "cifar.weights cifar.config cifar.checkpoint cifar.network cifar.teacher cifar.trainer",
    "cifar.network cifar.scoring",
    "cifar.config cifar.evaluation bench.measure",
    "bench.record bench.environment bench.worker",
)
"""In each, a module may import those before it and never, by any way, one after it."""


class Sources:
    """The modules under a folder and what each imports, told from their text."""

    def __init__(self, root: Path, packages: tuple[str, ...]) -> None:
        self.trees = {
            _module_name(path.relative_to(root)): ast.parse(path.read_text(encoding="utf-8"))
            for package in packages
            for path in sorted((root / package).rglob("*.py"))
        }

    def named(self, module: str, *, inside_functions: bool) -> set[str]:
        """The modules that the import statements of `module` name."""
        nodes = _nodes(self.trees[module], inside_functions)
        return {name for node in nodes for name in self._names(node)}

    def imports(self, module: str, *, inside_functions: bool) -> set[str]:
        """What importing `module` imports first: those it names and the packages around them."""
        found: set[str] = set()
        for name in self.named(module, inside_functions=inside_functions):
            parts = name.split(".")
            found |= {".".join(parts[:count]) for count in range(1, len(parts) + 1)}
        return found - {module}

    def check_acyclic(self) -> None:
        """Raises graphlib.CycleError if modules import each other, inside functions included."""
        graph = {module: self.named(module, inside_functions=True) for module in self.trees}
        graphlib.TopologicalSorter(graph).prepare()

    def _names(self, node: ast.AST) -> list[str]:
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "write absolute imports"
            members = [f"{node.module}.{alias.name}" for alias in node.names]
            return [node.module, *(name for name in members if name in self.trees)]
        return []

    def reach(self, module: str, *, inside_functions: bool) -> dict[str, list[str]]:
        """Everything that importing `module` imports, and the way to it (`module` first)."""
        ways, waiting = {module: [module]}, [module]
        while waiting:
            here = waiting.pop()
            around = {here.rpartition(".")[0]} - {""}
            for name in self.imports(here, inside_functions=inside_functions) | around:
                if name not in ways:
                    ways[name] = [*ways[here], name]
                    if name in self.trees:
                        waiting.append(name)
        return ways

    def ways_to(self, targets: set[str], module: str, *, inside_functions: bool) -> list[str]:
        """How `module` reaches any of `targets`, as `a -> b -> c`; empty if it does not."""
        ways = self.reach(module, inside_functions=inside_functions)
        return [" -> ".join(ways[name]) for name in sorted(targets & ways.keys())]


def _module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _nodes(tree: ast.AST, inside_functions: bool) -> Iterator[ast.AST]:
    """Nodes that run on import, or all of them; never those for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not inside_functions:
            continue
        yield node
        yield from _nodes(node, inside_functions)


@pytest.fixture(scope="module")
def sources() -> Sources:
    return Sources(ROOT, PACKAGES)


def test_every_module_is_classified(sources):
    assert not FREE & TORCH
    missing = sorted(set(sources.trees) - FREE - TORCH)
    assert not missing, f"add {missing} to FREE_NAMES or TORCH_NAMES in {Path(__file__).name}"
    gone = sorted((FREE | TORCH) - set(sources.trees))
    assert not gone, f"remove {gone} from FREE_NAMES or TORCH_NAMES in {Path(__file__).name}"


@pytest.mark.parametrize("module", sorted(FREE))
def test_the_torch_free_half_imports_nothing_heavy(sources, module):
    assert not sources.ways_to(HEAVY | TORCH, module, inside_functions=False)


def test_the_torch_free_half_can_be_imported_without_torch():
    program = f"import sys, {', '.join(sorted(FREE))}; print(*({HEAVY!r} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


def test_the_suite_leaves_torch_to_its_workers(sources):
    for module in sorted(name for name in FREE if name.startswith("bench")):
        direct = sources.imports(module, inside_functions=True)
        assert not direct & (HEAVY | TORCH), module


def test_the_trainer_knows_nothing_of_the_suite(sources):
    for module in sources.trees:
        if module.startswith(("cifar", "launch")):
            assert not sources.ways_to({"bench"}, module, inside_functions=True)


def test_one_module_imports_accelerate(sources):
    importers = {
        module
        for module in sources.trees
        if "accelerate" in sources.imports(module, inside_functions=True)
    }
    assert importers == {"cifar.accelerator"}


def test_statistics_know_nothing_of_records(sources):
    reached = sources.reach("bench.stats", inside_functions=True)
    assert {name for name in reached if name in sources.trees} == {"bench", "bench.stats"}


@pytest.mark.parametrize("chain", CHAINS)
def test_imports_go_one_way(sources, chain):
    modules = chain.split()
    for index, module in enumerate(modules):
        assert module in sources.trees
        after = set(modules[index + 1 :])
        assert not sources.ways_to(after, module, inside_functions=True)


def test_no_two_modules_import_each_other(sources):
    sources.check_acyclic()


@pytest.fixture
def fake(tmp_path: Path) -> Sources:
    """A package with one module of every kind that the checks have to tell apart."""
    files = {
        "__init__": "",
        "direct": "import torch.nn as nn",
        "indirect": "from pkg import direct",
        "member": "from pkg.indirect import nn",
        "guarded": "try:\n    import torch\nexcept ImportError:\n    torch = None",
        "body": "class A:\n    import torch",
        "late": "def f():\n    from pkg.direct import nn",
        "typed": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch",
        "sub/__init__": "import torch",
        "sub/innocent": "",
    }
    for name, text in files.items():
        path = tmp_path / "pkg" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Sources(tmp_path, ("pkg",))


@pytest.mark.parametrize(
    ("module", "way"),
    [
        ("direct", "pkg.direct -> torch"),
        ("indirect", "pkg.indirect -> pkg.direct -> torch"),
        ("member", "pkg.member -> pkg.indirect -> pkg.direct -> torch"),
        ("guarded", "pkg.guarded -> torch"),
        ("body", "pkg.body -> torch"),
        ("sub.innocent", "pkg.sub.innocent -> pkg.sub -> torch"),
    ],
)
def test_the_checker_finds_what_an_import_drags_in(fake, module, way):
    assert fake.ways_to({"torch"}, f"pkg.{module}", inside_functions=False) == [way]


def test_the_checker_allows_imports_inside_functions_where_asked(fake):
    assert not fake.ways_to({"torch"}, "pkg.late", inside_functions=False)
    assert fake.ways_to({"torch"}, "pkg.late", inside_functions=True)
    assert not fake.ways_to({"torch"}, "pkg.typed", inside_functions=True)


def test_the_checker_finds_circles(fake, tmp_path):
    fake.check_acyclic()
    (tmp_path / "pkg" / "direct.py").write_text("def f():\n    from pkg import member")
    with pytest.raises(graphlib.CycleError):
        Sources(tmp_path, ("pkg",)).check_acyclic()
