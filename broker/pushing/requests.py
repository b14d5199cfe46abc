"""What publishers send, as typed requests; and how a wrong one is told so.

null is as if absent, everywhere. Keys of the push object itself that we do not know are accepted (SDKs send
vendor channels' settings there), except `sms_message`: without the SMS the push is not what the publisher
meant. Inside notification and message an unknown key is 1009, inside audience 1003, inside options it is
accepted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, TypeVar

import msgspec
import orjson

from broker.audiences.audience import Audience
from broker.errors import PUSH, ApiError, Area
from broker.limits import Limits
from broker.model import Callback
from broker.telling.callback_urls import read_callback

PUSH_PLATFORMS: Final = ("android", "ios", "quickapp", "hmos", "winphone")
_PLATFORM_SET: Final = frozenset(PUSH_PLATFORMS)

_T = TypeVar("_T")
Text = str | dict[str, Any] | None
Extras = dict[str, Any] | None


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    """Written back as it came, less nulls and blanks between tokens."""


class Android(_Part, frozen=True):
    alert: Text = None
    title: str | None = None
    builder_id: int | None = None
    channel_id: str | None = None
    category: str | None = None
    priority: int | None = None
    style: int | None = None
    alert_type: int | None = None
    big_text: str | None = None
    inbox: Any = None
    big_pic_path: str | None = None
    extras: Extras = None
    large_icon: str | None = None
    small_icon_uri: str | None = None
    icon_bg_color: str | None = None
    intent: Any = None
    uri_activity: str | None = None
    uri_action: str | None = None
    badge_add_num: int | None = None
    badge_set_num: int | None = None
    badge_class: str | None = None
    sound: str | None = None
    show_begin_time: str | None = None
    show_end_time: str | None = None
    display_foreground: Any = None
    custom_buttons: Any = None
    mipns_content_forshort: str | None = None
    oppns_content_forshort: str | None = None
    vpns_content_forshort: str | None = None
    mzpns_content_forshort: str | None = None


class Ios(_Part, frozen=True, rename="kebab"):
    alert: Text = None
    sound: Text = None
    badge: int | str | None = None
    content_available: bool | int | None = None
    mutable_content: bool | int | None = None
    category: str | None = None
    extras: Extras = None
    thread_id: str | None = None
    interruption_level: str | None = None
    relevance_score: float | None = None
    target_content_id: str | None = None
    filter_criteria: str | None = None


class Quickapp(_Part, frozen=True):
    alert: str | None = None
    title: str | None = None
    page: str | None = None
    extras: Extras = None


class Hmos(_Part, frozen=True):
    alert: Text = None
    title: str | None = None
    category: str | None = None
    large_icon: str | None = None
    intent: Any = None
    extras: Extras = None
    style: int | str | None = None  # text in the vendor's own examples
    inbox: Any = None
    badge_add_num: int | None = None
    badge_set_num: int | None = None
    test_message: Any = None
    receipt_id: str | None = None
    push_type: int | None = None
    extra_data: Any = None
    display_foreground: Any = None
    sound: str | None = None
    sound_duration: int | None = None
    hm_payload: Any = None


class Winphone(_Part, frozen=True, rename={"open_page": "_open_page"}):
    alert: str | None = None
    title: str | None = None
    open_page: str | None = None
    extras: Extras = None


class Notification(_Part, frozen=True):
    alert: Text = None
    android: Android | None = None
    ios: Ios | None = None
    quickapp: Quickapp | None = None
    hmos: Hmos | None = None
    winphone: Winphone | None = None
    voip: dict[str, Any] | None = None


class Message(_Part, frozen=True):
    msg_content: str
    title: str | None = None
    content_type: str | None = None
    extras: Extras = None


class Body(_Part, frozen=True):
    """What devices get."""

    notification: Notification | None = None
    message: Message | None = None


Names = list[str | int] | None


class AudienceObject(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    tag: Names = None
    tag_and: Names = None
    tag_not: Names = None
    alias: Names = None
    registration_id: list[str] | None = None
    segment: list[Any] | None = None
    abtest: list[Any] | None = None
    file: dict[str, Any] | None = None


class Options(msgspec.Struct, frozen=True, gc=False):
    sendno: int | str | None = None
    time_to_live: int | None = None
    override_msg_id: int | str | None = None
    big_push_duration: int | None = None
    apns_production: bool | None = None
    apns_collapse_id: str | None = None
    collapse_key: str | None = None
    priority: str | None = None
    classification: int | None = None


class _Content(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """What one push and one item of a batch have in common."""

    platform: str | list[str] | None = None
    notification: Notification | None = None
    message: Message | None = None
    options: Options | None = None
    callback: Any = None
    sms_message: Any = None


class PushRequest(_Content, frozen=True, gc=False, kw_only=True):
    audience: str | AudienceObject | None = None
    cid: str | None = None


class BatchItem(_Content, frozen=True, gc=False, kw_only=True):
    target: str | None = None


class Batch(msgspec.Struct, frozen=True, gc=False):
    pushlist: dict[str, BatchItem]


class LooseBatch(msgspec.Struct, frozen=True, gc=False):
    """Read when some item of a batch is wrong, so that the others still go."""

    pushlist: dict[str, msgspec.Raw]


_push_decoder: Final = msgspec.json.Decoder(PushRequest)
_batch_decoder: Final = msgspec.json.Decoder(Batch)
_loose_batch_decoder: Final = msgspec.json.Decoder(LooseBatch)
_item_decoder: Final = msgspec.json.Decoder(BatchItem)
SHALLOW: Final = 250  # brackets that cannot nest too deep, however they are put
_encode: Final = msgspec.json.Encoder().encode


class Wishes(msgspec.Struct, frozen=True, gc=False):
    """How a push is to be delivered, beyond its time to live. Most pushes wish for nothing: NO_WISHES."""

    replaces: int = 0  # msg_id
    slow_minutes: int = 0  # 0: at once
    collapse: str = ""
    high: bool = False
    callback: Callback | None = None


NO_WISHES: Final = Wishes()


class Checked(msgspec.Struct, frozen=True, gc=False):
    """A push that is right in itself; its audience is not resolved yet."""

    audience: Audience
    body: bytes
    ttl: int
    sendno: str
    cid: str  # "": none
    wishes: Wishes


def read_push(raw: bytes, limits: Limits, default_callback: Callback | None = None) -> Checked:
    """Decode and check one push. Raises ApiError: 1002, 1003, 1005, 1009."""
    request = decode(_push_decoder.decode, raw, PUSH)
    sendno = read_sendno(request.options, limits)
    try:
        platforms = read_platforms(request.platform)
        audience = read_audience(request.audience, platforms, limits)
        ttl = _check_content(request, limits)
        if request.cid is not None:
            check_cid(request.cid, limits)
        wishes = _read_wishes(request, limits, default_callback)
        return Checked(audience, _encode_body(request, limits), ttl, sendno, request.cid or "", wishes)
    except ApiError as error:
        error.sendno = sendno
        raise


def read_batch(raw: bytes, limits: Limits) -> Mapping[str, BatchItem | ApiError]:
    """By cid the items of a batch, or what is wrong with those that could not be read."""
    items: Mapping[str, BatchItem | ApiError]
    try:
        items = _batch_decoder.decode(raw).pushlist
    except (ValueError, RecursionError):
        items = _read_items(decode(_loose_batch_decoder.decode, raw, PUSH).pushlist)
    if not items:
        raise ApiError(1002, "pushlist: at least one push is required")
    if len(items) > limits.max_batch_items:
        raise ApiError(1003, f"pushlist: at most {limits.max_batch_items} pushes, got {len(items)}")
    return items


def check_item(
    cid: str,
    item: BatchItem,
    by: Literal["regid", "alias"],
    limits: Limits,
    default_callback: Callback | None = None,
) -> Checked:
    """As read_push, for one item of a batch: `target` is one registration id or alias, the key is its cid."""
    sendno = read_sendno(item.options, limits)
    try:
        check_cid(cid, limits)
        platforms = read_platforms(item.platform)
        audience = _read_target(item.target, by, platforms, limits)
        ttl = _check_content(item, limits)
        wishes = _read_wishes(item, limits, default_callback)
        return Checked(audience, _encode_body(item, limits), ttl, sendno, cid, wishes)
    except ApiError as error:
        error.sendno = sendno
        raise


def decode(decoder: Callable[[bytes], _T], raw: bytes, area: Area) -> _T:
    """Run a msgspec decoder; what it dislikes becomes an ApiError that names the field."""
    try:
        return decoder(raw)
    except msgspec.ValidationError as error:
        raise _explain(str(error), area) from None
    except UnicodeDecodeError:
        raise ApiError(area.invalid, "the body is not valid UTF-8") from None
    except msgspec.DecodeError as error:
        raise ApiError(area.invalid, f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise ApiError(area.invalid, "the body is nested too deeply") from None


_PROBLEM: Final = re.compile(r"(?P<what>.*?)(?: - at `(?:key in )?\$\.?(?P<path>[^`]*)`)?", re.DOTALL)
_FIELD: Final = re.compile(r"`([^`]*)`")


def _explain(problem: str, area: Area) -> ApiError:
    """msgspec says "Expected `int`, got `str` - at `$.options.time_to_live`"."""
    match = _PROBLEM.fullmatch(problem)
    what, path = (match["what"], match["path"] or "") if match else (problem, "")
    field = _FIELD.search(what)
    named = ".".join(part for part in (path, field[1] if field else "") if part)
    if what.startswith("Object missing required field"):
        return ApiError(area.missing, f"{named} is required")
    if what.startswith("Object contains unknown field"):
        # The push area alone tells unsupported content keys apart.
        content = area is PUSH and not path.startswith("audience")
        return ApiError(1009 if content else area.invalid, f"{named}: this key is not supported")
    expected = what[:1].lower() + what[1:].replace("`", "")
    return ApiError(area.invalid, f"{path or 'the body'}: {expected}")


def _read_items(raws: dict[str, msgspec.Raw]) -> dict[str, BatchItem | ApiError]:
    items: dict[str, BatchItem | ApiError] = {}
    for cid, raw in raws.items():
        try:
            items[cid] = decode(_item_decoder.decode, bytes(raw), PUSH)
        except ApiError as error:
            items[cid] = error
    return items


def read_platforms(platform: str | list[str] | None) -> tuple[str, ...]:
    """() means all."""
    if platform == "all":
        return ()
    if platform is None:
        raise ApiError(1002, 'platform is required: "all" or a list of ' + ", ".join(PUSH_PLATFORMS))
    if isinstance(platform, str) or not platform or not _PLATFORM_SET.issuperset(platform):
        raise ApiError(1003, 'platform: must be "all" or a list of ' + ", ".join(PUSH_PLATFORMS))
    return tuple(platform)


def read_audience(
    audience: str | AudienceObject | None, platforms: tuple[str, ...], limits: Limits
) -> Audience:
    if audience == "all":
        return Audience(everyone=True, platforms=platforms)
    if audience is None:
        raise ApiError(1002, 'audience is required: "all" or an object')
    if isinstance(audience, str):
        raise ApiError(1003, 'audience: must be "all" or an object')
    if audience.abtest:
        raise ApiError(1003, "audience.abtest: not supported; send each copy to its own audience")
    read = Audience(
        registration_ids=_read_ids(audience.registration_id, limits),
        aliases=_read_names(audience.alias, "audience.alias", limits.max_ids, limits),
        tags=_read_names(audience.tag, "audience.tag", limits.max_audience_tags, limits),
        tags_and=_read_names(audience.tag_and, "audience.tag_and", limits.max_audience_tags, limits),
        tags_not=_read_names(audience.tag_not, "audience.tag_not", limits.max_audience_tags, limits),
        platforms=platforms,
        segment=_read_segment(audience.segment),
        file_id=_read_file(audience.file),
    )
    if not read.registration_ids and read == Audience(platforms=platforms):
        raise ApiError(
            1003,
            "audience: names nobody; give tag, tag_and, tag_not, alias, registration_id, segment or file,"
            ' or "all"',
        )
    return read


def _read_segment(segment: list[Any] | None) -> str:
    if not segment:
        return ""
    if len(segment) > 1 or not isinstance(segment[0], str | int) or not str(segment[0]):
        raise ApiError(1003, "audience.segment: must be a list with the id of one segment")
    return str(segment[0])


def _read_file(file: dict[str, Any] | None) -> str:
    if file is None:
        return ""
    file_id = file.get("file_id")
    if not isinstance(file_id, str) or not file_id:
        raise ApiError(1003, 'audience.file: must be {"file_id": "…"}')
    return file_id


def _read_target(
    target: str | None, by: Literal["regid", "alias"], platforms: tuple[str, ...], limits: Limits
) -> Audience:
    if not target:
        raise ApiError(1002, "target is required: one " + ("alias" if by == "alias" else "registration id"))
    if by == "alias":
        return Audience(aliases=(check_name(target, "target", limits),), platforms=platforms)
    return Audience(registration_ids=(target,), platforms=platforms)


def _read_ids(ids: list[str] | None, limits: Limits) -> tuple[str, ...]:
    if not ids:
        return ()
    if len(ids) > limits.max_ids:
        raise ApiError(1003, f"audience.registration_id: at most {limits.max_ids} values, got {len(ids)}")
    return tuple(ids)


def _read_names(names: Names, path: str, most: int, limits: Limits) -> tuple[str, ...]:
    if not names:
        return ()
    if len(names) > most:
        raise ApiError(1003, f"{path}: at most {most} values, got {len(names)}")
    return tuple(check_name(str(name), path, limits) for name in names)


_NAME: Final = re.compile(r"[\w@!#$&*+=.|￥]+")


def check_name(name: str, path: str, limits: Limits, code: int = 1003) -> str:
    """A tag or alias: 1..40 bytes of letters, digits, _, CJK and @!#$&*+=.|￥."""
    if len(name) > limits.name_size or len(name.encode()) > limits.name_size:
        raise ApiError(code, f"{path}: a name is at most {limits.name_size} bytes, got {len(name.encode())}")
    if not _NAME.fullmatch(name):
        raise ApiError(
            code, f"{path}: a name has letters, digits, _ and @!#$&*+=.|￥ only, at least one of them"
        )
    return name


