"""A forward call over a cache: begun, taken by every layer, ended; or undone.

A call that ends early (out of memory, NaN, Ctrl-C) leaves a cache as it was before, or refused from
then on: once a layer has stored its tokens, the layers no longer hold the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvquant.errors import OutlierOverflow, UserError

_AGAIN = "reset() it or take a new one"


class BrokenCache(UserError, RuntimeError):
    """The layers of a cache do not hold the same tokens, or not what they were given."""


class ForwardCall:
    """One call, from its plan to its last layer.

    Args:
        layers: Of the cache.
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


class CallRecord:
    """What a cache knows of the call that runs, and of calls that ended early."""

    def __init__(self) -> None:
        self._call: ForwardCall | None = None
        self._broken: str | None = None

    @property
    def running(self) -> bool:
        """Whether a call was begun and has not ended."""
        return self._call is not None

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
                self._call = None
        if self._broken is not None:
            raise BrokenCache(self._broken)

    def refuse(self, reason: BaseException) -> None:
        """Refuses the cache from now on."""
        self._broken = f"cache: {reason}; {_AGAIN}"

    def hear(self, *reports: Callable[[], None]) -> None:
        """Asks what became of earlier calls, and refuses the cache for what was lost or wrong.

        Args:
            reports: Raise for it.

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
        """A change of all layers; if it ends early, the cache is refused from then on.

        Args:
            what: Names the change.
        """
        self.check()
        self._broken = f"cache: {what} failed; {_AGAIN}"
        yield
        self._broken = None

    def begin(self, call: ForwardCall) -> None:
        """Starts a call; before the plan changes anything."""
        self._call = call

    def enter(self, layer: int, new_len: int) -> None:
        """A layer begins its part.

        Args:
            layer: Its number.
            new_len: Columns that it was given.

        Raises:
            UserError: No call was begun for it, or another one.
        """
        call = self._call
        if call is None or layer in call.done:
            raise UserError(
                f"cache: layer {layer} was called without a forward call of the model, which says "
                "what is padding; call the model, or begin_forward before each call of the layers"
            )
        if new_len != call.new_len:
            raise UserError(
                f"cache: layer {layer} was given {new_len} columns in a forward call of "
                f"{call.new_len}"
            )

    def store(self) -> None:
        """A layer begins to store: from here on the call cannot be undone."""
        if self._call is not None:
            self._call.stored = True

    def leave(self, layer: int) -> bool:
        """A layer has done its part; whether the call ends with it."""
        call = self._call
        assert call is not None
        call.done.add(layer)
        return not call.held and len(call.done) == call.layers

    def end(self) -> bool:
        """Whether the call that runs is whole; it then is no more.

        Raises:
            UserError: A layer did not take part.
        """
        call = self._call
        if call is None:
            return False
        missing = sorted(set(range(call.layers)) - call.done)
        if missing:
            raise UserError(
                f"cache: layer {missing[0]} took no part in the forward call; layers cannot be "
                "skipped over a quantized cache"
            )
        return True

    def close(self) -> None:
        """The call's tokens belong to the cache."""
        self._call = None
