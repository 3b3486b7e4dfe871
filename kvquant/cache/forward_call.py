"""Follows a forward call over a cache through all layers and handles calls that end early.

A call that ends early (out of memory, NaN, Ctrl-C) before any layer has stored tokens is undone.
After that, the layers no longer hold the same tokens, and the cache is refused from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, Self, TypeVar

import torch

from kvquant.errors import OutlierOverflow, UserError


class DevicePlan(Protocol):
    """The plan of a call as the record of calls sees it."""

    @property
    def device(self) -> torch.device:
        """The device of the plan's tensors."""

    def on(self, device: torch.device) -> Self:
        """Returns the plan, as it is before any layer has completed it, for another device."""


Plan = TypeVar("Plan", bound=DevicePlan)

_AGAIN = "reset() it or take a new one"


class BrokenCache(UserError, RuntimeError):
    """The error for a cache whose layers do not hold the tokens that they were given."""


class ForwardCall:
    """The progress of one call, from its beginning to its last layer.

    Args:
        layers: Number of layers of the cache.
        new_len: Number of new columns.
        held: Whether the caller who began the call ends it, too; else the last layer does.
        undo: Reverts what the plan changed; called at most once, and only while nothing is stored.

    Attributes:
        done: Indices of the layers that have finished their part.
        stored: Whether a layer has begun to store tokens.
    """

    def __init__(self, layers: int, new_len: int, held: bool, undo: Callable[[], None]) -> None:
        self.layers = layers
        self.new_len = new_len
        self.held = held
        self.undo = undo
        self.done: set[int] = set()
        self.stored = False


class CallRecord(Generic[Plan]):
    """The record of a cache's current call and of calls that ended early."""

    def __init__(self) -> None:
        self._call: ForwardCall | None = None
        self._begun: Plan | None = None  # the plan of the current call as it began
        # That plan for the layers of each device, and whether it is complete there, with what only
        # a layer brings.
        self._plans: dict[torch.device, tuple[Plan, bool]] = {}
        self._handed: Plan | None = None
        self._broken: str | None = None

    @property
    def running(self) -> bool:
        """Whether a call has begun and not ended."""
        return self._call is not None

    @property
    def handed(self) -> Plan | None:
        """The plan that :meth:`handing` gives to the layers, or None outside of that context."""
        return self._handed

    @contextmanager
    def handing(self, plan: Plan) -> Iterator[None]:
        """Gives the layers a plan made elsewhere, whose calls are not recorded.

        Args:
            plan: The plan; whoever made it also counts its tokens.
        """
        self._handed = plan
        try:
            yield
        finally:
            self._handed = None

    def check(self) -> None:
        """Undoes a call that ended before it stored anything; call this before each use.

        Raises:
            BrokenCache: An earlier call or change ended early, after it had begun to store.
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
        """Makes every later use of the cache raise the given reason."""
        self._broken = f"cache: {reason}; {_AGAIN}"

    def hear(self, *reports: Callable[[], None]) -> None:
        """Checks the results of earlier calls and refuses the cache from then on if one failed.

        Args:
            reports: Functions that raise an error if an earlier call failed.

        Raises:
            BrokenCache: The cache was refused before; see :meth:`check`.
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
        """Surrounds a change of all layers, which breaks the cache if it ends early.

        Args:
            what: Name of the change.
        """
        self.check()
        self._broken = f"cache: {what} failed; {_AGAIN}"
        yield
        self._broken = None

    def begin(self, call: ForwardCall) -> None:
        """Records the start of a call, before its planning changes anything."""
        self._call, self._begun = call, None
        self._plans.clear()

    def planned(self, plan: Plan) -> None:
        """Sets the plan of the current call, which every layer gets from then on."""
        self._begun = plan
        self._plans[plan.device] = plan, False

    def meet(self, plan: Plan) -> None:
        """Sets the plan of the current call for a device after a layer has completed it."""
        self._plans[plan.device] = plan, True

    def enter(self, layer: int, new_len: int, device: torch.device) -> tuple[Plan, bool]:
        """Begins a layer's part of the current call.

        Args:
            layer: Index of the layer.
            new_len: Number of columns that the layer was given.
            device: Device of the layer.

        Returns:
            The plan, and whether it is complete.

        Raises:
            UserError: No call was begun for the layer, or one with another number of columns.
        """
        if self._handed is not None:
            return self._handed, True
        call, begun = self._call, self._begun
        if call is None or begun is None or layer in call.done:
            raise UserError(
                f"cache: layer {layer} was called without a forward call of the model, which says "
                "what is padding; call the model, or begin_forward before each call of the layers"
            )
        if new_len != call.new_len:
            raise UserError(
                f"cache: layer {layer} was given {new_len} columns in a forward call of "
                f"{call.new_len}"
            )
        found = self._plans.get(device)
        if found is None:  # the first layer on a device that is not that of the call's inputs
            found = self._plans[device] = begun.on(device), False
        return found

    def store(self) -> None:
        """Notes that a layer begins to store, after which the call cannot be undone."""
        if self._call is not None:
            self._call.stored = True

    def leave(self, layer: int) -> bool:
        """Ends a layer's part of the call and returns whether the call ends with it."""
        call = self._call
        if self._handed is not None or call is None:
            return False
        call.done.add(layer)
        return not call.held and len(call.done) == call.layers

    def end(self) -> Plan | None:
        """Returns the plan as the current call began, which all layers must have finished, or None.

        Raises:
            UserError: A layer did not take part in the call.
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
        return self._begun

    def close(self) -> None:
        """Forgets the call, which was completed or undone."""
        self._call = self._begun = None
        self._plans.clear()
