"""How a device gets its token, over HTTP. Apart from the rest, so that a device with a token needs no HTTP
client."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import aiohttp
import orjson

from clients.errors import DeviceStopped
from clients.http import login_headers
from clients.journal import Credentials
from gateway.mqtt import Reason

TIMEOUT: Final = aiohttp.ClientTimeout(total=20)


class EnrollmentFailed(OSError):
    """The API did not answer, or not with a decision: worth another attempt."""


async def register(
    url: str,
    app_key: str,
    device_key: str,
    registration_id: str | None = None,
    *,
    platform: str | None = None,
    alias: str | None = None,
    tags: list[str] | None = None,
) -> Credentials:
    """POST /v1/devices. `registration_id` None: the server chooses one. Raises DeviceStopped if the server
    says no, EnrollmentFailed if it does not answer."""
    wish = {"registration_id": registration_id, "platform": platform, "alias": alias, "tags": tags}
    body = {name: value for name, value in wish.items() if value is not None}
    return await _post(f"{url}/v1/devices", app_key, device_key, body)


async def renew(url: str, device_key: str, current: Credentials) -> Credentials:
    """POST /v1/devices/{id}/token with the current token, which must not have expired. Raises as
    `register`."""
    address = f"{url}/v1/devices/{current.registration_id}/token"
    return await _post(address, current.app_key, device_key, {"token": current.token})


async def _post(address: str, app_key: str, device_key: str, body: Mapping[str, object]) -> Credentials:
    headers = login_headers(app_key, device_key)
    try:
        async with (
            aiohttp.ClientSession(headers=headers, timeout=TIMEOUT) as session,
            session.post(address, data=orjson.dumps(body)) as response,
        ):
            status, raw = response.status, await response.read()
    except (aiohttp.ClientError, TimeoutError) as error:
        raise EnrollmentFailed(f"{address}: {error or 'no answer in time'}") from error
    if status == 429 or status >= 500:
        raise EnrollmentFailed(f"{address}: HTTP status {status}")
    answer = _read(raw)
    if status == 200 and {"registration_id", "token", "expires_at"} <= answer.keys():
        return Credentials(app_key, answer["registration_id"], answer["token"], answer["expires_at"])
    refusal = answer.get("error") or {"message": f"{address}: HTTP status {status}"}
    raise DeviceStopped(refusal["message"], Reason.NOT_AUTHORIZED, refusal.get("code"))


def _read(raw: bytes) -> dict[str, Any]:
    try:
        answer = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return {}
    return answer if isinstance(answer, dict) else {}
