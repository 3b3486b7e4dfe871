"""A check of the machine: what was found, whether it will do, and the fix in one line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

State = Literal["ok", "warning", "missing", "skipped"]


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    Attributes:
        section: The part of the screen that it belongs to.
        name: What was looked at.
        state: "ok"; "warning": works less well or is not needed everywhere; "missing": does not
            work; "skipped": was not looked at.
        found: What was found, or the reason.
        fix: What to do, in one line; empty where nothing is to be done.
        needed: Whether what was asked for cannot run without it.
    """

    section: str
    name: str
    state: State
    found: str
    fix: str = ""
    needed: bool = False

    @property
    def fails(self) -> bool:
        """Whether what was asked for cannot run."""
        return self.needed and self.state == "missing"

    def as_json(self) -> dict[str, Any]:
        """Returns the check as the JSON has it."""
        return asdict(self)


Found = tuple[State, str, str]  # state, what was found, fix


def first_line(error: BaseException) -> str:
    """Returns an error in one line, with its type where the text alone says little."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def look(section: str, name: str, check: Callable[[], Found], *, needed: bool = False) -> Check:
    """Runs one check, whose failure is its outcome and never ends the others.

    Args:
        section: See :class:`Check`.
        name: See :class:`Check`.
        check: Returns the state, what was found, and the fix.
        needed: See :class:`Check`.
    """
    made = Check(section, name, "missing", "", needed=needed)
    try:
        state, found, fix = check()
    except Exception as error:  # whatever a broken installation raises
        return replace(made, found=first_line(error), fix="reinstall it, or report this line")
    return replace(made, state=state, found=found, fix=fix)