def check_cid(cid: str, limits: Limits) -> None:
    size = len(cid) if cid.isascii() else len(cid.encode())
    if not 0 < size <= limits.cid_size or not cid.isprintable():
        raise ApiError(1003, f"cid: must be 1 to {limits.cid_size} bytes of printable text")
    if cid == "error":  # beside which a batch's answer could not be told from a refusal
        raise ApiError(1003, "cid: must not be the word error")


def read_sendno(options: Options | None, limits: Limits) -> str:
    if options is None or options.sendno is None:
        return ""
    sendno = str(options.sendno)
    if len(sendno.encode()) > limits.sendno_size:
        raise ApiError(1003, f"options.sendno: at most {limits.sendno_size} bytes")
    return sendno


def _check_content(content: _Content, limits: Limits) -> int:
    """Everything but whom it is for; returns the time to live."""
    if content.sms_message is not None:
        raise ApiError(1003, "sms_message: SMS is not supported")
    if content.notification is None and content.message is None:
        raise ApiError(1002, "notification or message is required")
    if content.notification == _NO_NOTIFICATION:
        raise ApiError(1002, "notification is empty: give alert or a platform's notification")
    return limits.default_ttl if content.options is None else _check_options(content.options, limits)


_NO_NOTIFICATION: Final = Notification()


