"""One function per metric; a worker takes those of CORE, BASIC and FURTHER in their order.

A metric reads the subject, does its work and returns measurements that carry their unit and
direction, so nothing else has to know of a new one.
"""

from bench.measure.anatomy import measure_anatomy
from bench.measure.augmentation_cost import measure_augmentations
from bench.measure.cold import measure_cold
from bench.measure.compilation import measure_compilation
from bench.measure.inference import measure_inference
from bench.measure.outcome import measure_accuracy, measure_size
from bench.measure.pipeline import measure_pipeline
from bench.measure.ranks import measure_ranks
from bench.measure.subject import Metric
from bench.measure.training import measure_training
from bench.measure.utilization import measure_flops, measure_utilization
from bench.measure.validation import measure_validation

CORE: tuple[Metric, ...] = (measure_training, measure_accuracy, measure_size)
"""What a cell is trained for: without any of these there is no record of it."""
TRIAL: tuple[Metric, ...] = (measure_validation,)
"""The same of a cell that is trained to be compared with others on held-out images."""
BASIC: dict[str, Metric] = {
    "ranks": measure_ranks,
    "flops": measure_flops,
    "inference": measure_inference,
    "compilation": measure_compilation,
}
"""Those that follow; one that breaks down costs itself and the later ones, see `bench.worker`."""
FURTHER: dict[str, Metric] = {
    "anatomy": measure_anatomy,
    "pipeline": measure_pipeline,
    "augmentations": measure_augmentations,
    "utilization": measure_utilization,
    "cold": measure_cold,
}
"""Those that cost time of their own and are taken only if the protocol names them."""
STEPPING = ("ranks", "anatomy")
"""Of those the ones that take steps together all along: a process that hangs in them is missing."""
