"""Decides which packed blocks are freed: those that no sequence lists any more.

The sequences' tables say which blocks are live, so that no reference count can drift. An arena
without live blocks is freed. An arena whose last appends are dead is rewound to where they began.
Of the others, those with many dead blocks are compacted: their live blocks move into one new arena,
and the old ones are freed.

After that, there are at most an eighth as many dead blocks as live ones, and room for at most a
sixteenth as many new ones. At most eight blocks are moved for each that died. Only cropping and
selecting sequences do this; appending moves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

Block = tuple[int, int]  # arena, place

# An arena may hold 1/MAX_DEAD as many dead blocks as live ones, and all arenas together may have
# room for 1/MAX_ROOM as many new blocks as there are live ones.
MAX_DEAD, MAX_ROOM = 8, 16


@dataclass(eq=False)
class ArenaRecord:
    """The host's record of an arena, which forks of a layout share.

    Attributes:
        capacity: Number of places; 0 for a number that no arena has now.
        used: Number of places that were given out.
        shared: Whether forks may have blocks in it, too; then no place is given out again.
        starts: The first place of each append, increasing.
    """

    capacity: int
    used: int = 0
    shared: bool = False
    starts: list[int] = field(default_factory=list)

    @property
    def room(self) -> int:
        """The number of places that are not given out."""
        return self.capacity - self.used

    def take(self, blocks: int) -> int:
        """Gives out consecutive places and returns the first."""
        at = self.used
        self.starts.append(at)
        self.used += blocks
        return at

    def rewind(self, end: int) -> bool:
        """Undoes the appends that began at place `end` or later; returns whether there were any."""
        before = self.used
        while self.starts and self.starts[-1] >= end:
            self.used = self.starts.pop()
        return self.used < before


@dataclass(frozen=True)
class Move:
    """Live blocks that move into a new arena.

    Attributes:
        arena: Number of the new arena.
        sources: Old arenas and the places of the blocks in them, in the order of the new places.
    """

    arena: int
    sources: list[tuple[int, list[int]]]


@dataclass(frozen=True)
class Reclaim:
    """The change of arenas that a store makes to follow its layout.

    Attributes:
        rewound: Rewound arenas, and the number of places of each that are still used.
        moves: New arenas, made before old ones are freed.
        freed: Numbers of the arenas that are freed.
    """

    rewound: list[tuple[int, int]]
    moves: list[Move]
    freed: list[int]


def reclaim(arenas: list[ArenaRecord], tables: list[list[Block]]) -> Reclaim | None:
    """Frees dead blocks in the records and returns the change for the stores.

    Args:
        arenas: Records of the arenas, changed in place: those of freed arenas are replaced, and a
            new one may be added.
        tables: The blocks of each sequence, changed in place where blocks move.

    Returns:
        The change that stores have to make, or None if there is none.
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
    """Returns the numbers of the arenas to compact."""
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
    """Returns the lowest number that no arena has."""
    return next((i for i, record in enumerate(arenas) if not record.capacity), len(arenas))
