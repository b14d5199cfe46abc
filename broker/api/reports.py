"""/v3/received, /v3/status, /v1/events: what became of pushes."""

from __future__ import annotations

import orjson

from broker.api.call import Call, Endpoint
from broker.errors import REPORT
from broker.limits import Limits
from broker.reports import Reports


def report_endpoints(reports: Reports, limits: Limits) -> list[Endpoint]:
    async def received(call: Call) -> bytes:
        return orjson.dumps(await reports.received(call.app, call.query("msg_ids")))

    async def received_detail(call: Call) -> bytes:
        return orjson.dumps(await reports.received_detail(call.app, call.query("msg_ids")))

    async def status(call: Call) -> bytes:
        return orjson.dumps(await reports.status(call.app, call.raw))

    async def events(call: Call) -> bytes:
        return orjson.dumps(await reports.events(call.app, call.query("after"), call.query("limit")))

    def plans(path: str) -> tuple[str, str]:
        return f"/v3/{path}", f"/v3/report/{path}"

    return [
        Endpoint("GET", plans("received"), REPORT, received),
        Endpoint("GET", plans("received/detail"), REPORT, received_detail),
        Endpoint("POST", plans("status/message"), REPORT, status, limits.max_body),
        Endpoint("GET", ("/v1/events",), REPORT, events),
    ]
