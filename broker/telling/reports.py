"""What became of pushes, and what devices tell about them and about the app."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from typing import Final

import msgspec
import orjson
from pyroaring import BitMap

from broker.errors import REPORT, ApiError
from broker.limits import Limits, limits_of
from broker.model import App, BehaviourEvent, DeliveryState, MessageRecord, Receipt, Term
from broker.pushing.requests import PUSH_PLATFORMS, decode, parse_msg_id
from broker.store import Store

Clock = Callable[[], float]
RECEIPTS: Final = ("shown", "clicked", "dismissed")
_DATE: Final = re.compile(r"\d{4}-\d\d-\d\d")

# Status of one message for one device, on the wire. 4, the vendor's "system error", is none of ours: a call that
# cannot be answered fails as a whole.
DELIVERED, NOT_DELIVERED, NOT_A_DEVICE, NOT_A_TARGET = range(4)


class StatusRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    msg_id: int | str
    registration_ids: list[str]
    date: str | None = None  # the vendor's hint for its archive; checked, not needed


class ReceiptRequest(msgspec.Struct, frozen=True):
    msg_id: int | str
    event: str


_read_status: Final = msgspec.json.Decoder(StatusRequest).decode
_read_receipt: Final = msgspec.json.Decoder(ReceiptRequest).decode


class Reports:
    """Methods let StoreError pass."""

    def __init__(self, store: Store, limits: Limits | None = None, clock: Clock = time.time) -> None:
        self._store = store
        self._limits = limits or Limits()
        self._clock = clock

    async def received(self, app: App, msg_ids: str | None) -> list[dict[str, object]]:
        """`msg_ids`: ids with commas between. One row for each, in that order; null counts where the id is
        unknown."""
        ids = self._read_ids(app, msg_ids)
        records, platforms = await self._records(app, ids)
        return [_received(i, records.get(i), platforms) for i in ids]

    async def received_detail(self, app: App, msg_ids: str | None) -> list[dict[str, object]]:
        """`received`, by channel, with the whole accounting of each message."""
        ids = self._read_ids(app, msg_ids)
        records, platforms = await self._records(app, ids)
        now = self._clock()
        return [{**_detail(i, records.get(i), platforms), **_account(records.get(i), now)} for i in ids]

    async def messages(self, app: App, msg_ids: str | None) -> list[dict[str, object]]:
        """By platform: to how many each message was to go, was sent, and came, and how many were clicked."""
        ids = self._read_ids(app, msg_ids)
        records, platforms = await self._records(app, ids)
        return [_message(i, records.get(i), platforms) for i in ids]

    async def messages_detail(self, app: App, msg_ids: str | None) -> list[dict[str, object]]:
        """`messages`, by channel."""
        ids = self._read_ids(app, msg_ids)
        records, platforms = await self._records(app, ids)
        return [_message_detail(i, records.get(i), platforms) for i in ids]

    async def status(self, app: App, raw: bytes) -> dict[str, dict[str, object]]:
        """`{"msg_id", "registration_ids"}` -> `{registration_id: {"status": 0..3}}`; beside 1 stands `state`."""
        request = decode(_read_status, raw, REPORT)
        ids = request.registration_ids
        if not ids:
            raise ApiError(3004, "registration_ids: at least one value is required")
        most = limits_of(self._limits, app).max_ids
        if len(ids) > most:
            raise ApiError(3004, f"registration_ids: at most {most} values, got {len(ids)}")
        if request.date is not None and not _DATE.fullmatch(request.date):
            raise ApiError(3004, "date: must be YYYY-MM-DD")
        msg_id = read_msg_id(request.msg_id)
        record = (await self._store.find_messages(app.app_id, [msg_id])).get(msg_id)
        if record is None:
            raise ApiError(3004, f"msg_id: {msg_id} is not a message of this app, or its report is over")
        devnos = await self._store.resolve(app.app_id, ids)
        states = record.sets(self._clock())
        return {i: _status(states, devnos.get(i)) for i in ids}

    async def events(self, app: App, after: str | None, limit: str | None) -> dict[str, object]:
        """Behaviour events with id > after, oldest first; `after` of the answer continues."""
        start = read_int("after", after, 0, 0, 2**63 - 1)
        count = read_int("limit", limit, 100, 1, limits_of(self._limits, app).max_events)
        events = await self._store.list_events(app.app_id, start, count)
        names = await self._store.names(app.app_id, list({event.devno for _, event in events}))
        return {
            "events": [_event_row(event_id, event, names) for event_id, event in events],
            "after": events[-1][0] if events else start,
        }

    def receipt(self, app_id: int, devno: int, raw: bytes) -> Receipt:
        """What a device published on `receipt`. Raises ApiError."""
        request = decode(_read_receipt, raw, REPORT)
        if request.event not in RECEIPTS:
            raise ApiError(3004, f"event: must be one of {', '.join(RECEIPTS)}")
        return Receipt(app_id, read_msg_id(request.msg_id), devno, request.event, self._clock())

    def event(self, app_id: int, devno: int, name: str, raw: bytes, now: float) -> BehaviourEvent:
        """What a device published on `event/<name>`: any JSON, or nothing. Raises ApiError."""
        if not 0 < len(name.encode()) <= self._limits.max_event_name or not name.isprintable():
            raise ApiError(3004, f"event name: must be 1 to {self._limits.max_event_name} printable bytes")
        if len(raw) > self._limits.max_event:
            raise ApiError(3004, f"event {name}: at most {self._limits.max_event} bytes, got {len(raw)}")
        try:
            orjson.loads(raw or b"null")
        except orjson.JSONDecodeError as error:
            raise ApiError(3004, f"event {name}: the payload is not valid JSON: {error}") from None
        return BehaviourEvent(app_id, devno, name, now, raw)

    def _read_ids(self, app: App, msg_ids: str | None) -> list[int]:
        if not msg_ids:
            raise ApiError(3004, "msg_ids is required: ids with commas between")
        ids = msg_ids.split(",")
        most = limits_of(self._limits, app).max_msg_ids
        if len(ids) > most:
            raise ApiError(3004, f"msg_ids: at most {most} values, got {len(ids)}")
        return [read_msg_id(i) for i in ids]

    async def _records(
        self, app: App, ids: list[int]
    ) -> tuple[dict[int, MessageRecord], Mapping[str, BitMap]]:
        records = await self._store.find_messages(app.app_id, ids)
        terms = [(Term.PLATFORM, platform) for platform in PUSH_PLATFORMS]
        postings = await self._store.postings(app.app_id, terms)
        return records, dict(zip(PUSH_PLATFORMS, postings, strict=True))


def read_msg_id(value: int | str) -> int:
    text = str(value).strip()
    msg_id = parse_msg_id(text)
    if msg_id is None:
        raise ApiError(3004, f"msg_id: must be a positive integer, got {text[:40]}")
    return msg_id


def read_int(name: str, text: str | None, default: int, least: int, most: int) -> int:
    if text is None:
        return default
    if not (text.isascii() and text.isdigit()) or len(text) > 19 or not least <= int(text) <= most:
        raise ApiError(3004, f"{name}: must be an integer from {least} to {most}")
    return int(text)


def _received(
    msg_id: int, record: MessageRecord | None, platforms: Mapping[str, BitMap]
) -> dict[str, object]:
    """The vendor's summary. All our deliveries are its own channel; null where it means another vendor's."""
    on = _delivered(record, platforms)
    return {
        "msg_id": str(msg_id),
        "android_received": on("android"),
        "ios_apns_sent": None,
        "ios_apns_received": None,
        "ios_msg_received": on("ios"),
        "wp_mpns_sent": on("winphone"),
    }


def _detail(msg_id: int, record: MessageRecord | None, platforms: Mapping[str, BitMap]) -> dict[str, object]:
    on = _delivered(record, platforms)
    return {
        "msg_id": str(msg_id),
        "jpush_received": on("android"),
        "android_pns_sent": None,
        "android_pns_received": None,
        "ios_apns_sent": None,
        "ios_apns_received": None,
        "ios_msg_received": on("ios"),
        "wp_mpns_sent": on("winphone"),
        "quickapp_jpush_received": on("quickapp"),
        "quickapp_pns_sent": None,
        "hmos_msg_received": on("hmos"),
        "hmos_hmpns_sent": None,
    }


def _delivered(record: MessageRecord | None, platforms: Mapping[str, BitMap]) -> Callable[[str], int | None]:
    def on(platform: str) -> int | None:
        return None if record is None else record.delivered.intersection_cardinality(platforms[platform])

    return on


def _message(msg_id: int, record: MessageRecord | None, platforms: Mapping[str, BitMap]) -> dict[str, object]:
    """The vendor's statistics. null where the id is unknown, and in it for what belongs to another channel."""
    if record is None:
        return {"msg_id": str(msg_id)} | dict.fromkeys(PUSH_PLATFORMS)
    android, ios, winphone = (_counts(record, platforms[name]) for name in ("android", "ios", "winphone"))
    return {
        "msg_id": str(msg_id),
        "android": android,
        "ios": {"apns_target": None, "apns_sent": None, "apns_received": None} | ios,
        "winphone": {"mpns_target": None, "mpns_sent": None} | winphone,
        "quickapp": _counts(record, platforms["quickapp"]),
        "hmos": _counts(record, platforms["hmos"]),
    }


