"""Topic names and topic filters (MQTT5-4.7, MQTT311-4.7). How deep a topic may be is the caller's limit."""

from __future__ import annotations

from typing import Final

MAX_TOPIC_BYTES: Final = 65_535  # UTF-8 bytes: its length on the wire is a UINT16 (MQTT5-4.7.3-3)
SHARE: Final = "$share/"


def valid_topic_name(topic: str) -> bool:
    """Whether a PUBLISH may carry it: not empty, no wildcard (MQTT5-3.3.2-2), no U+0000, encodable."""
    return bool(topic) and "+" not in topic and "#" not in topic and _encodable(topic)


def valid_filter(topic_filter: str) -> bool:
    """Whether a SUBSCRIBE may carry it. `$share/...` must name a group and a filter, in 3.1.1 too."""
    if topic_filter.startswith(SHARE):
        return split_share(topic_filter) is not None and _encodable(topic_filter)
    return _valid_plain_filter(topic_filter) and _encodable(topic_filter)


def split_share(topic_filter: str) -> tuple[str, str] | None:
    """`$share/group/filter` as (group, filter); None when it is not a (valid) shared subscription."""
    if not topic_filter.startswith(SHARE):
        return None
    group, slash, plain = topic_filter[len(SHARE) :].partition("/")
    if not group or "+" in group or "#" in group or not slash:  # MQTT5-4.8.2-1, MQTT5-4.8.2-2
        return None
    return (group, plain) if _valid_plain_filter(plain) else None


def _valid_plain_filter(topic_filter: str) -> bool:
    if "+" not in topic_filter and "#" not in topic_filter:
        return bool(topic_filter)  # MQTT5-4.7.3-1
    levels = topic_filter.split("/")
    if "#" in topic_filter and ("#" in "".join(levels[:-1]) or (levels[-1] != "#" and "#" in levels[-1])):
        return False  # MQTT5-4.7.1-1: `#` is the last level, and all of it
    return all(level == "+" or "+" not in level for level in levels)  # MQTT5-4.7.1-2


def _encodable(topic: str) -> bool:
    if "\0" in topic:  # MQTT5-4.7.3-2
        return False
    if topic.isascii():
        return len(topic) <= MAX_TOPIC_BYTES
    try:
        return len(topic.encode()) <= MAX_TOPIC_BYTES
    except UnicodeEncodeError:  # a lone surrogate, which JSON can spell
        return False
