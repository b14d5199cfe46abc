"""/v1/keys: secrets beside the master secret."""

from __future__ import annotations

import orjson

from broker.api.call import BODY, DONE, Call, Endpoint
from broker.errors import ADMIN
from broker.tenants.keys import Keys


def key_endpoints(keys: Keys) -> list[Endpoint]:
    async def create(call: Call) -> bytes:
        key, secret = await keys.create(call.app, call.raw)
        call.subject = f"{key.key_id} {key.name}: {', '.join(key.scopes)}"
        return orjson.dumps({**key.describe(), "secret": secret})

    async def show(call: Call) -> bytes:
        return orjson.dumps({"keys": [key.describe() for key in await keys.of_app(call.app)]})

    async def delete(call: Call) -> bytes:
        key = await keys.delete(call.app, call.path("id"))
        call.subject = f"{key.key_id} {key.name}"
        return DONE

    return [
        Endpoint("POST", ("/v1/keys",), ADMIN, create, BODY, audit="key.create"),
        Endpoint("GET", ("/v1/keys",), ADMIN, show),
        Endpoint("DELETE", ("/v1/keys/{id}",), ADMIN, delete, audit="key.delete"),
    ]
