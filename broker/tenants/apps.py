"""Apps by key, and who may act for them. What was asked once is answered without I/O."""

from __future__ import annotations

import asyncio
import hmac
from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Final, Generic, TypeVar

from broker.bus import Bus, CredentialsChanged, Doorbell
from broker.limits import Limits
from broker.model import AccessRule, App, AppSettings
from broker.store import Conflict, Store, StoreUnavailable
from broker.tenants.keys import ApiKey, find_key

_V = TypeVar("_V")
MAX_AGE: Final = (
    60.0  # seconds that an answer is good for, if no doorbell says that it changed: one may be lost
)
TRIES: Final = 20  # of a change that other processes are faster with
MAX_KEY: Final = 64  # characters; no app has a longer key, and what was asked in vain is remembered


@dataclass(frozen=True, slots=True)
class Login:
    """Whoever proved a secret of this app."""

    app: App
    publisher: bool  # master secret or API key; else the device key, which may only register devices
    key: ApiKey | None = None

    @property
    def actor(self) -> str:
        """As the audit log has it."""
        if self.key is not None:
            return f"key {self.key.key_id} {self.key.name}"
        return "master" if self.publisher else "device key"


class _Answers(Generic[_V]):
    """At most `limit`, each for MAX_AGE. `clock` is monotonic."""

    def __init__(self, limit: int, clock: Callable[[], float]) -> None:
        self._limit = limit
        self._clock = clock
        self._answers: OrderedDict[str, tuple[_V, float]] = OrderedDict()  # and until when; oldest first

    def get(self, key: str) -> _V | None:
        found = self._answers.get(key)
        return found[0] if found is not None and self._clock() < found[1] else None

    def put(self, key: str, value: _V) -> None:
        self._answers.pop(key, None)
        if len(self._answers) >= self._limit:
            self._answers.popitem(last=False)
        self._answers[key] = value, self._clock() + MAX_AGE

    def drop(self, which: Callable[[_V], bool]) -> None:
        for key in [key for key, (value, _) in self._answers.items() if which(value)]:
            del self._answers[key]

    def clear(self) -> None:
        self._answers.clear()

    def __len__(self) -> int:
        return len(self._answers)


