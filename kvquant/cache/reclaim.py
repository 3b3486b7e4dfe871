"""Which packed blocks are returned: those that no sequence lists any more.

What is alive is read from the sequences' tables, so no count can drift from it. An arena of which
nothing is alive is returned whole. An arena whose last appends are dead is written again from where
they began. Of the others, those with many dead blocks are compacted: what is alive in them moves
into one new arena and they are returned.

After that, places that hold no living block are at most an eighth of those that do (dead blocks)
and a sixteenth more (room for the blocks to come). Moving costs at most eight blocks for each that
died. Only cutting and choosing sequences do this; appending moves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

Block = tuple[int, int]  # arena, place

# Of the living blocks: dead ones that an arena may hold, and room that all may have, one part in
# so many.
MAX_DEAD, MAX_ROOM = 8, 16


@dataclass(eq=False)
class ArenaRecord:
    """The host's record of an arena; forks of a layout share it with the arena itself.

    Attributes:
        capacity: Places; 0 for a number that no arena has now.
        used: Places that were given out.
        shared: Whether forks may have blocks in it, too; then no place is given out again.
        starts: The first places of what was appended, increasing.
    """

    capacity: int
    used: int = 0
    shared: bool = False
    starts: list[int] = field(default_factory=list)

    @property
    def room(self) -> int:
        """Places that were never given out."""
        return self.capacity - self.used

    def take(self, blocks: int) -> int:
        """Gives out consecutive places and returns the first."""
        at = self.used
        self.starts.append(at)
        self.used += blocks
        return at

    def rewind(self, end: int) -> bool:
        """Takes back what was appended at place `end` or later; whether there was any."""
        before = self.used
        while self.starts and self.starts[-1] >= end:
            self.used = self.starts.pop()
        return self.used < before


@dataclass(frozen=True)
class Move:
    """Living blocks that become an arena of their own.

    Attributes:
        arena: Its number.
        sources: Old arenas and the places taken from them, in the order of the new places.
    """

    arena: int
    sources: list[tuple[int, list[int]]]


@dataclass(frozen=True)
class Reclaim:
    """What a store does to follow its layout.

    Attributes:
        rewound: Arenas, and the places of each that are still used.
        moves: New arenas; made before old ones are returned.
        freed: Numbers of arenas that are returned.
    """

    rewound: list[tuple[int, int]]
    moves: list[Move]
    freed: list[int]


def reclaim(arenas: list[ArenaRecord], tables: list[list[Block]]) -> Reclaim | None:
    """Takes dead blocks back.

    Args:
        arenas: Changed: records of returned arenas are replaced, a new one may be added.
        tables: The blocks of each sequence; changed where blocks move.

    Returns:
        What stores have to do, or None if nothing is.
    """
    living: dict[int, list[int]] = {}
    for arena, place in dict.fromkeys(block for table in tables for block in table):
        living.setdefault(arena, []).append(place)
    freed, rewound = [], []
    for number, record in enumerate(arenas):
        if not record.capacity:
            continue
        if number not in living:
            freed.append(number)
        elif not record.shared and record.rewind(max(living[number]) + 1):
            rewound.append((number, record.used))
    victims = _victims(arenas, living)
    moves: list[Move] = []
    if victims:
        sources = [(number, living[number]) for number in victims]
        blocks = [(number, place) for number, places in sources for place in places]
        target = free_number(arenas)
        arenas[target : target + 1] = [ArenaRecord(len(blocks), len(blocks), starts=[0])]
        moved = {block: (target, place) for place, block in enumerate(blocks)}
        for table in tables:
            table[:] = [moved.get(block, block) for block in table]
        moves, freed = [Move(target, sources)], freed + victims
        rewound = [r for r in rewound if r[0] not in victims]
    for number in freed:
        arenas[number] = ArenaRecord(0)
    if not (freed or rewound):
        return None
    return Reclaim(rewound, moves, freed)


def _victims(arenas: list[ArenaRecord], living: dict[int, list[int]]) -> list[int]:
    """Numbers of the arenas to be compacted."""
    blocks = sum(map(len, living.values()))
    room = sum(arenas[number].room for number in living)
    roomy = room * MAX_ROOM > blocks
    return [
        number
        for number, places in living.items()
        if (arenas[number].used - len(places)) * MAX_DEAD > len(places)
        or (roomy and arenas[number].room)
    ]


def free_number(arenas: list[ArenaRecord]) -> int:
    """The lowest number that no arena has."""
    return next((i for i, record in enumerate(arenas) if not record.capacity), len(arenas))
