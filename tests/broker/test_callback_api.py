"""What a callback may be, where it may go, and the calls under /v1/callbacks."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroaring import BitMap
from yarl import URL

from broker.errors import ApiError
from broker.model import CALLBACK_EVENTS, Callback, NewMessage, Settled
from broker.telling.callback_urls import (
    CALLER,
    PARAMS_SIZE,
    RESOLVING,
    URL_SIZE,
    CheckedResolver,
    Refused,
    check_literal,
    is_public,
    read_callback,
)
from broker.telling.callbacks import signing_secret

URL_ROW = "https://example.com/told"


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ({"url": URL_ROW}, Callback(URL_ROW)),
        ({"url": URL_ROW, "params": {"a": [1]}}, Callback(URL_ROW, params={"a": [1]})),
        ({"url": URL_ROW, "type": 1}, Callback(URL_ROW, ("delivered",))),
        ({"url": URL_ROW, "type": 2, "params": None}, Callback(URL_ROW, ("clicked",))),
        ({"url": URL_ROW, "type": 3}, Callback(URL_ROW, ("delivered", "clicked"))),
        ({"url": URL_ROW, "events": list(CALLBACK_EVENTS)}, Callback(URL_ROW, CALLBACK_EVENTS)),
        ({"url": URL_ROW, "events": ["shown", "delivered", "shown"]}, Callback(URL_ROW, ("delivered", "shown"))),
        ({"url": "https://exämple.com/"}, Callback("https://exämple.com/")),
        ({"url": "https://a_b.xn--exmple-cua.com./"}, Callback("https://a_b.xn--exmple-cua.com./")),
        ({"url": "http://[2001:db8::1]:8080/x?y=%20"}, Callback("http://[2001:db8::1]:8080/x?y=%20")),
    ],
)  # fmt: skip
def test_callbacks_that_are_right(value: object, wanted: Callback) -> None:
    assert read_callback(value) == wanted


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("https://example.com", "callback: must be an object"),
        ({}, "callback.url: is missing"),
        ({"url": None, "type": 1}, "callback.url: is missing"),
        ({"url": 5}, "callback.url: must be text"),
        ({"url": "https://e.com/" + "x" * URL_SIZE}, "callback.url: must be text of at most"),
        ({"url": "ftp://example.com"}, "callback.url: must be a URL such as"),
        ({"url": "//example.com"}, "callback.url: must be a URL such as"),
        ({"url": "https://"}, "callback.url: must be a URL such as"),
        ({"url": "https://example.com:99999"}, "callback.url: must be a URL such as"),
        ({"url": "https://example.com:0"}, "callback.url: must be a URL such as"),
        ({"url": "https://exa mple.com"}, "callback.url: must be a URL such as"),
        ({"url": "https://example.com/\r\nX: y"}, "callback.url: must be a URL such as"),
        ({"url": "https://[::1/"}, "callback.url: must be a URL such as"),
        ({"url": "http://!][a@?_)"}, "callback.url: must be a URL such as"),
        ({"url": 'http://[~:"+c:]/x'}, "callback.url: must be a URL such as"),
        ({"url": "https://[:(){}]"}, "callback.url: must be a URL such as"),
        ({"url": "https://exa(mple.com/"}, "callback.url: must be a URL such as"),
        ({"url": "https://me:secret@example.com"}, "callback.url: must not hold credentials"),
        ({"url": URL_ROW, "params": "x"}, "callback.params: must be an object"),
        ({"url": URL_ROW, "params": {"x": "y" * PARAMS_SIZE}}, "callback.params: is"),
        ({"url": URL_ROW, "type": 4}, "callback.type: must be 1"),
        ({"url": URL_ROW, "type": True}, "callback.type: must be 1"),
        ({"url": URL_ROW, "type": "1"}, "callback.type: must be 1"),
        ({"url": URL_ROW, "type": 1, "events": ["shown"]}, 'callback: has "type" or "events"'),
        ({"url": URL_ROW, "events": []}, "callback.events: must be a list of delivered"),
        ({"url": URL_ROW, "events": "shown"}, "callback.events: must be a list of"),
        ({"url": URL_ROW, "events": ["sent"]}, "callback.events: must be a list of"),
        ({"url": URL_ROW, "events": [["shown"]]}, "callback.events: must be a list of"),
        ({"url": URL_ROW, "evnts": ["sent"]}, "callback.evnts: unknown; there is url, events"),
    ],
)
def test_callbacks_that_are_wrong(value: object, told: str) -> None:
    with pytest.raises(ApiError) as refused:
        read_callback(value)
    assert refused.value.code == 1003
    assert refused.value.message.startswith(told)


def test_a_push_may_leave_the_url_to_its_app() -> None:
    assert read_callback({"type": 2}, Callback(URL_ROW, ("shown",))) == Callback(URL_ROW, ("clicked",))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda x: st.lists(x) | st.dictionaries(st.text(), x),
)


@given(st.dictionaries(st.sampled_from(["url", "events", "type", "params", "x"]), JSON | st.just(URL_ROW)))
def test_any_json_is_a_callback_or_refused(value: dict[str, object]) -> None:
    try:
        callback = read_callback(value)
    except ApiError as error:
        code = error.code
    else:
        code = 1003
        assert callback.url == value["url"]
        assert set(callback.events) <= set(CALLBACK_EVENTS)
    assert code == 1003


# Addresses


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.255.0.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
        *("100.64.0.1", "192.0.0.1", "198.18.0.1", "224.0.0.1", "239.1.1.1", "255.255.255.255", "240.0.0.1"),
        *("::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1", "ff02::1", "2001:db8::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2002:a00:1::1"),
        *(
            "192.0.0.192",
            "192.88.99.1",
            "168.63.129.16",
            "fec0::2",
            "3fff::1",
            "5f00::1",
            "::ffff:168.63.129.16",
        ),
    ],
)
def test_addresses_that_are_not_called(address: str) -> None:
    assert not is_public(address)
    host = f"[{address.partition('%')[0]}]" if ":" in address else address
    with pytest.raises(Refused):
        check_literal(URL(f"http://{host}/"), private=False)
    check_literal(URL(f"http://{host}/"), private=True)


@pytest.mark.parametrize("address", ["1.1.1.1", "93.184.216.34", "2606:4700::1111", "64:ff9b::101:101"])
def test_addresses_that_are_called(address: str) -> None:
    assert is_public(address)
    check_literal(URL(f"http://[{address}]/" if ":" in address else f"http://{address}/"), private=False)


@pytest.mark.parametrize(
    "host", ["127.1", "2130706433", "0x7f000001", "1.2.3.0x4", "127.1.", "[1:,]", "[::1%25lo:]"]
)
def test_numbers_that_some_read_as_an_address_are_refused(host: str) -> None:
    with pytest.raises(Refused):
        check_literal(URL(f"http://{host}/"), private=False)


def test_names_are_for_the_resolver() -> None:
    for host in ("localhost", "example.com", "1.example.com", "0x7f.example"):
        check_literal(URL(f"http://{host}/"), private=False)


async def test_names_that_are_never_found_do_not_stop_those_of_other_apps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And nobody waits for them at the end: their threads are daemons."""
    release, look_up = threading.Event(), socket.getaddrinfo
    threads: set[threading.Thread] = set()

    def hang(host: str, *arguments: Any) -> Any:
        if host == "localhost":
            return look_up(host, *arguments)
        threads.add(threading.current_thread())
        release.wait()
        raise socket.gaierror("no answer")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    resolver = CheckedResolver(private=True)

    async def resolve(app_id: int, host: str) -> Any:
        CALLER.set(app_id)
        return await resolver.resolve(host, 80)

    waiting = [asyncio.create_task(resolve(1, f"{n}.slow.example")) for n in range(100)]
    found = await asyncio.create_task(resolve(2, "localhost"))
    assert [result["host"] for result in found] == ["127.0.0.1"]
    refused = [task for task in waiting if task.done()]
    assert len(refused) == 100 - RESOLVING // 2
    with pytest.raises(OSError, match="too many names of this app"):
        refused[0].result()
    assert all(thread.daemon for thread in threads)
    release.set()
    assert len(await asyncio.gather(*waiting, return_exceptions=True)) == 100
    assert (await asyncio.create_task(resolve(1, "localhost"))) == found  # there is room again