def _check_options(options: Options, limits: Limits) -> int:
    ttl = options.time_to_live
    if ttl is None:
        return limits.default_ttl
    if not 0 <= ttl <= limits.max_ttl:
        raise ApiError(1003, f"options.time_to_live: must be 0 to {limits.max_ttl} seconds, got {ttl}")
    return ttl


def _read_wishes(content: _Content, limits: Limits, default_callback: Callback | None) -> Wishes:
    options, callback = content.options, default_callback
    if content.callback is not None:
        callback = read_callback(content.callback, default_callback)
    if options is None or not _wishes_anything(options):
        return NO_WISHES if callback is None else Wishes(callback=callback)
    wishes = Wishes(
        _read_replaces(options.override_msg_id),
        _read_slow(options.big_push_duration, limits),
        _read_collapse(options, limits),
        _read_priority(options.priority),
        callback,
    )
    return NO_WISHES if wishes == NO_WISHES else wishes


def _wishes_anything(options: Options) -> bool:
    """Most options are a time to live alone."""
    return bool(
        options.override_msg_id
        or options.big_push_duration
        or options.collapse_key
        or options.apns_collapse_id
        or options.priority is not None
    )


def parse_msg_id(text: str) -> int | None:
    """None: this can be no msg_id."""
    right = text.isascii() and text.isdigit() and len(text) <= 19
    return int(text) if right and int(text) < 2**63 else None


