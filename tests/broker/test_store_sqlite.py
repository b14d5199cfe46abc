"""The embedded store: the contract, and what only SQLite can do wrong."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from pyroaring import BitMap

from broker.bitmaps import encode_bits
from broker.model import App, DeviceChange, NewDevice, NewMessage, SessionItem, Settled, Term
from broker.sqlite.engine import APPLICATION_ID
from broker.sqlite.messages import ID_EPOCH
from broker.store import PIECE, Store, StoreError, StoreFull, StoreUnavailable
from broker.store_sqlite import LOAD_SLICE, SqliteStore
from broker.store_sqlite import _Posting as Posting
from broker.store_sqlite import _Postings as Postings
from tests.broker.activity_contract import ActivityContract
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


class TestSqliteStore(StoreContract, MessageContract, ActivityContract):
    @pytest.fixture
    def make_store(self, clock: Clock, tmp_path: Path) -> MakeStore:
        async def make() -> Store:
            store = SqliteStore(tmp_path / "data" / "holdfast.db", clock=clock)
            await store.open()
            return store

        return make


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "holdfast.db"


CHILD = """
import asyncio, sys
from pathlib import Path
from pyroaring import BitMap
from broker.model import NewMessage
from broker.store_sqlite import SqliteStore

async def main():
    store = SqliteStore(Path(sys.argv[1]))
    await store.open()
    app = await store.create_app("crash")
    async def append(devno):
        message = NewMessage(app.app_id, b"{}", BitMap([devno]), False, 0.0, 1e12)
        (appended,) = await store.append([message])
        sys.stdout.write(f"{app.key} {devno} {appended.msg_id}\\n")
        sys.stdout.flush()
    for first in range(0, 10**9, 20):
        await asyncio.gather(*[append(devno) for devno in range(first, first + 20)])

