"""SCRAM-SHA-256: the server side against a client of this file's own, made from RFC 5802 with hashlib and hmac."""

from __future__ import annotations

import hashlib
import hmac
import unicodedata
from base64 import b64decode, b64encode
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from broker.model import App
from broker.tenants.tokens import CLAIMS_LENGTH, issue
from gateway.scram import (
    DEVICE,
    ITERATIONS,
    MAX_MESSAGE,
    PUBLISHER,
    Credentials,
    KeyCache,
    Keys,
    ScramError,
    ScramExchange,
)

APP = App(1, "a" * 24, "name", "m" * 24, "d" * 24, b"k" * 32, open=False, created_at=0.0)
OPEN = replace(APP, open=True)
TOKEN = issue(APP, "phone", 7, "ios", 0, 1000, 60)
CLAIMS = TOKEN[:CLAIMS_LENGTH]
NONCE = "3rfcNHYJY1ZVvWVs7j"


class Client:
    """RFC 5802, 3. `header` is the gs2-header."""

    def __init__(self, user: str, password: str, nonce: str = "client-nonce", header: str = "n,,") -> None:
        self.password = password.encode()
        self.nonce = nonce
        self.header = header
        escaped = user.replace("=", "=3D").replace(",", "=2C")
        self.bare = f"n={escaped},r={nonce}"
        self.server_signature = b""

    def first(self) -> bytes:
        return f"{self.header}{self.bare}".encode()

    def final(self, server_first: bytes) -> bytes:
        fields = dict(field.split("=", 1) for field in server_first.decode().split(","))
        assert fields["r"].startswith(self.nonce)
        assert len(fields["r"]) > len(self.nonce)
        binding = b64encode(self.header.encode()).decode()
        return self.prove(server_first, fields, f"c={binding},r={fields['r']}")

    def prove(self, server_first: bytes, fields: dict[str, str], unproved: str) -> bytes:
        salted = hashlib.pbkdf2_hmac("sha256", self.password, b64decode(fields["s"]), int(fields["i"]))
        client_key = _hmac(salted, b"Client Key")
        signed = f"{self.bare},{server_first.decode()},{unproved}".encode()
        signature = _hmac(hashlib.sha256(client_key).digest(), signed)
        proof = bytes(a ^ b for a, b in zip(client_key, signature, strict=True))
        self.server_signature = _hmac(_hmac(salted, b"Server Key"), signed)
        return f"{unproved},p={b64encode(proof).decode()}".encode()

    def trusts(self, server_final: bytes) -> bool:
        return server_final == b"v=" + b64encode(self.server_signature)


def _hmac(key: bytes, message: bytes) -> bytes:
    return hmac.new(key, message, "sha256").digest()


def _exchange(app: App = APP, registration_id: str = "phone", cache: KeyCache | None = None) -> ScramExchange:
    return ScramExchange(Credentials(app, registration_id), NONCE, KeyCache() if cache is None else cache)


def _login(exchange: ScramExchange, client: Client) -> bool:
    return client.trusts(exchange.final(client.final(exchange.first(client.first()))))


def _refusal(exchange: ScramExchange, client: Client) -> str:
    with pytest.raises(ScramError) as caught:
        _login(exchange, client)
    return caught.value.reason


class Rfc7677(Credentials):
    def secret(self, user: str) -> str:
        return {"user": "pencil"}[user]

    def salt(self, user: str) -> bytes:
        return b64decode("W22ZaJ0SNY7soEsUEjb6gQ==")


def test_the_example_of_rfc_7677() -> None:
    exchange = ScramExchange(Rfc7677(APP, ""), "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0", KeyCache())
    assert exchange.first(b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO") == (
        b"r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"
    )
    final = b"c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p="
    assert exchange.final(final + b"dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=") == (
        b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="
    )
    assert exchange.identity == "user"


@pytest.mark.parametrize(
    ("app", "user", "password"),
    [
        (APP, PUBLISHER, APP.master_secret),
        (OPEN, PUBLISHER, APP.master_secret),
        (OPEN, DEVICE, APP.device_key),
        (APP, CLAIMS, TOKEN),
    ],
    ids=["publisher", "publisher of an open app", "device of an open app", "device with a token"],
)
def test_who_has_the_secret_comes_in_and_knows_the_server(app: App, user: str, password: str) -> None:
    exchange = _exchange(app)
    assert _login(exchange, Client(user, password))
    assert (exchange.identity, exchange.secret) == (user, password)


@pytest.mark.parametrize(
    ("app", "user", "password"),
    [
        (APP, PUBLISHER, "wrong"),
        (APP, PUBLISHER, APP.device_key),
        (APP, DEVICE, APP.device_key),
        (OPEN, DEVICE, APP.master_secret),
        (APP, CLAIMS, issue(APP, "tablet", 7, "ios", 0, 1000, 60)),
        (APP, CLAIMS, CLAIMS),
        (replace(APP, signing_key=b"x" * 32), CLAIMS, TOKEN),
        (APP, "A" * CLAIMS_LENGTH, TOKEN),
        (APP, "nobody", ""),
        (APP, "Publisher", APP.master_secret),
    ],
)
def test_a_wrong_password_and_a_name_that_nobody_has_are_refused_alike(
    app: App, user: str, password: str
) -> None:
    exchange = _exchange(app)
    assert _refusal(exchange, Client(user, password)) == "invalid-proof"


