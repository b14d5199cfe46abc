"""Device tokens: what a device shows as its password. Verified without I/O. And how secrets are made.

A token is 40 characters of base64url: version, platform code, devno, generation, expiry (14 bytes), then
16 bytes of keyed BLAKE2b (RFC 7693) under the app's signing key over those bytes, app key and registration id.
BLAKE2b because every CONNECT checks one: 1 us, where hmac.digest takes 7 with OpenSSL 3.
It does not name its device: shown for another registration id or app, its signature is wrong.
"""

from __future__ import annotations

import hmac
import secrets
from base64 import urlsafe_b64encode
from binascii import Error as Base64Error
from binascii import a2b_base64
from hashlib import blake2b
from string import ascii_letters, digits
from struct import Struct
from typing import Final, NamedTuple

from broker.model import PLATFORMS, App

VERSION: Final = 1
LENGTH: Final = 40  # 30 bytes, so no padding
CLAIMS_LENGTH: Final = 19  # of these characters, what is not yet the signature

_CLAIMS: Final = Struct(">BBIII")  # version, platform, devno, generation, expires_at
_CLAIMS_SIZE: Final = _CLAIMS.size
_MAC_SIZE: Final = 16
_PLATFORM_CODES: Final = {name: code for code, name in enumerate(PLATFORMS)}
_FROM_URLSAFE: Final = bytes.maketrans(b"-_", b"+/")


def new_secret() -> str:
    """A master secret or key: 24 letters and digits (142 bits), which is what the vendor's SDKs take for one."""
    return "".join(secrets.choice(ascii_letters + digits) for _ in range(24))


def new_credentials() -> tuple[str, str, str, bytes]:
    """Of an app: key, master secret, device key, signing key."""
    return secrets.token_hex(12), new_secret(), new_secret(), secrets.token_bytes(32)


class TokenError(Exception):
    """`reason`: malformed | signature | expired."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class TokenClaims(NamedTuple):
    devno: int
    platform: str
    generation: int  # the caller compares it with store.token_generations(app_id).get(devno, 0)
    expires_at: int


def issue(
    app: App,
    registration_id: str,
    devno: int,
    platform: str,
    generation: int,
    now: float,
    lifetime: float,
) -> str:
    claims = _CLAIMS.pack(VERSION, _PLATFORM_CODES[platform], devno, generation, int(now + lifetime))
    return urlsafe_b64encode(claims + _mac(app, registration_id, claims)).decode()


def verify(app: App, registration_id: str, token: bytes, now: float) -> TokenClaims:
    """Raises TokenError."""
    if len(token) != LENGTH:
        raise TokenError("malformed")
    try:
        raw = a2b_base64(token.translate(_FROM_URLSAFE))
    except Base64Error:
        raise TokenError("malformed") from None
    if len(raw) != _CLAIMS_SIZE + _MAC_SIZE or raw[0] != VERSION:
        raise TokenError("malformed")
    claims = raw[:_CLAIMS_SIZE]
    if not hmac.compare_digest(raw[_CLAIMS_SIZE:], _mac(app, registration_id, claims)):
        raise TokenError("signature")
    _, platform, devno, generation, expires_at = _CLAIMS.unpack(claims)
    if now >= expires_at:
        raise TokenError("expired")
    return TokenClaims(devno, PLATFORMS[platform], generation, expires_at)


def reissue(app: App, registration_id: str, claims: str) -> str:
    """The token that begins with `claims`, its first CLAIMS_LENGTH characters, made again. Raises TokenError if they
    are malformed.

    Whoever shows claims has shown nothing yet: `verify` what this returns once they have proved that they have it.
    """
    if len(claims) != CLAIMS_LENGTH or not claims.isascii():
        raise TokenError("malformed")
    try:
        # The last character holds two bits of the signature as well; they count for nothing here.
        raw = a2b_base64(claims.encode().translate(_FROM_URLSAFE) + b"=")
    except Base64Error:
        raise TokenError("malformed") from None
    if len(raw) != _CLAIMS_SIZE or raw[0] != VERSION:
        raise TokenError("malformed")
    return urlsafe_b64encode(raw + _mac(app, registration_id, raw)).decode()


def _mac(app: App, registration_id: str, claims: bytes) -> bytes:
    # Unambiguous: claims have a fixed size, and an app key holds no NUL.
    signed = b"%b%b\0%b" % (claims, app.key.encode(), registration_id.encode())
    return blake2b(signed, digest_size=_MAC_SIZE, key=app.signing_key).digest()