asyncio.run(main())
"""


def _answers_before_kill_9(path: Path, reported: int) -> list[str]:
    """What a child that appends without end had answered when it was killed, at least `reported` lines."""
    command = [sys.executable, "-c", CHILD, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        lines = list(itertools.islice(child.stdout, reported))
        child.send_signal(signal.SIGKILL)
        lines += child.stdout.readlines()  # answered before the signal arrived
    assert len(lines) >= reported
    return [line for line in lines if line.endswith("\n")]


@pytest.mark.parametrize("reported", [1, 45, 200])
async def test_s1_what_was_answered_survives_kill_9(path: Path, reported: int) -> None:
    lines = await asyncio.to_thread(_answers_before_kill_9, path, reported)
    store = SqliteStore(path)
    await store.open()
    for key, devno, msg_id in map(str.split, lines):
        app = await store.find_app(key)
        assert app is not None
        assert await owed(store, app, int(devno)) == [int(msg_id)]
        assert (await claimed(store, app, int(devno))).may_owe
    await store.close()


async def test_a_second_server_on_the_same_directory_is_refused(path: Path) -> None:
    first = SqliteStore(path)
    await first.open()
    with pytest.raises(StoreUnavailable, match=rf"in use by another server \(process {os.getpid()}\)"):
        await SqliteStore(path).open()
    await first.close()
    await first.open()
    await first.close()


def _spoil(path: Path, statement: str | None) -> None:
    if statement is None:
        path.write_bytes(b"damaged " * 1000)
        return
    connection = sqlite3.connect(path)
    connection.execute(statement)
    connection.close()


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        ("PRAGMA user_version = 99", "schema version 99"),
        ("PRAGMA application_id = 7", "not one of Holdfast"),
        (None, "not a database"),
    ],
)
async def test_a_file_we_cannot_use_is_refused_with_the_reason(
    path: Path, prepare: str | None, message: str
) -> None:
    store = SqliteStore(path)
    await store.open()
    await store.close()
    _spoil(path, prepare)
    with pytest.raises(StoreUnavailable, match=message):
        await SqliteStore(path).open()


SCHEMAS = Path(__file__).parent / "schemas"
ROWS = {  # of every table that a version changed
    1: "INSERT INTO retained VALUES (1, 't', x'31', 1, x'', NULL);",
    2: "INSERT INTO retained VALUES (1, 't', x'31', 1, x'', NULL, '');"
    " INSERT INTO session_items VALUES (1, 1, 's', 1, x'31');",
    3: "INSERT INTO retained VALUES (1, 't', x'31', 1, x'', NULL, '');"
    " INSERT INTO session_items VALUES (1, 1, 's', 1, x'31'), (1, 1, 's', 2, x'31');",
}
OLD_ID = int((START - ID_EPOCH) * 1000) << 22 | 5  # as ids were made until version 2
NEW_ID = int((START - ID_EPOCH) * 1000) << 12 | 5
APP = "INSERT INTO apps (key, name, master_secret, device_key, signing_key, open, created_at, offline_limit)"
DEVICE = "INSERT INTO devices (app, devno, rid, platform, tags, generation, created_at)"
MESSAGE = "INSERT INTO messages (msg_id, app, broadcast, body, created_at, expires_at, sendno, target)"


def _old_rows(version: int) -> str:
    newest = OLD_ID if version < 3 else NEW_ID
    shown = f"x'{encode_bits(BitMap((0,))).hex()}'"
    receipt = f"receipts VALUES (7, 'shown', 0, {shown})"
    step = f"steps VALUES (7, 'shown', 0, 0, 0, 0, {shown})"
    return f"""
{APP} VALUES ('old', 'old', 'secret', 'key', x'00', 0, 1.0, 100);
{DEVICE} VALUES (1, 0, 'phone', 'ios', '[]', 0, 1.0);
{MESSAGE} VALUES (7, 1, 0, x'7b7d', {START}, {START + HOUR}, '', 0);
{MESSAGE} VALUES ({newest}, 1, 0, x'7b7d', {START}, {START + HOUR}, '', 0);
INSERT INTO inbox VALUES (1, 0, 7), (1, 0, {newest});
INSERT INTO {receipt if version < 3 else step};
{ROWS[version]}
"""


def _tables(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    """The columns of every table, and the indexes."""
    with closing(sqlite3.connect(path)) as connection:
        names = connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall()
        tables = {
            name: sorted(row[1:4] for row in connection.execute(f"PRAGMA table_info({name})"))
            for (name,) in names
        }
        indexes = connection.execute(
            "SELECT tbl_name, name, sql FROM sqlite_schema WHERE type = 'index' AND sql NOT NULL ORDER BY name"
        ).fetchall()
    return tables | {"indexes": indexes}


@pytest.mark.parametrize("version", ROWS)
async def test_a_file_of_an_older_schema_version_is_brought_up_to_date(
    tmp_path: Path, path: Path, version: int
) -> None:
    fresh = tmp_path / "fresh" / "holdfast.db"
    store = SqliteStore(fresh, clock=Clock())
    await store.open()
    await store.close()
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript((SCHEMAS / f"version_{version}.sql").read_text())
        connection.executescript(_old_rows(version))
        connection.executescript(
            f"PRAGMA journal_mode = WAL; PRAGMA user_version = {version}; PRAGMA application_id = {APPLICATION_ID};"
        )
    store = SqliteStore(path, clock=Clock())
    for _ in range(2):  # the second time it is done
        await store.open()
        assert _tables(path) == _tables(fresh)
        app = await store.find_app("old")
        assert app is not None
        assert len(await store.list_retained(app.app_id)) == 1
        assert len(await store.list_session_items(app.app_id)) == version - 1
        assert (await store.find_devices(app.app_id, ["phone"]))["phone"].attributes == {}
        assert await owed(store, app, 0) == [7, NEW_ID]
        record = (await store.find_messages(app.app_id, [7]))[7]
        assert (record.receipts["shown"], record.targets) == (BitMap((0,)), BitMap((0,)))
        (appended,) = await store.append([push(app, [0])])
        assert NEW_ID < appended.msg_id < 2**53
        await store.settle([Settled(app.app_id, appended.msg_id, False, [0])])
        await store.close()
    clock = Clock()
    clock.now += 31 * 24 * HOUR
    store = SqliteStore(path, clock=clock)
    await store.open()
    await expire_all(store, clock.now)
    assert not await store.find_messages(app.app_id, [7, NEW_ID, appended.msg_id])
    await store.close()


async def test_a_directory_that_cannot_be_made_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnavailable, match="--data-dir"):
        await SqliteStore(tmp_path / "file" / "holdfast.db").open()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "small"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(directory)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs root, to mount a small tmpfs")
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)


async def test_s2_on_a_full_disk_a_write_says_so_and_has_changed_nothing(small_disk: Path) -> None:
    store = SqliteStore(small_disk / "holdfast.db", clock=Clock())
    await store.open()
    app = await store.create_app("full")
    kept: list[int] = []
    with pytest.raises(StoreFull):
        await _fill(store, app, kept)
    assert await owed(store, app, 0, limit=10_000) == kept[-100:]
    assert len(await store.find_messages(app.app_id, kept)) == len(kept)
    await store.close()


async def test_a_full_disk_recovers_once_there_is_room(small_disk: Path) -> None:
    store = SqliteStore(small_disk / "holdfast.db", clock=Clock())
    await store.open()
    app = await store.create_app("full")
    ballast = _ballast(small_disk)
    with pytest.raises(StoreFull):
        await _fill(store, app, [])
    await asyncio.to_thread(ballast.unlink)
    (appended,) = await store.append([_large(app)])
    assert (await owed(store, app, 0))[-1] == appended.msg_id
    await store.close()


def _pieces(store: SqliteStore) -> int:
    connection = sqlite3.connect(store._path)
    try:
        return int(connection.execute("SELECT count(*) FROM files").fetchone()[0])
    finally:
        connection.close()


async def _endless() -> AsyncIterator[bytes]:
    while True:
        yield b"x" * PIECE


async def test_what_an_upload_left_on_a_full_disk_goes_once_there_is_room(small_disk: Path) -> None:
    store = SqliteStore(
        small_disk / "holdfast.db", clock=Clock(), file_reserve=-1 << 30
    )  # the last byte, too
    await store.open()
    app = await store.create_app("full")
    ballast = small_disk / "ballast"
    await asyncio.to_thread(ballast.write_bytes, bytes(5 << 20))  # a checkpoint may need room before all else
    with pytest.raises(StoreFull):
        await store.files.write(app.app_id, "f", _endless())
    assert _pieces(store)
    await asyncio.to_thread(ballast.unlink)
    await expire_all(store, START)
    assert not _pieces(store)
    await store.close()


async def test_uploads_leave_room_to_pushes(path: Path) -> None:
    disk = os.statvfs(path.parent)
    store = SqliteStore(path, clock=Clock(), file_reserve=disk.f_blocks * disk.f_frsize)
    await store.open()
    app = await store.create_app("room")
    with pytest.raises(StoreFull, match="left to pushes"):
        await store.files.write(app.app_id, "f", _endless())
    assert not _pieces(store)
    await store.append([push(app, [0])])
    await store.close()


def _ballast(directory: Path) -> Path:
    ballast = directory / "ballast"
    with pytest.raises(OSError, match="No space"):
        ballast.write_bytes(bytes(8 << 20))
    return ballast


def _large(app: App) -> NewMessage:
    return replace(push(app, [0]), body=b"x" * 20_000)


async def _fill(store: Store, app: App, kept: list[int]) -> None:
    for _ in range(1_000):
        kept.extend(appended.msg_id for appended in await store.append([_large(app), _large(app)]))


@pytest.fixture
def read_only_disk(small_disk: Path) -> Path:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    return small_disk


async def test_a_read_only_directory_is_refused_with_what_to_do(read_only_disk: Path) -> None:
    with pytest.raises(StoreUnavailable, match="Read-only file system; fix its permissions"):
        await SqliteStore(read_only_disk / "holdfast.db").open()


async def test_only_the_culprit_of_a_group_fails(path: Path) -> None:
    store = SqliteStore(path, clock=Clock())
    await store.open()
    app = await store.create_app("mixed")
    bad = push(app, [1], sendno=None)  # type: ignore[arg-type]
    results = await asyncio.gather(
        *[store.append([push(app, [0])]) for _ in range(20)],
        store.append([push(app, [1]), bad]),
        *[store.append([push(app, [0])]) for _ in range(20)],
        return_exceptions=True,
    )
    assert [index for index, result in enumerate(results) if isinstance(result, Exception)] == [20]
    assert await owed(store, app, 1) == []
    await store.close()


async def test_s11_a_call_with_an_item_that_cannot_be_stored_stores_nothing(path: Path) -> None:
    store = SqliteStore(path, clock=Clock())
    await store.open()
    app = await store.create_app("atomic")
    before = [SessionItem(app.app_id, 1, "s", n, b"old") for n in range(600)]
    await store.save_session_items(before)
    bad = SessionItem(app.app_id, 1, None, 9, b"")  # type: ignore[arg-type]
    with pytest.raises(StoreError):
        await store.save_session_items([*[replace(item, value=None) for item in before], bad])
    assert await store.list_session_items(app.app_id) == before
    await store.close()


async def test_concurrent_appends_share_commits(path: Path) -> None:
    store = SqliteStore(path, clock=Clock())
    await store.open()
    app = await store.create_app("group")
    seen: list[int] = []
    store.stats.on_commit = lambda operations, _seconds: seen.append(operations)
    await asyncio.gather(*[store.append([push(app, [n])]) for n in range(3000)])
    assert sum(seen) == 3000
    assert len(seen) < 30
    await store.close()


async def test_the_file_gives_space_back_and_the_log_stays_bounded(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.sqlite.threads.CHECKPOINT_PAGES", 50)
    monkeypatch.setattr("broker.sqlite.threads.RESET_PAGES", 200)
    monkeypatch.setattr("broker.sqlite.threads.TRUNCATE_PAGES", 200)
    monkeypatch.setattr("broker.sqlite.upkeep.FREE_PAGES", 10)
    clock = Clock()
    store = SqliteStore(path, clock=clock)
    await store.open()
    app = await store.create_app("space")
    for first in range(0, 20_000, 500):
        await store.append([push(app, [n], cid=str(n)) for n in range(first, first + 500)])
    assert _size(f"{path}-wal") < 2 << 20
    clock.now += 40 * 86400
    await expire_all(store, clock.now)
    await store.close()
    assert _size(path) < 1 << 20


def _size(path: Path | str) -> int:
    return os.stat(path).st_size


async def test_last_online_is_written_in_bulk_and_read_at_once(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.store_sqlite.LAST_ONLINE_DEVICES", 10)
    store = SqliteStore(path, clock=Clock())
    await store.open()
    app = await store.create_app("times")
    names = [f"d{n}" for n in range(25)]
    await store.register(app.app_id, [NewDevice(name) for name in names])
    commits = store.stats.commits
    for devno in range(25):
        store.release_route(app.app_id, devno, (await claimed(store, app, devno)).epoch, START + devno)
    for _ in range(2):  # before and after they are written
        found = await store.find_devices(app.app_id, names)
        assert [found[name].last_online_at for name in names] == [START + devno for devno in range(25)]
        await store.settle([])
    assert store.stats.commits - commits <= 4
    await store.close()


async def test_cached_postings_cost_no_thread_and_are_bounded(path: Path) -> None:
    store = SqliteStore(path, clock=Clock(), posting_bytes=2_000)
    await store.open()
    app = await store.create_app("cache")
    await store.register(app.app_id, [NewDevice(f"d{n}", tags=frozenset({f"t{n}"})) for n in range(20)])
    terms = [(Term.TAG, f"t{n}") for n in range(20)]
    for _ in range(2):
        assert [list(bits) for bits in await store.postings(app.app_id, terms)] == [[n] for n in range(20)]
    await store.postings(app.app_id, terms[-1:])
    commits = store.stats.commits
    with pytest.raises(StopIteration):  # nothing to wait for
        store.postings(app.app_id, terms[-1:]).send(None)
    assert store.stats.commits == commits
    await store.close()


async def test_only_missing_postings_are_loaded_and_in_slices(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SqliteStore(path, clock=Clock())
    await store.open()
    app = await store.create_app("slices")
    terms = [(Term.TAG, f"t{n}") for n in range(2 * LOAD_SLICE + 2)]
    await store.postings(app.app_id, terms[:2])
    loaded: list[int] = []
    write = store._write

    def spy(kind: str, argument: Any, rows: int = 1) -> asyncio.Future[Any]:
        loaded.extend([len(argument[1])] if kind == "load_postings" else [])
        return write(kind, argument, rows)

    monkeypatch.setattr(store, "_write", spy)
    for _ in range(2):
        assert not any(await store.postings(app.app_id, terms))
    assert loaded == [LOAD_SLICE, LOAD_SLICE]
    await store.close()


async def test_postings_loaded_in_slices_are_of_one_moment(path: Path) -> None:
    store = SqliteStore(path, clock=Clock(), posting_bytes=1)  # none of them stays
    await store.open()
    app = await store.create_app("moment")
    names = [f"d{n}" for n in range(50)]
    await store.register(app.app_id, [NewDevice(name, tags=frozenset({"left"})) for name in names])
    terms = [(Term.TAG, "left"), *((Term.TAG, f"t{n}") for n in range(3 * LOAD_SLICE)), (Term.TAG, "right")]
    left, right = frozenset({"left"}), frozenset({"right"})

    async def move() -> None:
        for name in names:
            await store.change_devices(app.app_id, {name: DeviceChange(add_tags=right, remove_tags=left)})

    moving, sizes = asyncio.create_task(move()), set()
    while not moving.done():
        lists = await store.postings(app.app_id, terms)
        assert lists[0] ^ lists[-1] == BitMap(range(50))
        sizes.add(len(lists[0]))
    assert len(sizes) > 1, "some moved between the slices"
    await store.close()


KEYS: Final = [(1, "tag", name) for name in "abc"]
SOME: Final = st.dictionaries(st.integers(0, 300), st.booleans(), min_size=1)
OPERATIONS: Final = st.one_of(
    st.tuples(st.just("hold"), st.sampled_from(KEYS), st.none()),
    st.tuples(st.just("forget"), st.sampled_from(KEYS), st.none()),
    st.tuples(st.just("change"), st.sampled_from(KEYS), SOME),
)


@given(st.lists(OPERATIONS), st.sampled_from([1, 1_000, 100_000]))
def test_what_is_held_follows_every_change_and_results_stay(
    operations: list[tuple[str, tuple[int, str, str], dict[int, bool] | None]], limit: int
) -> None:
    cache = Postings(limit)
    truth = {key: BitMap(range(n * 100)) for n, key in enumerate(KEYS)}
    held: dict[tuple[int, str, str], Posting] = {}
    results: list[tuple[BitMap, BitMap]] = []
    for operation, key, devnos in operations:
        match operation:
            case "hold":
                held[key] = cache.hold(key)
                if held[key].bits is None:
                    cache.put(key, truth[key])
                results.append((held[key].read(), truth[key]))
            case "forget":
                held.pop(key, None)
            case _:
                assert devnos is not None
                on = BitMap([devno for devno, has in devnos.items() if has])
                truth[key] = (truth[key] - BitMap(devnos)) | on
                cache.change(key, devnos)
        assert cache._size <= limit or len(cache._recent) == 1
        assert cache._size == sum(size for _, size in cache._recent.values())
    assert all(posting.read() == truth[key] for key, posting in held.items())
    assert all(result == then for result, then in results)


def test_changes_of_a_long_list_are_gathered() -> None:
    cache = Postings(1 << 20)
    cache.put(KEYS[0], BitMap(range(0, 1 << 20, 2)))
    held = cache.hold(KEYS[0])
    before = held.bits
    for devno in range(1, 1_001, 2):
        cache.change(KEYS[0], {devno: True})
    assert held.bits is before, "no copy for each change"
    assert len(held.read()) == (1 << 19) + 500
    assert held.size < 150_000


async def test_a_million_acknowledgements_rewrite_a_broadcast_rarely(path: Path) -> None:
    store = SqliteStore(path, clock=Clock())
    await store.open()
    app = await store.create_app("wide")
    (appended,) = await store.append([push(app, range(1_000_000), broadcast=True)])
    for first in range(0, 1_000_000, 10_000):
        part = range(first, first + 10_000)
        await store.settle([Settled(app.app_id, appended.msg_id, True, part)])
    assert await store.live_broadcasts(app.app_id) == []
    record = (await store.find_messages(app.app_id, [appended.msg_id]))[appended.msg_id]
    assert record.delivered == record.targets
    await store.close()
