"""Named limits of the public API. Those that protect default to the vendor's table; those that sell plans
are off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

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
    max_batch_items: int = 1000  # pushes in one batch
    max_msg_ids: int = 100  # of one report call

    max_ids: int = 1000  # registration ids or aliases in one call
    max_audience_tags: int = 20  # in each of tag, tag_and, tag_not
    max_device_tags: int = 1000
    name_size: int = 40  # one tag or alias
    registration_id_size: int = 64
    cid_size: int = 128
    sendno_size: int = 64  # the publisher's own number is stored with the push

    max_push: int = 4000  # Android notification + message; iOS message; any other platform
    max_ios_notification: int = 2000
    max_event: int = 4096  # a behaviour event's payload
    max_event_name: int = 64
    max_events: int = 1000  # in one answer of /v1/events

    max_listed: int = 10_000  # registration ids of an alias, or tags of an app, in one answer

    token_lifetime: int = 180 * DAY
    max_apps_cached: int = 65_536  # apps kept ready; beyond it the oldest entry is read again
    max_unknown_keys: int = 4096  # wrong app keys remembered, so that guessing costs no store read each

    push_rate: int | None = None  # calls per app and minute; the vendor's are 600, 2400, 600
    report_rate: int | None = None
    device_rate: int | None = None
