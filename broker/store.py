"""The store: what is true. The interface is its guarantees; `tests/broker/store_contract.py` checks them.

Every implementation gives these, whatever it is built on:

S1  When an awaited write returns, it is durable: it survives `kill -9` of every process of ours, and a power
    cut as far as the engine's own setting promises (SQLite: synchronous=FULL).
S2  A write that raises has changed nothing. `StoreFull` means there is no room; `StoreUnavailable` that the
    engine is away; both may be tried again.
S3  Message ids grow: along the appends of one app as they become visible to `fetch_owed`, so that a device that
    has seen id n never finds a new row below n afterwards (G3).
S4  A message's targets are fixed when it is appended (G2). For each of them exactly one state holds at any time:
    delivered, evicted, recalled, suppressed, or waiting (pending until `expires_at`, expired from then on); delivered
    wins (G4).
S5  Recording is idempotent: settling a delivery twice is settling it once.
S6  A cid is used once per app in `cid_lifetime`: a second append with it stores nothing and answers the first.
S7  Apps do not see each other: no call reaches a row of another app_id.
S8  Appending to an inbox applies the newest-N rule (`App.offline_limit`) to targets without a route: the oldest
    rows go, recorded as evicted. A routed device's rows are never evicted by an append.
S9  A claim makes the device routed under a new, larger epoch. A release with any epoch but the newest does
    nothing (G5). Routes do not outlive the lease of the node that holds them, and are there again when it comes back
    before another claim.
S10 Read-your-writes: what an awaited write stored is seen by every read that starts after it returned. Inbox rows of
    an append are seen once its doorbells ring, where another process is about to spread them.
S11 A session item has the value that was saved last: calls count in the order they were made, and the items of
    one call in theirs. A call is stored as a whole or not at all.
S12 A record changes only from the version that the change names; the changes of one call happen all or none, and
    those given to `append` happen with its messages or not at all.

All methods are called from the event loop's thread. None blocks it.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping, Sequence
from typing import Final, Protocol

from pyroaring import BitMap

from broker.model import (
    AccessRule,
    Activity,
    App,
    Appended,
    AppSettings,
    AuditEntry,
    Beat,
    BehaviourEvent,
    CallbackEvent,
    Claim,
    Device,
    DeviceChange,
    MessageRecord,
    NewDevice,
    NewMessage,
    NodeEntry,
    NodeInfo,
    OwedRequest,
    Receipt,
    Record,
    RecordChange,
    Retained,
    Route,
    RouteCheck,
    SessionItem,
    Settled,
    Step,
    StoredBroadcast,
    StoredMessage,
    Term,
    TermKey,
    Withdrawn,
)
from broker.telling.calendar import Calendar

PIECE: Final = 65_536  # bytes of one piece of a file


class StoreError(Exception):
    """A store operation did not happen."""


class StoreFull(StoreError):
    """There is no room (full disk, memory limit)."""


class StoreUnavailable(StoreError):
    """The engine is away, read-only, locked by another server, or broken."""


class UnknownMessage(StoreError):
    """No such message in this app, or it is gone."""


class UnknownDevice(StoreError):
    """No such device in this app."""


class Conflict(StoreError):
    """A record is not in the version that a change expects: somebody else was faster. Nothing was changed."""


class TooMany(StoreError):
    """The app has as many records of a kind as a change allows (`at_most`). Nothing was changed."""


class StoreStats(Protocol):
    """Counters, written by whatever thread commits, read by the metrics."""

    failed_commits: int
    on_commit: Callable[[int, float], None] | None
    """Called on the event loop's thread after each commit: how many writes shared it, and its seconds."""


class Records(Protocol):
    """Small documents with versions (S12), and with times at which somebody is to look at them."""

    async def find(self, app_id: int, kind: str, key: str) -> Record | None: ...

    async def list(self, app_id: int, kind: str, after: str = "", limit: int = 1000) -> Sequence[Record]:
        """Those with key > after, in the order of their keys' UTF-8 bytes."""

    async def count(self, app_id: int, kind: str) -> int: ...

    async def due(self, kinds: Sequence[str], now: float, limit: int) -> Sequence[Record]:
        """Of any app, those with due <= now, oldest first. Records of deleted apps are never due."""

    async def next_due(self, kinds: Sequence[str]) -> float | None:
        """The earliest `due` of all."""

    async def save(self, changes: Sequence[RecordChange]) -> Sequence[int]:
        """Make the changes, all of one app, all or none, and return the new versions (0 where a record was removed).
        Raises Conflict."""