def test_a_token_is_good_for_its_own_registration_id_only() -> None:
    assert _refusal(_exchange(registration_id="tablet"), Client(CLAIMS, TOKEN)) == "invalid-proof"


@pytest.mark.parametrize("user", [PUBLISHER, DEVICE, CLAIMS, "nobody"])
def test_every_name_has_one_salt_in_one_app(user: str) -> None:
    def server_first(app: App) -> bytes:
        return _exchange(app).first(Client(user, "").first())

    once = server_first(APP)
    assert once == server_first(APP)
    assert once != server_first(replace(APP, signing_key=b"x" * 32))
    assert once.endswith(b",i=%d" % ITERATIONS)
    assert len(once) == len(_exchange().first(Client("x", "").first()))


def test_salts_differ_between_names() -> None:
    credentials = Credentials(APP, "phone")
    assert len({credentials.salt(user) for user in (PUBLISHER, DEVICE, CLAIMS, "nobody", "")}) == 5


def test_an_answer_to_another_nonce_is_refused() -> None:
    client = Client(PUBLISHER, APP.master_secret)
    heard = client.final(_exchange().first(client.first()))
    later = ScramExchange(Credentials(APP, "phone"), "another nonce".replace(" ", "-"), KeyCache())
    later.first(client.first())
    with pytest.raises(ScramError, match="other-error"):
        later.final(heard)


def test_a_proof_for_another_nonce_is_refused() -> None:
    client = Client(PUBLISHER, APP.master_secret)
    heard = client.final(_exchange().first(client.first()))
    later = ScramExchange(Credentials(APP, "phone"), "another-nonce", KeyCache())
    later.first(client.first())
    with pytest.raises(ScramError, match="invalid-proof"):
        later.final(heard.replace(NONCE.encode(), b"another-nonce"))


@pytest.mark.parametrize("header", ["n,,", "y,,"])
def test_a_client_that_binds_no_channel_comes_in(header: str) -> None:
    assert _login(_exchange(), Client(PUBLISHER, APP.master_secret, header=header))


@pytest.mark.parametrize("header", ["p=tls-unique,,", "p=tls-server-end-point,,"])
def test_a_client_that_wants_its_channel_bound_is_told_no(header: str) -> None:
    client = Client(PUBLISHER, APP.master_secret, header=header)
    assert _refusal(_exchange(), client) == "channel-binding-not-supported"


def test_a_gs2_header_that_was_changed_on_the_way_is_noticed() -> None:
    client = Client(PUBLISHER, APP.master_secret, header="y,,")
    exchange = _exchange()
    server_first = exchange.first(client.first().replace(b"y,,", b"n,,"))
    with pytest.raises(ScramError, match="channel-bindings-dont-match"):
        exchange.final(client.final(server_first))


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (b"", "other-error"),
        (b"n,,", "other-error"),
        (b"n,,n=publisher", "other-error"),
        (b"n,,n=,r=x", "other-error"),
        (b"n,,n=publisher,r=", "other-error"),
        (b"n,,r=x,n=publisher", "other-error"),
        (b"n,,n=publisher,r=x\x7f", "other-error"),
        (b"n,a=admin,n=publisher,r=x", "other-error"),
        (b"q,,n=publisher,r=x", "other-error"),
        (b"n,,m=ext,n=publisher,r=x", "extensions-not-supported"),
        (b"n,,n=pub=lisher,r=x", "invalid-username-encoding"),
        (b"n,,n=\x07,r=x", "invalid-username-encoding"),
        (b"n,,n=\xff,r=x", "invalid-encoding"),
        (b"p=tls-exporter,,n=publisher,r=x", "unsupported-channel-binding-type"),
        (b"n,,n=publisher,r=" + b"x" * MAX_MESSAGE, "other-error"),
    ],
)
def test_a_first_message_that_is_none_is_refused(message: bytes, reason: str) -> None:
    with pytest.raises(ScramError) as caught:
        _exchange().first(message)
    assert (caught.value.reason, caught.value.answer) == (reason, f"e={reason}".encode())


