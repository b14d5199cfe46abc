"""Named limits of the public API. Those that protect default to the vendor's table; those that sell plans
are off."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

from broker.model import App

DAY: Final = 86_400
NO_LIMIT: Final = 1_000_000_000
"""What `X-Rate-Limit-Quota` says while a rate limit is off."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes are bytes of UTF-8, times seconds."""

    fanout_limit: int = 1000  # up to so many resolved targets get an inbox row each; more make one broadcast
    default_ttl: int = DAY
    max_ttl: int = 10 * DAY

    max_body: int = 1 << 20  # one API call; stops a caller from filling memory before a check runs
    max_batch_body: int = 8 << 20  # the batch paths
    request_timeout: float = 30.0  # until a body is there, or more of an upload
    max_batch_items: int = 1000  # pushes in one batch
    max_msg_ids: int = 100  # of one report call

    max_ids: int = 1000  # registration ids or aliases in one call
    max_audience_tags: int = 20  # in each of tag, tag_and, tag_not
    max_device_tags: int = 1000
    max_attributes: int = 50  # of one device
    attribute_name_size: int = 40
    attribute_text_size: int = 128
    max_imported: int = 1000  # devices in one call of /v1/devices/import

    max_segments: int = 1000  # of one app
    segment_name_size: int = 255
    max_rule_depth: int = 10  # of a segment's rule, which is read recursively
    max_rule_parts: int = (
        200  # its conditions, and the values they name; a question about numbers counts for 8 more
    )
    max_rule_times: int = 10  # its last_active conditions; each unites the bitmaps of many hours

    max_files: int = 20  # of one app at a time
    max_file_lines: int = 1_000_000
    max_file_size: int = 96 << 20  # a million of the longest ids and more
    file_lifetime: int = 30 * DAY
    name_size: int = 40  # one tag or alias
    registration_id_size: int = 64
    cid_size: int = 128
    collapse_key_size: int = 64
    sendno_size: int = 64  # the publisher's own number is stored with the push

    max_push: int = 4000  # Android notification + message; iOS message; any other platform
    max_ios_notification: int = 2000
    max_event: int = 4096  # a behaviour event's payload
    max_event_name: int = 64
    max_events: int = 1000  # in one answer of /v1/events
    max_user_days: int = 60  # in one answer of /v3/users

    max_listed: int = 10_000  # registration ids of an alias, or tags of an app, in one answer

    max_schedules: int | None = None  # live schedules of an app (8100); the vendor's is 100
    max_schedule: int = 256 << 10  # a schedule's push, as compact JSON; a page of the list has 50 of them
    max_schedule_name: int = 255
    max_schedule_span: int = 366 * DAY
    max_schedule_frequency: int = 100
    schedule_zone: str = "Asia/Shanghai"  # what existing JPush SDKs mean by a time without a zone
    schedule_grace: int = 3600  # what was missed by more is not fired any more
    override_lifetime: int = DAY  # how long after a push another may take its place
    cid_lifetime: int = DAY  # of a schedule's cid; the store knows its own
    report_lifetime: int = 30 * DAY  # a schedule that is over is kept as long as the reports of its pushes
    max_slow_minutes: int = 1400  # over which one push may be spread
    max_slow_pushes: int | None = 20  # of an app at once (1012)

    token_lifetime: int = 180 * DAY
    max_apps_cached: int = 65_536  # apps kept ready; beyond it the oldest entry is read again
    max_unknown_keys: int = 4096  # wrong app keys remembered, so that guessing costs no store read each

    push_rate: int | None = None  # calls per app and minute; the vendor's are 600, 2400, 600
    report_rate: int | None = None
    device_rate: int | None = None

    daily_pushes: int | None = (
        None  # accepted pushes of an app in a UTC day (2006); one of a batch counts as one
    )
    monthly_pushes: int | None = None  # in a UTC month (2007)
    daily_broadcasts: int | None = None  # pushes for more than fanout_limit devices in a UTC day (2008)
    max_targets: int | None = None  # devices that one push may be for (2005)
    alias_devices: int | None = None  # devices with the same alias (7015)

    max_keys: int = 100  # API keys of an app
    max_groups: int = 1000  # app groups of the installation
    max_group_apps: int = 100  # apps of a group: each is a push of its own


def limits_of(limits: Limits, app: App) -> Limits:
    """The server's limits with what the app's settings change. Two look-ups; most apps change nothing."""
    changes = app.settings.limits
    if not changes:
        return limits
    known = _merged.get(id(changes))
    if known is not None and known[0] is limits and known[1] is changes:
        return known[2]
    if len(_merged) >= MERGED:
        _merged.clear()
    own: dict[str, Any] = dict(changes)
    merged = replace(limits, **own)
    _merged[id(changes)] = (limits, changes, merged)  # holds `changes`, so that its id stays taken
    return merged


MERGED: Final = 4096  # apps with limits of their own that are kept ready
_merged: dict[int, tuple[Limits, object, Limits]] = {}