async def every_record(records: Records, app_id: int, kind: str) -> list[Record]:
    """All of them, page by page: where a limit was lowered there are more than it says."""
    found: list[Record] = []
    while page := await records.list(app_id, kind, found[-1].key if found else ""):
        found += page
    return found


class Files(Protocol):
    """Bytes that are too many for one record, in pieces. A file is seen once it is complete."""

    async def write(self, app_id: int, file_id: str, pieces: AsyncIterable[bytes]) -> int:
        """Store the pieces as they come, each at most PIECE bytes, and return how many bytes there are. When the
        iteration raises, nothing stays."""

    def read(self, app_id: int, file_id: str) -> AsyncIterator[bytes]:
        """Piece by piece."""

    async def remove(self, app_id: int, file_id: str) -> None: ...


class Callbacks(Protocol):
    """What is to be told to publishers: entered by `append`, `settle`, `recall`, `expire` and `record_receipts` for
    messages that have a callback, in the same transaction."""

    async def claim(self, now: float, lease: float, limit: int) -> list[CallbackEvent]:
        """Those that are due longest, in the order of their ids; they are due again after `lease` seconds, unless
        settled before. Those of deleted apps are never due."""

    async def done(self, event_ids: Sequence[int]) -> None: ...

    async def failed(self, event_ids: Sequence[int], due: float | None, error: str) -> None:
        """Another attempt did not work. `due`: when to try next; None: parked, until `retry`."""

    async def postpone(self, event_ids: Sequence[int], due: float) -> None:
        """They were not tried; they are due then."""

    async def retry(self, app_id: int, now: float) -> int:
        """Make the parked ones due, with no attempts counted; returns how many."""

    async def drop_parked(self, app_id: int) -> int: ...

    async def list_parked(self, app_id: int, after: int, limit: int) -> list[CallbackEvent]:
        """With event_id > after, in that order."""

    async def counts(self, app_id: int) -> tuple[int, int]:
        """How many wait, and how many are parked; app_id 0: of all apps."""


class Nodes(Protocol):
    """The processes of this installation. Each joins once, then beats."""

    @property
    def lease(self) -> float:
        """Seconds after its last beat in which a node is taken to live."""

    async def join(self, info: NodeInfo) -> None:
        """This process is that node from now on: routes are claimed in its name. Raises Conflict if a live one has
        the name."""

    async def beat(self, info: NodeInfo) -> Beat:
        """Renew the lease, and say how things are."""

    async def leave(self) -> None:
        """Its routes end."""

    async def list(self) -> list[NodeEntry]:
        """By name; those that left are not among them, those that died are for an hour."""

    async def wish(self, name: str, wish: str) -> bool:
        """Have the node's next beat answer this: drain | resume | "". False: there is no such node."""


