"""The installation's key pair: made by whoever needs it first, kept in the store, the same for all its processes.

Beside it there may be the next one: made long before it is used, so that apps can have both public keys built in
when the key changes. Devices take an answer that is signed with any key they know.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import msgspec

from broker.dispatch.document import Content, Signed, canonical, encode_bytes
from broker.model import RecordChange
from broker.store import Conflict, Records, StoreUnavailable

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

KIND: Final = "dispatch-key"
NAME: Final = "signing"
NEXT: Final = "next"
ETAG_LENGTH: Final = 16  # characters of a signature: 96 bits
TRIES: Final = 3

Clock = Callable[[], float]


class _Kept(msgspec.Struct, frozen=True):
    private: bytes  # 32 bytes; JSON has them as base64
    made_at: float


class SigningKey:
    """`seed`: the 32 private bytes."""

    def __init__(self, seed: bytes) -> None:
        # 4 MB that a server needs only once somebody asks.
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        self._key: Ed25519PrivateKey = Ed25519PrivateKey.from_private_bytes(seed)
        public = self._key.public_key().public_bytes_raw()
        self.public = encode_bytes(public)
        self.name = key_name(public)

    def sign(self, content: Content, now: float) -> Signed:
        fields: dict[str, Any] = msgspec.to_builtins(content)
        made = int(now)
        fields |= {"key": self.name, "made": made}
        signature = encode_bytes(self._key.sign(canonical(fields)))
        raw = canonical({**fields, "signature": signature})
        return Signed(content, made, raw, f'"{signature[:ETAG_LENGTH]}"', self.name)


def key_name(public: bytes) -> str:
    """By which a device finds the key among those it knows."""
    return hashlib.sha256(public).hexdigest()[:8]


async def installation_key(records: Records, clock: Clock = time.time) -> SigningKey:
    """That answers are signed with now. Lets StoreError pass."""
    return await _find_or_make(records, NAME, clock)


async def next_key(records: Records, clock: Clock = time.time) -> SigningKey:
    """That follows it. Lets StoreError pass."""
    return await _find_or_make(records, NEXT, clock)


async def change_key(records: Records) -> SigningKey:
    """The next key is that of the installation from now on, and the one before is gone; processes notice within
    seconds. Raises ValueError where there is no next one; lets StoreError pass, and Conflict is one."""
    now, following = [await records.find(0, KIND, name) for name in (NAME, NEXT)]
    if following is None:
        raise ValueError("there is no next key: make one, and give it to the devices first")
    version = 0 if now is None else now.version
    await records.save(
        [
            RecordChange(0, KIND, NAME, following.value, version),
            RecordChange(0, KIND, NEXT, None, following.version),
        ]
    )
    return await installation_key(records)


async def _find_or_make(records: Records, name: str, clock: Clock) -> SigningKey:
    for _ in range(TRIES):
        record = await records.find(0, KIND, name)
        if record is not None:
            return SigningKey(msgspec.json.decode(record.value, type=_Kept).private)
        value = msgspec.json.encode(_Kept(_fresh_seed(), clock()))
        try:
            await records.save([RecordChange(0, KIND, name, value, 0)])
        except Conflict:
            continue  # another process was first: all use its key
    raise StoreUnavailable("the signing key is neither there nor can it be made")


def _fresh_seed() -> bytes:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.generate().private_bytes_raw()
