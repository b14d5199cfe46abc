"""The two open apps that a start makes: the demo app, and the one for those without credentials."""

from __future__ import annotations

import logging
from typing import Final

from broker.config import Config, is_loopback
from broker.logs import log_event
from broker.model import App
from broker.store import Store
from broker.tenants.apps import Apps

DEMO_APP: Final = "demo"

log = logging.getLogger(__name__)


class StartError(Exception):
    """The service cannot run like this; the message says what to do."""


class OpenApps:
    """Found, or made, once the store is open."""

    def __init__(self, config: Config, store: Store, apps: Apps) -> None:
        self._config = config
        self._store = store
        self._apps = apps

    async def demo_app(self) -> App | None:
        """The app of the first steps, of a server that does all: open, so it must not be reachable from outside.
        Raises StartError."""
        config = self._config
        found = await self._find(DEMO_APP)
        if not config.on_loopback:
            if found is not None:
                raise StartError(_reachable(config, found))
            return None
        wanted = config.server.demo_app and config.serves_devices and config.serves_api
        return (found or await self._create(DEMO_APP)) if wanted else None

    async def anonymous_app(self) -> App | None:
        name = self._config.mqtt.anonymous_app
        if name is None or not self._config.serves_devices:
            return None
        app = await self._find(name) or await self._create(name)
        log_event(log, logging.WARNING, "connections without credentials are taken in", app=app.key)
        return app

    async def _find(self, name: str) -> App | None:
        """The oldest of that name."""
        last = 0
        while page := await self._store.list_apps(last):
            for app in page:
                if app.name == name and app.open:
                    return app
            last = page[-1].app_id
        return None

    async def _create(self, name: str) -> App:
        return await self._apps.create(name, open=True, offline_limit=self._config.push.offline_limit)


def _reachable(config: Config, found: App) -> str:
    where = "the store" if config.store.url else f"the data directory {config.server.data_dir}"
    return (
        f"{where} holds the demo app, which anybody may join; "
        f"remove it with `holdfast app delete {found.key}`, or listen on a loopback address only"
    )


def check_anonymous(config: Config) -> None:
    """Raises StartError where strangers could reach what asks for no credentials."""
    name, host = config.mqtt.anonymous_app, config.server.host
    if name is not None and not is_loopback(host) and not config.mqtt.anonymous_anywhere:
        raise StartError(
            f"mqtt.anonymous_app = {name!r} takes in everybody without credentials, and server.host = {host!r} is "
            "open to others than this machine; set server.host to a loopback address, mqtt.anonymous_app to off, or "
            "mqtt.anonymous_anywhere to true if that is meant"
        )
