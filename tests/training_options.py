"""Arguments of trainers, with those of `TrainingConfig` in one."""

from dataclasses import fields

from srigl_core import TrainingConfig

NAMES = {field.name for field in fields(TrainingConfig)}


def training_options(**options):
    """Return `options` with a `config` made of those that are the config's."""
    config = {name: options.pop(name) for name in NAMES & options.keys()}
    return options | ({"config": TrainingConfig(**config)} if config else {})