def _read_replaces(value: int | str | None) -> int:
    # Some SDKs send 0 for "not set" in this and the next.
    text = str(value or 0)
    msg_id = parse_msg_id(text)
    if msg_id is None:
        raise ApiError(1003, f"options.override_msg_id: must be the msg_id of a push, got {text[:40]}")
    return msg_id


def _read_slow(minutes: int | None, limits: Limits) -> int:
    if minutes is not None and not 0 <= minutes <= limits.max_slow_minutes:
        most = limits.max_slow_minutes
        raise ApiError(1003, f"options.big_push_duration: must be 1 to {most} minutes, got {minutes}")
    return minutes or 0


def _read_collapse(options: Options, limits: Limits) -> str:
    name = "apns_collapse_id" if options.collapse_key is None else "collapse_key"
    key = getattr(options, name) or ""
    if key and (len(key.encode(errors="replace")) > limits.collapse_key_size or not key.isprintable()):
        most = limits.collapse_key_size
        raise ApiError(1003, f"options.{name}: must be printable text of at most {most} bytes")
    return str(key)


def _read_priority(priority: str | None) -> bool:
    if priority not in (None, "normal", "high"):
        raise ApiError(1003, f"options.priority: must be normal or high, got {str(priority)[:40]}")
    return priority == "high"


