"""SCRAM-SHA-256 (RFC 5802, RFC 7677) as a method of MQTT 5's enhanced authentication (4.12). No I/O.

The password never crosses the wire: the peer proves that it has it, and the server proves that it knows it too.
Nothing is stored for this. Of the three kinds of user name, the server knows the secrets or can make them again:

    publisher                  the app's master secret
    device                     the app's device key, in an open app
    19 characters of claims    the device token that begins with them, of the registration id in CONNECT

Somebody who is nobody goes through all of it with a secret that nobody has, and fails where a wrong password
fails: neither an answer nor the time it takes tells whether a user name is right (RFC 5802, 9). The salt of a user
name is always the same, for it is made of the app's signing key.

PBKDF2 takes some 1 to 2 ms of CPU on purpose, and releases the GIL: `derivation` is for another thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final

from scramp import ScramException, ScramMechanism

from broker.model import App
from broker.tenants import tokens

METHOD: Final = "SCRAM-SHA-256"
ITERATIONS: Final = 4096  # RFC 7677, 4
MAX_MESSAGE: Final = 512  # bytes: preparing a user name (RFC 4013) takes 4 us for each, before any proof
SALT_SIZE: Final = 16
CACHED_KEYS: Final = 1024  # some 300 bytes each
PUBLISHER: Final = "publisher"
DEVICE: Final = "device"
SHARED: Final = frozenset((PUBLISHER, DEVICE))

_MECHANISM: Final = ScramMechanism(METHOD)


class ScramError(Exception):
    """The peer is not let in. `reason` is a server-error-value of RFC 5802, 7: invalid-proof | other-error | …"""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)

    @property
    def answer(self) -> bytes:
        """The server-final-message that says so."""
        return f"e={self.reason}".encode()


@dataclass(frozen=True, slots=True)
class Keys:
    """What a password comes down to, for one salt."""

    stored: bytes  # checks the peer's proof
    server: bytes  # signs the server's


class KeyCache:
    """Keys of the secrets that many peers share; the least recently used goes first. For one thread."""

    def __init__(self, limit: int = CACHED_KEYS) -> None:
        self._limit = limit
        self._keys: OrderedDict[tuple[str, bytes], Keys] = OrderedDict()  # by secret and salt

    def get(self, secret: str, salt: bytes) -> Keys | None:
        found = self._keys.get((secret, salt))
        if found is not None:
            self._keys.move_to_end((secret, salt))
        return found

    def put(self, secret: str, salt: bytes, keys: Keys) -> None:
        self._keys[secret, salt] = keys
        if len(self._keys) > self._limit:
            self._keys.popitem(last=False)

    def __len__(self) -> int:
        return len(self._keys)


@dataclass(frozen=True, slots=True)
class Credentials:
    """Who may log in to `app` as the client id `registration_id`."""

    app: App
    registration_id: str

    def secret(self, user: str) -> str:
        """The password of a SCRAM user name; one that nobody has if there is none. That a token is not expired or
        revoked is for `admission.admit` to check, once the peer has proved that it has it."""
        if user == PUBLISHER:
            return self.app.master_secret
        if user == DEVICE and self.app.open:
            return self.app.device_key
        try:
            return tokens.reissue(self.app, self.registration_id, user)
        except tokens.TokenError:
            return self._fingerprint(b"scram nobody", user).hex()

    def salt(self, user: str) -> bytes:
        return self._fingerprint(b"scram salt", user)

    def _fingerprint(self, purpose: bytes, user: str) -> bytes:
        # `person` keeps it apart from the signatures of tokens, under the same key.
        key = self.app.signing_key
        return blake2b(user.encode(), digest_size=SALT_SIZE, key=key, person=purpose).digest()


class ScramExchange:
    """One login, or one re-authentication: `first`, perhaps `derivation`, then `final`, once each.

    `nonce`: at least 18 random bytes as printable ASCII without a comma, fresh for each exchange.
    """

    __slots__ = ("_cache", "_client_first", "_credentials", "_keys", "_nonce", "_salt", "identity", "secret")

    def __init__(self, credentials: Credentials, nonce: str, cache: KeyCache) -> None:
        self._credentials = credentials
        self._nonce = nonce
        self._cache = cache
        self._client_first = ""
        self._salt = b""
        self._keys: Keys | None = None
        self.identity = ""  # the SCRAM user name, known after `first`, proved after `final`
        self.secret = ""  # its password, or one that nobody has

    def first(self, client_first: bytes) -> bytes:
        """The server-first-message. Raises ScramError."""
        assert not self._client_first, "first comes once"
        self._client_first = _read(client_first)
        _, server_first = self._begin(Keys(b"", b""))  # they are needed in `final` only
        self.secret = self._credentials.secret(self.identity)
        self._keys = self._cache.get(self.secret, self._salt)
        return server_first

    def derivation(self) -> Callable[[], None] | None:
        """The CPU time of `final`, for another thread, before `final`; None: the keys are known. Without it `final`
        takes that time itself."""
        assert self.secret, "first comes first"
        return self._derive if self._keys is None else None

    def final(self, client_final: bytes) -> bytes:
        """The server-final-message, which proves the server to the peer. Raises ScramError."""
        text = _read(client_final)
        derive = self.derivation()
        if derive is not None:
            derive()
        assert self._keys is not None
        if self.identity in SHARED:  # names that a stranger makes up must not crowd these out
            self._cache.put(self.secret, self._salt, self._keys)
        server, _ = self._begin(self._keys)
        _call(server.set_client_final, text)
        return _call(server.get_server_final).encode()

    def _begin(self, keys: Keys) -> tuple[Any, bytes]:
        """The library's server, and its server-first-message."""

        def look_up(user: str) -> tuple[bytes, bytes, bytes, int]:
            self.identity, self._salt = user, self._credentials.salt(user)
            return self._salt, keys.stored, keys.server, ITERATIONS

        server = _MECHANISM.make_server(look_up, s_nonce=self._nonce)
        _call(server.set_client_first, self._client_first)
        return server, _call(server.get_server_first).encode()

    def _derive(self) -> None:
        _, stored, server, _ = _MECHANISM.make_auth_info(self.secret, ITERATIONS, self._salt)
        self._keys = Keys(stored, server)


def _read(message: bytes) -> str:
    if len(message) > MAX_MESSAGE:
        raise ScramError("other-error")
    try:
        return message.decode()
    except UnicodeDecodeError:
        raise ScramError("invalid-encoding") from None


def _call(step: Callable[..., str], *arguments: str) -> str:
    """A step of the library; what it objects to is the peer's doing."""
    try:
        return step(*arguments)
    except ScramException as error:
        told = error.server_error
        raise ScramError("other-error" if told is None else told.value) from error