@pytest.mark.parametrize(
    ("final", "reason"),
    [
        (b"", "other-error"),
        (b"c=biws", "other-error"),
        (b"c=biws,r=client-nonce%b", "other-error"),
        (b"c=biws,r=client-nonce%b,p=", "other-error"),
        (b"c=biws,r=client-nonce%b,p=!", "invalid-encoding"),
        (b"c=biws,r=client-nonce%b,p=AAAA", "invalid-proof"),
        (b"c=!,r=client-nonce%b,p=AAAA", "invalid-encoding"),
        (b"c=biws,r=client-nonce,p=AAAA", "other-error"),
        (b"\xff", "invalid-encoding"),
        (b"c=biws,r=client-nonce%b,p=" + b"A" * MAX_MESSAGE, "other-error"),
    ],
)
def test_a_final_message_that_is_none_is_refused(final: bytes, reason: str) -> None:
    exchange = _exchange()
    exchange.first(Client(PUBLISHER, "").first())
    with pytest.raises(ScramError) as caught:
        exchange.final(final.replace(b"%b", NONCE.encode()))
    assert caught.value.reason == reason


FIELDS = st.sampled_from(
    [b"n,,", b"y,,", b"p=x,,", b"n=", b"r=", b"c=biws", b"p=", b"m=", b"=2C", b",", b"A"]
)
MESSAGES = st.binary(max_size=80) | st.lists(FIELDS | st.binary(max_size=4), max_size=12).map(b"".join)


@given(MESSAGES)
@example("n,,n=\u0221,r=x".encode())  # unassigned in Unicode 3.2
def test_no_first_message_raises_anything_else(message: bytes) -> None:
    try:
        answer = _exchange().first(message)
    except ScramError:
        return
    assert NONCE.encode() in answer


@settings(deadline=None, max_examples=50)
@given(MESSAGES | MESSAGES.map(lambda tail: b"c=biws,r=client-nonce" + NONCE.encode() + b"," + tail))
def test_no_final_message_raises_anything_else_or_lets_in(message: bytes) -> None:
    exchange = _exchange(cache=CACHE)
    exchange.first(Client(PUBLISHER, "").first())
    with pytest.raises(ScramError):
        exchange.final(message)


CACHE = KeyCache()


# User names are prepared with SASLprep (RFC 4013), so that what looks alike is alike.


@pytest.mark.parametrize(
    "user",
    ["publ\u00adisher", unicodedata.normalize("NFD", "publisher"), "\uff50ublisher", "\u200bpublisher"],
    ids=["soft hyphen", "decomposed", "full width", "zero width space"],
)
def test_a_user_name_is_prepared(user: str) -> None:
    exchange = _exchange()
    assert _login(exchange, Client(user, APP.master_secret))
    assert exchange.identity == PUBLISHER


@pytest.mark.parametrize("user", ["a,b", "a=b", "=2C", "name with spaces", "ünïcode", "日本"])
def test_odd_user_names_are_names_that_nobody_has(user: str) -> None:
    exchange = _exchange()
    assert _refusal(exchange, Client(user, "")) == "invalid-proof"
    assert exchange.identity == unicodedata.normalize("NFKC", user)


# Who derives the keys, and where they stay


def test_the_derivation_can_run_in_another_thread() -> None:
    exchange = _exchange()
    client = Client(CLAIMS, TOKEN)
    final = client.final(exchange.first(client.first()))
    derive = exchange.derivation()
    assert derive is not None
    with ThreadPoolExecutor(1) as pool:
        pool.submit(derive).result()
    assert exchange.derivation() is None
    assert client.trusts(exchange.final(final))


@pytest.mark.parametrize(
    ("app", "user", "kept"),
    [
        (APP, PUBLISHER, True),
        (OPEN, DEVICE, True),
        (APP, DEVICE, True),
        (APP, CLAIMS, False),
        (APP, "x", False),
    ],
)
def test_keys_of_shared_names_are_kept_whether_there_is_such_a_secret_or_not(
    app: App, user: str, kept: bool
) -> None:
    cache = KeyCache()
    _refusal(_exchange(app, cache=cache), Client(user, "wrong"))
    again = _exchange(app, cache=cache)
    again.first(Client(user, "").first())
    assert (again.derivation() is None) is kept


def test_a_new_master_secret_counts_at_once() -> None:
    cache = KeyCache()
    assert _login(_exchange(cache=cache), Client(PUBLISHER, APP.master_secret))
    rotated = replace(APP, master_secret="n" * 24)
    assert _refusal(_exchange(rotated, cache=cache), Client(PUBLISHER, APP.master_secret)) == "invalid-proof"
    assert _login(_exchange(rotated, cache=cache), Client(PUBLISHER, "n" * 24))


def test_the_cache_is_bounded_and_keeps_what_is_used() -> None:
    cache = KeyCache(limit=2)
    keys = Keys(b"stored", b"server")
    cache.put("a", b"salt", keys)
    cache.put("b", b"salt", keys)
    assert cache.get("a", b"salt") is keys
    cache.put("c", b"salt", keys)
    assert len(cache) == 2
    assert (cache.get("a", b"salt"), cache.get("b", b"salt")) == (keys, None)


def test_steps_out_of_turn_are_our_own_mistakes() -> None:
    exchange = _exchange()
    with pytest.raises(AssertionError):
        exchange.final(b"c=biws,r=x,p=AAAA")
    exchange.first(Client(PUBLISHER, "").first())
    with pytest.raises(AssertionError):
        exchange.first(Client(PUBLISHER, "").first())
