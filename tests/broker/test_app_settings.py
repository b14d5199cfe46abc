"""Settings of an app: what is taken, what is refused and how it is said, and who may set what."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import orjson
import pytest

from broker.bus import CredentialsChanged
from broker.errors import ApiError
from broker.limits import Limits, limits_of
from broker.model import AppSettings, Callback, FrequencyCap, QuietHours
from broker.tenants.app_settings import (
    OVERRIDABLE,
    describe_own_settings,
    describe_settings,
    read_own_settings,
    read_settings,
)

ALL: dict[str, Any] = {
    "restricted": True,
    "allow_from": ["10.0.0.0/8", "2001:db8::/32", "192.0.2.7/32"],
    "limits": {"push_rate": 600, "max_audience_tags": 50, "daily_pushes": None},
    "quiet_hours": {"start": "22:00", "end": "07:00", "zone": "Asia/Shanghai", "action": "suppress"},
    "frequency_caps": [
        {"count": 5, "per": "hour", "zone": "UTC"},
        {"count": 20, "per": "day", "zone": "UTC"},
    ],
    "callback": {"url": "https://shop.example/told", "events": ["delivered"], "params": {"a": 1}},
}
NONE: dict[str, Any] = {
    "restricted": False,
    "allow_from": [],
    "limits": {},
    "quiet_hours": None,
    "frequency_caps": [],
    "callback": None,
}
OWN = ("allow_from", "quiet_hours", "frequency_caps", "callback")


def test_all_of_them_are_read_and_shown() -> None:
    settings = read_settings(orjson.dumps(ALL), Limits())
    assert settings == AppSettings(
        restricted=True,
        allow_from=("10.0.0.0/8", "2001:db8::/32", "192.0.2.7/32"),
        limits=ALL["limits"],
        quiet_hours=QuietHours("22:00", "07:00", "Asia/Shanghai", "suppress"),
        frequency_caps=(FrequencyCap(5, "hour"), FrequencyCap(20)),
        callback=Callback("https://shop.example/told", ("delivered",), {"a": 1}),
    )
    assert describe_settings(settings) == ALL
    assert describe_own_settings(settings) == {name: ALL[name] for name in OWN}


def test_what_is_left_out_gets_its_default() -> None:
    assert read_settings(b"{}", Limits()) == AppSettings()
    assert describe_settings(AppSettings()) == NONE


def test_an_address_alone_is_a_network_of_one() -> None:
    settings = read_settings(b'{"allow_from": ["192.0.2.7", "192.0.2.7/32", "::1"]}', Limits())
    assert settings.allow_from == ("192.0.2.7/32", "::1/128")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"quiet": {}}, "quiet: this key is not supported"),
    ({"restricted": "yes"}, "restricted: expected bool"),
    ({"allow_from": "10.0.0.0/8"}, "allow_from: expected array"),
    ({"allow_from": ["10.0.0.1/8"]}, "allow_from: must be networks such as 192.0.2.0/24"),
    ({"allow_from": ["example.org"]}, "'example.org' does not appear to be"),
    ({"allow_from": ["10.0.0.0/8"] * 1001}, "allow_from: at most 1000 networks, got 1001"),
    ({"limits": {"pushes": 1}}, "limits.pushes: there is no such limit; there are default_ttl, "),
    ({"limits": {"max_apps_cached": 1}}, "limits.max_apps_cached: there is no such limit"),
    (
        {"limits": {"push_rate": 0}},
        "limits.push_rate = 0: must be a whole number from 1 to 1000000000, or null",
    ),
    ({"limits": {"max_ids": None}}, "limits.max_ids = null: must be a whole number from 1 to 1000000000"),
    ({"limits": {"max_ids": 10**10}}, "limits.max_ids = 10000000000: must be"),
    ({"limits": {"max_ids": True}}, "limits"),
    ({"limits": {"max_ttl": 60}}, "limits.default_ttl = 86400: must be at most max_ttl, 60"),
    ({"quiet_hours": {"start": "22:00"}}, "quiet_hours.end is required"),
    ({"quiet_hours": {"start": "24:00", "end": "07:00"}}, "quiet_hours.start = '24:00': must be HH:MM"),
    ({"quiet_hours": {"start": "22:00", "end": "7:00"}}, "quiet_hours.end = '7:00': must be HH:MM"),
    (
        {"quiet_hours": {"start": "07:00", "end": "07:00"}},
        "quiet_hours.end = '07:00': must differ from start",
    ),
    (
        {"quiet_hours": {"start": "22:00", "end": "07:00", "zone": "Mars/Olympus"}},
        "quiet_hours.zone = 'Mars/Olympus': must be a name of the IANA time zones",
    ),
    (
        {"quiet_hours": {"start": "22:00", "end": "07:00", "zone": "../../etc/passwd"}},
        "quiet_hours.zone = '../../etc/passwd': must be",
    ),
    (
        {"quiet_hours": {"start": "22:00", "end": "07:00", "action": "drop"}},
        "quiet_hours.action = 'drop': must be one of delay, suppress",
    ),
    ({"frequency_caps": [{"count": 0}]}, "frequency_caps[0].count = 0: must be 1 to 1000"),
    (
        {"frequency_caps": [{"count": 1}, {"count": 1001}]},
        "frequency_caps[1].count = 1001: must be 1 to 1000",
    ),
    (
        {"frequency_caps": [{"count": 1, "per": "week"}]},
        "frequency_caps[0].per = 'week': must be one of hour",
    ),
    ({"frequency_caps": [{"count": 1, "zone": ""}]}, "frequency_caps[0].zone = '': must be"),
    ({"frequency_caps": [{"count": 1}] * 11}, "frequency_caps: at most 10, got 11"),
    ({"callback": {"url": "ftp://shop.example"}}, "callback.url"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_a_mistake_is_named_with_what_is_allowed(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ApiError) as error:
        read_settings(orjson.dumps(wrong), Limits())
    assert (error.value.http_status, message in error.value.message) == (400, True), error.value.message


def test_every_limit_that_an_app_may_have_is_one() -> None:
    for name, can_be_off in OVERRIDABLE.items():
        assert read_settings(orjson.dumps({"limits": {name: 86_400}}), Limits()).limits == {name: 86_400}
        assert hasattr(Limits(), name)
        if can_be_off:
            assert read_settings(orjson.dumps({"limits": {name: None}}), Limits()).limits == {name: None}


def test_the_owner_changes_his_part_and_leaves_the_rest() -> None:
    now = read_settings(orjson.dumps(ALL), Limits())
    changed = read_own_settings(b'{"allow_from": ["192.0.2.0/24"]}', now, "192.0.2.1")
    assert describe_settings(changed) == {
        **NONE,
        "restricted": True,
        "limits": ALL["limits"],
        "allow_from": ["192.0.2.0/24"],
    }


@pytest.mark.parametrize("name", ["restricted", "limits"])
def test_the_owner_may_not_set_what_is_the_operators(name: str) -> None:
    with pytest.raises(ApiError, match="only the operator of the server may set it"):
        read_own_settings(orjson.dumps({name: ALL[name]}), AppSettings(), "127.0.0.1")


@pytest.mark.parametrize("caller", ["192.0.3.1", "", "2001:db8::1"])
def test_the_owner_cannot_lock_himself_out(caller: str) -> None:
    with pytest.raises(ApiError, match="allow_from: your own address"):
        read_own_settings(b'{"allow_from": ["192.0.2.0/24"]}', AppSettings(), caller)


# Limits of an app


async def test_most_apps_have_the_servers_limits(service: Any) -> None:
    limits = Limits()
    assert limits_of(limits, service.app) is limits


async def test_limits_of_an_app_are_made_once(service: Any) -> None:
    app = replace(service.app, settings=AppSettings(limits={"max_ids": 7}))
    limits, other = Limits(max_push=1), Limits(max_push=2)
    made = limits_of(limits, app)
    assert (made.max_ids, made.max_push) == (7, 1)
    assert limits_of(limits, app) is made
    assert limits_of(other, app).max_push == 2
    again = replace(service.app, settings=AppSettings(limits={"max_ids": 8}))
    assert limits_of(limits, again).max_ids == 8


# Over HTTP


async def test_settings_hold_at_once_and_survive(service: Any) -> None:
    wanted = {**{name: NONE[name] for name in OWN}, "quiet_hours": ALL["quiet_hours"]}
    answer = await service.call("PUT", "/v1/settings", {"quiet_hours": ALL["quiet_hours"]})
    assert (answer.status, answer.json) == (200, wanted)
    assert (await service.call("GET", "/v1/settings")).json == wanted
    app = await service.apps.find(service.app.key)
    assert app.settings.quiet_hours == QuietHours("22:00", "07:00", "Asia/Shanghai", "suppress")
    assert (await service.store.find_app(service.app.key)) == app
    while not isinstance(bell := await service.doorbell(), CredentialsChanged) or bell.devnos is not None:
        pass
    assert (await service.call("PUT", "/v1/settings", {})).json == {name: NONE[name] for name in OWN}


async def test_what_the_operator_sets_meanwhile_stays(service: Any) -> None:
    """The owner's call is on its way, and its app is the one of before."""
    wanted = AppSettings(restricted=True, limits={"push_rate": 7})
    calls = [
        service.apps.set_settings(service.app.key, wanted),
        *(service.call("PUT", "/v1/settings", {"allow_from": ["127.0.0.1"]}) for _ in range(5)),
    ]
    await asyncio.gather(*calls)
    app = await service.store.find_app(service.app.key)
    assert (app.settings.restricted, app.settings.limits) == (True, {"push_rate": 7})


