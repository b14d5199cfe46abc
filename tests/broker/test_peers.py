"""Where a call comes from, with and without proxies."""

from __future__ import annotations

import tracemalloc
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.api.peers import Peers
from broker.limits import Limits
from broker.tenants.networks import CACHED_LISTS, is_within, read_network

ADDRESSES: list[tuple[tuple[str, ...], str, list[str], str]] = [
    # trusted, peer, X-Forwarded-For, caller
    ((), "192.0.2.1", ["198.51.100.1"], "192.0.2.1"),
    (("10.0.0.0/8",), "192.0.2.1", ["198.51.100.1"], "192.0.2.1"),
    (("10.0.0.0/8",), "10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
    (("10.0.0.0/8",), "10.0.0.1", ["1.1.1.1, 198.51.100.1"], "198.51.100.1"),
    (("10.0.0.0/8",), "10.0.0.1", ["1.1.1.1, 198.51.100.1, 10.0.0.2"], "198.51.100.1"),
    (("10.0.0.0/8",), "10.0.0.1", ["1.1.1.1, 198.51.100.1", "10.0.0.2"], "198.51.100.1"),
    (("10.0.0.0/8",), "10.0.0.1", ["10.0.0.3,10.0.0.2"], "10.0.0.3"),
    (("10.0.0.0/8",), "10.0.0.1", [], "10.0.0.1"),
    (("10.0.0.0/8",), "10.0.0.1", [""], "10.0.0.1"),
    (("10.0.0.0/8",), "10.0.0.1", ["198.51.100.1, unknown"], "10.0.0.1"),
    (("10.0.0.0/8",), "10.0.0.1", ["198.51.100.1:4711"], "198.51.100.1"),
    (("10.0.0.0/8",), "10.0.0.1", ["[2001:db8::1]:4711"], "2001:db8::1"),
    (("10.0.0.0/8",), "10.0.0.1", ["2001:db8::1"], "2001:db8::1"),
    (("10.0.0.0/8",), "::ffff:10.0.0.1", ["::ffff:198.51.100.1"], "198.51.100.1"),
    (("::1/128",), "::1", ["198.51.100.1"], "198.51.100.1"),
]


@pytest.mark.parametrize(("trusted", "peer", "said", "caller"), ADDRESSES)
def test_the_caller_is_the_first_that_is_not_trusted(
    trusted: tuple[str, ...], peer: str, said: list[str], caller: str
) -> None:
    assert Peers(trusted).caller(peer, said) == caller


SECURE: list[tuple[str, list[str], bool]] = [
    # peer, X-Forwarded-Proto, secure
    ("192.0.2.1", ["https"], False),
    ("10.0.0.1", ["https"], True),
    ("10.0.0.1", ["HTTPS"], True),
    ("10.0.0.1", ["http"], False),
    ("10.0.0.1", ["https, http"], False),
    ("10.0.0.1", ["https", "http"], False),
    ("10.0.0.1", ["http, https"], True),
    ("10.0.0.1", [], False),
]


@pytest.mark.parametrize(("peer", "said", "secure"), SECURE)
def test_only_a_trusted_proxy_says_that_it_was_tls(peer: str, said: list[str], secure: bool) -> None:
    assert Peers(("10.0.0.0/8",)).was_secure(peer, said) is secure
    assert not Peers().was_secure(peer, said)


def test_networks_are_read() -> None:
    assert [read_network(text) for text in ("10.0.0.0/8", " 192.0.2.1", "::1")] == [
        "10.0.0.0/8",
        "192.0.2.1/32",
        "::1/128",
    ]
    assert [read_network(text) for text in ("::ffff:192.0.2.7", "::ffff:10.0.0.0/104")] == [
        "192.0.2.7/32",
        "10.0.0.0/8",
    ]
    assert read_network("::/0") == "::/0"
    for text in ("", "10.0.0.1/8", "10/8/8", "x", "10.0.0.0/33"):
        with pytest.raises(ValueError):
            read_network(text)
    assert not is_within("unknown", ("0.0.0.0/0", "::/0"))
    assert is_within("::ffff:10.1.2.3", ("10.0.0.0/8",))


NETWORKS = st.lists(
    st.one_of(
        st.tuples(st.integers(0, 2**8 - 1), st.integers(24, 32)).map(
            lambda pair: str(IPv4Network(pair, strict=False))
        ),
        st.tuples(st.integers(0, 2**8 - 1), st.integers(120, 128)).map(
            lambda pair: str(IPv6Network(pair, strict=False))
        ),
    ),
    max_size=8,
)


@given(NETWORKS, st.one_of(st.integers(0, 2**9).map(IPv4Address), st.integers(0, 2**9).map(IPv6Address)))
def test_an_address_is_within_a_list_if_it_is_in_one_of_its_networks(
    networks: list[str], address: IPv4Address | IPv6Address
) -> None:
    assert is_within(str(address), networks) == any(address in ip_network(network) for network in networks)


def test_a_list_that_was_used_once_takes_little_memory() -> None:
    """A key with such a list may be made, used and deleted again and again."""
    lists = [[f"2001:db8:{i:x}:{n:x}::/64" for n in range(0, 2000, 2)] for i in range(5)]
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        assert not any(is_within("203.0.113.1", networks) for networks in lists)
        each = (tracemalloc.get_traced_memory()[0] - before) / len(lists)
    finally:
        tracemalloc.stop()
    assert each * CACHED_LISTS < 50 << 20


# Over HTTP


async def test_https_only_refuses_what_came_without(start: Any) -> None:
    service = await start(peers=Peers(("127.0.0.0/8",), https_only=True))
    for method, path in (("GET", "/v3/push/cid"), ("GET", "/v3/tags"), ("GET", "/nowhere")):
        for headers in ({}, {"X-Forwarded-Proto": "http"}):
            answer = await service.call(method, path, headers=headers)
            assert (answer.status, answer.code) == (404, 1020)
            assert "X-Rate-Limit-Quota" in answer.headers
    answer = await service.call("GET", "/v3/push/cid", headers={"X-Forwarded-Proto": "https"})
    assert answer.status == 200


async def test_the_white_list_knows_callers_behind_a_proxy(start: Any) -> None:
    service = await start(peers=Peers(("127.0.0.0/8",)), limits=Limits())
    answer = await service.call(
        "PUT",
        "/v1/settings",
        {"allow_from": ["192.0.2.0/24"]},
        headers={"X-Forwarded-For": "1.1.1.1, 192.0.2.9"},
    )
    assert answer.status == 200
    for said, status in (("192.0.2.1", 200), ("192.0.3.1", 403), ("192.0.2.1, 192.0.3.1", 403)):
        answer = await service.call("GET", "/v3/push/cid", headers={"X-Forwarded-For": said})
        assert answer.status == status, said
    assert (await service.call("GET", "/v3/push/cid")).code == 2004


async def test_without_trusted_proxies_the_header_says_nothing(service: Any) -> None:
    answer = await service.call("PUT", "/v1/settings", {"allow_from": ["127.0.0.1"]})
    assert answer.status == 200
    for said in ("127.0.0.1", "192.0.2.1"):
        assert (await service.call("GET", "/v1/settings", headers={"X-Forwarded-For": said})).status == 200
