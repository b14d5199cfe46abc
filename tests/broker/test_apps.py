from __future__ import annotations

from base64 import b64encode
from dataclasses import replace
from typing import Any

import pytest

from broker.bus import CredentialsChanged
from broker.limits import Limits
from broker.model import AccessRule
from broker.tenants.apps import MAX_AGE, Apps, read_basic
from broker.tenants.keys import Keys


def _basic(user: str, password: str) -> str:
    return "Basic " + b64encode(f"{user}:{password}".encode()).decode()


@pytest.mark.parametrize(
    ("header", "credentials"),
    [
        ("Basic YTpi", ("a", b"b")),
        ("basic YTpi", ("a", b"b")),
        ("Basic  YTpi", ("a", b"b")),
        ("Basic YTpiOmM=", ("a", b"b:c")),
        ("Basic Og==", ("", b"")),
        ("Basic YQ==", None),
        ("Basic YTp", None),
        ("Basic \u00e9", None),
        ("Basic /zo=", None),
        ("Basic", None),
        ("Bearer YTpi", None),
        ("", None),
    ],
)
def test_a_basic_header_is_read(header: str, credentials: tuple[str, bytes] | None) -> None:
    assert read_basic(header) == credentials


async def test_an_app_is_known_after_it_was_found(service: Any) -> None:
    apps = Apps(service.store, service.bus)
    assert apps.peek(service.app.key) is None
    assert await apps.find(service.app.key) == service.app
    assert apps.peek(service.app.key) == service.app
    assert await apps.find("f" * 24) is None
    assert await apps.find("f" * 24) is None
    apps.close()


async def test_each_secret_opens_its_own_door(service: Any) -> None:
    apps, app = service.apps, service.app
    master = await apps.login(_basic(app.key, app.master_secret))
    device = await apps.login(_basic(app.key, app.device_key))
    assert master is not None
    assert device is not None
    assert (master.app, master.publisher) == (app, True)
    assert (device.app, device.publisher) == (app, False)
    assert apps.peek_login(_basic(app.key, app.master_secret)) is master
    for header in (_basic(app.key, "wrong"), _basic("f" * 24, app.master_secret), "nonsense"):
        assert await apps.login(header) is None
        assert apps.peek_login(header) is None
    assert apps.check_master_secret(app, app.master_secret.encode())
    assert not apps.check_master_secret(app, app.device_key.encode())
    assert apps.check_device_key(app, app.device_key.encode())
    assert not apps.check_device_key(app, b"")


async def test_a_rotated_secret_stops_at_once_and_everywhere(service: Any) -> None:
    app, elsewhere = service.app, Apps(service.store, service.bus)
    old = _basic(app.key, app.master_secret)
    assert await elsewhere.login(old) is not None
    assert await service.apps.login(old) is not None
    rotated = await service.apps.rotate_secret(app.key)
    assert rotated is not None
    assert await service.apps.login(old) is None
    while not isinstance(bell := await service.doorbell(), CredentialsChanged) or bell.app_id != app.app_id:
        pass
    assert bell.devnos is None
    assert elsewhere.peek(app.key) is None
    assert await elsewhere.login(old) is None
    assert await elsewhere.login(_basic(app.key, rotated.master_secret)) is not None
    elsewhere.close()


async def test_other_access_rules_hold_at_once_and_everywhere(service: Any) -> None:
    app, elsewhere = service.app, Apps(service.store, service.bus)
    rules = (AccessRule(True, "all", "a/{registration_id}", "devices"),)
    assert await elsewhere.find(app.key) == app
    assert await service.apps.set_access(app.key, rules) == replace(app, access=rules)
    assert await service.apps.find(app.key) == replace(app, access=rules)
    while not isinstance(bell := await service.doorbell(), CredentialsChanged) or bell.app_id != app.app_id:
        pass
    assert bell.devnos is None
    assert elsewhere.peek(app.key) is None
    assert await elsewhere.find(app.key) == replace(app, access=rules)
    assert await service.apps.set_access("f" * 24, rules) is None
    elsewhere.close()


