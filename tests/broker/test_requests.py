"""The push object: rows of what is refused, with the code and what the caller reads; and what is accepted."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.audiences.audience import Audience
from broker.errors import STATUS, ApiError
from broker.limits import Limits
from broker.model import Callback
from broker.pushing.requests import NO_WISHES, BatchItem, Checked, Wishes, check_item, read_batch, read_push

LIMITS = Limits()
GOOD: dict[str, Any] = {"platform": "all", "audience": "all", "notification": {"alert": "hi"}}
ABSENT = object()


def _push(**changes: Any) -> bytes:
    """GOOD with changes; ABSENT takes a key away."""
    return orjson.dumps({key: value for key, value in (GOOD | changes).items() if value is not ABSENT})


def _refused(raw: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read_push(raw, LIMITS)
    return caught.value


def _read(**changes: Any) -> Checked:
    return read_push(_push(**changes), LIMITS)


REFUSED = [
    # body, code, what the message says
    (b"", 1003, "not valid JSON"),
    (b"{", 1003, "not valid JSON"),
    (b"\xff\xfe", 1003, "not valid JSON"),
    (b"[]", 1003, "the body: expected object, got array"),
    (b'"x"', 1003, "the body: expected object, got str"),
    (b'{"a":' * 5000 + b"1" + b"}" * 5000, 1003, "nested too deeply"),
    (b'{"platform":"all","audience":"all","notification":{"alert":"\xff"}}', 1003, "UTF-8"),
    (b'{"platform":"all","audience":"all","notification":{"alert":"\\ud800"}}', 1003, "not valid JSON"),
    (_push() + b"x", 1003, "trailing"),
    (b"{}", 1002, "platform is required"),
    (_push(platform=ABSENT), 1002, 'platform is required: "all" or a list of android, ios, quickapp'),
    (_push(platform=None), 1002, "platform is required"),
    (_push(platform="android"), 1003, 'platform: must be "all" or a list'),
    (_push(platform=[]), 1003, "platform: must be"),
    (_push(platform=["android", "symbian"]), 1003, "platform: must be"),
    (_push(platform=["android", 1]), 1003, "platform[1]: expected str, got int"),
    (_push(platform=7), 1003, "platform: expected"),
    (_push(audience=ABSENT), 1002, "audience is required"),
    (_push(audience=None), 1002, "audience is required"),
    (_push(audience="everyone"), 1003, 'audience: must be "all" or an object'),
    (_push(audience=[]), 1003, "audience: expected"),
    (_push(audience={}), 1003, "audience: names nobody"),
    (_push(audience={"tag": [], "alias": []}), 1003, "audience: names nobody"),
    (_push(audience={"tags": ["a"]}), 1003, "audience.tags: this key is not supported"),
    (_push(audience={"tag": "a"}), 1003, "audience.tag: expected array | null, got str"),
    (_push(audience={"tag": ["a", True]}), 1003, "audience.tag[1]: expected int | str"),
    (_push(audience={"tag": ["a"] * 21}), 1003, "audience.tag: at most 20 values, got 21"),
    (_push(audience={"tag_and": ["a"] * 21}), 1003, "audience.tag_and: at most 20"),
    (_push(audience={"tag_not": ["a"] * 21}), 1003, "audience.tag_not: at most 20"),
    (_push(audience={"alias": ["a"] * 1001}), 1003, "audience.alias: at most 1000 values, got 1001"),
    (_push(audience={"registration_id": ["a"] * 1001}), 1003, "audience.registration_id: at most 1000"),
    (_push(audience={"registration_id": [1]}), 1003, "audience.registration_id[0]: expected str"),
    (_push(audience={"tag": ["a" * 41]}), 1003, "audience.tag: a name is at most 40 bytes, got 41"),
    (_push(audience={"tag": ["深" * 14]}), 1003, "at most 40 bytes, got 42"),
    (_push(audience={"tag": ["a b"]}), 1003, "audience.tag: a name has letters"),
    (_push(audience={"alias": [""]}), 1003, "audience.alias: a name has letters"),
    (_push(audience={"segment": ["s", "t"]}), 1003, "audience.segment: must be a list with the id of one"),
    (_push(audience={"segment": [{}]}), 1003, "audience.segment: must be a list with the id of one"),
    (_push(audience={"segment": []}), 1003, "audience: names nobody"),
    (_push(audience={"abtest": ["s"]}), 1003, "audience.abtest: not supported"),
    (_push(audience={"file": {"id": "f"}}), 1003, 'audience.file: must be {"file_id": "…"}'),
    (_push(notification=ABSENT), 1002, "notification or message is required"),
    (_push(notification=None), 1002, "notification or message is required"),
    (_push(notification={}), 1002, "notification is empty"),
    (_push(notification="hi"), 1003, "notification: expected object | null, got str"),
    (_push(notification={"alert": 1}), 1003, "notification.alert: expected"),
    (
        _push(notification={"alert": "x", "symbian": {}}),
        1009,
        "notification.symbian: this key is not supported",
    ),
    (_push(notification={"android": {"alert": "x", "colour": 1}}), 1009, "notification.android.colour"),
    (_push(notification={"ios": {"content_available": 1}}), 1009, "notification.ios.content_available"),
    (
        _push(notification={"android": {"builder_id": "1"}}),
        1003,
        "notification.android.builder_id: expected int",
    ),
    (_push(notification={"android": {"extras": []}}), 1003, "notification.android.extras: expected object"),
    (_push(message={}), 1002, "message.msg_content is required"),
    (_push(message={"msg_content": {}}), 1003, "message.msg_content: expected str"),
    (_push(message={"msg_content": "x", "body": "y"}), 1009, "message.body: this key is not supported"),
    (_push(options=[]), 1003, "options: expected object"),
    (_push(options={"time_to_live": -1}), 1003, "options.time_to_live: must be 0 to 864000 seconds, got -1"),
    (_push(options={"time_to_live": 864001}), 1003, "must be 0 to 864000"),
    (_push(options={"time_to_live": "60"}), 1003, "options.time_to_live: expected int | null, got str"),
    (_push(options={"sendno": 1.5}), 1003, "options.sendno: expected"),
    (_push(options={"sendno": "9" * 65}), 1003, "options.sendno: at most 64 bytes"),
    (_push(options={"override_msg_id": "x"}), 1003, "options.override_msg_id: must be the msg_id of a push"),
    (_push(options={"override_msg_id": -1}), 1003, "options.override_msg_id: must be"),
    (_push(options={"override_msg_id": "9" * 19}), 1003, "options.override_msg_id: must be"),
    (
        _push(options={"big_push_duration": 1401}),
        1003,
        "big_push_duration: must be 1 to 1400 minutes, got 1401",
    ),
    (_push(options={"big_push_duration": -1}), 1003, "big_push_duration: must be 1 to 1400 minutes, got -1"),
    (_push(options={"priority": "urgent"}), 1003, "options.priority: must be normal or high, got urgent"),
    (
        _push(options={"collapse_key": "k" * 65}),
        1003,
        "options.collapse_key: must be printable text of at most 64",
    ),
    (_push(options={"apns_collapse_id": "a\tb"}), 1003, "options.apns_collapse_id: must be printable"),
    (_push(callback={"url": "ftp://x"}), 1003, "callback.url: must be a URL"),
    (_push(callback=[]), 1003, "callback: must be an object"),
    (_push(sms_message={"temp_id": 1}), 1003, "sms_message: SMS is not supported"),
    (_push(cid=""), 1003, "cid: must be 1 to 128 bytes"),
    (_push(cid="a\nb"), 1003, "cid: must be 1 to 128 bytes"),
    (_push(cid="error"), 1003, "cid: must not be the word error"),
    (_push(cid="c" * 129), 1003, "cid: must be 1 to 128 bytes"),
    (_push(cid=1), 1003, "cid: expected str | null, got int"),
    (_push(message={"msg_content": "x" * 4000}), 1005, "message: at most 4000 bytes, got 4018"),
    (_push(notification={"android": {"alert": "x" * 4000}}), 1005, "notification.android and message"),
    (
        _push(notification={"ios": {"alert": "x" * 2000}}),
        1005,
        "notification.ios: at most 2000 bytes, got 2012",
    ),
    (_push(notification={"alert": "x" * 2000}), 1005, "notification.ios: at most 2000"),
    (
        _push(notification={"android": {"alert": "x" * 2500}}, message={"msg_content": "x" * 2500}),
        1005,
        "notification.android and message: at most 4000",
    ),
]


@pytest.mark.parametrize(("raw", "code", "message"), REFUSED)
def test_a_wrong_push_is_told_its_field_and_what_is_allowed(raw: bytes, code: int, message: str) -> None:
    error = _refused(raw)
    assert (error.code, error.http_status) == (code, STATUS[code][0])
    assert message in error.message


def test_a_huge_key_is_named_in_part() -> None:
    error = _refused(_push(notification={"k" * 70_000: 1}))
    assert (error.code, len(error.message)) == (1009, 1001)


ACCEPTED: list[dict[str, Any]] = [
    {"platform": ["android", "ios", "quickapp", "hmos", "winphone"]},
    {"audience": {"tag": ["深圳", "a_b", "@!#$&*+=.|￥"]}},
    {"audience": {"alias": ["a" * 40]}},
    {"audience": {"registration_id": ["r"] * 1000}},
    {"audience": {"tag": ["a"], "segment": [], "abtest": None}},
    {"message": {"msg_content": "x", "title": "t", "content_type": "text", "extras": {"a": {"b": [1]}}}},
    {"notification": None, "message": {"msg_content": ""}},
    {"notification": {"ios": {"alert": {"title": "t"}, "badge": "+1", "content-available": 1}}},
    {"notification": {"winphone": {"alert": "x", "_open_page": "/p"}, "voip": {"k": "v"}}},
    {"notification": {"android": {"alert": "x" * 3900}}},
    {"options": {"apns_production": False, "third_party_channel": {"xiaomi": {}}, "sendno": 2**31}},
    {"options": {"override_msg_id": 0, "big_push_duration": 0, "time_to_live": 864000}},
    {"options": None, "cid": None, "callback": {"url": "http://x", "type": 3}},
    {"notification_3rd": {"title": "t", "content": "c"}, "whatever": 1},
]


@pytest.mark.parametrize("changes", ACCEPTED)
def test_what_sdks_send_is_accepted(changes: dict[str, Any]) -> None:
    _read(**changes)


def test_devices_get_what_the_publisher_sent() -> None:
    notification = {
        "alert": "hi 你好",
        "android": {"alert": "", "extras": {"n": 1, "null": None, "deep": [{}]}},
    }
    checked = _read(notification=notification, message={"msg_content": "m", "title": None})
    assert orjson.loads(checked.body) == {"notification": notification, "message": {"msg_content": "m"}}
    assert b' "' not in checked.body


def test_keys_of_the_audience_are_kept_apart_and_numbers_are_names() -> None:
    audience = {"tag": [1, 2], "tag_and": ["3", 4], "tag_not": [5], "alias": [6], "registration_id": ["r"]}
    assert _read(audience=audience, platform=["ios"]).audience == Audience(
        registration_ids=("r",),
        aliases=("6",),
        tags=("1", "2"),
        tags_and=("3", "4"),
        tags_not=("5",),
        platforms=("ios",),
    )


def test_options_have_defaults() -> None:
    checked = _read()
    assert (checked.ttl, checked.sendno, checked.cid) == (86400, "", "")
    checked = _read(options={"time_to_live": 0, "sendno": 12}, cid="c")
    assert (checked.ttl, checked.sendno, checked.cid) == (0, "12", "c")


def test_wishes_are_read_and_a_push_without_any_shares_one_object() -> None:
    assert _read().wishes is _read(options={"override_msg_id": "0", "priority": "normal"}).wishes is NO_WISHES
    options = {"override_msg_id": "17", "big_push_duration": 5, "apns_collapse_id": "k", "priority": "high"}
    callback = {"url": "https://example.com/x", "params": {"a": 1}, "type": 1}
    assert _read(options=options, callback=callback).wishes == Wishes(
        17, 5, "k", True, Callback("https://example.com/x", ("delivered",), {"a": 1})
    )
    both = _read(options={"collapse_key": "mine", "apns_collapse_id": "apple's"})
    assert both.wishes.collapse == "mine"


def test_the_apps_own_callback_holds_where_the_push_has_none() -> None:
    own = Callback("https://example.com/own")
    assert read_push(_push(), LIMITS, own).wishes == Wishes(callback=own)
    other = _push(callback={"url": "https://example.com/other"})
    checked = read_push(other, LIMITS, own)
    assert checked.wishes.callback is not None
    assert checked.wishes.callback.url == "https://example.com/other"


def test_a_segment_and_a_file_are_parts_of_an_audience() -> None:
    audience = _read(audience={"segment": [7], "file": {"file_id": "f"}, "tag": ["a"]}).audience
    assert audience == Audience(tags=("a",), segment="7", file_id="f")


def test_a_refused_push_keeps_its_sendno() -> None:
    assert _refused(_push(platform=[], options={"sendno": 5})).as_dict()["sendno"] == "5"


@given(st.recursive(st.none() | st.booleans() | st.integers(0, 9) | st.text(max_size=3),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                        st.sampled_from([*GOOD, "alert", "tag", "options", "message", "msg_content", "cid"]),
                        inner, max_size=4)))  # fmt: skip
def test_no_json_raises_anything_but_an_api_error(value: Any) -> None:
    for raw in (orjson.dumps(value), _push(audience=value), _push(notification=value), _push(options=value)):
        try:
            read_push(raw, LIMITS)
        except ApiError as error:
            assert error.code in {1002, 1003, 1005, 1009}  # noqa: PT017


@given(st.binary(max_size=50))
def test_no_bytes_raise_anything_but_an_api_error(raw: bytes) -> None:
    assert _refused(raw).code in {1002, 1003}


ITEM = {"platform": "all", "target": "r1", "message": {"msg_content": "x"}}


def test_one_wrong_item_does_not_spoil_a_batch() -> None:
    pushlist = {"c2": 7, "c1": ITEM, "c3": ITEM | {"message": {"colour": 1}}}
    items = read_batch(orjson.dumps({"pushlist": pushlist}), LIMITS)
    assert list(items) == ["c2", "c1", "c3"]
    wrong = {cid: item.code for cid, item in items.items() if isinstance(item, ApiError)}
    assert wrong == {"c2": 1003, "c3": 1009}


def _only_item(raw: bytes) -> BatchItem:
    (item,) = read_batch(raw, LIMITS).values()
    assert isinstance(item, BatchItem)
    return item


def test_the_target_of_a_batch_item() -> None:
    item = _only_item(orjson.dumps({"pushlist": {"c1": ITEM}}))
    assert check_item("c1", item, "regid", LIMITS).audience == Audience(registration_ids=("r1",))
    assert check_item("c1", item, "alias", LIMITS).audience == Audience(aliases=("r1",))


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"target": None}, 1002, "target is required: one alias"),
        ({"target": ""}, 1002, "target is required"),
        ({"target": "a b"}, 1003, "target: a name has letters"),
        ({"platform": None}, 1002, "platform is required"),
        ({"message": None}, 1002, "notification or message"),
        ({"options": {"time_to_live": -1}}, 1003, "time_to_live"),
    ],
)
def test_a_wrong_item(changes: dict[str, Any], code: int, message: str) -> None:
    item = _only_item(orjson.dumps({"pushlist": {"c1": ITEM | changes}}))
    with pytest.raises(ApiError, match=message) as caught:
        check_item("c1", item, "alias", LIMITS)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"{}", 1002),
        (b'{"pushlist":{}}', 1002),
        (b'{"pushlist":[]}', 1003),
        (b"x", 1003),
        (orjson.dumps({"pushlist": {str(n): ITEM for n in range(1001)}}), 1003),
    ],
)
def test_a_batch_that_is_none(raw: bytes, code: int) -> None:
    with pytest.raises(ApiError) as caught:
        read_batch(raw, LIMITS)
    assert caught.value.code == code
