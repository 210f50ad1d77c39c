"""The configuration: one typed tree (`sections`), read and validated before anything starts (`loading`).

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
from sid_ray.config.sections import INCEPTION_ADDRESS, MAY_CHANGE_ON_RESUME, TEACHER_REFERENCE, Config, Guard, Section

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
