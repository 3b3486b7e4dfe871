"""Says which of the package's extras brings a package that is not installed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib import metadata

from kvquant.errors import UserError

_WANTED = re.compile(r"""^(?P<name>[A-Za-z0-9._-]+).*;.*extra\s*==\s*['"](?P<extra>[^'"]+)['"]""")


def extra_of(module: str, requirements: Iterable[str]) -> str | None:
    """Returns the extra whose packages include a module, or None.

    Args:
        module: Name of an import, as `lm_eval.tasks`.
        requirements: The package's requirements, as its metadata has them.
    """
    top = module.partition(".")[0]
    for line in requirements:
        found = _WANTED.match(line)
        if found and found["name"].replace("-", "_").replace(".", "_") == top:
            return found["extra"]
    return None


def not_installed(error: ModuleNotFoundError) -> UserError | None:
    """Returns the error for a user who lacks an extra, or None where no extra would help."""
    try:
        requirements = metadata.requires("kvquant") or []
    except metadata.PackageNotFoundError:
        return None
    extra = extra_of(error.name or "", requirements)
    if extra is None:
        return None
    return UserError(f"{error.name}: is not installed: pip install 'kvquant[{extra}]'")
