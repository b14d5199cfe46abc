"""What a push is, and what the server says to one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from clients.publishing.calls import PushError

Everyone = Literal["all"]
Platform = Literal["android", "ios", "quickapp", "hmos", "winphone"]
Priority = Literal["normal", "high"]
Event = Literal["delivered", "shown", "clicked", "dismissed", "expired", "evicted", "recalled", "suppressed"]


class FileAudience(msgspec.Struct, frozen=True):
    """An uploaded list of registration ids or aliases; see Files."""

    file_id: str


class Audience(msgspec.Struct, frozen=True, omit_defaults=True):
    """Whom a push is for. Keys AND together; `registration_id`, `alias` and `tag` mean any of the values,
    `tag_and` all of them, `tag_not` none of them; `segment` is the id of one saved segment."""

    registration_id: Sequence[str] = ()
    alias: Sequence[str] = ()
    tag: Sequence[str] = ()
    tag_and: Sequence[str] = ()
    tag_not: Sequence[str] = ()
    segment: Sequence[str] = ()
    file: FileAudience | None = None


Part = Mapping[str, Any] | None


class Notification(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a person sees: one `alert` for all, and what a platform has of its own."""

    alert: str | Mapping[str, Any] | None = None
    android: Part = None
    ios: Part = None
    quickapp: Part = None
    hmos: Part = None
    winphone: Part = None
    voip: Part = None

    @classmethod
    def titled(cls, title: str, alert: str, extras: Mapping[str, Any] | None = None) -> Notification:
        """With a title on every platform."""
        more = {"extras": extras} if extras else {}
        own = {"alert": alert, "title": title, **more}
        ios = {"alert": {"title": title, "body": alert}, **more}
        return cls(alert, android=own, ios=ios, quickapp=own, hmos=own, winphone=own)


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the app gets, and shows or not."""

    msg_content: str
    title: str | None = None
    content_type: str | None = None
    extras: Mapping[str, Any] | None = None


class Options(msgspec.Struct, frozen=True, omit_defaults=True):
    """Each is the server's default where it is None.

    `time_to_live`: seconds, 0: only for devices that are online now; default a day.
    `override_msg_id`: a push that this one takes the place of, where it waits and where it shows (1 day back).
    `big_push_duration`: spread evenly over so many minutes, 1 to 1400.
    `collapse_key`: of the app's waiting pushes with this key a device keeps only the newest.
    `priority`: "high" goes in quiet hours, and frequency caps do not count it."""

    time_to_live: int | None = None
    sendno: int | str | None = None
    apns_production: bool | None = None
    apns_collapse_id: str | None = None
    classification: int | None = None
    override_msg_id: int | None = None
    big_push_duration: int | None = None
    collapse_key: str | None = None
    priority: Priority | None = None


class CallbackTo(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where this push's events are told to, instead of the app's own callback. `params` comes along as it is."""

    url: str
    events: Sequence[Event] = ()
    params: Mapping[str, Any] | None = None


class PushRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """`cid`: a key of your own, up to 128 bytes; a push with a cid that was used is the push of the first
    time."""

    audience: Audience | Everyone
    notification: Notification | None = None
    message: Message | None = None
    options: Options | None = None
    cid: str | None = None
    callback: CallbackTo | None = None
    platform: Everyone | Sequence[Platform] = msgspec.field(default_factory=lambda: "all")  # always written


class SinglePush(msgspec.Struct, frozen=True, omit_defaults=True):
    """One push of a batch: `target` is one registration id or alias."""

    target: str
    notification: Notification | None = None
    message: Message | None = None
    options: Options | None = None
    platform: Everyone | Sequence[Platform] = msgspec.field(default_factory=lambda: "all")


class Accepted(msgspec.Struct, frozen=True):
    """`msg_id` 0: it was only validated."""

    msg_id: int
    sendno: str


class GroupAccepted(msgspec.Struct, frozen=True):
    """`results` by app key: an app's push, or why it has none."""

    group_msgid: str
    results: dict[str, Accepted | PushError]


class _Error(msgspec.Struct, frozen=True):
    code: int
    message: str


class Row(msgspec.Struct, frozen=True):
    """One push of several in an answer."""

    msg_id: int | None = None
    sendno: str = ""
    error: _Error | None = None

    def result(self, status: int) -> Accepted | PushError:
        if self.error is not None:
            return PushError(self.error.code, status, self.error.message)
        return Accepted(self.msg_id or 0, self.sendno)


def read_row(row: object, status: int) -> Accepted | PushError:
    return msgspec.convert(row, Row, strict=False).result(status)
