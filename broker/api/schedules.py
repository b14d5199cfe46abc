"""/v3/schedules: pushes that are made at a time."""

from __future__ import annotations

import msgspec
import orjson

from broker.api.call import BODY, DONE, Call, Endpoint
from broker.errors import SCHEDULE
from broker.later.schedules import Schedules


def schedule_endpoints(schedules: Schedules) -> list[Endpoint]:
    async def create(call: Call) -> bytes:
        return msgspec.json.encode(await schedules.create(call.app, call.raw))

    async def page(call: Call) -> bytes:
        return orjson.dumps(await schedules.page(call.app, call.query("page")))

    async def find(call: Call) -> bytes:
        return orjson.dumps(await schedules.find(call.app, call.path("id")))

    async def change(call: Call) -> bytes:
        return orjson.dumps(await schedules.change(call.app, call.path("id"), call.raw))

    async def delete(call: Call) -> bytes:
        await schedules.delete(call.app, call.path("id"))
        return DONE

    async def msg_ids(call: Call) -> bytes:
        return orjson.dumps(await schedules.msg_ids(call.app, call.path("id")))

    plans = ("/v3/schedules", "/v3/push/schedules")
    one = tuple(f"{plan}/{{id}}" for plan in plans)
    ids = tuple(f"{plan}/{{id}}/msg_ids" for plan in plans)
    return [
        Endpoint("POST", plans, SCHEDULE, create, BODY),
        Endpoint("GET", plans, SCHEDULE, page),
        Endpoint("GET", one, SCHEDULE, find),
        Endpoint("PUT", one, SCHEDULE, change, BODY),
        Endpoint("DELETE", one, SCHEDULE, delete),
        Endpoint("GET", ids, SCHEDULE, msg_ids),
    ]
