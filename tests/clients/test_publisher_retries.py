"""Which calls of the publisher SDK are made again when their answer was lost, and which might do harm."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from clients.publisher import (
    Audience,
    NewDevice,
    Notification,
    Publisher,
    PushError,
    PushRequest,
    RetrySettings,
    Settings,
    Single,
)

PUSH = PushRequest("all", Notification("Hello"))
WHEN = Single("2027-01-01 00:00:00")
RULE = {"tag": "red"}


class Deaf:
    """Does what it is asked for and breaks the connection instead of the first answer; `answer` is the second."""

    def __init__(self, answer: object, status: int = 200, body: bytes = b"") -> None:
        self._answer = body if answer is None else orjson.dumps(answer)
        self._status = status
        self.calls: list[str] = []

    async def take(self, request: web.Request) -> web.Response:
        self.calls.append(f"{request.method} {request.path_qs}")
        await request.read()
        if len(self.calls) == 1:
            assert request.transport is not None
            request.transport.abort()
        return web.Response(status=self._status, body=self._answer)

    async def ask(self, call: Callable[[Publisher], Awaitable[Any]]) -> Any:
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", self.take)
        async with (
            TestServer(application) as server,
            Publisher("app", "s", str(server.make_url("")), retry=RetrySettings(base=0.0)) as publisher,
        ):
            return await call(publisher)


async def _all(found: Any) -> list[Any]:
    return [one async for one in found]


PROGRESS = {"total": 1, "released": 0, "planned_end": None, "state": "paused"}
SETTINGS = {"allow_from": [], "quiet_hours": None, "frequency_caps": [], "callback": None}
SEGMENT = {"id": "s", "name": "n", "rule": RULE}
ESTIMATE = {"registered": 1, "online": 0}
SAFE: list[tuple[str, Any, Callable[[Publisher], Awaitable[Any]]]] = [
    ("DELETE /v3/push/5", None, lambda p: p.withdraw(5)),
    ("POST /v1/pushes/5/pause", PROGRESS, lambda p: p.pause(5)),
    ("POST /v1/pushes/5/resume", PROGRESS, lambda p: p.resume(5)),
    ("POST /v1/audience/estimate", ESTIMATE, lambda p: p.estimate(Audience(tag=["a"]))),
    ("POST /v1/devices/import", {"devices": []}, lambda p: p.import_devices([NewDevice("a")])),
    ("PUT /v1/settings", SETTINGS, lambda p: p.change_settings(Settings())),
    ("POST /v3/schedules", {"schedule_id": "s"}, lambda p: p.schedules.create("n", WHEN, PUSH, cid="c")),
    ("PUT /v3/schedules/a%2Fb", {}, lambda p: p.schedules.change("a/b", enabled=False)),
    ("DELETE /v3/schedules/s", None, lambda p: p.schedules.delete("s")),
    ("PUT /v1/segments/s", SEGMENT, lambda p: p.segments.replace("s", "n", RULE)),
    ("POST /v1/segments/estimate", ESTIMATE, lambda p: p.segments.estimate_rule(RULE)),
    ("GET /v1/segments", {"segments": [SEGMENT]}, lambda p: _all(p.segments.all())),
    ("DELETE /v3/files/f", None, lambda p: p.files.delete("f")),
    ("POST /v1/callbacks/parked/retry", {"retried": 0}, lambda p: p.callbacks.retry()),
    ("DELETE /v1/callbacks/parked", {"dropped": 0}, lambda p: p.callbacks.drop()),
    ("DELETE /v1/keys/k", None, lambda p: p.keys.delete("k")),
    ("GET /v1/audit?limit=100", {"entries": [], "before": 0}, lambda p: _all(p.audit())),
]
HARMFUL: list[tuple[str, Callable[[Publisher], Awaitable[Any]]]] = [
    ("POST /v1/pushes/5/stop", lambda p: p.stop(5)),
    ("POST /v3/schedules", lambda p: p.schedules.create("n", WHEN, PUSH)),
    ("POST /v1/segments", lambda p: p.segments.create("n", RULE)),
    ("POST /v3/files/alias", lambda p: p.files.upload(["a"], "alias")),
    ("POST /v1/keys", lambda p: p.keys.create("n", ["push"])),
]


@pytest.mark.parametrize(("path", "answer", "call"), SAFE, ids=[row[0] for row in SAFE])
async def test_calls_that_may_be_repeated_are(
    path: str, answer: Any, call: Callable[[Publisher], Awaitable[Any]]
) -> None:
    server = Deaf(answer)
    await server.ask(call)
    assert server.calls == [path, path]


GONE = b'{"error": {"code": 1003, "message": "there is no key k"}}'


async def test_what_is_gone_when_a_deletion_is_repeated_was_deleted() -> None:
    server = Deaf(None, status=404, body=GONE)
    await server.ask(lambda p: p.keys.delete("k"))
    assert server.calls == ["DELETE /v1/keys/k"] * 2


async def test_what_was_never_there_is_an_error() -> None:
    with pytest.raises(PushError, match="there is no key k"):
        await ask(lambda _: web.Response(status=404, body=GONE), lambda p: p.keys.delete("k"))
    with pytest.raises(PushError, match="there is no key k"):
        await Deaf(None, status=404, body=GONE).ask(lambda p: p.segments.get("k"))


@pytest.mark.parametrize(("path", "call"), HARMFUL, ids=[row[0] for row in HARMFUL])
async def test_calls_that_may_not_be_repeated_are_not(
    path: str, call: Callable[[Publisher], Awaitable[Any]]
) -> None:
    server = Deaf({})
    with pytest.raises(PushError, match="may have been accepted") as caught:
        await server.ask(call)
    assert (caught.value.code, server.calls) == (0, [path])


async def test_an_answer_of_another_shape_is_an_error() -> None:
    with pytest.raises(PushError, match="HTTP status 200"):
        await Deaf({"registered": "many"}).ask(lambda p: p.estimate("all"))


# Pages, and answers that are none of ours


async def ask(
    answer: Callable[[web.Request], web.Response], call: Callable[[Publisher], Awaitable[Any]]
) -> Any:
    async def take(request: web.Request) -> web.Response:
        return answer(request)

    application = web.Application()
    application.router.add_route("*", "/{path:.*}", take)
    once = RetrySettings(attempts=1)
    async with (
        TestServer(application) as server,
        Publisher("a", "s", str(server.make_url("")), retry=once) as p,
    ):
        return await call(p)


def _page(request: web.Request, make: Callable[[str], object]) -> list[object]:
    """The next thousand of 2001, after the one that is named."""
    after = int(request.query.get("after", 0))
    return [make(str(number)) for number in range(after + 1, min(after + 1001, 2002))]


async def test_all_pages_of_segments_are_read() -> None:
    def answer(request: web.Request) -> web.Response:
        return web.json_response({"segments": _page(request, lambda i: SEGMENT | {"id": i})})

    assert [one.id for one in await ask(answer, lambda p: _all(p.segments.all()))] == [
        str(number) for number in range(1, 2002)
    ]


async def test_all_pages_of_parked_callbacks_are_read() -> None:
    event = {
        "msg_id": "1",
        "event": "clicked",
        "at": 1.0,
        "devices": 1,
        "url": "u",
        "attempts": 1,
        "error": "e",
    }

    def answer(request: web.Request) -> web.Response:
        return web.json_response({"events": _page(request, lambda i: event | {"event_id": i})})

    assert len(await ask(answer, lambda p: _all(p.callbacks.parked()))) == 2001


async def test_an_answer_of_somebody_in_between_is_an_error_with_its_status() -> None:
    def answer(request: web.Request) -> web.Response:
        return web.Response(status=502, text="<h1>Bad Gateway</h1>")

    with pytest.raises(PushError, match="HTTP status 502, without an explanation") as caught:
        await ask(answer, lambda p: p.keys.list())
    assert (caught.value.code, caught.value.http_status) == (0, 502)
