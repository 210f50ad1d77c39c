"""Tune spaces: the small YAML files that say what a sweep searches. Plain Python, no Ray.

A field's range is one of

    {uniform: [low, high]}            any number between, equally likely
    {loguniform: [low, high]}         the same on a logarithmic scale
    {quantised: [low, high, step]}    low, low + step, ... up to high
    {choice: [a, b, ...]}             one of these; what a grid search needs
    {follows: FIELD, at: [x, y], power: p}    not searched: y (value of FIELD / x)^p, as a rate with the batch
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import reduce
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from pydantic import Field, ValidationError, model_validator

from sid_ray.config import Config, Section, load_config
from sid_ray.errors import UserError

Value = float | int | str | bool
Values = dict[str, Any]
"""Dotted fields of a trial with their values."""


class Range(Section):
    """The values of one field; exactly one kind is given."""

    uniform: tuple[float, float] | None = None
    """Any number between these two."""
    loguniform: tuple[float, float] | None = None
    """Any number between these two, on a logarithmic scale."""
    quantised: tuple[float, float, float] | None = None
    """Lowest, highest, step."""
    choice: tuple[Value, ...] | None = None
    """The values themselves."""
    follows: str | None = None
    """Another field of the space, from which this one is computed."""
    at: tuple[float, float] | None = None
    """With `follows`: a value of the other field and this field's value there."""
    power: float = 1.0
    """With `follows`: the exponent; 1 is proportional, 0.5 the square root."""

    @model_validator(mode="after")
    def _one_kind(self) -> Range:
        kinds = [k for k in ("uniform", "loguniform", "quantised", "choice", "follows") if getattr(self, k) is not None]
        if len(kinds) != 1:
            raise ValueError("allowed: one of uniform, loguniform, quantised, choice, follows")
        low, high = (self.uniform or self.loguniform or self.quantised or (0.0, 1.0))[:2]
        if not low < high or not math.isfinite(low) or not math.isfinite(high):
            raise ValueError(f"allowed: a lower end below the higher one, not {low:g} and {high:g}")
        if self.loguniform and low <= 0:
            raise ValueError(f"allowed: positive ends for loguniform, not {low:g}")
        if self.quantised and self.quantised[2] <= 0:
            raise ValueError(f"allowed: a positive step, not {self.quantised[2]:g}")
        if self.choice is not None and not self.choice:
            raise ValueError("allowed: at least one value")
        if self.follows is not None and (self.at is None or self.at[0] <= 0):
            raise ValueError("allowed: with follows, at: [value of that field (positive), value of this one]")
        return self

    @property
    def ends(self) -> list[Any]:
        """Values that must be possible: both ends of a range, or every choice."""
        if self.choice is not None:
            return list(self.choice)
        return list((self.uniform or self.loguniform or self.quantised or ())[:2])

    def contains(self, value: Any) -> bool:
        """Whether it is one of the values."""
        if self.choice is not None:
            return value in self.choice
        if not isinstance(value, (int, float)) or not self.ends[0] <= value <= self.ends[1]:
            return False
        if self.quantised is None:
            return True
        steps = (value - self.quantised[0]) / self.quantised[2]
        return math.isclose(steps, round(steps), abs_tol=1e-9)

    def sample(self, rng: np.random.Generator) -> Any:
        """One random value."""
        if self.uniform:
            return float(rng.uniform(self.uniform[0], self.uniform[1]))
        if self.loguniform:
            low, high = self.loguniform
            return float(math.exp(rng.uniform(math.log(low), math.log(high))))
        if self.quantised:
            low, high, step = self.quantised
            return low + step * int(rng.integers(int((high - low) / step + 1e-9) + 1))
        assert self.choice is not None
        return self.choice[int(rng.integers(len(self.choice)))]


