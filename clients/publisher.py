"""A backend's side: send pushes, see what became of them, manage devices; over HTTP.

    async with Publisher("APPKEY", "MASTERSECRET", "https://push.example.com") as publisher:
        accepted = await publisher.push(PushRequest(Audience(alias=["anna"]), Notification("Hello")))

Pushes and devices are methods of the Publisher; what is kept on the server has a place of its own:
`publisher.schedules`, `.segments`, `.files`, `.callbacks`, `.keys`, `.tags`, `.aliases`, and `.reports` of pushes. A
receiver of callbacks checks them with `read_callback`.

An accepted push is durable on the server. One Publisher is one pool of connections: make one for a process
and share it between tasks.

A call is tried again only where a repetition does no harm: the server refused it undone (429), no
connection came about, or the call is idempotent, as a push with a cid is. A push without a cid whose answer
was lost is not sent twice; PushError says so with http_status 0.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Literal, Self
from uuid import uuid4

import msgspec

from clients.publishing.access import (
    AuditEntry,
    FrequencyCap,
    Key,
    Keys,
    NewKey,
    QuietHours,
    Settings,
    read_audit,
)
from clients.publishing.callbacks import (
    CallbackCounts,
    Callbacks,
    ParkedEvent,
    SignatureError,
    read_callback,
    verify_signature,
)
from clients.publishing.calls import NO_ANSWER, Calls, PushError, RetrySettings, given, join, quoted
from clients.publishing.devices import (
    Aliases,
    AttributeValue,
    DeviceInfo,
    DeviceStatus,
    NewDevice,
    Registered,
    Tags,
)
from clients.publishing.files import Files, UploadedFile
from clients.publishing.files import Progress as UploadProgress
from clients.publishing.pushes import (
    Accepted,
    Audience,
    CallbackTo,
    Everyone,
    FileAudience,
    GroupAccepted,
    Message,
    Notification,
    Options,
    Platform,
    PushRequest,
    SinglePush,
    read_row,
)
from clients.publishing.reports import (
    CURVES,
    RECEIPTS,
    STATES,
    Curve,
    Delivery,
    DeliveryRow,
    MessageReport,
    Progress,
    PushReport,
    Received,
    Report,
    Reports,
    Trace,
    TraceStep,
    UsersReport,
)
from clients.publishing.schedules import Firing, Periodical, Schedule, Schedules, Single
from clients.publishing.segments import Estimate, Segment, Segments, estimate_audience

BATCH: Final = 1000  # pushes in one batch call: the API's limit
BATCHES_AT_ONCE: Final = 4
DEFAULTS: Final = RetrySettings()


class Publisher:
    """Every call raises PushError. `master_secret`: the app's, or that of an API key with the scopes that the calls
    need. `connections`: how many calls may be under way at once, others wait. ValueError: `url` is no http
    address."""

    def __init__(
        self,
        app_key: str,
        master_secret: str,
        url: str = "http://127.0.0.1:8080",
        *,
        connections: int = 100,
        retry: RetrySettings = DEFAULTS,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._calls = Calls(app_key, master_secret, url, connections, retry, jitter)
        self.reports = Reports(self._calls)
        self.schedules = Schedules(self._calls)
        self.segments = Segments(self._calls)
        self.files = Files(self._calls)
        self.callbacks = Callbacks(self._calls)
        self.keys = Keys(self._calls)
        self.tags = Tags(self._calls)
        self.aliases = Aliases(self._calls)

    async def __aenter__(self) -> Self:
        self._calls.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._calls.close()

    # Pushes

    async def push(self, request: PushRequest | Mapping[str, Any]) -> Accepted:
        """Send one push. A mapping is the API's JSON object as it is."""
        return await self._calls.post("/v3/push", request, Accepted, safe=_cid(request) is not None)

    async def validate(self, request: PushRequest | Mapping[str, Any]) -> Accepted:
        """All checks of `push`, its audience included, and nothing is sent."""
        return await self._calls.post("/v3/push/validate", request, Accepted, safe=True)

    async def push_many(
        self, pushes: Sequence[SinglePush] | Mapping[str, SinglePush], by: Literal["regid", "alias"] = "regid"
    ) -> list[Accepted | PushError]:
        """Many pushes to one device or alias each, a thousand in a call and one fsync; results in the order
        given. A mapping gives the pushes cids of your own; otherwise they get random ones. Raises PushError
        if a call failed as a whole: with cids of your own the same pushes may be sent again."""
        named = pushes if isinstance(pushes, Mapping) else {str(uuid4()): push for push in pushes}
        cids = list(named)
        gate = asyncio.Semaphore(BATCHES_AT_ONCE)

        async def send(part: list[str]) -> list[Accepted | PushError]:
            async with gate:
                return await self._push_batch({cid: named[cid] for cid in part}, by)

        parts = [cids[start : start + BATCH] for start in range(0, len(cids), BATCH)]
        return [result for results in await asyncio.gather(*map(send, parts)) for result in results]

    async def _push_batch(self, batch: Mapping[str, SinglePush], by: str) -> list[Accepted | PushError]:
        """If every push of a batch is refused, the status is the first one's, and the rows stand beside
        it."""
        body = msgspec.json.encode({"pushlist": batch})
        answer = await self._calls.call("POST", f"/v3/push/batch/{by}/single", body, safe=True)
        rows = answer.read(dict[str, Any])
        if not batch.keys() <= rows.keys():
            raise answer.failure()
        return [read_row(rows[cid], answer.status) for cid in batch]

    async def withdraw(self, msg_id: int) -> None:
        """What is not delivered yet never is; devices that have it are told to remove it. A second time changes
        nothing."""
        await self._calls.do("DELETE", f"/v3/push/{msg_id}")

    async def pause(self, msg_id: int) -> Progress:
        """Of a slow push: nothing more is let go until `resume`."""
        return await self._pace(msg_id, "pause")

    async def resume(self, msg_id: int) -> Progress:
        """The rest goes in the time that was left."""
        return await self._pace(msg_id, "resume")

    async def stop(self, msg_id: int) -> Progress:
        """The rest never goes, and what waits is withdrawn."""
        return await self._pace(msg_id, "stop")

    async def _pace(self, msg_id: int, verb: str) -> Progress:
        return await self._calls.post(f"/v1/pushes/{msg_id}/{verb}", {}, Progress, safe=verb != "stop")

    async def estimate(
        self,
        audience: Audience | Mapping[str, Any] | Everyone,
        platform: Everyone | Sequence[Platform] = "all",
    ) -> Estimate:
        """How many devices a push would be for now. Nobody is no error. A mapping is the API's JSON object as it
        is."""
        return await estimate_audience(self._calls, audience, platform)

    # What became of them

    async def status(self, msg_id: int, registration_ids: Sequence[str]) -> dict[str, Delivery]:
        """Up to 1000 devices."""
        body = {"msg_id": msg_id, "registration_ids": registration_ids}
        states = await self._calls.post("/v3/status/message", body, dict[str, DeliveryRow], safe=True)
        return {registration_id: state.delivery for registration_id, state in states.items()}

    async def received(self, msg_ids: Sequence[int]) -> list[Received]:
        """Up to 100 messages, in the order given."""
        return await self._calls.get("/v3/received", list[Received], msg_ids=join(msg_ids))

    async def received_detail(self, msg_ids: Sequence[int]) -> list[Report]:
        """Up to 100 messages, in the order given."""
        return await self._calls.get("/v3/received/detail", list[Report], msg_ids=join(msg_ids))

    # Devices

    async def register_device(
        self,
        registration_id: str | None = None,
        *,
        platform: str | None = None,
        alias: str | None = None,
        tags: Sequence[str] | None = None,
        mobile: str | None = None,
        attributes: Mapping[str, AttributeValue] | None = None,
    ) -> Registered:
        """Register a device, or give one that exists a new token and these properties."""
        body = {
            "registration_id": registration_id,
            "platform": platform,
            "alias": alias,
            "tags": tags,
            "mobile": mobile,
            "attributes": attributes,
        }
        safe = registration_id is not None
        return await self._calls.post("/v1/devices", given(body), Registered, safe=safe)

    async def import_devices(self, devices: Sequence[NewDevice | Mapping[str, Any]]) -> list[Registered]:
        """Register or change many, a thousand in a call, in the order given. Each call is done whole or not at
        all. A mapping is the API's JSON object as it is."""
        found: list[Registered] = []
        for start in range(0, len(devices), BATCH):
            body = {"devices": devices[start : start + BATCH]}
            found += (await self._calls.post("/v1/devices/import", body, _Imported, safe=True)).devices
        return found

    async def revoke_tokens(self, registration_id: str) -> None:
        """All tokens of the device stop being valid, and its connection is closed."""
        await self._calls.do("DELETE", f"/v1/devices/{quoted(registration_id)}/token")

    async def device(self, registration_id: str) -> DeviceInfo:
        return await self._calls.get(_device(registration_id), DeviceInfo)

    async def update_device(
        self,
        registration_id: str,
        *,
        alias: str | None = None,
        tags: Sequence[str] | None = None,
        add_tags: Sequence[str] = (),
        remove_tags: Sequence[str] = (),
        mobile: str | None = None,
        platform: str | None = None,
        attributes: Mapping[str, AttributeValue | None] | None = None,
    ) -> None:
        """None leaves a value as it is, "" clears alias and mobile; `tags` replaces all of them. Of `attributes`,
        None removes one, and those that are not named stay."""
        body: dict[str, object] = {
            "alias": alias,
            "mobile": mobile,
            "platform": platform,
            "tags": tags,
            "attributes": attributes,
        }
        if add_tags or remove_tags:
            if tags is not None:
                raise ValueError("give tags, or add_tags and remove_tags")
            body["tags"] = {"add": add_tags, "remove": remove_tags}
        await self._calls.do("POST", _device(registration_id), given(body))

    async def devices_status(self, registration_ids: Sequence[str]) -> dict[str, DeviceStatus]:
        """Up to 1000; ids that are no device of the app are left out."""
        body = {"registration_ids": registration_ids}
        return await self._calls.post("/v3/devices/status", body, dict[str, DeviceStatus], safe=True)

    # The app

    async def settings(self) -> Settings:
        return await self._calls.get("/v1/settings", Settings)

    async def change_settings(self, settings: Settings | Mapping[str, Any]) -> Settings:
        """Put these in place of all that were; returns them as they are now. A mapping is the API's JSON object as it
        is."""
        return await self._calls.put("/v1/settings", settings, Settings)

    def audit(self) -> AsyncIterator[AuditEntry]:
        """Administrative calls on this app, newest first."""
        return read_audit(self._calls)