class Apps:
    """Bounded caches over `store.find_app`. Told by the bus (in every process) when an app changed; should the
    doorbell be lost, they ask again within MAX_AGE. `clock` is monotonic.

    Key and header lookups are dict lookups: str hashes are keyed per process, so their timing tells nothing
    about the secrets. Comparisons of secrets take constant time.
    """

    def __init__(
        self,
        store: Store,
        bus: Bus,
        limits: Limits | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._store = store
        self._bus = bus
        limits = limits or Limits()
        self._apps: _Answers[App] = _Answers(limits.max_apps_cached, clock)
        self._unknown: _Answers[bool] = _Answers(limits.max_unknown_keys, clock)  # keys looked up in vain
        # Authorization header -> what it proved
        self._logins: _Answers[Login] = _Answers(limits.max_apps_cached, clock)
        self._changes = 0  # a lookup that spans a change is not cached
        self._settling = asyncio.Lock()  # those of this process need not get in each other's way
        self._unsubscribe = bus.subscribe(self._heard, self._missed)

    def close(self) -> None:
        self._unsubscribe()

    def peek(self, key: str) -> App | None:
        """From the cache only; None may mean "not asked yet"."""
        return self._apps.get(key)

    async def find(self, key: str) -> App | None:
        app = self._apps.get(key)
        if app is not None or self._unknown.get(key) or len(key) > MAX_KEY:
            return app
        changes = self._changes
        app = await self._store.find_app(key)
        if changes == self._changes:
            self._remember(key, app)
        return app

    def forget(self, app_id: int) -> None:
        """The app changed or is gone. Logins are dropped all together: this is rare, and one app may have
        several."""
        self._changes += 1
        self._apps.drop(lambda app: app.app_id == app_id)
        self._unknown.clear()
        self._logins.clear()

    def check_master_secret(self, app: App, secret: bytes) -> bool:
        return hmac.compare_digest(app.master_secret.encode(), secret)

    def check_device_key(self, app: App, key: bytes) -> bool:
        return hmac.compare_digest(app.device_key.encode(), key)

    def peek_login(self, header: str) -> Login | None:
        """The login of an Authorization header that was accepted before. One form of each secret is remembered: there
        are endless ways to write one, and every installation has the device key."""
        return self._logins.get(header)

    async def login(self, header: str) -> Login | None:
        """Check an `Authorization: Basic` header (app key; master secret, API key's secret or device key). Whether an
        API key has expired is for the caller to see. Lets StoreError pass."""
        known = self._logins.get(header)
        if known is not None:
            return known
        credentials = read_basic(header)
        app = await self.find(credentials[0]) if credentials else None
        if app is None or credentials is None:
            return None
        login = await self._prove(app, credentials[1])
        if login is not None and self._apps.get(app.key) is app and header == _basic(*credentials):
            self._logins.put(header, login)
        return login

    async def create(self, name: str, *, open: bool = False, offline_limit: int = 100) -> App:
        app = await self._store.create_app(name, open=open, offline_limit=offline_limit)
        self.changed(app.app_id)
        return app

    async def rotate_secret(self, key: str) -> App | None:
        """A fresh master secret; the old one stops at once. None: no such app."""
        app = await self._store.rotate_secret(key)
        if app is not None:
            self.changed(app.app_id)
        return app

    async def set_access(self, key: str, rules: Sequence[AccessRule]) -> App | None:
        """Other access rules; they hold at once. None: no such app."""
        app = await self._store.set_access(key, rules)
        if app is not None:
            self.changed(app.app_id)
        return app

    async def set_settings(self, key: str, settings: AppSettings) -> App | None:
        """Other settings; they hold at once. None: no such app."""
        app = await self._store.set_settings(key, settings)
        if app is not None:
            self.changed(app.app_id)
        return app

    async def change_settings(self, key: str, change: Callable[[AppSettings], AppSettings]) -> App | None:
        """Other settings, made from those that are there now: nobody sets others in between. What `change` raises
        passes."""
        async with self._settling:
            app = await self._change_settings(key, change)
        if app is not None:
            self.changed(app.app_id)
        return app

    async def _change_settings(self, key: str, change: Callable[[AppSettings], AppSettings]) -> App | None:
        for _ in range(TRIES):
            app = await self._store.find_app(key)
            try:
                return app and await self._store.set_settings(key, change(app.settings), app.settings)
            except Conflict:
                continue
        raise StoreUnavailable(f"others change the settings of app {key} all the time")

    async def delete(self, key: str) -> bool:
        app = await self._store.find_app(key)
        if app is None or not await self._store.delete_app(key):
            return False
        self.changed(app.app_id)
        return True

    async def _prove(self, app: App, secret: bytes) -> Login | None:
        if self.check_master_secret(app, secret):
            return Login(app, publisher=True)
        if self.check_device_key(app, secret):
            return Login(app, publisher=False)
        key = await find_key(self._store, app, secret)
        return Login(app, publisher=True, key=key) if key else None

    def _remember(self, key: str, app: App | None) -> None:
        if app is None:
            self._unknown.put(key, True)
        else:
            self._apps.put(key, app)

    def changed(self, app_id: int) -> None:
        """The app, or who may act for it, is other now."""
        self.forget(app_id)  # here at once, elsewhere when the bell arrives
        self._bus.ring([CredentialsChanged(app_id, None)])

    def _heard(self, doorbells: Sequence[Doorbell]) -> None:
        for doorbell in doorbells:
            if isinstance(doorbell, CredentialsChanged) and doorbell.devnos is None:
                self.forget(doorbell.app_id)

    async def _missed(self) -> None:
        self._changes += 1
        for answers in (self._apps, self._unknown, self._logins):
            answers.clear()


def read_basic(header: str) -> tuple[str, bytes] | None:
    """User and password of an `Authorization: Basic` header (RFC 7617); None if it is not one."""
    scheme, _, encoded = header.partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        user, colon, password = b64decode(encoded.strip(), validate=True).partition(b":")
        return (user.decode(), password) if colon else None
    except (Base64Error, UnicodeDecodeError, ValueError):
        return None


def _basic(user: str, password: bytes) -> str:
    return f"Basic {b64encode(user.encode() + b':' + password).decode()}"
