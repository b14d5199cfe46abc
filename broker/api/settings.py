"""/v1/settings, /v1/audit: what the owner of an app sets for it, and who did what to it."""

from __future__ import annotations

import orjson

from broker.api.call import BODY, Call, Endpoint
from broker.errors import ADMIN, ApiError
from broker.model import AppSettings
from broker.tenants.app_settings import describe_own_settings, names_of_changes, read_own_settings
from broker.tenants.apps import Apps
from broker.tenants.audit import Audit, describe_page, read_page


def settings_endpoints(apps: Apps, audit: Audit) -> list[Endpoint]:
    async def show(call: Call) -> bytes:
        return orjson.dumps(describe_own_settings(call.app.settings))

    async def change(call: Call) -> bytes:
        def replaced(settings: AppSettings) -> AppSettings:
            changed = read_own_settings(call.raw, settings, call.address)
            call.subject = names_of_changes(settings, changed)
            return changed

        app = await apps.change_settings(call.app.key, replaced)
        if app is None:
            raise ApiError(1008, f"there is no app {call.app.key} any more")
        return orjson.dumps(describe_own_settings(app.settings))

    async def entries(call: Call) -> bytes:
        before, limit = read_page(call.query("before"), call.query("limit"))
        return orjson.dumps(describe_page(await audit.entries(call.app.app_id, before, limit), limit))

    return [
        Endpoint("GET", ("/v1/settings",), ADMIN, show),
        Endpoint("PUT", ("/v1/settings",), ADMIN, change, BODY, audit="settings.set"),
        Endpoint("GET", ("/v1/audit",), ADMIN, entries),
    ]
