"""Every error the public API can answer: its code, HTTP status and meaning, in one table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import orjson

from broker.store import StoreError, StoreFull, TooMany, UnknownDevice

STATUS: Final[dict[int, tuple[int, str]]] = {
    # code: (HTTP status, when)
    1000: (500, "internal error"),
    1001: (405, "this method is not supported here"),
    1002: (400, "a required parameter is missing"),
    1003: (400, "a parameter value is not valid"),
    1004: (401, "authentication failed"),
    1005: (400, "the message is too long"),
    1008: (400, "the app key is not valid"),
    1009: (400, "an unsupported key inside notification or message"),
    1011: (400, "no target matches the audience"),
    1012: (400, "too many slow pushes at once"),
    1020: (404, "only HTTPS is supported"),
    1030: (503, "the store did not answer; try again"),
    2002: (429, "over the rate limit"),
    2003: (403, "the app is restricted"),
    2004: (403, "the caller's address is not on the app's white list"),
    2005: (403, "the target got too many"),
    2006: (403, "over a quota"),
    2007: (403, "over a quota"),
    2008: (403, "over the daily broadcast quota"),
    3001: (401, "authentication failed"),
    3004: (400, "a parameter is not valid"),
    7000: (500, "internal error"),
    7001: (401, "authentication is missing"),
    7002: (400, "a parameter is not valid"),
    7004: (401, "authentication failed"),
    7013: (400, "too many"),
    7015: (400, "too many devices on the alias"),
    7030: (503, "the store did not answer; try again"),
    8100: (400, "a parameter is not valid"),
    8101: (401, "authentication failed"),
    8104: (404, "not found"),
    8200: (500, "internal error"),
    8203: (503, "the store did not answer; try again"),
}


MAX_MESSAGE: Final = 1000  # characters: messages name what the caller sent, which may be a key of a megabyte


def _cut(message: str) -> str:
    return message if len(message) <= MAX_MESSAGE else message[:MAX_MESSAGE] + "…"


class ApiError(Exception):
    """A refused call. `http_status` is the table's unless given (413, 404 and 405 keep the area's code)."""

    def __init__(
        self, code: int, message: str = "", *, http_status: int | None = None, sendno: str = ""
    ) -> None:
        status, meaning = STATUS[code]
        self.code = code
        self.http_status = http_status or status
        self.message = _cut(message or meaning)
        self.sendno = sendno  # of the refused push, where it could be read
        super().__init__(code, self.http_status, self.message)

    def as_dict(self) -> dict[str, object]:
        """The wire shape: `{"error": {"code", "message"}}`, and `sendno` where known."""
        shape: dict[str, object] = {"error": {"code": self.code, "message": self.message}}
        if self.sendno:
            shape["sendno"] = self.sendno
        return shape

    def body(self) -> bytes:
        return orjson.dumps(self.as_dict())


@dataclass(frozen=True, slots=True)
class Area:
    """A part of the API with codes of its own for the same troubles."""

    name: str
    missing: int
    invalid: int
    no_credentials: int
    bad_credentials: int
    too_large: int
    too_many: int
    method: int
    internal: int
    unavailable: int
    rate: str = "push"  # which rate limit its calls count against: push | report | device


PUSH: Final = Area("push", 1002, 1003, 1004, 1004, 1005, 1003, 1001, 1000, 1030)
REPORT: Final = Area("report", 3004, 3004, 3001, 3001, 3004, 3004, 3004, 1000, 1030, "report")
DEVICE: Final = Area("device", 7002, 7002, 7001, 7004, 7002, 7013, 7002, 7000, 7030, "device")
SCHEDULE: Final = Area("schedule", 8100, 8100, 8101, 8101, 8100, 8100, 8100, 8200, 8203)
ADMIN: Final = Area("admin", 1002, 1003, 1004, 1004, 1005, 1003, 1001, 1000, 1030)


def refusal(error: StoreError, area: Area, sendno: str = "") -> ApiError:
    """What a caller is told when the store did nothing."""
    if isinstance(error, TooMany):
        return ApiError(area.too_many, str(error), sendno=sendno)
    if isinstance(error, UnknownDevice):
        return ApiError(area.invalid, f"no such device in this app: {error}")
    room = "the store has no room left" if isinstance(error, StoreFull) else "the store is not available"
    return ApiError(area.unavailable, f"{room}; nothing was stored, try again later", sendno=sendno)


@contextmanager
def refusing(area: Area) -> Iterator[None]:
    """Store failures inside become ApiErrors."""
    try:
        yield
    except StoreError as error:
        raise refusal(error, area) from error