def _message_detail(
    msg_id: int, record: MessageRecord | None, platforms: Mapping[str, BitMap]
) -> dict[str, object]:
    """`jpush` is our own channel, on all platforms; others are null or have nulls."""
    if record is None:
        channels = ("jpush", "android_pns", "ios", "winphone", "quickapp", "hmos", "details")
        return {"msg_id": str(msg_id)} | dict.fromkeys(channels)
    ios, winphone = _counts(record, platforms["ios"]), _counts(record, platforms["winphone"])
    return {
        "msg_id": str(msg_id),
        "jpush": _counts(record, record.targets),
        "android_pns": None,
        "ios": {"apns_target": None, "apns_sent": None, "apns_received": None, "apns_click": None}
        | {"msg_target": ios["target"], "msg_received": ios["received"]},
        "winphone": {"mpns_target": None, "mpns_sent": None, "click": winphone["click"]},
        "quickapp": _counts(record, platforms["quickapp"]),
        "hmos": _counts(record, platforms["hmos"]),
        "details": None,
    }


def _counts(record: MessageRecord, devnos: BitMap) -> dict[str, int | None]:
    """For some of the targets. A device does not tell a click on a notification from one on a message."""
    return {
        "target": record.targets.intersection_cardinality(devnos),
        "online_push": record.sent.intersection_cardinality(devnos),
        "received": record.delivered.intersection_cardinality(devnos),
        "click": record.receipts.get("clicked", _NOBODY).intersection_cardinality(devnos),
        "msg_click": None,
    }


