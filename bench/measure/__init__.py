"""One function per metric; `METRICS` is the order in which a worker takes them.

A metric reads the subject, does its work and returns measurements that carry their unit and
direction, so nothing else has to know of a new one.
"""

from bench.measure.anatomy import measure_anatomy
from bench.measure.compilation import measure_compilation
from bench.measure.inference import measure_inference
from bench.measure.outcome import measure_accuracy, measure_size
from bench.measure.pipeline import measure_pipeline
from bench.measure.subject import Metric
from bench.measure.training import measure_training
from bench.measure.utilization import measure_flops, measure_utilization

METRICS: tuple[Metric, ...] = (
    measure_training,
    measure_accuracy,
    measure_size,
    measure_flops,
    measure_inference,
    measure_compilation,
)
FURTHER: dict[str, Metric] = {
    "anatomy": measure_anatomy,
    "pipeline": measure_pipeline,
    "utilization": measure_utilization,
}
"""Those that cost time of their own and are taken only if the protocol names them."""
