"""Where to connect: asked of the installation, checked, kept, and there when nobody answers. `Dispatch` does no I/O
and reads no clock; `ask` and `tell` are the shell around it.

Theory. What the installation answers is signed with its key, which the app has built in: so any door may be asked,
over any network, and an answer kept for weeks is as good as on its first day. It is kept for each network, and
asked for anew when it is over or the device is on a network it does not know. Used is the answer for this network,
or else the newest for another one; behind it always the built-in list.

What must always hold: nothing that is not signed by one of the keys is used or kept; an answer that is older than
what is known by more than its time is refused, so that nobody leads devices back to yesterday's addresses.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from base64 import urlsafe_b64decode
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlencode, urlsplit

import msgspec
import orjson

from clients.addresses import Address, Hints
from clients.http import http_address

VERSION: Final = 1
MAX_ANSWER: Final = 16_384  # bytes; an answer has some 500
MAX_NETWORKS: Final = 16  # of which answers are kept
QUESTION: Final = 450  # bytes of a datagram: the server answers with at most three times as many
RETRY_BASE: Final = (
    15.0  # seconds; doors that did not answer are asked again after a random part of this, doubled
)
RETRY_CAP: Final = 900.0
DOOR_STAGGER: Final = 1.0  # seconds until the next door is asked beside the one before
DOOR_PATIENCE: Final = 6.0  # seconds
DATAGRAM_PAUSE: Final = 1.5  # seconds until a question over UDP is repeated

log = logging.getLogger(__name__)


class DispatchError(Exception):
    """An answer that cannot be believed, or that is none; the message says why."""


class _Waits(msgspec.Struct, frozen=True):
    base: int
    cap: int
    stagger: int
    ban: int
    parallel: int


class _Document(msgspec.Struct, frozen=True):
    """What is added later is not looked at."""

    addresses: list[str]
    carrier: str
    heartbeat: str
    key: str
    made: int
    reconnect: _Waits
    region: str
    signature: str
    ttl: int
    v: int


@dataclass(frozen=True, slots=True)
class Told:
    """An answer that was checked. Seconds."""

    addresses: tuple[Address, ...]  # best first; those of a kind that this version does not know are left out
    carrier: str
    heartbeat: tuple[int, int, int]  # start, least, most
    hints: Hints
    made: int  # by the server's clock
    ttl: int
    raw: bytes
    etag: str


def read_answer(raw: bytes, keys: Sequence[str]) -> Told:
    """`keys`: public keys as `holdfast dispatch key` prints them. Raises DispatchError."""
    if len(raw) > MAX_ANSWER:
        raise DispatchError(f"the answer has more than {MAX_ANSWER} bytes")
    try:
        fields = orjson.loads(raw)
        document = msgspec.convert(fields, _Document)
    except (orjson.JSONDecodeError, msgspec.ValidationError) as error:
        raise DispatchError(f"not an answer of dispatch: {error}") from None
    if document.v != VERSION:
        raise DispatchError(f"version {document.v}: only {VERSION} is known here")
    _check(fields, document, keys)
    waits = document.reconnect
    return Told(
        addresses=tuple(_known(document.addresses)),
        carrier=document.carrier,
        heartbeat=_read_heartbeat(document.heartbeat),
        hints=Hints(
            stagger=waits.stagger / 1000,
            parallel=waits.parallel,
            ban=waits.ban / 1000,
            base=waits.base / 1000,
            cap=waits.cap / 1000,
        ),
        made=document.made,
        ttl=document.ttl,
        raw=raw,
        etag=f'"{document.signature[:16]}"',
    )


def _check(fields: dict[str, Any], document: _Document, keys: Sequence[str]) -> None:
    """Ed25519 (RFC 8032) over the other fields as canonical JSON."""
    from cryptography.exceptions import InvalidSignature  # 4 MB that a device without dispatch does not need
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    signed = {name: value for name, value in fields.items() if name != "signature"}
    for key in map(_decode, keys):
        if hashlib.sha256(key).hexdigest()[:8] == document.key:
            try:
                public = Ed25519PublicKey.from_public_bytes(key)
                public.verify(_decode(document.signature), orjson.dumps(signed, option=orjson.OPT_SORT_KEYS))
            except InvalidSignature:
                raise DispatchError("the signature is wrong") from None
            return
    raise DispatchError(f"signed with the key {document.key[:8]}, which this device does not have")


def _decode(text: str) -> bytes:
    """base64url without padding. Raises DispatchError."""
    try:
        return urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except ValueError:
        raise DispatchError("not base64url") from None


def _known(texts: Iterable[str]) -> Iterable[Address]:
    for text in texts:
        try:
            yield Address.read(text)
        except ValueError as error:
            log.info("dispatch: %s", error)


def _read_heartbeat(text: str) -> tuple[int, int, int]:
    try:
        start, least, most = map(int, text.split())
    except ValueError:
        raise DispatchError(f"heartbeat {text[:40]!r}: must be start, least and most") from None
    if not 0 < least <= start <= most:
        raise DispatchError(f"heartbeat {text[:40]!r}: must be least <= start <= most")
    return start, least, most


class _Kept(msgspec.Struct):
    raw: str
    at: float


class Dispatch:
    """`keys`: the installation's public keys, at least one. `built_in`: where to connect while nothing is known.
    Times are Unix seconds. `jitter` gives numbers in [0, 1)."""

    def __init__(
        self,
        app_key: str,
        keys: Sequence[str],
        jitter: Callable[[], float],
        *,
        built_in: Iterable[str] = (),
        region: str = "",
    ) -> None:
        """Raises ValueError for a key or address that cannot be one."""
        if not keys:
            raise ValueError("give the installation's public key: holdfast dispatch key prints it")
        for key in keys:
            if len(_public_key(key)) != 32:
                raise ValueError(f"{key!r}: must be a public key, as holdfast dispatch key prints it")
        self._app_key = app_key
        self._keys = tuple(keys)
        self._jitter = jitter
        self._built_in = tuple(map(Address.read, built_in))
        self._region = region
        self._network = ""
        self._carrier = ""
        self._link = ""
        self._told: dict[str, tuple[Told, float]] = {}  # by network, oldest first: and when it was heard
        self._retry_at = 0.0
        self._misses = 0
        self._reached = ""

    # The network

    def enter(self, network: str, *, carrier: str = "", link: str = "") -> None:
        """The device is on this network now. `carrier`: MCC+MNC or a name; both as in CONNECT."""
        self._network, self._carrier, self._link = network, carrier, link
        self._retry_at, self._misses = 0.0, 0  # another network may let questions through
        self._reached = ""

    # What is known

    @property
    def told(self) -> Told | None:
        """For this network."""
        found = self._told.get(self._network)
        return found[0] if found is not None else None

    def addresses(self) -> tuple[Address, ...]:
        """Best first, the built-in ones last."""
        told = self.told or self._newest()
        found = told.addresses if told is not None else ()
        return tuple(dict.fromkeys((*found, *self._built_in)))

    def _newest(self) -> Told | None:
        return next((told for told, _ in reversed(self._told.values())), None)

    # Asking

    def wants(self, now: float) -> bool:
        """It is time to ask."""
        if (
            now < self._retry_at <= now + RETRY_CAP
        ):  # a clock that was set back does not make us wait for ever
            return False
        found = self._told.get(self._network)
        return found is None or not 0 <= now - found[1] < found[0].ttl

    def path(self) -> str:
        """Of the question over HTTP, under an API's base address."""
        reached = {"reached": self._reached} if self._reached else {}
        return f"/v1/dispatch?{urlencode(self._asked() | reached)}"

    def datagram(self) -> bytes:
        """Of the question over UDP: blanks make room for the answer."""
        return orjson.dumps(self._asked() | {"v": VERSION}).ljust(QUESTION)

    def _asked(self) -> dict[str, Any]:
        """What the server need not know is left out."""
        said = {"app": self._app_key, "carrier": self._carrier, "link": self._link, "region": self._region}
        return {name: value for name, value in said.items() if value}

    def take(self, raw: bytes | None, now: float) -> Told:
        """An answer came; None: what is known still holds. Raises DispatchError, and what was known stays."""
        told = self.told if raw is None else read_answer(raw, self._keys)
        if told is None:
            raise DispatchError("nothing is known that could still hold")
        newest = max((known.made for known, _ in self._told.values()), default=0)
        if told.made < newest - told.ttl and raw is not None:
            raise DispatchError(f"made {newest - told.made} s before what is known")
        self._put(self._network, told, now)
        self._retry_at, self._misses = 0.0, 0
        return told

    def _put(self, network: str, told: Told, at: float) -> None:
        self._told.pop(network, None)
        self._told[network] = told, at
        if len(self._told) > MAX_NETWORKS:
            del self._told[next(iter(self._told))]

    def missed(self, now: float) -> None:
        """Nobody answered."""
        most = min(RETRY_CAP, RETRY_BASE * 2.0 ** min(self._misses, 62))
        self._misses += 1
        self._retry_at = now + most * (1 + self._jitter()) / 2

    # What went well

    def reached(self, address: Address) -> None:
        """The device got through to it; the next question over HTTP says so. Those who get through have nothing else
        to tell, and without their word those who fail would seem to be all."""
        self._reached = str(Address(address.name or address.host, address.port, address.transport))

    def report(self, outcomes: Iterable[tuple[str, int, int]]) -> bytes | None:
        """The body that tells how attempts went: address, reached, failed. None: there is nothing to tell."""
        tried = [
            {"address": address, "ok": reached, "failed": failed}
            for address, reached, failed in outcomes
            if reached or failed
        ]
        return orjson.dumps(self._asked() | {"tried": tried[:16]}) if tried else None

    # For the next process

    def state(self) -> dict[str, Any]:
        """For JSON."""
        return {network: {"raw": told.raw.decode(), "at": at} for network, (told, at) in self._told.items()}

    def restore(self, state: object) -> None:
        """What cannot be read, or was signed with a key that is not known any more, is forgotten."""
        if not isinstance(state, Mapping):
            return
        for network, entry in state.items():
            try:
                kept = msgspec.convert(entry, _Kept)
                self._put(str(network), read_answer(kept.raw.encode(), self._keys), kept.at)
            except (msgspec.ValidationError, DispatchError) as error:
                log.info("dispatch: what was kept for a network is not used: %s", error)


