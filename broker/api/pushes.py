"""/v3/push: accept pushes, one or many."""

from __future__ import annotations

from typing import Final, Literal
from uuid import uuid4

import orjson

from broker.api.call import BATCH_BODY, BODY, DONE, Call, Endpoint
from broker.errors import PUSH, ApiError
from broker.pushing.pushes import Accepted, Pushes
from broker.pushing.requests import parse_msg_id
from broker.pushing.withdrawals import Withdrawals

MAX_CIDS: Final = 1000


def push_endpoints(pushes: Pushes, withdrawals: Withdrawals) -> list[Endpoint]:
    async def push(call: Call) -> bytes:
        return accepted_answer(await pushes.push(call.app, call.raw))

    async def validate(call: Call) -> bytes:
        return accepted_answer(await pushes.validate(call.app, call.raw))

    async def withdraw(call: Call) -> bytes:
        await withdrawals.withdraw(call.app, _read_msg_id(call.path("msg_id")))
        return DONE

    async def cids(call: Call) -> bytes:
        return _cids(call)

    def batch(by: Literal["regid", "alias"]) -> Endpoint:
        async def push_batch(call: Call) -> bytes:
            return _batch_results(await pushes.push_batch(call.app, call.raw, by))

        return Endpoint("POST", (f"/v3/push/batch/{by}/single",), PUSH, push_batch, BATCH_BODY)

    return [
        Endpoint("POST", ("/v3/push",), PUSH, push, BODY),
        Endpoint("POST", ("/v3/push/validate",), PUSH, validate, BODY),
        Endpoint("GET", ("/v3/push/cid",), PUSH, cids),
        batch("regid"),
        batch("alias"),
        Endpoint("DELETE", ("/v3/push/{msg_id}",), PUSH, withdraw, audit="push.withdraw"),
    ]


def accepted_answer(accepted: Accepted) -> bytes:
    return orjson.dumps(accepted_row(accepted))


def accepted_row(accepted: Accepted) -> dict[str, str]:
    # Typed SDKs read both as numbers, so a push without a sendno gets the vendor's 0.
    return {"sendno": accepted.sendno or "0", "msg_id": str(accepted.msg_id)}


def _read_msg_id(text: str) -> int:
    msg_id = parse_msg_id(text)
    if msg_id is None:
        raise ApiError(1003, f"msg_id: must be a positive integer, got {text[:40]}")
    return msg_id


def _batch_results(results: dict[str, Accepted | ApiError]) -> bytes:
    """Raises the first error if nothing was accepted: 200 never means failure."""
    rows = {cid: r.as_dict() if isinstance(r, ApiError) else accepted_row(r) for cid, r in results.items()}
    errors = [result for result in results.values() if isinstance(result, ApiError)]
    if len(errors) == len(results):
        raise BatchRefused(errors[0], rows)
    return orjson.dumps(rows)


class BatchRefused(ApiError):
    """No push of the batch was accepted: the first error, and beside it each push's own."""

    def __init__(self, first: ApiError, rows: dict[str, dict[str, str] | dict[str, object]]) -> None:
        super().__init__(first.code, first.message, http_status=first.http_status)
        self._rows = rows

    def as_dict(self) -> dict[str, object]:
        return {**self._rows, **super().as_dict()}


def _cids(call: Call) -> bytes:
    """Idempotency keys. Nothing is kept until one is used."""
    count = call.query("count") or "1"
    if not (count.isascii() and count.isdigit() and len(count) <= 4 and 1 <= int(count) <= MAX_CIDS):
        raise ApiError(1003, f"count: must be 1 to {MAX_CIDS}")
    if call.query("type") not in (None, "push", "schedule"):
        raise ApiError(1003, "type: must be push or schedule")
    return orjson.dumps({"cidlist": [f"{call.app.key}-{uuid4()}" for _ in range(int(count))]})
