"""Documents of different lengths in sequences of one length, with next to no room left over."""

import bisect

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


def best_fit(lengths: npt.NDArray[np.int64], capacity: int) -> list[Ids]:
    """Best-fit decreasing: each document goes where it leaves the least room (Johnson 1973).

    Lengths are at most ``capacity``. Returns the indices of each sequence's documents; equal
    input gives equal output. Time grows with documents x log(capacity).
    """
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # sequences by the room left
    rooms: list[int] = []  # the rooms that some sequence has, ascending
    rows: list[list[int]] = []
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[place]
            row = with_room[room].pop()
            if not with_room[room]:
                rooms.pop(place)
        rows[row].append(document)
        left = room - length
        if left and not with_room[left]:
            bisect.insort(rooms, left)
        if left:
            with_room[left].append(row)
    return [np.array(row, dtype=np.int64) for row in rows]
