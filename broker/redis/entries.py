"""Entries of an app's log, and what follows from them: who gets what into the inbox, and who is rung. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from msgspec.structs import replace
from pyroaring import BitMap

from broker.bus import Broadcast, Doorbell, Recalled, Targeted
from broker.model import StoredBroadcast, Withdrawn
from broker.redis.partitions import Inbox
from broker.redis.rows import ROWS, Row, stored_message

SPREAD_ENTRIES: Final = 512  # taken from the log at once: a lease is long enough for them
SPREAD_BYTES: Final = 1 << 20
SPREAD_DELIVERIES: Final = 20_000


class Entry(NamedTuple):
    """Of the log."""

    msg_id: int
    row: Row
    targets: BitMap


def read_entry(packed: bytes) -> tuple[int, Row]:
    """As the log has it; the row knows the lasting broadcast before it."""
    msg_id, after, row = packed.split(b" ", 2)
    return int(msg_id), replace(ROWS.decode(row), after=int(after))


def size_of(row: Row) -> int:
    return len(row.body) + (len(row.targets) if isinstance(row.targets, bytes) else 0)


def count_online(entries: Sequence[Entry], online: BitMap) -> list[int]:
    return [entry.targets.intersection_cardinality(online) for entry in entries]


def bounded(entries: Iterable[Entry]) -> list[Entry]:
    """As many as are spread in one step."""
    some: list[Entry] = []
    deliveries = size = 0
    for entry in entries:
        deliveries += 0 if entry.row.broadcast else len(entry.targets)
        size += size_of(entry.row)
        if some and (deliveries > SPREAD_DELIVERIES or size > SPREAD_BYTES or len(some) >= SPREAD_ENTRIES):
            break
        some.append(entry)
    return some


def without(entries: Sequence[Entry], gone: Mapping[int, BitMap]) -> Sequence[Entry]:
    """Some targets are to get nothing of them."""
    return [entry._replace(targets=entry.targets - gone.get(entry.msg_id, BitMap())) for entry in entries]


def with_routes(entries: Iterable[Entry], routes: Mapping[int, int]) -> Iterator[Entry]:
    """Online are those that have one."""
    for entry in entries:
        count = sum(devno in routes for devno in entry.targets)
        yield entry._replace(row=replace(entry.row, online=count)) if count else entry


def is_wide(row: Row) -> bool:
    """A broadcast, or of one in parts: its row has its targets, and who of them is online is asked for it alone."""
    return row.broadcast or row.paced or bool(row.part_of)


def takes(row: Row) -> bool:
    """It may take others' places, or (paced) its parts may lose theirs."""
    return bool(row.collapse or (row.replaces and not row.paced))


def independent(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Runs in which none takes another one's place: that has to be in the inboxes before."""
    run: list[Entry] = []
    keys: set[str] = set()
    ids: set[int] = set()
    for entry in entries:
        row = entry.row
        if run and ((row.collapse and row.collapse in keys) or (row.replaces and row.replaces in ids)):
            yield run
            run, keys, ids = [], set(), set()
        run.append(entry)
        if row.collapse:
            keys.add(row.collapse)
        ids.update((entry.msg_id, row.part_of))
    if run:
        yield run


def inboxes_of(entries: Sequence[Entry]) -> dict[int, Inbox]:
    """What each device gets of them. What does not last is not kept, but the route is asked for."""
    inboxes: dict[int, Inbox] = {}
    for msg_id, row, targets in entries:
        if row.broadcast or row.paced:
            continue
        one = (msg_id, row.expires_at if row.lasting else 0.0)
        evicts = row.evicts and row.lasting
        for devno in targets:
            known = inboxes.get(devno)
            if known is None:
                inboxes[devno] = Inbox([one], evicts)
            else:
                known.entries.append(one)
                if evicts and not known.evicts:
                    inboxes[devno] = known._replace(evicts=True)
    return inboxes


Ring = tuple[Sequence[int] | None, list[Doorbell]]
"""Whom to ring (None: all nodes), and what."""


def rings_of(
    entries: Sequence[Entry], routes: Mapping[int, int], withdrawn: Mapping[int, Sequence[Withdrawn]]
) -> Iterator[list[Ring]]:
    """Those of one list may go at the same time: what goes to all nodes and what goes to some take turns, so that
    each node hears the ids in their order."""
    everywhere: list[Doorbell] = []
    by_node: dict[int, list[Doorbell]] = {}
    for entry in entries:
        general, targeted = _general(entry, withdrawn), _targeted(entry, routes)
        if general and by_node:
            yield [((node,), doorbells) for node, doorbells in by_node.items()]
            by_node = {}
        everywhere += general
        if targeted and everywhere:
            yield [(None, everywhere)]
            everywhere = []
        for node, doorbell in targeted.items():
            by_node.setdefault(node, []).append(doorbell)
    if everywhere:
        yield [(None, everywhere)]
    if by_node:
        yield [((node,), doorbells) for node, doorbells in by_node.items()]


def _general(entry: Entry, withdrawn: Mapping[int, Sequence[Withdrawn]]) -> list[Doorbell]:
    msg_id, row, targets = entry
    doorbells: list[Doorbell] = []
    if msg_id in withdrawn:
        doorbells.append(Recalled(withdrawn[msg_id]))
    if row.broadcast and targets and not row.paced:
        doorbells.append(Broadcast(StoredBroadcast(stored_message(msg_id, row), targets, BitMap())))
    return doorbells


def _targeted(entry: Entry, routes: Mapping[int, int]) -> dict[int, Doorbell]:
    """By node."""
    msg_id, row, targets = entry
    if row.broadcast or row.paced:
        return {}
    devnos: dict[int, list[int]] = {}
    for devno in targets:
        node = routes.get(devno)
        if node is not None:
            devnos.setdefault(node, []).append(devno)
    if not devnos:
        return {}
    message = stored_message(msg_id, row)
    return {node: Targeted(message, tuple(some)) for node, some in devnos.items()}
