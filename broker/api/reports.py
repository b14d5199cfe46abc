"""/v3/received, /v3/messages, /v3/status, /v1/pushes, /v1/events: what became of pushes. /v3/users: who was there."""

from __future__ import annotations

import orjson

from broker.api.call import BODY, Call, Endpoint
from broker.errors import REPORT
from broker.telling.accounts import Accounts
from broker.telling.reports import Reports
from broker.telling.users import Users


def _plans(path: str) -> tuple[str, str]:
    return f"/v3/{path}", f"/v3/report/{path}"


def report_endpoints(reports: Reports) -> list[Endpoint]:
    async def received(call: Call) -> bytes:
        return orjson.dumps(await reports.received(call.app, call.query("msg_ids")))

    async def received_detail(call: Call) -> bytes:
        return orjson.dumps(await reports.received_detail(call.app, call.query("msg_ids")))

    async def messages(call: Call) -> bytes:
        return orjson.dumps(await reports.messages(call.app, call.query("msg_ids")))

    async def messages_detail(call: Call) -> bytes:
        return orjson.dumps(await reports.messages_detail(call.app, call.query("msg_ids")))

    async def status(call: Call) -> bytes:
        return orjson.dumps(await reports.status(call.app, call.raw))

    async def events(call: Call) -> bytes:
        return orjson.dumps(await reports.events(call.app, call.query("after"), call.query("limit")))

    return [
        Endpoint("GET", _plans("received"), REPORT, received),
        Endpoint("GET", _plans("received/detail"), REPORT, received_detail),
        Endpoint("GET", _plans("messages"), REPORT, messages),
        Endpoint("GET", _plans("messages/detail"), REPORT, messages_detail),
        Endpoint("POST", _plans("status/message"), REPORT, status, BODY),
        Endpoint("GET", ("/v1/events",), REPORT, events),
    ]


def user_endpoints(users: Users) -> list[Endpoint]:
    async def report(call: Call) -> bytes:
        parameters = (call.query(name) for name in ("time_unit", "start", "duration"))
        return orjson.dumps(await users.report(call.app, *parameters))

    return [Endpoint("GET", _plans("users"), REPORT, report)]


def account_endpoints(accounts: Accounts) -> list[Endpoint]:
    async def push(call: Call) -> bytes:
        return orjson.dumps(await accounts.push(call.app, call.path("msg_id")))

    async def curve(call: Call) -> bytes:
        return orjson.dumps(await accounts.curve(call.app, call.path("msg_id")))

    async def trace(call: Call) -> bytes:
        return orjson.dumps(await accounts.trace(call.app, call.path("msg_id"), call.path("registration_id")))

    one = "/v1/pushes/{msg_id}"
    return [
        Endpoint("GET", (one,), REPORT, push),
        Endpoint("GET", (f"{one}/curve",), REPORT, curve),
        Endpoint("GET", (f"{one}/devices/{{registration_id}}",), REPORT, trace),
    ]
