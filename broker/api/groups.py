"""/v3/grouppush: one push to each app of a group."""

from __future__ import annotations

import orjson

from broker.api.call import BODY, Call, Endpoint
from broker.api.pushes import BatchRefused, accepted_row
from broker.errors import PUSH, ApiError
from broker.pushing.pushes import Accepted
from broker.tenants.groups import GroupPushes


def group_endpoints(pushes: GroupPushes) -> list[Endpoint]:
    async def push(call: Call) -> bytes:
        return _results(*await pushes.push(call.group, call.raw, call.address))

    paths = ("/v3/grouppush", "/v3/grouppush/file")
    return [Endpoint("POST", paths, PUSH, push, BODY, who="group")]


def _results(group_msgid: str, results: dict[str, Accepted | ApiError]) -> bytes:
    """Each app's own result. Raises the first error if no app accepted it: 200 never means failure."""
    rows = {key: r.as_dict() if isinstance(r, ApiError) else accepted_row(r) for key, r in results.items()}
    errors = [result for result in results.values() if isinstance(result, ApiError)]
    if len(errors) == len(results):
        raise BatchRefused(errors[0], rows)
    return orjson.dumps({"group_msgid": group_msgid, **rows})
