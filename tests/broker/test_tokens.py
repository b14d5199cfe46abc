from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.model import PLATFORMS, App
from broker.tenants.tokens import CLAIMS_LENGTH, LENGTH, TokenClaims, TokenError, issue, reissue, verify

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


# What SCRAM needs: the token again, from the part of it that is no secret


@given(UINT32, UINT32, UINT32, st.sampled_from(PLATFORMS))
def test_a_token_is_made_again_from_its_claims(
    devno: int, generation: int, expires_at: int, platform: str
) -> None:
    token = issue(APP, "phone", devno, platform, generation, float(expires_at), 0)
    assert reissue(APP, "phone", token[:CLAIMS_LENGTH]) == token


def test_claims_alone_make_the_same_token_as_its_first_characters() -> None:
    token = issue(APP, "phone", 7, "ios", 0, 1000, 60)
    claims = urlsafe_b64encode(urlsafe_b64decode(token)[:14]).decode().rstrip("=")
    assert len(claims) == CLAIMS_LENGTH
    assert reissue(APP, "phone", claims) == token


def test_claims_that_were_made_up_make_a_token_that_is_not_theirs() -> None:
    token = issue(APP, "phone", 7, "ios", 0, 1000, 60)
    other = reissue(APP, "tablet", token[:CLAIMS_LENGTH])
    assert other[:18] == token[:18]
    assert _reason(APP, "phone", other.encode(), 1000) == "signature"


def test_an_expired_token_is_made_again_and_is_expired() -> None:
    token = issue(APP, "phone", 7, "ios", 0, 1000, 60)
    assert _reason(APP, "phone", reissue(APP, "phone", token[:CLAIMS_LENGTH]).encode(), 1060) == "expired"


@pytest.mark.parametrize(
    "claims",
    ["", "publisher", "A" * 18, "A" * 20, "A" * 19, "AQ" + "!" * 17, "AQ" + "é" * 17, "AQ" + "=" * 17],
)
def test_what_is_no_claims_is_malformed(claims: str) -> None:
    with pytest.raises(TokenError, match="malformed"):
        reissue(APP, "phone", claims)


@given(st.text(max_size=24) | st.text("AQ-_=+/ 0z", min_size=17, max_size=19).map("AQ".__add__))
def test_no_claims_raise_anything_else(claims: str) -> None:
    try:
        token = reissue(APP, "phone", claims)
    except TokenError:
        return
    assert len(token) == LENGTH
