"""The configuration: one typed tree (`learning`, `running`, `tree`), read and validated before anything starts
(`loading`).

Presets and user files are YAML with these sections; overrides are dotted (`method.alpha`). Every field is
documented where it stands, and `sid-ray distill --help` prints these texts.
"""

from sid_ray.config.loading import (
    differences,
    fields,
    load_config,
    override,
    parse_config,
    preset_names,
    settled_as,
)
from sid_ray.config.running import INCEPTION_ADDRESS, TEACHER_REFERENCE, Guard
from sid_ray.config.section import Section
from sid_ray.config.tree import MAY_CHANGE_ON_RESUME, Config

__all__ = [
    "INCEPTION_ADDRESS",
    "MAY_CHANGE_ON_RESUME",
    "TEACHER_REFERENCE",
    "Config",
    "Guard",
    "Section",
    "differences",
    "fields",
    "load_config",
    "override",
    "parse_config",
    "preset_names",
    "settled_as",
]
