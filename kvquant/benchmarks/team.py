"""What the processes that run a job together tell each other, so that all do the same.

They decide by the same numbers, of which each has its own: what fits in its memory, the seconds it
took. The first process measures and writes; the others work along.
"""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")


class Team:
    """A single process, which has nobody to ask.

    Attributes:
        rank: The process's number.
        size: Number of processes.
    """

    rank = 0
    size = 1

    def gathered(self, value: T) -> list[T]:
        """Returns the values of all processes, by their ranks."""
        return [value]

    def wait(self) -> None:
        """Waits until all processes are here."""

    @property
    def first(self) -> bool:
        """Whether this process measures and writes."""
        return self.rank == 0

    def told(self, value: T) -> T:
        """Returns the value of the first process."""
        return self.gathered(value)[0]

    def least(self, value: int) -> int:
        """Returns the smallest of all processes' numbers."""
        return min(self.gathered(value))

    def most(self, value: float) -> float:
        """Returns the largest of all processes' numbers."""
        return max(self.gathered(value))


class ProcessTeam(Team):
    """The processes that :mod:`torch.distributed` was started with.

    They talk over the host, so that a GPU whose process waits does nothing: what it would draw
    while it waited for others by NCCL would count as the job's energy.
    """

    def __init__(self) -> None:
        from torch import distributed

        self._distributed: Any = distributed
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self._group = distributed.new_group(backend="gloo")

    def gathered(self, value: T) -> list[T]:
        """Returns the values of all processes, by their ranks."""
        found: list[Any] = [None] * self.size
        self._distributed.all_gather_object(found, value, group=self._group)
        return found

    def wait(self) -> None:
        """Waits until all processes are here."""
        self._distributed.barrier(group=self._group)
