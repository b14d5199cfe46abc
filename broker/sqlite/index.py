"""Apps, devices and the posting lists, as the writer thread changes them. A device's row and its postings
change in one transaction; posting changes of a group are gathered and each touched chunk is written once."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec
import orjson
from pyroaring import BitMap

from broker.audiences.device_terms import changed, differ, term_changes, terms, too_many
from broker.bitmaps import decode_bits, encode_bits
from broker.model import AccessRule, App, AppSettings, Device, DeviceChange, NewDevice, Term, TermKey
from broker.sqlite.engine import Row, delete_rows, read_rows, write_rows
from broker.sqlite.threads import Effects, Handler
from broker.store import Conflict, StoreError, TooMany, UnknownDevice
from broker.tenants.tokens import new_credentials, new_secret

APP_COLUMNS: Final = (
    "app_id, key, name, master_secret, device_key, signing_key, open, created_at, offline_limit, access,"
    " settings"
)
DEVICE_COLUMNS: Final = (
    "d.app, d.devno, d.rid, d.platform, d.alias, d.tags, d.mobile, d.generation,"
    " d.created_at, d.last_online_at, d.attributes"
)
DEVICES_BY_RID: Final = (
    f"SELECT {DEVICE_COLUMNS} FROM ({{values}}) v"
    " CROSS JOIN devices d ON d.app = v.column1 AND d.rid = v.column2"
)
DEVICES_BY_DEVNO: Final = (
    f"SELECT {DEVICE_COLUMNS} FROM ({{values}}) v"
    " CROSS JOIN devices d ON d.app = v.column1 AND d.devno = v.column2"
)
# To replace the row would write the index of registration ids, too, a random page for each device.
UPDATE_DEVICES: Final = (
    "UPDATE devices SET platform = v.column3, alias = v.column4, tags = v.column5, mobile = v.column6,"
    " generation = v.column7, attributes = v.column8 FROM ({values}) v"
    " WHERE devices.app = v.column1 AND devices.devno = v.column2"
)
RULES: Final = msgspec.json.Decoder(tuple[AccessRule, ...])
SETTINGS: Final = msgspec.json.Decoder(AppSettings)
POSTING_KEY: Final = "p.app = v.column1 AND p.kind = v.column2 AND p.value = v.column3"


def app_from_row(row: Row) -> App:
    app_id, key, name, master_secret, device_key, signing_key, is_open, created_at, *rest = row
    offline_limit, access, settings = rest
    return App(
        app_id,
        key,
        name,
        master_secret,
        device_key,
        signing_key,
        bool(is_open),
        created_at,
        offline_limit,
        RULES.decode(access),
        SETTINGS.decode(settings),
    )


def device_from_row(row: Row) -> Device:
    app, devno, rid, platform, alias, tags, mobile, generation, created_at, last_online_at, attributes = row
    return Device(
        app,
        devno,
        rid,
        platform,
        alias,
        frozenset(orjson.loads(tags)),
        mobile,
        generation,
        created_at,
        last_online_at,
        orjson.loads(attributes) if attributes != "{}" else {},
    )


def device_row(device: Device) -> Row:
    return (
        device.app_id,
        device.devno,
        device.registration_id,
        device.platform,
        device.alias,
        orjson.dumps(sorted(device.tags)).decode(),
        device.mobile,
        device.token_generation,
        device.created_at,
        device.last_online_at,
        orjson.dumps(device.attributes).decode() if device.attributes else "{}",
    )


def changeable_row(device: Device) -> Row:
    """For UPDATE_DEVICES."""
    app, devno, _, platform, alias, tags, mobile, generation, _, _, attributes = device_row(device)
    return app, devno, platform, alias, tags, mobile, generation, attributes


class IndexWrites:
    """The handlers for apps, devices and postings."""

    def __init__(self, connection: sqlite3.Connection, clock: Callable[[], float]) -> None:
        self._connection = connection
        self._clock = clock
        self._effects = Effects()
        self._pending: dict[
            tuple[int, str, str, int], dict[int, bool]
        ] = {}  # posting chunk -> devno -> has it
        self._next_devnos: dict[int, int] = {}  # of the apps registered to in this transaction
        self.handlers: dict[str, Handler] = {
            "create_app": lambda calls: [self._create_app(*call) for call in calls],
            "rotate_secret": lambda calls: [self._rotate_secret(key) for key in calls],
            "set_access": lambda calls: [self._set_access(*call) for call in calls],
            "set_settings": lambda calls: [self._set_settings(*call) for call in calls],
            "delete_app": lambda calls: [self._delete_app(key) for key in calls],
            "register": self._register,
            "register_new": self._register_new,
            "change_devices": self._change_devices,
            "drop_term": self._drop_terms,
            "load_postings": lambda calls: [self._load_postings(*call) for call in calls],
            "last_online": self._last_online,
        }

    def begin(self, effects: Effects) -> None:
        self._effects = effects
        self._pending.clear()
        self._next_devnos.clear()

    # Apps

    def _create_app(self, name: str, is_open: bool, offline_limit: int) -> App:
        key, master_secret, device_key, signing_key = new_credentials()
        row = (
            key,
            name,
            master_secret,
            device_key,
            signing_key,
            is_open,
            self._clock(),
            offline_limit,
        )
        cursor = self._connection.execute(
            "INSERT INTO apps"
            " (key, name, master_secret, device_key, signing_key, open, created_at, offline_limit)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            row,
        )
        return app_from_row((cursor.lastrowid, *row, "[]", "{}"))

    def _rotate_secret(self, key: str) -> App | None:
        self._connection.execute(
            "UPDATE apps SET master_secret = ? WHERE key = ? AND NOT deleted",
            (new_secret(), key),
        )
        return self._app(key)

    def _set_access(self, key: str, rules: tuple[AccessRule, ...]) -> App | None:
        self._connection.execute(
            "UPDATE apps SET access = ? WHERE key = ? AND NOT deleted",
            (msgspec.json.encode(rules).decode(), key),
        )
        return self._app(key)

    def _set_settings(
        self, key: str, settings: AppSettings, former: AppSettings | None
    ) -> App | Exception | None:
        app = self._app(key)
        if former is not None and app is not None and app.settings != former:
            return Conflict(f"the settings of app {key} were changed meanwhile")
        self._connection.execute(
            "UPDATE apps SET settings = ? WHERE key = ? AND NOT deleted",
            (msgspec.json.encode(settings).decode(), key),
        )
        return self._app(key)

    def _app(self, key: str) -> App | None:
        row = self._connection.execute(
            f"SELECT {APP_COLUMNS} FROM apps WHERE key = ? AND NOT deleted", (key,)
        ).fetchone()
        return app_from_row(row) if row else None

    def _delete_app(self, key: str) -> int | None:
        row = self._connection.execute(
            "SELECT app_id FROM apps WHERE key = ? AND NOT deleted", (key,)
        ).fetchone()
        if row is None:
            return None
        self._connection.execute("UPDATE apps SET deleted = 1 WHERE app_id = ?", row)
        return int(row[0])

    # Devices

    def _register(self, calls: list[tuple[int, Sequence[NewDevice]]]) -> list[list[Device]]:
        wanted = list({(app, new.registration_id): None for app, devices in calls for new in devices})
        found = {
            (device.app_id, device.registration_id): device
            for device in map(device_from_row, read_rows(self._connection, DEVICES_BY_RID, wanted))
        }
        fresh: list[Device] = []
        for app_id, devices in calls:
            for new in devices:
                key = (app_id, new.registration_id)
                if key not in found:
                    found[key] = self._new_device(app_id, new)
                    fresh.append(found[key])
        self._store_devices(fresh)
        for device in fresh:
            self._post(device, terms(device), True)
        return [[found[app, new.registration_id] for new in devices] for app, devices in calls]

    def _register_new(self, calls: list[tuple[int, NewDevice]]) -> list[Device | None]:
        wanted: dict[tuple[int, str], tuple[int, Sequence[NewDevice]]] = {
            (app_id, new.registration_id): (app_id, [new]) for app_id, new in reversed(calls)
        }
        for row in read_rows(self._connection, DEVICES_BY_RID, list(wanted)):
            device = device_from_row(row)
            del wanted[device.app_id, device.registration_id]
        made = self._register(list(wanted.values()))
        left = {key: device for key, (device,) in zip(wanted, made, strict=True)}
        # The first of several calls with one id gets the device.
        return [left.pop((app_id, new.registration_id), None) for app_id, new in calls]

    def _new_device(self, app_id: int, new: NewDevice) -> Device:
        return Device(
            app_id,
            self._next_devno(app_id),
            new.registration_id,
            new.platform,
            new.alias or None,
            new.tags,
            new.mobile or None,
            0,
            self._clock(),
            None,
            new.attributes,
        )

    def _next_devno(self, app_id: int) -> int:
        devno = self._next_devnos.get(app_id)
        if devno is None:
            (greatest,) = self._connection.execute(
                "SELECT max(devno) FROM devices WHERE app = ?", (app_id,)
            ).fetchone()
            devno = 0 if greatest is None else greatest + 1
        self._next_devnos[app_id] = devno + 1
        return devno

    def _store_devices(self, devices: Iterable[Device]) -> None:
        write_rows(
            self._connection, "INSERT OR REPLACE INTO devices {values}", [device_row(d) for d in devices]
        )

    def _change_devices(
        self, calls: list[tuple[int, Mapping[str, DeviceChange]]]
    ) -> list[dict[str, Device] | StoreError]:
        """In order of arrival, with one read and one write for all."""
        wanted = list({(app_id, rid): None for app_id, changes in calls for rid in changes})
        rows = read_rows(self._connection, DEVICES_BY_RID, wanted)
        before = {(device.app_id, device.registration_id): device for device in map(device_from_row, rows)}
        now = dict(before)
        results: list[dict[str, Device] | StoreError] = []
        for app_id, changes in calls:
            unknown = next((rid for rid in changes if (app_id, rid) not in now), None)
            if unknown is not None:
                results.append(UnknownDevice(unknown))
                continue
            after = {rid: changed(now[app_id, rid], change) for rid, change in changes.items()}
            crowded = next(
                (problem for rid in changes if (problem := too_many(after[rid], changes[rid]))), None
            )
            if crowded is not None:
                results.append(TooMany(crowded))
                continue
            now.update(((app_id, rid), device) for rid, device in after.items())
            results.append(after)
        self._replace_devices(
            [(before[key], device) for key, device in now.items() if device is not before[key]]
        )
        return results

    def _replace_devices(self, pairs: Sequence[tuple[Device, Device]]) -> None:
        write_rows(
            self._connection,
            UPDATE_DEVICES,
            [changeable_row(after) for before, after in pairs if differ(before, after)],
        )
        for before, after in pairs:
            old, new = term_changes(before, after)
            self._post(after, old, False)
            self._post(after, new, True)
            if after.token_generation != before.token_generation:
                self._effects.generations[after.app_id, after.devno] = after.token_generation

    def _last_online(self, calls: list[Mapping[tuple[int, int], float]]) -> list[None]:
        newest = {key: at for call in calls for key, at in call.items()}
        write_rows(
            self._connection,
            "UPDATE devices SET last_online_at = v.column3 FROM ({values}) v"
            " WHERE devices.app = v.column1 AND devices.devno = v.column2",
            [(*key, at) for key, at in newest.items()],
        )
        return [None] * len(calls)

    # Postings

    def _post(self, device: Device, keys: Iterable[TermKey], on: bool) -> None:
        for kind, value in keys:
            chunk = (device.app_id, str(kind), value, device.devno >> 16)
            self._pending.setdefault(chunk, {})[device.devno] = on

    def flush_postings(self) -> None:
        """Write the gathered changes. Before postings are read in this transaction, and before its end."""
        if not self._pending:
            return
        pending, self._pending = self._pending, {}
        stored = read_rows(
            self._connection,
            "SELECT p.app, p.kind, p.value, p.chunk, p.bits FROM ({values}) v"
            f" CROSS JOIN postings p ON {POSTING_KEY} AND p.chunk = v.column4",
            list(pending),
        )
        chunks = {row[:4]: decode_bits(row[4]) for row in stored}
        for key, devnos in pending.items():
            bits = chunks.setdefault(key, BitMap())
            bits |= BitMap([devno for devno, on in devnos.items() if on])
            bits -= BitMap([devno for devno, on in devnos.items() if not on])
            self._effects.postings.setdefault(key[:3], {}).update(devnos)
        self._write_chunks({key: chunks[key] for key in pending})

    def _write_chunks(self, chunks: Mapping[Row, BitMap]) -> None:
        write_rows(
            self._connection,
            "INSERT OR REPLACE INTO postings {values}",
            [(*key, encode_bits(bits)) for key, bits in chunks.items() if bits],
        )
        delete_rows(self._connection, "postings", [key for key, bits in chunks.items() if not bits])

    def _load_postings(self, app_id: int, keys: Sequence[TermKey]) -> list[BitMap]:
        self.flush_postings()
        chunks: dict[tuple[str, str], list[BitMap]] = {}
        rows = read_rows(
            self._connection,
            f"SELECT p.kind, p.value, p.bits FROM ({{values}}) v CROSS JOIN postings p ON {POSTING_KEY}",
            list({(app_id, str(kind), value): None for kind, value in keys}),
        )
        for kind, value, bits in rows:
            chunks.setdefault((kind, value), []).append(decode_bits(bits))
        lists: list[BitMap] = []
        for kind_, value in keys:
            bits = BitMap.union(*chunks.get((str(kind_), value), [BitMap()]))
            self._effects.loaded[app_id, str(kind_), value] = bits
            lists.append(bits)
        return lists

    def _drop_terms(self, calls: list[tuple[int, TermKey, BitMap]]) -> list[None]:
        for call in calls:
            self._drop_term(*call)
        return [None] * len(calls)

    def _drop_term(self, app_id: int, term: TermKey, devnos: BitMap) -> None:
        """Of devices that have it; a bounded number."""
        kind, value = term
        rows: list[Any] = read_rows(self._connection, DEVICES_BY_DEVNO, [(app_id, devno) for devno in devnos])
        change = DeviceChange(remove_tags=frozenset((value,))) if kind == Term.TAG else DeviceChange(alias="")
        devices = [device for device in map(device_from_row, rows) if (kind, value) in terms(device)]
        self._replace_devices([(device, changed(device, change)) for device in devices])


class IndexReads:
    """Look-ups of thousands of names at once, on a reader's thread. A statement carries them as JSON and answers with
    one row: it takes the GIL once, not once for each name."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.handlers: dict[str, Handler] = {
            "resolve_bitmap": lambda calls: [self._resolve_bitmap(*call) for call in calls],
            "union_bitmap": lambda calls: [self._union_bitmap(*call) for call in calls],
        }

    def _resolve_bitmap(self, app_id: int, registration_ids: Sequence[str]) -> BitMap:
        (devnos,) = self._connection.execute(
            "SELECT json_group_array(d.devno) FROM json_each(?) v"
            " CROSS JOIN devices d ON d.app = ? AND d.rid = v.value",
            (orjson.dumps(registration_ids).decode(), app_id),
        ).fetchone()
        return BitMap(orjson.loads(devnos))

    def _union_bitmap(self, app_id: int, kind: str, values: Sequence[str]) -> BitMap:
        chunks = self._connection.execute(
            "SELECT p.bits FROM json_each(?) v"
            " CROSS JOIN postings p ON p.app = ? AND p.kind = ? AND p.value = v.value",
            (orjson.dumps(values).decode(), app_id, kind),
        ).fetchall()
        return BitMap.union(BitMap(), *[decode_bits(bits) for (bits,) in chunks])
