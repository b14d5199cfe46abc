"""The device's side of dispatch: what it believes, keeps and asks; and both doors of a real server."""

from __future__ import annotations

import asyncio
import hashlib
import time
from base64 import urlsafe_b64encode
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from broker.config import load_config
from clients.addresses import Address
from clients.dispatch import (
    MAX_ANSWER,
    MAX_NETWORKS,
    QUESTION,
    RETRY_BASE,
    RETRY_CAP,
    Dispatch,
    DispatchError,
    ask,
    read_answer,
    tell,
)
from gateway.server import Service
from tests.patience import PATIENCE


class Signer:
    """An installation."""

    def __init__(self, seed: int = 1) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32)
        public = self._key.public_key().public_bytes_raw()
        self.public = _text(public)
        self.name = hashlib.sha256(public).hexdigest()[:8]

    def sign(self, **changes: Any) -> bytes:
        fields: dict[str, Any] = {
            "addresses": ["tls://a.example.com:8883", "wss://b.example.com:443"],
            "carrier": "mobile",
            "heartbeat": "240 30 1200",
            "key": self.name,
            "made": 1_800_000_000,
            "reconnect": {"ban": 360_000, "base": 1000, "cap": 60_000, "parallel": 3, "stagger": 2500},
            "region": "",
            "ttl": 3600,
            "v": 1,
        } | changes
        signature = self._key.sign(orjson.dumps(fields, option=orjson.OPT_SORT_KEYS))
        return orjson.dumps({**fields, "signature": _text(signature)})


def _text(raw: bytes) -> str:
    return urlsafe_b64encode(raw).rstrip(b"=").decode()


SIGNER = Signer()
FIRST, SECOND = Address("a.example.com", 8883, "tls"), Address("b.example.com", 443, "wss")
OWN = Address("own.example.com", 1883)


def _dispatch(**more: Any) -> Dispatch:
    options: dict[str, Any] = {"built_in": ["own.example.com:1883"], "region": "eu", **more}
    return Dispatch("APP", [SIGNER.public], lambda: 0.5, **options)


# What is believed


def test_an_answer_is_read_whole() -> None:
    told = read_answer(SIGNER.sign(), [SIGNER.public])
    assert told.addresses == (FIRST, SECOND)
    assert told.heartbeat == (240, 30, 1200)
    assert (told.carrier, told.made, told.ttl) == ("mobile", 1_800_000_000, 3600)
    hints = told.hints
    assert (hints.base, hints.cap, hints.stagger, hints.ban, hints.parallel) == (1.0, 60.0, 2.5, 360.0, 3)


def test_keys_may_be_several_and_the_form_of_the_json_is_free() -> None:
    raw = orjson.dumps(orjson.loads(SIGNER.sign(later_key={"b": 1, "a": [1]})), option=orjson.OPT_INDENT_2)
    assert read_answer(raw, [Signer(2).public, SIGNER.public]).addresses == (FIRST, SECOND)


def test_addresses_of_kinds_that_are_not_known_here_are_left_out() -> None:
    raw = SIGNER.sign(addresses=["quic://a.example.com:443", "wss://b.example.com:443", "nonsense:x"])
    assert read_answer(raw, [SIGNER.public]).addresses == (SECOND,)


WRONG: list[tuple[bytes, str]] = [
    (b"", "not an answer"),
    (b"[]", "not an answer"),
    (b'{"error": {"code": 1008}}', "not an answer"),
    (b" " * (MAX_ANSWER + 1), "more than"),
    (SIGNER.sign(v=2), "version 2"),
    (SIGNER.sign(addresses="a"), "not an answer"),
    (SIGNER.sign(heartbeat="240"), "heartbeat '240'"),
    (SIGNER.sign(heartbeat="a b c"), "heartbeat 'a b c'"),
    (SIGNER.sign(heartbeat="30 240 1200"), "least <= start <= most"),
    (SIGNER.sign(heartbeat="0 0 0"), "least <= start <= most"),
    (Signer(2).sign(), "which this device does not have"),
    (Signer(2).sign(key=SIGNER.name), "the signature is wrong"),
    (SIGNER.sign().replace(b"a.example", b"x.example"), "the signature is wrong"),
    (SIGNER.sign().replace(b'"v":1', b'"v":1,"extra":1'), "the signature is wrong"),
]