def _check_nesting(body: bytes) -> None:
    """Nodes write payloads with orjson, which stops at 254 levels: such a push could never be sent."""
    try:
        orjson.dumps(orjson.loads(body))
    except TypeError as error:
        raise ApiError(1003, "notification and message may be nested 250 levels deep at the most") from error


def _encode_body(content: _Content, limits: Limits) -> bytes:
    body = _encode(Body(content.notification, content.message))
    if len(body) > SHALLOW and body.count(b"[") + body.count(b"{") > SHALLOW:
        _check_nesting(body)
    if len(body) > limits.max_ios_notification or len(body) > limits.max_push:  # else no part can be too long
        _check_sizes(content, limits)
    return body


def _check_sizes(content: _Content, limits: Limits) -> None:
    message = _size(content.message)
    _check_size("message", message, limits.max_push)
    if content.notification is None:
        return
    alert = _size(content.notification.alert)
    for platform in PUSH_PLATFORMS:
        own = _size(getattr(content.notification, platform))
        if platform == "ios":
            own += _size(content.notification.voip)
            _check_size("notification.ios", own or alert, limits.max_ios_notification)
        else:
            _check_size(f"notification.{platform} and message", (own or alert) + message, limits.max_push)


def _size(part: object) -> int:
    return 0 if part is None else len(_encode(part))


def _check_size(what: str, size: int, most: int) -> None:
    if size > most:
        raise ApiError(1005, f"{what}: at most {most} bytes, got {size}")