def _public_key(text: str) -> bytes:
    try:
        return _decode(text)
    except DispatchError:
        return b""


# The shell


async def ask(dispatch: Dispatch, doors: Sequence[str], clock: Callable[[], float]) -> Told | None:
    """One question, at all doors (`https://…`, `http://…`, `udp://host:port`) if need be: the next is asked beside
    the one before after a stagger, and the first answer that can be believed is taken. None: there was none. `clock`
    gives Unix seconds."""
    tasks = [
        asyncio.ensure_future(_ask_door(dispatch, door, n * DOOR_STAGGER)) for n, door in enumerate(doors)
    ]
    try:
        for answer in asyncio.as_completed(tasks):
            try:
                return dispatch.take(await answer, clock())
            except (DispatchError, OSError) as error:
                log.info("dispatch: %s", error)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    dispatch.missed(clock())
    return None


async def _ask_door(dispatch: Dispatch, door: str, delay: float) -> bytes | None:
    """Raises OSError or DispatchError."""
    await asyncio.sleep(delay)
    try:
        async with asyncio.timeout(DOOR_PATIENCE):
            if door.startswith("udp://"):
                return await _ask_datagram(door, dispatch.datagram())
            return await _ask_http(http_address(door) + dispatch.path(), dispatch.told)
    except TimeoutError:
        raise DispatchError(f"{door}: no answer") from None