@pytest.mark.parametrize(("raw", "why"), WRONG)
def test_what_cannot_be_believed_changes_nothing(raw: bytes, why: str) -> None:
    dispatch = _dispatch()
    dispatch.take(SIGNER.sign(), 100.0)
    with pytest.raises(DispatchError, match=why):
        dispatch.take(raw, 200.0)
    assert dispatch.addresses() == (FIRST, SECOND, OWN)
    assert not dispatch.wants(100.0 + 3599)


@given(st.integers(0), st.integers(1, 255))
def test_no_byte_can_be_changed(position: int, change: int) -> None:
    raw = bytearray(SIGNER.sign())
    raw[position % len(raw)] ^= change
    try:
        told = read_answer(bytes(raw), [SIGNER.public])
    except DispatchError:
        return
    # base64 has bits that say nothing, and hexadecimal digits no case: all that is signed is as it was.
    assert (told.addresses, told.heartbeat) == ((FIRST, SECOND), (240, 30, 1200))


@given(st.binary(max_size=300))
def test_rubbish_is_refused_and_never_more(raw: bytes) -> None:
    with pytest.raises(DispatchError):
        read_answer(raw, [SIGNER.public])


def test_nobody_leads_a_device_back_to_old_addresses() -> None:
    dispatch = _dispatch()
    dispatch.take(SIGNER.sign(made=1_800_010_000), 0.0)
    dispatch.take(
        SIGNER.sign(made=1_800_010_000 - 3600), 1.0
    )  # of another process, which signs at other times
    dispatch.enter("elsewhere")
    with pytest.raises(DispatchError, match="before what is known"):
        dispatch.take(SIGNER.sign(made=1_800_010_000 - 7201), 2.0)
    assert dispatch.told is None


@pytest.mark.parametrize("keys", [[], ["short"], ["!" * 43], [SIGNER.public, ""]])
def test_a_key_that_cannot_be_one_is_refused_at_once(keys: list[str]) -> None:
    with pytest.raises(ValueError, match="holdfast dispatch key"):
        Dispatch("APP", keys, lambda: 0.5)


# What is used, and when it is asked


def test_without_an_answer_the_built_in_addresses_are_used() -> None:
    dispatch = _dispatch()
    assert dispatch.addresses() == (OWN,)
    assert dispatch.told is None
    assert dispatch.wants(0.0)


def test_an_answer_is_asked_for_again_when_its_time_is_over_and_used_on_until_then() -> None:
    dispatch = _dispatch()
    dispatch.take(SIGNER.sign(), 1000.0)
    assert [dispatch.wants(now) for now in (1000.0, 4599.0, 4600.0, 900.0)] == [False, False, True, True]
    dispatch.missed(4600.0)
    assert dispatch.addresses() == (FIRST, SECOND, OWN)


def test_another_network_has_its_own_answer_and_until_it_comes_the_newest() -> None:
    dispatch = _dispatch()
    dispatch.enter("home", link="wifi")
    dispatch.take(SIGNER.sign(), 0.0)
    dispatch.enter("away", carrier="46000", link="cellular")
    assert dispatch.wants(1.0)
    assert dispatch.addresses() == (FIRST, SECOND, OWN)
    dispatch.take(SIGNER.sign(addresses=["wss://b.example.com:443"]), 1.0)
    assert dispatch.addresses() == (SECOND, OWN)
    dispatch.enter("home", link="wifi")
    assert not dispatch.wants(2.0)
    assert dispatch.addresses() == (FIRST, SECOND, OWN)


