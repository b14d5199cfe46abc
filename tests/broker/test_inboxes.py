"""Where a push waits in the embedded store: in its own row while it is fresh, then in `inbox`."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyroaring import BitMap

from broker.model import NewMessage, OwedRequest, Settled
from broker.sqlite import inbox, upkeep
from broker.sqlite.engine import open_database
from broker.sqlite.inbox import Fresh, InboxWrites
from broker.sqlite.reads import Reads
from broker.sqlite.routes import AppStates
from broker.store import Store
from broker.store_sqlite import SqliteStore
from tests.broker.message_contract import MessageContract
from tests.broker.store_contract import (
    HOUR,
    START,
    Clock,
    MakeStore,
    StoreContract,
    claimed,
    expire_all,
    owed,
    push,
)

APP = (
    "INSERT INTO apps VALUES (1, 'key', '', '', '', x'', 0, 0, 2, 0, 0, '[]', '{}')"  # the newest 2 are kept
)
MESSAGE = "INSERT INTO messages (msg_id, app, broadcast, body, created_at, expires_at, sendno, target)"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "holdfast.db"


@pytest.fixture
def clock() -> Clock:
    return Clock()


async def opened(path: Path, clock: Clock) -> SqliteStore:
    store = SqliteStore(path, clock=clock)
    await store.open()
    return store


class TestMovedAtOnce(StoreContract, MessageContract):
    """The contracts, with what waits now here, now there."""

    @pytest.fixture(autouse=True, params=[1, 3])
    def _soon(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(inbox, "MOVE_AFTER", request.param)

    @pytest.fixture
    def make_store(self, clock: Clock, path: Path) -> MakeStore:
        async def make() -> Store:
            return await opened(path, clock)

        return make


def rows(path: Path) -> list[tuple[int, ...]]:
    """(app, devno, msg_id)."""
    connection = sqlite3.connect(path)
    found = connection.execute("SELECT * FROM inbox ORDER BY app, devno, msg_id").fetchall()
    connection.close()
    return found


async def ids(store: Store, messages: list[NewMessage]) -> list[int]:
    return [appended.msg_id for appended in await store.append(messages)]


async def test_a_push_that_is_taken_soon_never_stands_in_an_inbox(
    path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await opened(path, clock)
    app = await store.create_app("a")
    monkeypatch.setattr(inbox, "MOVE_AFTER", 4)
    first, second = await ids(store, [push(app, [0]), push(app, [1])])
    assert rows(path) == []
    assert await owed(store, app, 0) == [first]
    await store.settle([Settled(app.app_id, first, False, [0])])
    assert await owed(store, app, 0) == []
    third, fourth = await ids(store, [push(app, [0]), push(app, [0])])
    assert rows(path) == [(1, 0, third), (1, 0, fourth), (1, 1, second)]
    assert await owed(store, app, 0) == [third, fourth]
    await store.close()


async def test_what_was_fresh_waits_after_a_restart(path: Path, clock: Clock) -> None:
    store = await opened(path, clock)
    app = await store.create_app("a")
    waits, done, shared, _fleeting = await ids(
        store, [push(app, [0]), push(app, [0]), push(app, [0, 1]), push(app, [2], ttl=0)]
    )
    await store.settle([Settled(app.app_id, done, False, [0])])
    await store.close()
    for _ in range(2):
        store = await opened(path, clock)
        assert await owed(store, app, 0) == [waits, shared]
        assert (await claimed(store, app, 0)).may_owe
        assert not (await claimed(store, app, 2)).may_owe
        await store.close()
    assert rows(path) == [(1, 0, shared), (1, 1, shared)]
    store = await opened(path, clock)
    await store.settle([Settled(app.app_id, msg_id, False, [0]) for msg_id in (waits, shared)])
    assert await owed(store, app, 0) == []
    assert rows(path) == [(1, 1, shared)]
    await store.close()


async def test_g6_memory_is_bounded_whatever_kind_of_message_comes(
    path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "MOVE_AFTER", 4)
    store = await opened(path, clock)
    app = await store.create_app("a")
    kept = store._writer._engine._inbox  # type: ignore[attr-defined]
    for _ in range(20):
        await store.append([push(app, [0, 1]), push(app, [0], ttl=0), push(app, [0], broadcast=True)])
        assert len(kept._at_once) <= 4
        assert kept._size <= 4
    await store.close()


async def test_ids_stay_above_those_that_were_moved_when_the_clock_steps_back(
    path: Path, clock: Clock
) -> None:
    store = await opened(path, clock)
    app = await store.create_app("a")
    await store.close()
    connection = sqlite3.connect(path)
    connection.execute("UPDATE high_water SET moved = ?", (1 << 52,))  # a message that was rolled back
    connection.commit()
    connection.close()
    store = await opened(path, clock)
    (msg_id,) = await ids(store, [push(app, [0])])
    assert msg_id > 1 << 52
    await store.close()


async def test_s8_what_is_fresh_counts_among_the_newest(
    path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "MOVE_AFTER", 2)
    store = await opened(path, clock)
    app = await store.create_app("a", offline_limit=3)
    waiting: list[int] = []
    for _ in range(4):
        waiting += await ids(store, [push(app, [0])])
        waiting += await ids(store, [push(app, [0, 1])])
        waiting += await ids(store, [push(app, [0], collapse=str(len(waiting)))])
        assert await owed(store, app, 0) == waiting[-3:]
    await store.close()


async def test_s8_what_a_device_took_while_it_was_online_does_not_count(path: Path, clock: Clock) -> None:
    store = await opened(path, clock)
    app = await store.create_app("a", offline_limit=2)
    epoch = (await claimed(store, app, 0)).epoch
    for _ in range(5):
        (msg_id,) = await ids(store, [push(app, [0])])
        await store.settle([Settled(app.app_id, msg_id, False, [0])])
    store.release_route(app.app_id, 0, epoch, START)
    waiting = [(await ids(store, [push(app, [0])]))[0] for _ in range(3)]
    assert await owed(store, app, 0) == waiting[1:]
    await store.close()


async def test_nothing_of_a_deleted_app_stays(
    path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "SCAN_MESSAGES", 2)
    store = await opened(path, clock)
    app, other = await store.create_app("a"), await store.create_app("b")
    await store.append([push(app, [devno]) for devno in range(5)])
    await store.delete_app(app.key)
    monkeypatch.setattr(inbox, "MOVE_AFTER", 1)  # so it moves while the app is being removed
    await expire_all(store, START)
    (msg_id,) = await ids(store, [push(other, [7])])
    await store.close()
    assert rows(path) == [(other.app_id, 7, msg_id)]


async def test_what_expired_while_it_was_fresh_is_not_moved(path: Path, clock: Clock) -> None:
    store = await opened(path, clock)
    app = await store.create_app("a")
    await store.append([push(app, [0], ttl=HOUR)])
    clock.now += 2 * HOUR
    await expire_all(store, clock.now)
    await store.close()
    store = await opened(path, clock)
    assert rows(path) == []
    await store.close()


# One transaction after the other


class Tables:
    """A database with one app, and pushes that are put into it as the writer does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.connection = open_database(path, cache_size=1 << 20)
        self.connection.execute(APP)
        self.fresh, self.states = Fresh(), AppStates()
        self.inbox = InboxWrites(self.connection, self.states, self.fresh)
        self.inbox.open()
        self.reader = sqlite3.connect(path, isolation_level=None)

    def put(self, *msg_ids: int, move: bool = False, end: str = "COMMIT") -> None:
        """To device 0."""
        self.inbox.begin()
        self.connection.execute("BEGIN IMMEDIATE")
        for msg_id in msg_ids:
            row = (msg_id, 1, 0, b"{}", START, START + HOUR, "", 0)
            self.connection.execute(f"{MESSAGE} VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
        self.inbox.stored(len(msg_ids), msg_ids[-1])
        self.inbox.put_fresh([(1, 0, msg_id) for msg_id in msg_ids])
        if move:
            self.inbox.move()
        self.connection.execute(end)

    def owed(self) -> list[int]:
        reads = Reads(self.reader, Clock(), self.fresh)
        (answer,) = reads.handlers["fetch_owed"]([[OwedRequest(1, 0, 0, 100)]])
        return [message.msg_id for message in answer[0]]

    def close(self) -> None:
        for connection in (self.reader, self.connection):
            connection.close()


@pytest.fixture
def tables(path: Path) -> Iterator[Tables]:
    tables = Tables(path)
    yield tables
    tables.close()


def test_a_move_that_is_rolled_back_has_moved_nothing(
    tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "MOVE_AFTER", 4)
    tables.put(1, 2)
    tables.put(3, move=True, end="ROLLBACK")
    assert rows(tables.path) == []
    assert tables.owed() == [1, 2]
    tables.inbox.begin()
    tables.inbox.finish()  # what comes now may make the room that there was not
    assert rows(tables.path) == []
    tables.put(4, 5)
    tables.inbox.finish()  # it is tried again
    assert rows(tables.path) == [(1, 0, msg_id) for msg_id in (1, 2, 4, 5)]
    tables.put(6)
    assert tables.owed() == [1, 2, 4, 5, 6]


def test_a_push_that_is_taken_after_a_move_that_was_rolled_back_waits_nowhere(tables: Tables) -> None:
    tables.put(1)
    tables.put(2, move=True, end="ROLLBACK")
    tables.inbox.begin()
    tables.connection.execute("UPDATE messages SET delivered = 0 WHERE msg_id = 1")
    tables.inbox.take([(1, 0, 1)])
    tables.put(3, move=True)
    assert tables.owed() == [3]


def test_whoever_reads_an_older_snapshot_still_finds_what_was_moved_since(tables: Tables) -> None:
    tables.put(1)
    with tables.fresh.reading():
        tables.reader.execute("BEGIN")
        tables.reader.execute("SELECT * FROM high_water").fetchall()  # now the snapshot is taken
        tables.put(2, move=True)
        tables.put(3, move=True)
        tables.put(4, move=True)
        assert tables.owed() == [1]
        tables.reader.execute("COMMIT")
    with tables.fresh.reading() as find:
        assert find((1, 0), 0) == [4]  # moved, and not known to be committed
    tables.put(5, move=True)
    tables.put(6)
    assert tables.owed() == [1, 2, 3, 4, 5, 6]


def test_what_is_moved_is_forgotten_when_nobody_can_need_it(tables: Tables) -> None:
    tables.put(1, move=True)
    tables.put(2)
    with tables.fresh.reading() as find:
        assert find((1, 0), 0) == [2]
        assert find((1, 0), 2) == []
        assert find((1, 1), 0) == []


def test_the_route_decides_whose_surplus_goes(tables: Tables) -> None:
    tables.put(1, 2)
    assert tables.inbox.surplus() == []
    tables.put(3)
    tables.inbox.put([(1, 0, 4)], evicts=False)
    assert tables.inbox.surplus() == [(1, 0, 1), (1, 0, 2)]
    tables.states[1].routed = BitMap([0])
    tables.put(5)
    assert tables.inbox.surplus() == []