async def test_a_deleted_app_is_gone(service: Any) -> None:
    header = _basic(service.app.key, service.app.master_secret)
    assert await service.apps.login(header) is not None
    assert await service.apps.delete(service.app.key)
    assert await service.apps.login(header) is None
    assert await service.apps.find(service.app.key) is None
    assert not await service.apps.delete(service.app.key)
    assert await service.apps.rotate_secret(service.app.key) is None


async def test_one_form_of_a_header_is_remembered(service: Any) -> None:
    """Every installation has the device key, and there are endless ways to write it."""
    apps, app = service.apps, service.app
    plain = _basic(app.key, app.device_key)
    encoded = plain.removeprefix("Basic ")
    for header in (f"basic {encoded}", f"Basic  {encoded}", plain + " " * 6000, plain):
        login = await apps.login(header)
        assert login is not None
        assert (apps.peek_login(header) is not None) == (header == plain)


async def test_long_keys_are_not_remembered(service: Any) -> None:
    assert await service.apps.find("f" * 8000) is None
    assert not service.apps._unknown


async def test_caches_are_bounded(service: Any) -> None:
    apps = Apps(service.store, service.bus, Limits(max_apps_cached=2, max_unknown_keys=2))
    created = [await service.apps.create(f"app {n}") for n in range(4)]
    for app in created:
        assert await apps.login(_basic(app.key, app.master_secret)) is not None
    for n in range(4):
        assert await apps.find(f"unknown {n}") is None
    assert [apps.peek(app.key) is not None for app in created] == [False, False, True, True]
    assert await apps.find(created[0].key) == created[0]
    apps.close()


# A doorbell may be lost (bus B1)


class Deaf:
    """A bus that brings nothing, and says so when it is asked to."""

    def subscribe(self, subscriber: object, missed: Any = None) -> Any:
        del subscriber
        self.missed = missed
        return lambda: None

    def ring(self, doorbells: object) -> None:
        del doorbells


async def test_what_changed_elsewhere_is_known_after_a_while(service: Any) -> None:
    now = 1000.0
    apps = Apps(service.store, Deaf(), clock=lambda: now)  # type: ignore[arg-type]
    header = _basic(service.app.key, service.app.master_secret)
    assert await apps.login(header) is not None
    assert await apps.find("f" * 24) is None
    await service.store.rotate_secret(service.app.key)
    now += MAX_AGE - 1
    assert await apps.login(header) is not None  # this is the bound
    now += 1
    assert apps.peek(service.app.key) is None
    assert await apps.login(header) is None


async def test_an_api_key_that_was_deleted_elsewhere_stops_after_a_while(service: Any) -> None:
    now = 1000.0
    apps = Apps(service.store, Deaf(), clock=lambda: now)  # type: ignore[arg-type]
    keys = Keys(service.store, lambda _: None)
    key, secret = await keys.create(service.app, b'{"name": "k", "scopes": ["push"]}')
    header = _basic(service.app.key, secret)
    assert (await apps.login(header)).key == key  # type: ignore[union-attr]
    await keys.delete(service.app, key.key_id)
    now += MAX_AGE
    assert await apps.login(header) is None


async def test_what_was_missed_is_asked_again_at_once(service: Any) -> None:
    bus = Deaf()
    apps = Apps(service.store, bus)  # type: ignore[arg-type]
    header = _basic(service.app.key, service.app.master_secret)
    assert await apps.login(header) is not None
    await service.store.rotate_secret(service.app.key)
    await bus.missed()
    assert await apps.login(header) is None


async def test_an_answer_that_is_given_again_lasts_anew(service: Any) -> None:
    now = 1000.0
    apps = Apps(service.store, Deaf(), Limits(max_apps_cached=2), clock=lambda: now)  # type: ignore[arg-type]
    first = await service.apps.create("first")
    second = await service.apps.create("second")
    for app in (service.app, first):
        await apps.find(app.key)
    now += MAX_AGE
    await apps.find(service.app.key)
    await apps.find(second.key)  # the oldest goes
    assert [apps.peek(app.key) for app in (service.app, first, second)] == [service.app, None, second]