def test_doors_that_do_not_answer_are_left_alone_for_longer_and_longer() -> None:
    dispatch, now, pauses = _dispatch(), 1000.0, []
    for _ in range(10):
        dispatch.missed(now)
        assert not dispatch.wants(now)
        pause = next(n for n in range(int(RETRY_CAP) + 1) if dispatch.wants(now + n))
        pauses.append(pause)
        now += pause
    assert pauses == sorted(pauses)
    assert RETRY_BASE / 2 <= pauses[0] <= RETRY_BASE
    assert pauses[-1] <= RETRY_CAP
    assert dispatch.wants(0.0)  # the clock was set back
    dispatch.enter("another")
    assert dispatch.wants(now)


def test_networks_are_bounded() -> None:
    dispatch = _dispatch()
    for n in range(MAX_NETWORKS + 5):
        dispatch.enter(f"n{n}")
        dispatch.take(SIGNER.sign(), float(n))
    assert list(dispatch.state()) == [f"n{n}" for n in range(5, MAX_NETWORKS + 5)]


def test_the_question_says_what_is_known() -> None:
    dispatch = _dispatch()
    assert dispatch.path() == "/v1/dispatch?app=APP&region=eu"
    dispatch.enter("home", carrier="460 00&", link="wifi")
    assert dispatch.path() == "/v1/dispatch?app=APP&carrier=460+00%26&link=wifi&region=eu"
    datagram = dispatch.datagram()
    assert len(datagram) == QUESTION
    assert orjson.loads(datagram) == {
        "app": "APP",
        "carrier": "460 00&",
        "link": "wifi",
        "region": "eu",
        "v": 1,
    }


def test_the_next_question_over_http_says_what_was_reached_on_this_network() -> None:
    dispatch = _dispatch(region="")
    dispatch.reached(FIRST.at("192.0.2.1"))  # it is known by its name
    assert dispatch.path() == "/v1/dispatch?app=APP&reached=tls%3A%2F%2Fa.example.com%3A8883"
    assert b"reached" not in dispatch.datagram()
    dispatch.enter("elsewhere")
    assert dispatch.path() == "/v1/dispatch?app=APP"


def test_a_report_has_what_was_tried() -> None:
    dispatch = _dispatch(region="")
    assert dispatch.report([]) is None
    assert dispatch.report([("tls://a:1", 0, 0)]) is None
    report = dispatch.report([("tls://a:1", 1, 0), ("tls://b:1", 0, 2), *(("tls://c:1", 1, 1),) * 50])
    assert report is not None
    told = orjson.loads(report)
    assert told["app"] == "APP"
    assert told["tried"][:2] == [
        {"address": "tls://a:1", "ok": 1, "failed": 0},
        {"address": "tls://b:1", "ok": 0, "failed": 2},
    ]
    assert len(told["tried"]) == 16


# For the next process


def test_what_is_kept_is_checked_again() -> None:
    dispatch = _dispatch()
    dispatch.enter("home")
    dispatch.take(SIGNER.sign(), 1000.0)
    state = orjson.loads(orjson.dumps(dispatch.state()))
    again = _dispatch()
    again.restore(state)
    again.enter("home")
    assert again.addresses() == (FIRST, SECOND, OWN)
    assert not again.wants(1001.0)
    other = Dispatch("APP", [Signer(2).public], lambda: 0.5)  # the installation has another key now
    other.restore(state)
    assert other.state() == {}


@pytest.mark.parametrize(
    "state", [None, [], "x", {"n": None}, {"n": {"raw": "x", "at": 1.0}}, {"n": {"raw": 1}}]
)
def test_what_was_kept_and_cannot_be_read_is_forgotten(state: object) -> None:
    dispatch = _dispatch()
    dispatch.restore(state)
    assert dispatch.addresses() == (OWN,)


# With a real server

OFF = {"mqtt.port": "0", "mqtt.ws_port": "off", "http.port": "0", "admin.port": "0"}


