"""Code that the user names: `python:package.module:factory`, a function without arguments that returns an object."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from sid_ray.errors import UserError

PYTHON = "python:"
"""Prefix of a factory in the user's own code."""
HANDED = "module:"
"""Prefix by which a configuration records a module that a Python program handed over."""


def is_python(path: str) -> bool:
    """Whether a path names code of the user instead of a file."""
    return path.startswith(PYTHON)


def call_factory(name: str, field: str) -> Any:
    """What `python:package.module:factory` returns: imports the module, which **executes it**, and calls the factory.

    The module is found as Python finds it, and in the working directory. UserError, naming `field`, if there is no
    such module or function, or if it raises anything.
    """
    module, colon, factory = name.removeprefix(PYTHON).partition(":")
    if not (module and colon and factory):
        raise UserError(f"{field}: {name!r} is not allowed; allowed: python:package.module:factory")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        namespace = vars(importlib.import_module(module))
        if factory not in namespace:
            raise UserError(f"{field}: {name!r}: the module {module!r} has no {factory!r}")
        return namespace[factory]()
    except UserError:
        raise
    except Exception as error:  # foreign code: there is no telling what it raises
        raise UserError(f"{field}: {name!r} cannot be called: {type(error).__name__}: {error}") from error