_NOBODY: Final = BitMap()


def account(record: MessageRecord, now: float) -> dict[str, int]:
    """target = delivered + pending + expired + evicted + recalled + suppressed (G4); `online` of them were, when the
    push was accepted; the rest counts to whom it was sent, and what people did."""
    states = {state.value: count for state, count in record.counts(now).items()}
    receipts = {event: len(record.receipts.get(event, ())) for event in RECEIPTS}
    return (
        {"target": len(record.targets), "online": record.online, "sent": len(record.sent)} | states | receipts
    )


NO_ACCOUNT: Final = dict.fromkeys(
    ("target", "online", "sent", *(state.value for state in DeliveryState), *RECEIPTS)
)


def _account(record: MessageRecord | None, now: float) -> Mapping[str, int | None]:
    return NO_ACCOUNT if record is None else account(record, now)


def _status(states: Mapping[DeliveryState, BitMap], devno: int | None) -> dict[str, object]:
    if devno is None:
        return {"status": NOT_A_DEVICE}
    state = next((state for state, devnos in states.items() if devno in devnos), None)
    if state is None:
        return {"status": NOT_A_TARGET}
    if state is DeliveryState.DELIVERED:
        return {"status": DELIVERED}
    return {"status": NOT_DELIVERED, "state": state.value}


def _event_row(event_id: int, event: BehaviourEvent, names: Mapping[int, str]) -> dict[str, object]:
    return {
        "id": event_id,
        "registration_id": names.get(event.devno),
        "name": event.name,
        "at": event.at,
        "payload": orjson.Fragment(event.payload or b"null"),
    }