@pytest.fixture
async def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[dict[str, str]]:
    monkeypatch.setattr("gateway.server.tune_interpreter", lambda _: None)
    flags = {"server.data_dir": str(tmp_path), "dispatch.udp_port": "0", "dispatch.ttl": "600", **OFF}
    service = Service(load_config(None, None, flags))
    listening = await service.open()
    assert listening.demo_app is not None
    assert service.dispatch_door is not None
    try:
        yield {
            "app": listening.demo_app.key,
            "key": (await service._broker.dispatch.signing_key()).public,
            "mqtt": f"tcp://{listening.mqtt}",
            "http": f"http://{listening.http}",
            "udp": "udp://{}:{}".format(*service.dispatch_door.address),
        }
    finally:
        await service.close()


def _of(installation: dict[str, str]) -> Dispatch:
    return Dispatch(installation["app"], [installation["key"]], lambda: 0.5)


@pytest.mark.parametrize("door", ["http", "udp"])
async def test_both_doors_tell_where_the_server_is(installation: dict[str, str], door: str) -> None:
    dispatch = _of(installation)
    told = await ask(dispatch, [installation[door]], time.time)
    assert told is not None
    assert list(map(str, told.addresses)) == [installation["mqtt"]]
    assert told.ttl == 600
    assert abs(told.made - time.time()) < 60
    assert not dispatch.wants(time.time())


async def test_an_answer_that_still_holds_is_not_sent_again(installation: dict[str, str]) -> None:
    dispatch = _of(installation)
    first = await ask(dispatch, [installation["http"]], lambda: 1000.0)
    assert dispatch.wants(1600.0)
    again = await ask(dispatch, [installation["http"]], lambda: 1600.0)
    assert again is first
    assert not dispatch.wants(1601.0)


async def test_doors_that_lie_or_are_shut_do_not_stop_the_next(
    installation: dict[str, str], closed_port: int
) -> None:
    async def lie(_: web.Request) -> web.Response:
        return web.Response(body=Signer(7).sign())

    liar = web.Application()
    liar.router.add_get("/v1/dispatch", lie)
    runner = web.AppRunner(liar)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    doors = [
        "http://{}:{}".format(*runner.addresses[0][:2]),
        f"http://127.0.0.1:{closed_port}",
        f"udp://127.0.0.1:{closed_port}",
        "udp://nonsense",
        installation["udp"],
    ]
    dispatch = _of(installation)
    try:
        assert await ask(dispatch, doors[:2], lambda: 1000.0) is None
        assert not dispatch.wants(1000.0)
        told = await asyncio.wait_for(ask(dispatch, doors, lambda: 1000.0), PATIENCE)
    finally:
        await runner.cleanup()
    assert told is not None
    assert list(map(str, told.addresses)) == [installation["mqtt"]]


async def test_what_is_told_is_counted(installation: dict[str, str], closed_port: int) -> None:
    dispatch = _of(installation)
    outcomes = [(installation["mqtt"], 3, 1)]
    shut = f"http://127.0.0.1:{closed_port}"
    assert not await tell(dispatch, [shut, installation["udp"]], outcomes)
    assert await tell(dispatch, [shut, installation["http"]], outcomes)
    assert await tell(dispatch, [], [])


async def test_an_endless_answer_is_cut(installation: dict[str, str]) -> None:
    poured = 0

    async def pour(request: web.Request) -> web.StreamResponse:
        nonlocal poured
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(b" " * 65_536)
                poured += 65_536
        except ConnectionError:
            return response

    endless = web.Application()
    endless.router.add_get("/v1/dispatch", pour)
    runner = web.AppRunner(endless, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    door = "http://{}:{}".format(*runner.addresses[0][:2])
    try:
        assert await asyncio.wait_for(ask(_of(installation), [door], time.time), PATIENCE) is None
    finally:
        await runner.cleanup()
    assert poured < 32 << 20  # what sockets hold, and not what a server gives in DOOR_PATIENCE


async def test_nobody_sees_the_admin_of_dispatch_without_its_key(installation: dict[str, str]) -> None:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{installation['http']}/v1/dispatch/key") as response,
    ):
        assert response.status == 404
