"""One function per metric; `METRICS` is the order in which a worker takes them.

A metric reads the subject, does its work and returns measurements that carry their unit and
direction, so nothing else has to know of a new one.
"""

from bench.measure.anatomy import measure_anatomy
from bench.measure.inference import measure_inference
from bench.measure.outcome import measure_accuracy, measure_size
from bench.measure.pipeline import measure_pipeline
from bench.measure.subject import Metric
from bench.measure.training import measure_training

METRICS: tuple[Metric, ...] = (
    measure_training,
    measure_accuracy,
    measure_size,
    measure_inference,
)
FURTHER: dict[str, Metric] = {
    "anatomy": measure_anatomy,
    "pipeline": measure_pipeline,
}
"""Those that cost time of their own and are taken only if the protocol names them."""
