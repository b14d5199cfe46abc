"""The publisher SDK: against a real server, and against one that fails in chosen ways."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from clients.local_server import LocalServer
from clients.publisher import (
    Accepted,
    Audience,
    Delivery,
    DeviceStatus,
    Message,
    Notification,
    Options,
    Publisher,
    PushError,
    PushRequest,
    RetrySettings,
    SinglePush,
)

AT_ONCE = RetrySettings(attempts=3, base=0.0)
HELLO = Notification("Hello")


@pytest.fixture
async def publisher(server: LocalServer) -> AsyncIterator[Publisher]:
    app = server.create_app("publisher")
    async with Publisher(app.app_key, app.master_secret, server.addresses.http) as publisher:
        yield publisher


# What is written


@pytest.mark.parametrize(
    ("request_", "written"),
    [
        (
            PushRequest("all", HELLO),
            b'{"audience":"all","notification":{"alert":"Hello"},"platform":"all"}',
        ),
        (
            PushRequest(Audience(tag=["a"], tag_not=["b"]), message=Message("m"), platform=["ios"], cid="1"),
            b'{"audience":{"tag":["a"],"tag_not":["b"]},"message":{"msg_content":"m"},'
            b'"cid":"1","platform":["ios"]}',
        ),
        (
            PushRequest("all", HELLO, options=Options(time_to_live=0)),
            b'{"audience":"all","notification":{"alert":"Hello"},'
            b'"options":{"time_to_live":0},"platform":"all"}',
        ),
    ],
)
def test_requests_are_the_apis_json(request_: PushRequest, written: bytes) -> None:
    assert msgspec.json.encode(request_) == written


# Against a real server


async def test_push_and_what_became_of_it(publisher: Publisher) -> None:
    await publisher.register_device("p1", alias="anna", tags=["a"])
    accepted = await publisher.push(PushRequest(Audience(alias=["anna"]), HELLO, options=Options(sendno=77)))
    assert accepted.sendno == "77"
    states = await publisher.status(accepted.msg_id, ["p1", "nobody"])
    assert states == {"p1": Delivery.PENDING, "nobody": Delivery.NOT_A_DEVICE}
    report, unknown = await publisher.received_detail([accepted.msg_id, 1])
    assert (report.target, report.pending, report.adds_up) == (1, 1, True)
    assert not unknown.known
    assert [row.msg_id for row in await publisher.received([accepted.msg_id])] == [accepted.msg_id]


async def test_a_cid_makes_a_push_that_happens_once(publisher: Publisher) -> None:
    await publisher.register_device("p1")
    request = PushRequest("all", HELLO, cid="order-4711")
    assert await publisher.push(request) == await publisher.push(request)


async def test_validate_sends_nothing(publisher: Publisher) -> None:
    await publisher.register_device("p1")
    assert (await publisher.validate(PushRequest("all", HELLO))).msg_id == 0


async def test_refusals_carry_code_and_status(publisher: Publisher) -> None:
    with pytest.raises(PushError) as caught:
        await publisher.push(PushRequest(Audience(alias=["nobody"]), HELLO))
    assert (caught.value.code, caught.value.http_status) == (1011, 400)
    with pytest.raises(PushError) as caught:
        await publisher.push({"platform": "all", "audience": "all", "notification": {"beep": 1}})
    assert caught.value.code == 1009


async def test_wrong_secret(server: LocalServer) -> None:
    async with Publisher(server.app.app_key, "wrong", server.addresses.http) as publisher:
        with pytest.raises(PushError) as caught:
            await publisher.push(PushRequest("all", HELLO))
    assert (caught.value.code, caught.value.http_status) == (1004, 401)


async def test_push_many_answers_each_in_order(publisher: Publisher) -> None:
    await publisher.register_device("p1", alias="anna")
    pushes = [SinglePush("nobody" if i % 100 == 7 else "p1", HELLO) for i in range(2100)]
    results = await publisher.push_many(pushes)
    refused = [i for i, result in enumerate(results) if isinstance(result, PushError)]
    assert refused == list(range(7, 2100, 100))
    assert len({result.msg_id for result in results if isinstance(result, Accepted)}) == 2100 - len(refused)
    (result,) = await publisher.push_many([SinglePush("anna", HELLO)], by="alias")
    assert isinstance(result, Accepted)


async def test_push_many_with_own_cids_happens_once(publisher: Publisher) -> None:
    await publisher.register_device("p1")
    pushes = {"a": SinglePush("p1", HELLO), "b": SinglePush("p1", HELLO)}
    assert await publisher.push_many(pushes) == await publisher.push_many(pushes)


async def test_a_batch_that_is_refused_as_a_whole_still_answers_each(publisher: Publisher) -> None:
    results = await publisher.push_many([SinglePush("nobody", HELLO), SinglePush("", HELLO)])
    assert [result.code for result in results if isinstance(result, PushError)] == [1011, 1002]
    assert await publisher.push_many([]) == []


async def test_devices(publisher: Publisher) -> None:
    registered = await publisher.register_device("p/1 ä", alias="anna", tags=["a"])
    assert (registered.registration_id, len(registered.token)) == ("p/1 ä", 40)
    await publisher.update_device("p/1 ä", alias="", add_tags=["b"], mobile="+49 30 1")
    device = await publisher.device("p/1 ä")
    assert (device.alias, device.tags, device.mobile) == (None, {"a", "b"}, "+49 30 1")
    await publisher.update_device("p/1 ä", tags=[])
    assert (await publisher.device("p/1 ä")).tags == frozenset()
    assert await publisher.devices_status(["p/1 ä", "x"]) == {"p/1 ä": DeviceStatus(False)}
    with pytest.raises(PushError) as caught:
        await publisher.device("x")
    assert caught.value.code == 7002
    with pytest.raises(ValueError, match="add_tags"):
        await publisher.update_device("x", tags=[], add_tags=["a"])


# Against one that fails


class Faulty:
    """Answers with the given statuses, then 200; None drops the connection instead."""

    def __init__(self, *answers: int | None) -> None:
        self._answers = list(answers)
        self.calls = 0

    async def answer(self, request: web.Request) -> web.Response:
        self.calls += 1
        status = self._answers.pop(0) if self._answers else 200
        if status is None:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        good = {"msg_id": "5", "sendno": "0"}
        return web.json_response(good if status == 200 else _error(status), status=status)

    async def push(self, cid: str | None) -> Accepted:
        application = web.Application()
        application.router.add_post("/v3/push", self.answer)
        async with (
            TestServer(application) as server,
            Publisher("app", "secret", str(server.make_url("")), retry=AT_ONCE) as publisher,
        ):
            return await publisher.push(PushRequest("all", HELLO, cid=cid))


def _error(status: int) -> dict[str, object]:
    return {"error": {"code": 2002 if status == 429 else 1030, "message": "later"}}


@pytest.mark.parametrize("answers", [(503, 500), (None, 502), (429, None)], ids=str)
async def test_a_push_with_a_cid_is_tried_again(answers: tuple[int | None, ...]) -> None:
    faulty = Faulty(*answers)
    assert (await faulty.push("cid")).msg_id == 5
    assert faulty.calls == 3


async def test_a_push_without_cid_is_tried_again_only_if_it_was_refused_undone() -> None:
    faulty = Faulty(429)
    assert (await faulty.push(None)).msg_id == 5


async def test_a_push_without_cid_is_not_repeated_after_a_lost_answer() -> None:
    faulty = Faulty(None)
    with pytest.raises(PushError, match="may have been accepted") as caught:
        await faulty.push(None)
    assert (caught.value.code, caught.value.http_status, faulty.calls) == (0, 0, 1)


async def test_a_push_without_cid_is_not_repeated_after_503() -> None:
    faulty = Faulty(503)
    with pytest.raises(PushError, match="later") as caught:
        await faulty.push(None)
    assert (caught.value.code, caught.value.http_status, faulty.calls) == (1030, 503, 1)


async def test_attempts_end() -> None:
    faulty = Faulty(503, 503, 503, 503)
    with pytest.raises(PushError) as caught:
        await faulty.push("cid")
    assert (caught.value.http_status, faulty.calls) == (503, 3)


async def test_a_server_that_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    async with Publisher("app", "secret", f"http://127.0.0.1:{port}", retry=AT_ONCE) as publisher:
        with pytest.raises(PushError, match="cannot be reached"):
            await publisher.push(PushRequest("all", HELLO))
