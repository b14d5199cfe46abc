"""What each endpoint is for and what it takes and answers: one row each, by method and first path.

A row is for readers and for the OpenAPI document; what is enforced is in the endpoint and in the code behind it, and
tests hold the two together. Types are those that the code reads bodies with, and shapes.py for the answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from broker.api import shapes
from broker.api.dispatch import MAX_ADDRESS, MAX_TEXT, AttemptsReport
from broker.audiences.device_checks import ChangeRequest, Properties
from broker.audiences.devices import IdChanges, Ids, Import, Renewal
from broker.audiences.segments import AudienceRequest, Estimate, EstimateRequest, Segment, SegmentRequest
from broker.later.pacer import Progress
from broker.later.schedules import ChangeRequest as ScheduleChange
from broker.later.schedules import Created, CreateRequest
from broker.model import PLATFORMS
from broker.pushing.requests import Batch, PushRequest
from broker.telling.reports import StatusRequest
from broker.tenants.app_settings import SettingsRequest
from broker.tenants.audit import MAX_ENTRIES
from broker.tenants.keys import KeyRequest

Schema = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Query:
    """One parameter of the query."""

    name: str
    about: str
    schema: Schema
    required: bool = False


@dataclass(frozen=True, slots=True)
class Described:
    """`name` is what generated clients call it. `body` and `answer` are types; None: there is none. `needed`: keys of
    the body without which nothing works."""

    name: str
    summary: str
    body: object = None
    answer: object = None
    query: tuple[Query, ...] = ()
    codes: tuple[int, ...] = ()  # beside those that every endpoint of its area has
    needed: tuple[str, ...] = ()
    optional_body: bool = False
    upload: bool = False  # multipart/form-data with a file
    cached: bool = False  # 304 where the caller has the answer (If-None-Match)


def _integer(least: int, most: int, default: int | None = None) -> Schema:
    schema: dict[str, Any] = {"type": "integer", "minimum": least, "maximum": most}
    return schema if default is None else {**schema, "default": default}


_TEXT: Final[Schema] = {"type": "string"}
_SHORT: Final[Schema] = {"type": "string", "maxLength": MAX_TEXT}
_MSG_IDS: Final = Query(
    "msg_ids",
    "Up to 100 ids with commas between.",
    {"type": "string", "pattern": "^[0-9]{1,18}(,[0-9]{1,18})*$"},
    required=True,
)
_PLATFORM: Final = Query(
    "platform",
    "Names of platforms with commas between; absent, empty or `all`: no filter.",
    {"type": "string", "pattern": f"^((all|({'|'.join(PLATFORMS)})(,({'|'.join(PLATFORMS)}))*)?)$"},
)
_AFTER: Final = Query("after", "Go on where the last answer ended.", _integer(0, 2**63 - 1, 0))
_PUSH_CODES: Final = (1005, 1009, 1011, 1012, 2003, 2005, 2006, 2007, 2008)
_NEEDED: Final = ("platform", "audience")

DESCRIBED: Final[Mapping[str, Described]] = {
    # Pushes
    "POST /v3/push": Described(
        "push", "Push to an audience.", PushRequest, shapes.Pushed, codes=_PUSH_CODES, needed=_NEEDED
    ),
    "POST /v3/push/validate": Described(
        "validatePush",
        "The checks of a push, and nothing is sent.",
        PushRequest,
        shapes.Pushed,
        codes=_PUSH_CODES,
        needed=_NEEDED,
    ),
    "POST /v3/push/file": Described(
        "pushToFile",
        "Push to the names in an uploaded file.",
        PushRequest,
        shapes.Pushed,
        codes=_PUSH_CODES,
        needed=_NEEDED,
    ),
    "GET /v3/push/cid": Described(
        "getCids",
        "Fresh idempotency keys.",
        answer=shapes.Cids,
        query=(
            Query("count", "How many.", _integer(1, 1000, 1)),
            Query("type", "For what.", {"type": "string", "enum": ["push", "schedule"]}),
        ),
    ),
    "POST /v3/push/batch/regid/single": Described(
        "pushBatchByRegistrationId",
        "Up to 1000 pushes to one registration id each, by cid.",
        Batch,
        dict[str, shapes.Result],
        codes=_PUSH_CODES,
    ),
    "POST /v3/push/batch/alias/single": Described(
        "pushBatchByAlias",
        "Up to 1000 pushes to one alias each, by cid.",
        Batch,
        dict[str, shapes.Result],
        codes=_PUSH_CODES,
    ),
    "DELETE /v3/push/{msg_id}": Described(
        "withdrawPush", "Withdraw a push: who does not have it yet never gets it."
    ),
    "POST /v3/grouppush": Described(
        "pushToGroup",
        "One push to each app of a group, as `group-KEY` with the group's secret; each app's own result by its key.",
        PushRequest,
        dict[str, str | shapes.Result],
        codes=(*_PUSH_CODES, 1008),
        needed=_NEEDED,
    ),
    "POST /v1/pushes/{msg_id}/pause": Described("pausePush", "Hold a slow push up.", answer=Progress),
    "POST /v1/pushes/{msg_id}/resume": Described("resumePush", "Let a slow push go on.", answer=Progress),
    "POST /v1/pushes/{msg_id}/stop": Described("stopPush", "End a slow push.", answer=Progress),
    # Schedules
    "POST /v3/schedules": Described(
        "createSchedule",
        "Push at a time, once or again and again.",
        CreateRequest,
        Created,
        codes=_PUSH_CODES,
    ),
    "GET /v3/schedules": Described(
        "listSchedules",
        "Live schedules, 50 a page.",
        answer=shapes.SchedulePage,
        query=(Query("page", "Counts from 1.", _integer(1, 1_000_000, 1)),),
    ),
    "GET /v3/schedules/{id}": Described("getSchedule", "One schedule.", answer=shapes.ScheduleView),
    "PUT /v3/schedules/{id}": Described(
        "updateSchedule", "Change a schedule.", ScheduleChange, shapes.ScheduleView, codes=_PUSH_CODES
    ),
    "DELETE /v3/schedules/{id}": Described("deleteSchedule", "Delete a schedule; its pushes stay."),
    "GET /v3/schedules/{id}/msg_ids": Described(
        "listPushesOfSchedule", "The pushes that a schedule made.", answer=shapes.SchedulePushes
    ),
    # Files
    "POST /v3/files/alias": Described(
        "uploadAliases", "Upload a list of aliases, one in a line.", answer=shapes.FileId, upload=True
    ),
    "POST /v3/files/registration_id": Described(
        "uploadRegistrationIds",
        "Upload a list of registration ids, one in a line.",
        answer=shapes.FileId,
        upload=True,
    ),
    "GET /v3/files": Described("listFiles", "The app's files.", answer=shapes.FileList),
    "GET /v3/files/{id}": Described("getFile", "One file.", answer=shapes.FileView),
    "DELETE /v3/files/{id}": Described("deleteFile", "Delete a file."),
    # Segments
    "GET /v1/segments": Described(
        "listSegments",
        "Saved segments.",
        answer=shapes.SegmentList,
        query=(Query("after", "Those whose id is greater.", _TEXT),),
    ),
    "POST /v1/segments": Described("createSegment", "Save a segment.", SegmentRequest, Segment),
    "POST /v1/segments/estimate": Described(
        "estimateRule", "How many devices a rule holds for.", EstimateRequest, Estimate
    ),
    "GET /v1/segments/{id}": Described("getSegment", "One segment.", answer=Segment),
    "PUT /v1/segments/{id}": Described("replaceSegment", "Change a segment.", SegmentRequest, Segment),
    "DELETE /v1/segments/{id}": Described("deleteSegment", "Delete a segment."),
    "GET /v1/segments/{id}/estimate": Described(
        "estimateSegment", "How many devices a segment has.", answer=Estimate
    ),
    "POST /v1/audience/estimate": Described(
        "estimateAudience", "How many devices a push would be for.", AudienceRequest, Estimate, needed=_NEEDED
    ),
    # Devices
    "POST /v1/devices": Described(
        "registerDevice",
        "Register an installation. The device key is enough.",
        Properties,
        shapes.Registered,
        codes=(7013, 7015),
        optional_body=True,
    ),
    "POST /v1/devices/import": Described(
        "importDevices", "Register many devices, or change them.", Import, shapes.Imported, codes=(7013, 7015)
    ),
    "POST /v1/devices/{id}/token": Described(
        "renewDeviceToken",
        "A new token. With the device key, the body shows the current one.",
        Renewal,
        shapes.Registered,
        optional_body=True,
    ),
    "DELETE /v1/devices/{id}/token": Described(
        "revokeDeviceTokens", "Revoke all tokens of a device and close its connection."
    ),
    "POST /v3/devices/status": Described(
        "getDevicesStatus", "Who is online.", Ids, dict[str, shapes.Presence], codes=(7013,)
    ),
    "GET /v3/tags": Described("listTags", "Tags that some device has.", answer=shapes.Tags),
    "GET /v3/tags/{tag}/registration_ids/{id}": Described(
        "deviceHasTag", "Whether a device has a tag.", answer=shapes.HasTag
    ),
    "POST /v3/tags/{tag}": Described(
        "updateTag", "Give devices a tag, or take it from them.", IdChanges, codes=(7013,)
    ),
    "DELETE /v3/tags/{tag}": Described("deleteTag", "Take a tag from all devices.", query=(_PLATFORM,)),
    "GET /v3/aliases/{alias}": Described(
        "getDevicesOfAlias", "The devices of an alias.", answer=shapes.OfAlias, query=(_PLATFORM,)
    ),
    "POST /v3/aliases/{alias}": Described(
        "removeAliasFromDevices", "Take an alias from devices.", IdChanges, codes=(7013,)
    ),
    "DELETE /v3/aliases/{alias}": Described(
        "deleteAlias", "Take an alias from all devices.", query=(_PLATFORM,)
    ),
    "GET /v3/devices/{id}": Described("getDevice", "One device's tags and alias.", answer=shapes.DeviceView),
    "POST /v3/devices/{id}": Described(
        "updateDevice", "Change a device's tags and alias.", ChangeRequest, codes=(7013, 7015)
    ),
    "GET /v1/dispatch": Described(
        "askDispatch",
        "Where a device is to connect: addresses in order, heartbeat, backoff; signed. The app key is enough.",
        answer=shapes.DispatchAnswer,
        query=(
            Query(
                "app",
                "The app key.",
                {"type": "string", "minLength": 1, "maxLength": MAX_TEXT},
                required=True,
            ),
            Query("carrier", "MCC+MNC of the SIM card, or a carrier's name.", _SHORT),
            Query("link", "wifi, cellular, ethernet, satellite or other.", _SHORT),
            Query("region", "Addresses there go first.", _SHORT),
            Query(
                "reached",
                "The address that the device got through to last.",
                {"type": "string", "maxLength": MAX_ADDRESS},
            ),
            Query("v", "Version of the answer.", {"type": "string", "enum": ["1"]}),
        ),
        codes=(1008,),
        cached=True,
    ),
    "POST /v1/dispatch/report": Described(
        "reportAttempts", "How a device's attempts to connect went.", AttemptsReport, codes=(1008,)
    ),
    # Reports
    "GET /v3/received": Described(
        "getReceived", "To how many devices messages came.", answer=list[shapes.Received], query=(_MSG_IDS,)
    ),
    "GET /v3/received/detail": Described(
        "getReceivedDetail",
        "The same by channel, with the whole account.",
        answer=list[shapes.ReceivedDetail],
        query=(_MSG_IDS,),
    ),
    "GET /v3/messages": Described(
        "getMessageStatistics",
        "Statistics of messages by platform.",
        answer=list[shapes.MessageStatistics],
        query=(_MSG_IDS,),
    ),
    "GET /v3/messages/detail": Described(
        "getMessageStatisticsDetail",
        "Statistics of messages by channel.",
        answer=list[shapes.MessageDetail],
        query=(_MSG_IDS,),
    ),
    "POST /v3/status/message": Described(
        "getMessageStatus",
        "What became of one message for some devices.",
        StatusRequest,
        dict[str, shapes.DeviceStatus],
    ),
    "GET /v3/users": Described(
        "getUsers",
        "New, online and active users by hour, day or month.",
        answer=shapes.Users,
        query=(
            Query(
                "time_unit", "Of the stretches.", {"type": "string", "enum": ["HOUR", "DAY", "MONTH"]}, True
            ),
            Query("start", "Of the first: 2026-11-22 08, 2026-11-22 or 2026-11.", _TEXT, True),
            Query("duration", "How many.", _integer(1, 72)),
        ),
    ),
    "GET /v1/pushes/{msg_id}": Described(
        "getPushReport", "Everything that is counted of one push.", answer=shapes.PushReport
    ),
    "GET /v1/pushes/{msg_id}/curve": Described("getPushCurve", "The hours of a push.", answer=shapes.Curve),
    "GET /v1/pushes/{msg_id}/devices/{registration_id}": Described(
        "getPushTrace", "What happened between one push and one device.", answer=shapes.Trace
    ),
    "GET /v1/events": Described(
        "listDeviceEvents",
        "What devices told on event/NAME.",
        answer=shapes.Events,
        query=(_AFTER, Query("limit", "At most so many.", _integer(1, 1000, 100))),
    ),
    # Callbacks
    "GET /v1/callbacks": Described(
        "getCallbacks", "How much waits to be told.", answer=shapes.CallbackCounts
    ),
    "GET /v1/callbacks/parked": Described(
        "listParkedCallbacks",
        "What was given up, oldest first.",
        answer=shapes.Parked,
        query=(_AFTER, Query("limit", "At most so many.", _integer(1, 1000, 100))),
    ),
    "POST /v1/callbacks/parked/retry": Described(
        "retryParkedCallbacks", "Try what was given up again.", answer=shapes.Retried
    ),
    "DELETE /v1/callbacks/parked": Described(
        "dropParkedCallbacks", "Drop what was given up.", answer=shapes.Dropped
    ),
    # Administration
    "GET /v1/settings": Described(
        "getSettings", "The owner's settings of the app.", answer=shapes.OwnSettings
    ),
    "PUT /v1/settings": Described(
        "replaceSettings",
        "Replace the owner's settings of the app; what is left out gets its default.",
        SettingsRequest,
        shapes.OwnSettings,
    ),
    "GET /v1/keys": Described(
        "listKeys", "The app's API keys, without their secrets.", answer=shapes.KeyList
    ),
    "POST /v1/keys": Described("createKey", "Make an API key.", KeyRequest, shapes.NewKey),
    "DELETE /v1/keys/{id}": Described("deleteKey", "Delete an API key: it stops at once."),
    "GET /v1/audit": Described(
        "listAudit",
        "Administrative calls, newest first.",
        answer=shapes.AuditPage,
        query=(
            Query("before", "Those with a smaller id; 0: the newest.", _integer(0, 2**63 - 1, 0)),
            Query("limit", "At most so many.", _integer(1, MAX_ENTRIES, 100)),
        ),
    ),
    "GET /v1/openapi.json": Described("getOpenApi", "This document.", answer=dict[str, Any]),
}

PARAMETERS: Final[Mapping[str, tuple[str, Schema]]] = {
    "msg_id": ("Of a push.", {"type": "string", "pattern": "^[0-9]{1,18}$"}),
    "registration_id": ("Of a device.", {"type": "string", "minLength": 1}),
    "tag": ("A tag.", {"type": "string", "minLength": 1}),
    "alias": ("An alias.", {"type": "string", "minLength": 1}),
    "id": ("What the path names.", {"type": "string", "minLength": 1}),
}
"""Names in paths."""

SCHEMA_NAMES: Final[Mapping[type, str]] = {ChangeRequest: "DeviceChange", ScheduleChange: "ScheduleChange"}
"""Of types whose own name another type has, too."""