class Space(Section):
    """A sweep: what is tried, how long, and when a trial is given up."""

    description: str = ""
    """What the sweep is for, in a sentence."""
    preset: str
    """Preset or YAML file that every trial starts from."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Dotted fields that every trial shares."""
    fields: dict[str, Range]
    """Dotted fields that are searched, each with its range."""
    metric: Literal["fid"] = "fid"
    """What the best trial has least of: FID, measured as in a run."""
    budget_kimg: float = Field(gt=0)
    """Length of a whole trial in thousands of images."""
    search: Literal["grid", "random", "tpe"] = "random"
    """All combinations of choices, random ones, or Optuna's tree-structured Parzen estimator, which learns."""
    trials: int = Field(16, ge=1)
    """Number of trials; a grid's own number if it is a grid."""
    preset_first: bool = True
    """Trial 0 has the preset's own values, to compare the others with (but not in a grid)."""
    repeats: int = Field(1, ge=1)
    """Runs of each trial with seeds of their own; the report gives mean and deviation."""
    scheduler: Literal["none", "asha", "median"] = "none"
    """Ray Tune's successive halving or median stopping, beside the rules below."""
    grace_kimg: float | None = Field(None, gt=0)
    """No trial is stopped for being behind before this many thousand images; unset: a quarter of the budget."""
    stop_diverged: bool = True
    """Stop a trial whose FID diverges (the guard's rule)."""
    power_law: bool = True
    """Stop a trial whose extrapolated FID cannot reach the best one."""
    trials_at_once: int | Literal["auto"] = "auto"
    """Trials that run at the same time; auto: as many as the CPUs or GPUs allow."""
    seed: int = Field(0, ge=0)
    """Seed of the search."""

    @model_validator(mode="after")
    def _agree(self) -> Space:
        if not self.fields:
            raise ValueError("fields: empty; allowed: at least one field to search")
        for name, range_ in self.fields.items():
            other = range_.follows
            if other is not None and (other not in self.fields or self.fields[other].follows is not None):
                raise ValueError(f"fields.{name}: follows {other!r}, which is not a searched field of this space")
            if self.search == "grid" and range_.choice is None and other is None:
                raise ValueError(f"fields.{name}: a grid search needs choice (or follows)")
        if isinstance(self.trials_at_once, int) and self.trials_at_once < 1:
            raise ValueError("trials_at_once: allowed: 'auto' or a number of at least 1")
        return self

    @property
    def searched(self) -> dict[str, Range]:
        """The fields with a choice of their own."""
        return {name: r for name, r in self.fields.items() if r.follows is None}

    @property
    def has_preset_first(self) -> bool:
        """Whether trial 0 is the preset's own."""
        return self.preset_first and self.search != "grid"

    @property
    def grace_nimg(self) -> float:
        """Images before which no trial is given up for being behind."""
        return 1000 * (self.budget_kimg / 4 if self.grace_kimg is None else self.grace_kimg)

    def complete(self, searched: Values) -> Values:
        """A trial's values: the searched ones, and those that follow them."""
        values = dict(searched)
        for name, r in self.fields.items():
            if r.follows is not None and r.at is not None:
                values[name] = r.at[1] * (float(searched[r.follows]) / r.at[0]) ** r.power
        return {name: values[name] for name in self.fields}

    def grid(self) -> list[Values]:
        """Every combination of choices, the last field varying fastest."""
        choices = [r.choice or () for r in self.searched.values()]
        return [self.complete(dict(zip(self.searched, values, strict=True))) for values in product(*choices)]

    def draw(self, number: int) -> Values:
        """The values of a random search's trial: a function of (seed, number)."""
        rng = np.random.default_rng((self.seed, number))
        return self.complete({name: r.sample(rng) for name, r in self.searched.items()})

    def of_preset(self) -> Values:
        """The values that the searched fields have without a sweep."""
        tree: Any = self.config({}, {}).model_dump()
        return {name: reduce(lambda branch, part: branch[part], name.split("."), tree) for name in self.fields}

    def config(self, values: Mapping[str, Any], overrides: Mapping[str, Any]) -> Config:
        """The configuration of a trial. UserError if it is not possible.

        The guard only warns in it: a trial that diverges is the sweep's to end.
        """
        fixed = {"run.total_kimg": self.budget_kimg, "guard.policy": "warn"}
        return load_config(self.preset, fixed | self.settings | dict(values) | dict(overrides))


def load_space(path: str) -> Space:
    """Read and check a space. UserError names the file, the line, the field, and what is allowed."""
    file = Path(path).expanduser()
    if not file.is_file():
        shipped = ", ".join(sorted(str(p) for p in Path("tune_spaces").glob("*.yaml")))
        raise UserError(f"space: {path!r} is not a file" + (f"; there are: {shipped}" if shipped else ""))
    text = file.read_text(encoding="utf-8")
    try:
        tree, node = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected 'preset:', 'fields:' and so on, found {type(tree).__name__}")
    lines = _lines(node)
    if isinstance(tree.get("fields"), dict):  # a bare list is a choice
        tree["fields"] = {k: {"choice": v} if isinstance(v, list) else v for k, v in tree["fields"].items()}
    try:
        space = Space.model_validate(tree)
    except ValidationError as error:
        raise UserError("\n".join(_explain(path, lines, e) for e in error.errors())) from error
    _check_fields(path, space, lines)
    return space


def _check_fields(path: str, space: Space, lines: dict[str, int]) -> None:
    """Every setting and every end of every range must make a possible configuration."""

    def attempt(where: str, values: Mapping[str, Any]) -> None:
        try:
            space.config({}, values)
        except UserError as error:
            setting = f"settings.{str(error).partition(':')[0]}"  # what is wrong may have been said further up
            place = setting if setting in lines else where
            raise UserError(f"{path}:{lines.get(place, 1)}: {place}: {error}") from error

    attempt("preset", {})
    if not space.config({}, {}).evaluation.num_images:
        raise UserError(f"{path}: evaluation.num_images: 0 measures no FID, which the trials are compared by")
    for name, range_ in space.searched.items():
        for value in range_.ends:
            followers = {
                k: v
                for k, v in space.complete({n: r.ends[0] for n, r in space.searched.items()} | {name: value}).items()
                if space.fields[k].follows == name
            }
            attempt(f"fields.{name}", {name: value} | followers)


def _lines(node: Any, prefix: str = "") -> dict[str, int]:
    """Line number of every key, by dotted path."""
    found: dict[str, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            found[name] = key.start_mark.line + 1
            found |= _lines(value, f"{name}.")
    return found


def _explain(path: str, lines: dict[str, int], error: Any) -> str:
    location = ".".join(str(p) for p in error["loc"])
    line = next((lines[p] for p in _prefixes(location) if p in lines), 1)
    if error["type"] == "extra_forbidden":
        return f"{path}:{line}: {location}: there is no such field"
    if error["type"] == "missing":
        return f"{path}:{line}: {location}: is required and missing"
    message = error["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(error["input"], dict) else f"{error['input']!r} is not allowed; "
    return f"{path}:{line}: {location + ': ' if location else ''}{shown}{message}"


def _prefixes(dotted: str) -> list[str]:
    parts = dotted.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
