"""A forward call over a cache: begun, planned, taken by every layer, ended; or undone.

A call that ends early (out of memory, NaN, Ctrl-C) leaves a cache as it was before, or refused from
then on: once a layer has stored its tokens, the layers no longer hold the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from kvquant.errors import OutlierOverflow, UserError

Plan = TypeVar("Plan")

_AGAIN = "reset() it or take a new one"


class BrokenCache(UserError, RuntimeError):
    """The layers of a cache do not hold the same tokens, or not what they were given."""


class ForwardCall:
    """The progress of one call, from its beginning to its last layer.

    Args:
        layers: Layers of the cache.
        new_len: New columns.
        held: Whether whoever began the call ends it, too; else the last layer does.
        undo: Puts back what the plan changed; called at most once, while nothing is stored.

    Attributes:
        done: Layers that have taken the call.
        stored: Whether a layer has begun to store.
    """

    def __init__(self, layers: int, new_len: int, held: bool, undo: Callable[[], None]) -> None:
        self.layers = layers
        self.new_len = new_len
        self.held = held
        self.undo = undo
        self.done: set[int] = set()
        self.stored = False


class CallRecord(Generic[Plan]):
    """What a cache knows of the call that runs, and of calls that ended early."""

    def __init__(self) -> None:
        self._call: ForwardCall | None = None
        self._plan: Plan | None = None  # of the call that runs
        self._handed: Plan | None = None
        self._broken: str | None = None

    @property
    def running(self) -> bool:
        """Whether a call was begun and has not ended."""
        return self._call is not None

    @property
    def handed(self) -> Plan | None:
        """The plan that :meth:`handing` gives to the layers, or None outside of it."""
        return self._handed

    @contextmanager
    def handing(self, plan: Plan) -> Iterator[None]:
        """Gives a plan made elsewhere to the layers; their calls are then not recorded.

        Args:
            plan: Whoever made it accounts for the tokens, too.
        """
        self._handed = plan
        try:
            yield
        finally:
            self._handed = None

    def check(self) -> None:
        """Undoes a call that never got to store anything; to be called before each use.

        Raises:
            BrokenCache: An earlier call or change ended after it had begun to store.
        """
        call = self._call
        if self._broken is None and call is not None:
            if call.stored:
                self._broken = (
                    "cache: a forward call on it ended early, so that its layers do not hold the "
                    f"same tokens; {_AGAIN}"
                )
            else:
                call.undo()
                self.close()
        if self._broken is not None:
            raise BrokenCache(self._broken)

    def refuse(self, reason: BaseException) -> None:
        """Refuses the cache from now on."""
        self._broken = f"cache: {reason}; {_AGAIN}"

    def hear(self, *reports: Callable[[], None]) -> None:
        """Asks what became of earlier calls, and refuses the cache for what was lost or wrong.

        Args:
            reports: Functions that raise an error for it.

        Raises:
            BrokenCache: See :meth:`check`.
        """
        self.check()
        try:
            for report in reports:
                report()
        except (OutlierOverflow, ValueError) as error:
            self.refuse(error)
            raise

    @contextmanager
    def changing(self, what: str) -> Iterator[None]:
        """Surrounds a change of all layers; if it ends early, the cache is refused from then on.

        Args:
            what: Names the change.
        """
        self.check()
        self._broken = f"cache: {what} failed; {_AGAIN}"
        yield
        self._broken = None

    def begin(self, call: ForwardCall) -> None:
        """Starts a call, before planning it changes anything."""
        self._call, self._plan = call, None

    def planned(self, plan: Plan) -> None:
        """Takes the plan of the call that runs, which every layer gets from then on."""
        self._plan = plan

    def enter(self, layer: int, new_len: int) -> tuple[Plan, bool]:
        """Begins a layer's part of the call that runs.

        Args:
            layer: Its number.
            new_len: Columns that it was given.

        Returns:
            The plan, and whether the layer is the first to take it.

        Raises:
            UserError: No call was begun and planned for it, or another one.
        """
        if self._handed is not None:
            return self._handed, False
        call, plan = self._call, self._plan
        if call is None or plan is None or layer in call.done:
            raise UserError(
                f"cache: layer {layer} was called without a forward call of the model, which says "
                "what is padding; call the model, or begin_forward before each call of the layers"
            )
        if new_len != call.new_len:
            raise UserError(
                f"cache: layer {layer} was given {new_len} columns in a forward call of "
                f"{call.new_len}"
            )
        return plan, not call.done

    def store(self) -> None:
        """Notes that a layer begins to store: from here on the call cannot be undone."""
        if self._call is not None:
            self._call.stored = True

    def leave(self, layer: int) -> bool:
        """Ends a layer's part of the call; returns whether the call ends with it."""
        call = self._call
        if self._handed is not None or call is None:
            return False
        call.done.add(layer)
        return not call.held and len(call.done) == call.layers

    def end(self) -> Plan | None:
        """The plan of the call that runs if all layers took it; None if no call runs.

        Raises:
            UserError: A layer did not take part.
        """
        call = self._call
        if self._handed is not None or call is None:
            return None
        missing = sorted(set(range(call.layers)) - call.done)
        if missing:
            raise UserError(
                f"cache: layer {missing[0]} took no part in the forward call; layers cannot be "
                "skipped over a quantized cache"
            )
        return self._plan

    def close(self) -> None:
        """Forgets the call: its tokens belong to the cache, or it was undone."""
        self._call = self._plan = None