class Store(Protocol):
    """See the module's guarantees. `app_id`s come from `create_app`/`find_app`."""

    @property
    def records(self) -> Records: ...

    @property
    def files(self) -> Files: ...

    @property
    def callbacks(self) -> Callbacks: ...

    @property
    def nodes(self) -> Nodes: ...

    @property
    def stats(self) -> StoreStats:
        """What the store counts for the metrics."""

    async def open(self) -> None:
        """Create or open. Raises StoreUnavailable with what to do about it."""

    async def close(self) -> None:
        """Finish what was accepted, then close. No call may follow."""

    # Apps

    async def create_app(self, name: str, *, open: bool = False, offline_limit: int = 100) -> App:
        """A new app with fresh key, secrets and signing key. Names need not be unique."""

    async def find_app(self, key: str) -> App | None: ...

    async def list_apps(self, after: int = 0, limit: int = 1000) -> list[App]:
        """Apps with app_id > after, in that order."""

    async def rotate_secret(self, key: str) -> App | None:
        """A fresh master secret; None if there is no such app."""

    async def set_access(self, key: str, rules: Sequence[AccessRule]) -> App | None:
        """Put these access rules in place of the app's; None if there is no such app."""

    async def set_settings(
        self, key: str, settings: AppSettings, former: AppSettings | None = None
    ) -> App | None:
        """Put these settings in place of the app's; None if there is no such app. Raises Conflict if `former` is
        given and the app has others by now."""

    async def delete_app(self, key: str) -> bool:
        """Remove the app at once and all its rows in the background. False: no such app."""

    # Devices and the index over them

    async def register(self, app_id: int, devices: Sequence[NewDevice]) -> list[Device]:
        """Register devices, each with the next free devno. A registration id that exists already is left as
        it is and returned."""

    async def register_new(self, app_id: int, device: NewDevice) -> Device | None:
        """Register a device unless it exists: then None. Of all calls with one registration id, in any process, only
        one gets the device."""

    async def find_devices(self, app_id: int, registration_ids: Sequence[str]) -> dict[str, Device]:
        """Whole records of those that exist."""

    async def resolve(self, app_id: int, registration_ids: Sequence[str]) -> dict[str, int]:
        """registration id -> devno of those that exist. Cheaper than find_devices."""

    async def resolve_bitmap(self, app_id: int, registration_ids: Sequence[str]) -> BitMap:
        """The devnos of those that exist. For the thousands of a file: none is remembered. The caller owns the
        result."""

    async def names(self, app_id: int, devnos: Sequence[int]) -> dict[int, str]:
        """devno -> registration id of those that exist."""

    async def change_devices(self, app_id: int, changes: Mapping[str, DeviceChange]) -> dict[str, Device]:
        """Apply changes by registration id, all or none, and return the devices as they are now. Raises
        UnknownDevice naming the first that does not exist, or TooMany that says what a device would have too much
        of."""

    async def postings(self, app_id: int, terms: Sequence[TermKey]) -> list[BitMap]:
        """The posting list of each term, empty if there is none. The caller must not change them."""

    async def union_bitmap(self, app_id: int, kind: Term, values: Sequence[str]) -> BitMap:
        """The union of these values' posting lists. For the thousands of a file: none is remembered. The caller owns
        the result."""

    async def list_terms(self, app_id: int, kind: str) -> list[str]:
        """Values of this kind with a posting list that is not empty, sorted."""

    async def drop_term(self, app_id: int, term: TermKey, only: BitMap | None = None) -> BitMap:
        """Take an alias or tag away from all devices (or those in `only`) that have it; returns them."""

    # Who was there when. Exempt from S1: a crash may lose the last seconds

    @property
    def calendar(self) -> Calendar:
        """Its hours and days are those by which activity is kept."""

    @property
    def activity_lifetime(self) -> float: ...

    async def active(self, app_id: int, activity: Activity, start: float, end: float) -> BitMap:
        """Devices that did this in any hour that touches [start, end). Activity is kept for `activity_lifetime`:
        today, yesterday and the day before by hour, earlier days as days. The caller owns the result."""

    async def active_counts(
        self, app_id: int, activity: Activity, stretches: Sequence[tuple[float, float]]
    ) -> list[int]:
        """How many devices in each stretch."""

    async def registered_before(self, app_id: int, times: Sequence[float]) -> list[int]:
        """How many devices were registered before each time: devnos below this number are older."""

    def token_generations(self, app_id: int) -> Mapping[int, int]:
        """devno -> generation, for those above 0 (few: revoked devices). Valid after `find_app` of this app;
        kept up to date."""

    # Messages

    async def append(
        self, messages: Sequence[NewMessage], changes: Sequence[RecordChange] = ()
    ) -> list[Appended]:
        """Store pushes, all or none, in order; ids are assigned here. Messages that expire at once
        (`expires_at <= created_at`) get a row for the report and nothing that could be fetched. Ids grow in the order
        of the calls, and the answers come in that order.

        The record changes are made along with the messages (S12; raises Conflict or TooMany), but not if a message's
        cid was used before (those with a key of their own: any message's; those named after a message: that one's).
        `replaces` must name a message of the app (else UnknownMessage): what waits of it for this one's targets is
        recalled; as is what waits for them with the same collapse key and is older."""

    async def find_cids(self, app_id: int, cids: Sequence[str]) -> dict[str, Appended]:
        """By cid, what an append with it would answer now; those that are free are left out."""

    async def fetch_owed(self, requests: Sequence[OwedRequest]) -> list[list[StoredMessage]]:
        """For each request the waiting, unexpired inbox rows, oldest first, at most `limit`. A message asked for
        by several requests is one object."""

    async def live_broadcasts(self, app_id: int) -> list[StoredBroadcast]:
        """Unexpired broadcasts that some device is still owed, oldest first: all that were accepted before the call.
        What is older than one of them is in its inboxes."""

    async def settle(self, settled: Sequence[Settled]) -> None:
        """Record deliveries and evictions, in bulk."""

    async def recall(self, app_id: int, msg_ids: Sequence[int], now: float) -> list[Withdrawn]:
        """What is still waiting of these messages and their parts never will be again: it is recalled. One answer for
        each message and part that exists, that had targets left or not. A second time changes nothing."""

    async def find_messages(self, app_id: int, msg_ids: Sequence[int]) -> dict[int, MessageRecord]:
        """The records of those that exist (kept for `report_lifetime`). A paced push's has its parts' deliveries."""

    async def find_steps(self, app_id: int, msg_id: int) -> list[Step]:
        """What happened to a message and its parts, and when."""

    async def record_receipts(self, receipts: Sequence[Receipt]) -> None:
        """Receipts for messages or devices that do not match are dropped."""

    async def record_events(self, events: Sequence[BehaviourEvent]) -> None: ...

    async def list_events(self, app_id: int, after: int, limit: int) -> list[tuple[int, BehaviourEvent]]:
        """Events with their ids, id > after, in order (kept for `event_lifetime`)."""

    # Administrative calls

    async def record_audit(self, entries: Sequence[AuditEntry]) -> None: ...

    async def list_audit(self, app_id: int | None, before: int, limit: int) -> list[tuple[int, AuditEntry]]:
        """Entries with their ids, id < before (0: from the newest), newest first; None: of all apps. Kept for
        `audit_lifetime`."""

    # Ordinary retained messages

    async def retain(self, retained: Sequence[Retained]) -> None:
        """Set (or, with an empty payload, remove) retained messages."""

    async def list_retained(self, app_id: int) -> list[Retained]: ...

    async def find_home(self, app_id: int) -> NodeInfo | None:
        """The node that the app's ordinary topics live on (decision 0022); None: this one, which takes the app on if
        no live node has it."""

    # Durable MQTT sessions. Of a node that is not the app's home any more, they and retained messages are refused
    # with StoreUnavailable

    async def save_session_items(self, items: Sequence[SessionItem]) -> None:
        """Set values, or remove those that are None, of any apps, all or none (S11). To remove what is not there
        does nothing. Items of an app that was deleted are dropped: they must not keep back those of others."""

    async def list_session_items(self, app_id: int) -> list[SessionItem]:
        """All of an app by session, kind and item; numbers come before texts, texts in the order of their
        UTF-8 bytes."""

    # Routes

    def claim_route(self, app_id: int, devno: int, node_id: str, done: Callable[[Claim], None]) -> None:
        """Claim the device for this node. `done` is called exactly once, at once or from the loop later: no task,
        so that a connect storm costs none, and implementations may send many claims together. Claim first, then
        fetch (architecture, decision 4)."""

    def release_route(self, app_id: int, devno: int, epoch: int, now: float) -> None:
        """Give the route up and note when the device was last online; stale epochs do nothing (S9)."""

    async def inspect_routes(self, app_id: int, routes: Mapping[int, int]) -> RouteCheck:
        """Whether these (devno -> epoch) still are this node's newest claims, and who may be owed something."""

    async def find_routes(self, app_id: int, devnos: Sequence[int]) -> dict[int, Route]:
        """Where these devices are, as the operator asks it: for a few at a time. Those that are not known are left
        out."""

    async def online(self, app_id: int, devnos: BitMap | None = None) -> BitMap:
        """Those of `devnos` (None: of all the app's devices) that have a route now."""

    # Upkeep

    async def expire(self, now: float) -> int:
        """Remove a bounded slice of what is over (inbox rows and bodies of expired messages, reports, cids and
        events past their time, rows of deleted apps), give space back, and return how many rows went. Called
        again soon while it returns more than 0. Never holds up writes for long."""