async def test_the_resolver_hands_out_only_what_may_be_called() -> None:
    strict, loose = CheckedResolver(private=False), CheckedResolver(private=True)
    with pytest.raises(Refused, match="localhost"):
        await strict.resolve("localhost", 80, socket.AF_UNSPEC)
    found = await loose.resolve("localhost", 80, socket.AF_UNSPEC)
    assert {result["host"] for result in found} <= {"127.0.0.1", "::1"}
    assert all(result["port"] == 80 for result in found)
    with pytest.raises(socket.gaierror):
        await strict.resolve("no-such-name.invalid", 80)
    await strict.close()
    await loose.close()


# /v1/callbacks


async def _park(service: Any, count: int) -> list[int]:
    await service.broker.callbacks.close()  # nobody else takes them
    app, now = service.app, service.now
    await service.register("device-1")
    callback = Callback("http://192.168.0.1/x", ("delivered",))
    messages = [
        NewMessage(app.app_id, b"{}", BitMap([0]), False, now, now + 10, callback=callback)
        for _ in range(count)
    ]
    msg_ids = [appended.msg_id for appended in await service.store.append(messages)]
    await service.store.settle([Settled(app.app_id, msg_id, False, (0,), at=now) for msg_id in msg_ids])
    events = await service.store.callbacks.claim(now, 60, count)
    await service.store.callbacks.failed([event.event_id for event in events], None, "HTTP 410")
    return msg_ids


