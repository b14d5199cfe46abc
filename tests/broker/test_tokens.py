from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.model import PLATFORMS, App
from broker.tokens import LENGTH, TokenClaims, TokenError, issue, verify

APP = App(1, "a" * 24, "name", "m" * 24, "d" * 24, b"k" * 32, open=False, created_at=0.0)
UINT32 = st.integers(0, 2**32 - 1)


def _reason(app: App, registration_id: str, token: bytes, now: float = 0.0) -> str:
    with pytest.raises(TokenError) as caught:
        verify(app, registration_id, token, now)
    return caught.value.reason


@given(
    st.text(min_size=1, max_size=64).filter(lambda t: t.isprintable()),
    UINT32,
    UINT32,
    st.sampled_from(PLATFORMS),
)
def test_a_token_says_what_was_issued(
    registration_id: str, devno: int, generation: int, platform: str
) -> None:
    token = issue(APP, registration_id, devno, platform, generation, 1000.5, 60)
    assert len(token) == LENGTH
    assert verify(APP, registration_id, token.encode(), 1000) == TokenClaims(
        devno, platform, generation, 1060
    )


def test_a_token_lasts_until_its_expiry() -> None:
    token = issue(APP, "phone", 7, "ios", 0, 1000, 60).encode()
    assert verify(APP, "phone", token, 1059.9).devno == 7
    assert _reason(APP, "phone", token, 1060) == "expired"


@given(st.integers(0, 8 * 30 - 1))
def test_any_flipped_bit_is_seen(bit: int) -> None:
    raw = bytearray(urlsafe_b64decode(issue(APP, "phone", 7, "ios", 0, 1000, 60)))
    raw[bit // 8] ^= 1 << bit % 8
    reason = _reason(APP, "phone", urlsafe_b64encode(raw), 1000)
    assert reason == ("malformed" if bit < 8 else "signature")


@pytest.mark.parametrize(
    ("app", "registration_id"),
    [
        (APP, "phone2"),
        (replace(APP, key="b" * 24), "phone"),
        (replace(APP, signing_key=b"x" * 32), "phone"),
    ],
    ids=["another device", "another app", "another signing key"],
)
def test_a_token_is_for_one_device_of_one_app(app: App, registration_id: str) -> None:
    token = issue(APP, "phone", 7, "ios", 0, 1000, 60).encode()
    assert _reason(app, registration_id, token, 1000) == "signature"


@pytest.mark.parametrize(
    "token", [b"", b"x", b"!" * LENGTH, b"\xff" * LENGTH, b"A" * (LENGTH - 1), b"A" * 400, b"A" * 39 + b"="]
)
def test_what_is_no_token_is_malformed(token: bytes) -> None:
    assert _reason(APP, "phone", token) == "malformed"


@given(st.binary(max_size=60))
def test_no_input_raises_anything_else(token: bytes) -> None:
    _reason(APP, "phone", token)