async def test_a_mistake_changes_nothing(service: Any) -> None:
    await service.call("PUT", "/v1/settings", {"quiet_hours": ALL["quiet_hours"]})
    answer = await service.call("PUT", "/v1/settings", {"frequency_caps": [{"count": 0}]})
    assert (answer.status, answer.code) == (400, 1003)
    assert (await service.call("GET", "/v1/settings")).json["quiet_hours"] == ALL["quiet_hours"]


async def test_the_white_list_is_for_publishers(service: Any) -> None:
    await service.apps.set_settings(service.app.key, AppSettings(allow_from=("192.0.2.0/24",)))
    for method, path in (("GET", "/v3/push/cid"), ("GET", "/v3/tags"), ("GET", "/v1/settings")):
        answer = await service.call(method, path)
        assert (answer.status, answer.code) == (403, 2004)
        assert "127.0.0.1" in answer.message
    installation = (service.app.key, service.app.device_key)
    assert (await service.call("POST", "/v1/devices", {}, auth=installation)).status == 200
    await service.apps.set_settings(service.app.key, AppSettings(allow_from=("127.0.0.0/8",)))
    assert (await service.call("GET", "/v3/push/cid")).status == 200


async def test_an_apps_own_rate_and_body_size_hold(service: Any) -> None:
    settings = AppSettings(limits={"push_rate": 2, "max_body": 2000})
    await service.apps.set_settings(service.app.key, settings)
    first = await service.call("GET", "/v3/push/cid")
    assert first.headers["X-Rate-Limit-Quota"] == "2"
    answer = await service.call("PUT", "/v1/settings", b" " * 2001)
    assert (answer.status, answer.code, "larger than 2000 bytes" in answer.message) == (413, 1005, True)
    assert (await service.call("GET", "/v3/push/cid")).code == 2002
    other = await service.apps.create("other")
    auth = (other.key, other.master_secret)
    assert (await service.call("PUT", "/v1/settings", b"{" + b" " * 2001 + b"}", auth=auth)).status == 200
