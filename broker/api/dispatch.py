"""/v1/dispatch: where a device is to connect, and how its attempts went. Needs the app key and no secret."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from broker.api.call import DONE, Call, Endpoint
from broker.dispatch.dispatch import Dispatch, Question
from broker.dispatch.document import VERSION, Signed
from broker.dispatch.outcomes import Tried
from broker.errors import DEVICE, ApiError
from broker.pushing.requests import decode

MAX_TEXT: Final = 64  # characters of each thing that a device says of itself
MAX_ADDRESS: Final = 300  # characters: a host's name has at most 253
MAX_TRIED: Final = 16  # addresses in one report: more than an answer has
MAX_REPORT: Final = 8192
MAX_AGE: Final = (
    60  # seconds for which a device's own HTTP cache may answer; the device may hold it for its `ttl`
)


class TriedAddress(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Attempts since the last report."""

    address: Annotated[str, msgspec.Meta(max_length=MAX_ADDRESS)]
    ok: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 0
    failed: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 0


Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]


class AttemptsReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    app: Text
    tried: Annotated[list[TriedAddress], msgspec.Meta(max_length=MAX_TRIED)]
    carrier: Text = ""
    link: Text = ""
    region: Text = ""


_read_report: Final = msgspec.json.Decoder(AttemptsReport).decode


def dispatch_endpoints(dispatch: Dispatch) -> list[Endpoint]:
    async def ask(call: Call) -> bytes:
        if (version := call.query("v") or str(VERSION)) != str(VERSION):
            raise ApiError(DEVICE.invalid, f"v: must be {VERSION}, got {version[:MAX_TEXT]}")
        return _answer(call, await dispatch.answer(_question(call)))

    async def report(call: Call) -> bytes:
        told = decode(_read_report, call.raw, DEVICE)
        question = Question(told.app, told.carrier, told.link, told.region, call.address)
        await dispatch.report(question, [Tried(each.address, each.ok, each.failed) for each in told.tried])
        return DONE

    return [
        Endpoint("GET", ("/v1/dispatch",), DEVICE, ask, who="anybody"),
        Endpoint("POST", ("/v1/dispatch/report",), DEVICE, report, MAX_REPORT, who="anybody"),
    ]


def _question(call: Call) -> Question:
    app = _text(call, "app")
    if not app:
        raise ApiError(DEVICE.missing, "app is required: the app key")
    carrier, link, region = (_text(call, name) for name in ("carrier", "link", "region"))
    return Question(app, carrier, link, region, call.address, _text(call, "reached", MAX_ADDRESS))


def _text(call: Call, name: str, most: int = MAX_TEXT) -> str:
    text = call.query(name) or ""
    if len(text) > most:
        raise ApiError(DEVICE.invalid, f"{name}: must be at most {most} characters")
    return text


def _answer(call: Call, signed: Signed) -> bytes:
    """304 without a body, where the caller has it."""
    call.headers = {
        "ETag": signed.etag,
        "Cache-Control": f"private, max-age={min(MAX_AGE, signed.content.ttl)}",
    }
    asked = call.request.headers.get("If-None-Match", "")
    if signed.etag in (each.strip().removeprefix("W/") for each in asked.split(",")):  # RFC 9110, 13.1.2
        call.status = 304
        return DONE
    return signed.raw
