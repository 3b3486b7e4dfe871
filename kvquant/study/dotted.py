"""Code that a registration names as "module:attribute" and that is imported when it is needed.

Registrations are read by the workflow, which must not import torch or pandas; so they name their
code and do not import it.
"""

from __future__ import annotations

import importlib
from typing import Any


def load(name: str) -> Any:
    """Returns the attribute that a registration names.

    Args:
        name: Such as "kvquant.evaluation.passkey:PASSKEY".
    """
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)