async def _ask_http(url: str, known: Told | None) -> bytes | None:
    """None: it still holds."""
    import aiohttp

    headers = {} if known is None else {"If-None-Match": known.etag}
    try:
        async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as response:
            if response.status == 304:
                return None
            raw = await _read_some(response.content)
    except aiohttp.ClientError as error:
        raise DispatchError(f"{url}: {error}") from error
    if response.status != 200:
        raise DispatchError(f"{url}: HTTP status {response.status}")
    return raw


async def _read_some(content: Any) -> bytes:
    """Not more than an answer can have."""
    raw = bytearray()
    while len(raw) <= MAX_ANSWER and (more := await content.read(MAX_ANSWER)):
        raw += more
    return bytes(raw)


class _Waiter(asyncio.DatagramProtocol):
    def __init__(self) -> None:
        self.answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def datagram_received(self, data: bytes, addr: tuple[str | Any, int]) -> None:
        if not self.answer.done():
            self.answer.set_result(data)

    def error_received(self, exc: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(exc)


async def _ask_datagram(door: str, question: bytes) -> bytes:
    """Asks until somebody answers."""
    parts = urlsplit(door)
    if not parts.hostname or not parts.port:
        raise DispatchError(f"{door}: must be udp://host:port")
    loop = asyncio.get_running_loop()
    transport, waiter = await loop.create_datagram_endpoint(_Waiter, remote_addr=(parts.hostname, parts.port))
    try:
        while True:
            transport.sendto(question)
            await asyncio.wait([waiter.answer], timeout=DATAGRAM_PAUSE)
            if waiter.answer.done():
                return waiter.answer.result()
    finally:
        waiter.answer.cancel()
        transport.close()


async def tell(dispatch: Dispatch, doors: Sequence[str], outcomes: Iterable[tuple[str, int, int]]) -> bool:
    """Report how attempts went, at the first door over HTTP that takes it. False: nobody did, and it is not told
    again."""
    body = dispatch.report(outcomes)
    if body is None:
        return True
    import aiohttp

    headers = {"Content-Type": "application/json"}
    for door in doors:
        if door.startswith("udp://"):
            continue
        try:
            async with (
                asyncio.timeout(DOOR_PATIENCE),
                aiohttp.ClientSession(headers=headers) as session,
                session.post(f"{http_address(door)}/v1/dispatch/report", data=body) as response,
            ):
                if response.status == 200:
                    return True
        except (aiohttp.ClientError, OSError) as error:
            log.info("dispatch: %s: %s", door, error or "no answer")
    return False
