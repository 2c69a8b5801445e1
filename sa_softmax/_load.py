"""Objects that users name on the command line as ``module:attribute``."""

import importlib
import importlib.util
import os
import sys
import traceback
from typing import Any

__all__ = ["named"]


def named(name: str) -> Any:
    """What ``module:attribute`` gives, called without arguments if it is callable.

    The module is looked for in the current folder, too. Raises ValueError that says what stands in the way, and where.
    """
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a console script does not search the folder that it runs in
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(f"{error.name}.")):
            raise ValueError(
                f"cannot load {name!r}: there is no module {error.name!r}, neither in the current folder nor installed"
            ) from error
        raise ValueError(f"cannot load {name!r}: its module needs {error.name!r}, which is not installed") from error
    except Exception as error:  # whatever the module does when it is imported
        raise ValueError(f"cannot load {name!r}: importing {module} raised {_said(error, module)}") from error
    if not hasattr(found, attribute):
        hint = "; did you mean Adapter?" if hasattr(found, "Adapter") else ""
        raise ValueError(
            f"cannot load {name!r}: {module} has no attribute {attribute!r}{hint}. The form is module:attribute"
        )
    target = getattr(found, attribute)
    if not callable(target):
        return target
    try:
        return target()
    except Exception as error:
        raise ValueError(
            f"cannot load {name!r}: {attribute}() raised {_said(error, module)}. It is called without arguments"
        ) from error


def _said(error: Exception, module: str) -> str:
    """The error, and the last line of the user's own module that led to it."""
    spec = importlib.util.find_spec(module) if module else None
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if spec and frame.filename == spec.origin]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"
