"""Reading configurations: presets, YAML files and dotted overrides, with errors that name the field."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from sid_ray.config.section import Section
from sid_ray.config.tree import MAY_CHANGE_ON_RESUME, SETTLED, Config
from sid_ray.errors import UserError

PRESETS = Path(__file__).parent.parent / "presets"


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(p.stem for p in PRESETS.glob("*.yaml"))


def load_config(preset_or_yaml: str, overrides: Mapping[str, Any] | None = None) -> Config:
    """The configuration of a preset or a YAML file, with dotted overrides such as {"method.alpha": 1.0}.

    Values may be Python values or text as typed on a command line. UserError names the field, the value and
    what is allowed. A preset's runs are called after it unless `run.name` says otherwise.
    """
    path = PRESETS / f"{preset_or_yaml}.yaml"
    if preset_or_yaml not in preset_names():
        path = Path(preset_or_yaml).expanduser()
        if not path.is_file():
            hint = _did_you_mean(preset_or_yaml, preset_names())
            raise UserError(
                f"preset: there is no preset or YAML file {preset_or_yaml!r}{hint}; "
                f"presets: {', '.join(preset_names())}"
            )
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections such as 'method:' and 'run:', found {type(tree).__name__}")
    tree.setdefault("run", {})
    if isinstance(tree["run"], dict):
        tree["run"].setdefault("name", path.stem)
    for dotted, value in (overrides or {}).items():
        _override(tree, dotted, value)
    return parse_config(tree)


def override(config: Config, overrides: Mapping[str, Any]) -> Config:
    """The configuration with dotted overrides, validated again. UserError as in `load_config`."""
    tree = config.model_dump()
    for dotted, value in overrides.items():
        _override(tree, dotted, value)
    return parse_config(tree)


def parse_config(tree: Any) -> Config:
    """Validate a nested mapping. UserError lists every wrong field with its value and what is allowed."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError("\n".join(_explain(e) for e in error.errors())) from error


def fields(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All leaf fields as (dotted name, pydantic FieldInfo), in order."""
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            yield from fields(info.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info


def settled_as(config: Config, earlier: Config) -> Config:
    """The configuration with what an earlier start of its run settled where it still says `auto`."""
    ours, theirs = _flat(config.model_dump()), _flat(earlier.model_dump())
    return override(config, {name: theirs[name] for name in SETTLED if ours[name] == "auto"})


def differences(old: Config, new: Config) -> tuple[list[str], list[str]]:
    """Fields in which two configurations differ, as "field: old -> new": (those that may, those that may not)."""
    before, after = _flat(old.model_dump()), _flat(new.model_dump())
    free: list[str] = []
    fixed: list[str] = []
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            text = f"{name}: {before.get(name)!r} -> {after.get(name)!r}"
            (free if name.startswith(MAY_CHANGE_ON_RESUME) else fixed).append(text)
    return free, fixed


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _override(tree: dict[str, Any], dotted: str, value: Any) -> None:
    names = [name for name, _ in fields()]
    if dotted not in names:
        raise UserError(f"{dotted}: there is no such field{_did_you_mean(dotted, names)}")
    *sections, last = dotted.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[last] = _yaml_value(value) if isinstance(value, str) else value


def _yaml_value(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return value if isinstance(value, (bool, int, float, list, type(None))) else text


def _explain(error: Any) -> str:
    """One validation error of pydantic in the form "field: value is not allowed; allowed: ..."."""
    parts = [str(p) for p in error["loc"] if str(p) in _NAMES]
    field = ".".join(parts)
    kind, value = error["type"], error["input"]
    if kind == "extra_forbidden":
        unknown = ".".join(str(p) for p in error["loc"])
        return f"{unknown}: there is no such field{_did_you_mean(unknown, [name for name, _ in fields()])}"
    if kind == "missing":
        return f"{field}: is required and missing"
    message = error["msg"].removeprefix("Value error, ")
    if isinstance(value, dict):  # a check over several fields names them itself
        return f"{field}: {message}" if field and not message.startswith(field) else message
    return f"{field}: {value!r} is not allowed; {message[0].lower()}{message[1:]}"


def _did_you_mean(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


_NAMES = {part for name, _ in fields() for part in name.split(".")}