class GroupPublisher:
    """Pushes to all apps of a group at once. Every call raises PushError. `group_key` with its `group-` or without
    it."""

    def __init__(
        self,
        group_key: str,
        secret: str,
        url: str = "http://127.0.0.1:8080",
        *,
        retry: RetrySettings = DEFAULTS,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._calls = Calls(f"group-{group_key.removeprefix('group-')}", secret, url, 100, retry, jitter)

    async def __aenter__(self) -> Self:
        self._calls.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._calls.close()

    async def push(self, request: PushRequest | Mapping[str, Any]) -> GroupAccepted:
        """One push to each app: each is accepted or refused on its own. Raises PushError if all refused it, or the
        call failed as a whole."""
        safe = _cid(request) is not None
        answer = await self._calls.call("POST", "/v3/grouppush", msgspec.json.encode(request), safe=safe)
        rows = answer.check().read(dict[str, Any])
        group_msgid = str(rows.pop("group_msgid", ""))
        return GroupAccepted(group_msgid, {key: read_row(row, 200) for key, row in rows.items()})


class _Imported(msgspec.Struct, frozen=True):
    devices: list[Registered]


def _cid(request: PushRequest | Mapping[str, Any]) -> object:
    return request.cid if isinstance(request, PushRequest) else request.get("cid")


def _device(registration_id: str) -> str:
    return f"/v3/devices/{quoted(registration_id)}"


__all__ = [
    "BATCH",
    "CURVES",
    "NO_ANSWER",
    "RECEIPTS",
    "STATES",
    "Accepted",
    "Audience",
    "AuditEntry",
    "CallbackCounts",
    "CallbackTo",
    "Curve",
    "Delivery",
    "DeviceInfo",
    "DeviceStatus",
    "Estimate",
    "Everyone",
    "FileAudience",
    "Firing",
    "FrequencyCap",
    "GroupAccepted",
    "GroupPublisher",
    "Key",
    "Message",
    "MessageReport",
    "NewDevice",
    "NewKey",
    "Notification",
    "Options",
    "ParkedEvent",
    "Periodical",
    "Platform",
    "Progress",
    "Publisher",
    "PushError",
    "PushReport",
    "PushRequest",
    "QuietHours",
    "Received",
    "Registered",
    "Report",
    "RetrySettings",
    "Schedule",
    "Segment",
    "Settings",
    "SignatureError",
    "Single",
    "SinglePush",
    "Trace",
    "TraceStep",
    "UploadProgress",
    "UploadedFile",
    "UsersReport",
    "read_callback",
    "verify_signature",
]
