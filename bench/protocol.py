"""How a cell is measured: steps, iterations, training budget and limits. No torch."""

from dataclasses import dataclass, field
from typing import ClassVar

from bench.stats import FEWEST
from cifar.config import option_name, require
from cifar.serialize import NOT_IN_DIGEST, STRICT, digest

METRICS = ("anatomy", "pipeline", "augmentations", "utilization", "cold")
"""What a protocol may ask for besides the basic metrics: the keys of `bench.measure.FURTHER`."""
BACKENDS = ("compiled", "exported", "onnxruntime")
"""Ways to run a model for inference, see `bench.measure.backends`."""
MOST = 10**12
"""Of steps, samples or seconds, so that a slip is told from a long measurement."""
MOST_IMAGES = 1_000_000
"""Of a batch for inference."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """How a cell is measured: steps, iterations, training budget and limits."""

    __pydantic_config__: ClassVar = STRICT

    warmup_steps: int = 5
    """Steps in each of two neighbouring spans whose median times must agree to end the warm-up;
    fewer where these take more than a second (`bench.spec.SPAN_SECONDS`)."""
    max_warmup_steps: int = 30
    """Steps, or batches of inference, after which the clock starts anyway."""
    timed_steps: int = 20
    """Optimiser steps that are timed."""
    timed_seconds: float | None = None
    """Time as many steps as fit into so many seconds instead."""
    min_timed_seconds: float = 2.0
    """Time more than `timed_steps` where these would take less than so many seconds: steps may last
    milliseconds, a GPU's energy is counted every 0.1 s and a CPU's neighbours every 0.01 s. The
    same of the steps of further metrics, but of a DataLoader, and of `inference_iterations`, up to
    some 2,000."""
    repeats: int = field(default=1, metadata=NOT_IN_DIGEST)
    """Fresh processes per cell; at most so many with `target_interval`."""
    target_interval: float | None = field(default=None, metadata=NOT_IN_DIGEST)
    """Start no more processes of a cell once the 95 % interval of its training throughput reaches
    no further from the median than this fraction of it (see `bench.repeats`)."""
    train_samples: int = 0
    """Training budget in samples; 0: speed only."""
    inference_batch_sizes: tuple[int, ...] = (1, 256)
    inference_warmup: int = 5
    """Batches in each of two neighbouring spans whose median times must agree to start the clock,
    at each batch size, within `max_warmup_steps` and `inference_seconds`; fewer where these take
    more than a second. 0: one batch, whatever it takes."""
    inference_iterations: int = 30
    """Batches timed at each batch size."""
    inference_seconds: float = 10.0
    """At each batch size, stop after this many seconds, but not before the third batch."""
    throughput_seconds: float = 0.5
    """At each batch size, after those batches, keep the device busy with as many as take so many
    seconds, to tell the throughput; with one at least, on a GPU with ten. 0: tell none."""
    inference_backends: tuple[str, ...] = ()
    """Ways to run the same weights besides the cell's own: compiled, exported, onnxruntime."""
    metrics: tuple[str, ...] = ()
    """Further metrics than the basic ones: see METRICS."""
    training_alone: bool = False
    """True: measure the training and nothing else, with no step that is not the cell's own."""
    validation_alone: bool = False
    """True: train the recipe's epochs and score the images held out after each; time no step."""
    memory_limit: int | None = None
    """Bytes that each process may allocate, see `bench.limits`; None: as much as there is."""
    allow_emulated: bool = True
    """False: a precision that the device has no instructions for, and so emulates or converts, is
    `unsupported`, for its speed says nothing."""
    timeout: float = field(default=1800.0, metadata=NOT_IN_DIGEST)
    """Seconds after which the cell's processes are ended."""

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_together()
        for name, known in (("metrics", METRICS), ("inference_backends", BACKENDS)):
            given = getattr(self, name)
            require(
                set(given) <= set(known) and len(set(given)) == len(given),
                option_name(name),
                ",".join(given),
                f"choose from {', '.join(known)}, each once",
            )
            object.__setattr__(self, name, tuple(each for each in known if each in given))

    def _check_ranges(self) -> None:
        for name, least in (
            ("warmup_steps", 0),
            ("max_warmup_steps", 0),
            ("timed_steps", 1),
            ("repeats", 1),
            ("train_samples", 0),
            ("inference_warmup", 0),
            ("inference_iterations", 1),
            ("min_timed_seconds", 0),
            ("throughput_seconds", 0),
        ):
            value = getattr(self, name)
            require(value >= least, option_name(name), value, f"give {least} or more")
            require(value <= MOST, option_name(name), value, f"give at most {MOST}")
        limit = self.memory_limit
        require(limit is None or limit >= 1, "memory-limit", limit, "give 1 or more")
        for name in ("inference_seconds", "timeout", "timed_seconds", "target_interval"):
            value = getattr(self, name)
            require(
                value is None or 0 < value <= MOST,
                option_name(name),
                value,
                f"give a positive number, at most {MOST}",
            )
        sizes = self.inference_batch_sizes
        require(
            all(1 <= size <= MOST_IMAGES for size in sizes) and len(set(sizes)) == len(sizes),
            "inference-batch-sizes",
            ",".join(map(str, sizes)),
            f"give different sizes of 1 to {MOST_IMAGES}",
        )

    def _check_together(self) -> None:
        require(
            self.timed_seconds is None or self.warmup_steps > 0,
            "timed-seconds",
            self.timed_seconds,
            "needs warm-up steps, whose pace tells how many fit",
        )
        require(
            self.target_interval is None or self.repeats > FEWEST,
            "target-interval",
            self.target_interval,
            f"needs repeats, at most how many processes to start: {FEWEST + 1} or more",
        )
        require(
            not (self.training_alone and self.metrics),
            "metrics",
            ",".join(self.metrics),
            "not with training-alone, which measures the training and nothing else",
        )
        require(
            not (self.validation_alone and (self.training_alone or self.metrics)),
            "validation-alone",
            self.validation_alone,
            "measures nothing else; not with training-alone or metrics",
        )
        require(
            not (self.validation_alone and self.train_samples),
            "train-samples",
            self.train_samples,
            "not with validation-alone, which trains the recipe's epochs",
        )
        require(
            self.max_warmup_steps >= 2 * self.warmup_steps,
            "warmup-steps",
            self.warmup_steps,
            f"give at most {self.max_warmup_steps // 2}: two spans within {self.max_warmup_steps}",
        )
        infers = self.inference_batch_sizes and not (self.training_alone or self.validation_alone)
        require(
            not infers or self.max_warmup_steps >= 2 * self.inference_warmup,
            "inference-warmup",
            self.inference_warmup,
            f"give at most {self.max_warmup_steps // 2}: two spans within {self.max_warmup_steps}",
        )
        require(
            self.timed_seconds is None or self.timed_seconds < self.timeout,
            "timed-seconds",
            self.timed_seconds,
            f"give less than the timeout of {self.timeout:g}",
        )

    @property
    def digest(self) -> str:
        """16 hexadecimal digits over what is measured; repeats and time limit do not enter."""
        return digest(self)
