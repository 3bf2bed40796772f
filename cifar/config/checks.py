"""How fields are checked, and what they are called on the command line."""

from cifar.errors import ConfigError

OPTION_NAMES = {
    "global_batch_size": "batch-size",
    "accumulation_steps": "accumulation",
    "model.name": "model",
    "distillation.teacher.sha256": "teacher",
    "distillation.teacher.path": "teacher",
    "distillation.weight": "distillation-weight",
    "distillation.temperature": "distillation-temperature",
}
"""Command-line names of fields where they differ."""


def require(condition: bool, name: str, value: object, remedy: str) -> None:
    """Raise a ConfigError that names the field, the value and the remedy."""
    if not condition:
        raise ConfigError(f"{name}: {value!r}: {remedy}")


def option_name(field_name: str) -> str:
    """How a field is called on the command line."""
    return OPTION_NAMES.get(field_name, field_name).replace("_", "-")
