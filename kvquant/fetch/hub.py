"""Explains in one line why a request to the Hugging Face hub failed."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from kvquant.errors import UserError

REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def is_repository_id(name: str) -> bool:
    """Returns whether a text may be the id of a repository, such as "owner/name"."""
    return REPOSITORY.fullmatch(name) is not None and len(name) <= 200


@contextlib.contextmanager
def hub_errors(where: str, revision: str | None, what: str = "fetched") -> Iterator[None]:
    """Turns the errors of the hub's client into `UserError`, one line each.

    Args:
        where: The repository, as messages name it.
        revision: The revision that was asked for; None: the newest.
        what: What cannot be done where files or the network fail.

    Raises:
        UserError: The hub refused the request, or cannot be reached.
    """
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        code = getattr(getattr(error, "response", None), "status_code", None)
        hint = {
            401: "no such repository, or it needs HF_TOKEN",
            403: "access is gated: accept its terms and set HF_TOKEN",
            404: f"no such repository or revision ({revision})",
        }.get(code or 0, str(error).splitlines()[0])
        raise UserError(f"{where}: {hint}") from None
    except (OSError, ValueError) as error:
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{where}: cannot be {what} ({text[:200]}): check the network") from None
    except Exception as error:
        # The hub's HTTP client has its own errors, and the client differs between releases.
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3")):
            raise
        raise UserError(f"{where}: the hub cannot be reached: check network and proxy") from None