async def test_parked_events_are_listed_retried_and_dropped(service: Any) -> None:
    secret = signing_secret(service.app)
    counts = await service.call("GET", "/v1/callbacks")
    assert counts.json == {"waiting": 0, "parked": 0, "signing_secret": secret}
    msg_ids = await _park(service, 3)
    first = (await service.call("GET", "/v1/callbacks/parked?limit=2")).json["events"]
    last = first[-1]["event_id"]
    second = (await service.call("GET", f"/v1/callbacks/parked?after={last}")).json["events"]
    assert [event["msg_id"] for event in first + second] == list(map(str, msg_ids))
    assert second == [
        {
            "event_id": second[0]["event_id"],
            "msg_id": str(msg_ids[2]),
            "event": "delivered",
            "at": service.now,
            "devices": 1,
            "url": "http://192.168.0.1/x",
            "attempts": 1,
            "error": "HTTP 410",
        }
    ]
    assert (await service.call("DELETE", "/v1/callbacks/parked")).json == {"dropped": 3}
    await _park(service, 2)
    assert (await service.call("POST", "/v1/callbacks/parked/retry")).json == {"retried": 2}
    assert (await service.call("POST", "/v1/callbacks/parked/retry")).json == {"retried": 0}


async def test_other_apps_events_are_not_seen(service: Any) -> None:
    await _park(service, 1)
    other = await service.apps.create("other")
    auth = (other.key, other.master_secret)
    assert (await service.call("GET", "/v1/callbacks", auth=auth)).json["parked"] == 0
    assert (await service.call("GET", "/v1/callbacks/parked", auth=auth)).json == {"events": []}
    assert (await service.call("DELETE", "/v1/callbacks/parked", auth=auth)).json == {"dropped": 0}
    assert (await service.call("GET", "/v1/callbacks")).json["parked"] == 1


@pytest.mark.parametrize(
    "query", ["after=x", "after=-1", "limit=0", "limit=1001", "limit=", "after=9223372036854775808"]
)
async def test_wrong_pages_are_refused(service: Any, query: str) -> None:
    answer = await service.call("GET", f"/v1/callbacks/parked?{query}")
    assert (answer.status, answer.code) == (400, 3004)
    assert answer.message.startswith(query.partition("=")[0])


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/callbacks"),
        ("GET", "/v1/callbacks/parked"),
        ("POST", "/v1/callbacks/parked/retry"),
        ("DELETE", "/v1/callbacks/parked"),
    ],
)
async def test_callbacks_need_the_master_secret(service: Any, method: str, path: str) -> None:
    for auth in (None, (service.app.key, "wrong"), (service.app.key, service.app.device_key)):
        answer = await service.call(method, path, auth=auth)
        assert (answer.status, answer.code) == (401, 3001)
    assert (await service.call("PUT", path)).status == 405
