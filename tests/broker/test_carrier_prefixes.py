"""The longest prefix, against a search through all of them."""

from __future__ import annotations

import random
import tracemalloc
from array import array
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.carriers.prefixes import IPV4, Prefixes, pack, read_prefix

NESTED = {
    "10.0.0.0/8": "outer",
    "10.64.0.0/10": "inner",
    "10.64.0.0/16": "innermost",
    "10.64.7.9": "host",
    "10.127.255.0/24": "last of inner",
    "2001:db8::/32": "six",
    "2001:db8:0:1::/64": "six within",
    "255.255.255.255": "end",
    "0.0.0.0": "beginning",
}


@pytest.mark.parametrize(
    ("address", "owner"),
    [
        ("10.0.0.0", "outer"),
        ("9.255.255.255", None),
        ("10.63.255.255", "outer"),
        ("10.64.0.0", "innermost"),
        ("10.64.7.8", "innermost"),
        ("10.64.7.9", "host"),
        ("10.64.7.10", "innermost"),
        ("10.65.0.0", "inner"),
        ("10.127.254.255", "inner"),
        ("10.127.255.255", "last of inner"),
        ("10.128.0.0", "outer"),
        ("10.255.255.255", "outer"),
        ("11.0.0.0", None),
        ("0.0.0.0", "beginning"),
        ("0.0.0.1", None),
        ("255.255.255.254", None),
        ("255.255.255.255", "end"),
        ("::ffff:10.64.7.9", "host"),
        ("::a40:709", None),
        ("2001:db8::1", "six"),
        ("2001:db8:0:1:ffff::", "six within"),
        ("2001:db8:0:2::", "six"),
        ("2001:db9::", None),
        ("", None),
        ("phone", None),
        ("10.0.0.256", None),
        ("10.0.0.0/8", None),
        ("fe80::1%eth0", None),
        ("10.0.0.1\0", None),
    ],
)
def test_the_innermost_prefix_has_an_address(address: str, owner: str | None) -> None:
    prefixes = Prefixes((read_prefix(text), name) for text, name in NESTED.items())
    assert prefixes.find(address) == owner


def test_of_no_prefixes_nobody_has_any_address() -> None:
    assert Prefixes[str]([]).find("10.0.0.1") is None
    assert Prefixes([(read_prefix("10.0.0.0/8"), "four")]).find("2001:db8::1") is None


def test_all_addresses_are_a_prefix_too() -> None:
    prefixes = Prefixes([(read_prefix("0.0.0.0/0"), "four"), (read_prefix("::/0"), "six")])
    found = [prefixes.find(text) for text in ("0.0.0.0", "255.255.255.255", "::", f"{'ffff:' * 7}ffff")]
    assert found == ["four", "four", "six", "six"]


def test_neighbours_of_one_owner_are_one_range() -> None:
    one, other = "one", "other"
    owned = [("10.0.0.0/9", one), ("10.128.0.0/9", one), ("10.1.0.0/16", one), ("11.0.0.0/8", other)]
    assert len(Prefixes((read_prefix(text), name) for text, name in owned)) == 3  # of one, other, nobody


@pytest.mark.parametrize(
    "text",
    [
        *("", "/", "10.0.0.0/", "10.0.0.0/33", "10.0.0.0/-1", "10.0.0.0/+8", "10.0.0.0/8 ", "10.0.0/8"),
        *(
            "10.0.0.1/8",
            "2001:db8::1/32",
            "2001:db8::/129",
            "::ffff:10.0.0.0/8",
            "phone",
            "10.0.0.0/٨",
            "fe80::%e/64",
        ),
    ],
)
def test_what_is_no_network_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be a network such as 192\.0\.2\.0/24"):
        read_prefix(text)


@pytest.mark.parametrize(
    "text", ["10.0.0.0/8", "0.0.0.0/0", "192.0.2.7/32", "2001:db8::/32", "::/0", "::1/128"]
)
def test_a_prefix_reads_as_it_is_written(text: str) -> None:
    assert str(read_prefix(text)) == text


def test_ipv4_written_as_ipv6_is_ipv4() -> None:
    assert read_prefix("::ffff:10.0.0.0/104") == read_prefix("10.0.0.0/8")
    assert read_prefix("::ffff:10.0.0.1") == read_prefix("10.0.0.1/32")
    assert pack("::ffff:10.0.0.1") == pack("10.0.0.1") == bytes([10, 0, 0, 1])


# Few bits make prefixes that meet.
FOUR = st.tuples(st.integers(0, 255), st.integers(24, 32)).map(
    lambda drawn: IPv4Network((0x0A000000 | drawn[0], drawn[1]), strict=False)
)
SIX = st.tuples(st.integers(0, 255), st.integers(120, 128)).map(
    lambda drawn: IPv6Network((0x20010DB8 << 96 | drawn[0], drawn[1]), strict=False)
)


@given(st.dictionaries(st.one_of(FOUR, SIX), st.sampled_from("abc")))
def test_every_address_is_whose_a_search_through_all_says(
    owners: dict[IPv4Network | IPv6Network, str],
) -> None:
    prefixes = Prefixes((read_prefix(str(network)), owner) for network, owner in owners.items())
    for base in ("10.0.0.0", "2001:db8::"):
        for number in range(-1, 257):
            address = ip_address(base) + number
            around = [network for network in owners if address in network]
            innermost = max(around, key=lambda network: network.prefixlen, default=None)
            expected = None if innermost is None else owners[innermost]
            assert prefixes.find(str(address)) == expected, address


@given(st.one_of(FOUR, SIX))
def test_a_prefix_holds_what_its_network_holds(network: IPv4Network | IPv6Network) -> None:
    prefix = read_prefix(str(network))
    assert str(prefix) == str(network)
    for address in (network[0], network[-1]):
        assert address.packed in prefix
    assert (network.network_address - 1).packed not in prefix
    assert (network.broadcast_address + 1).packed not in prefix


class _Counted(array):  # type: ignore[type-arg]
    """It counts how often it is looked at."""

    reads = 0

    def __getitem__(self, at: Any) -> Any:
        _Counted.reads += 1
        return super().__getitem__(at)


def test_a_hundred_thousand_prefixes_are_found_in_few_steps_and_take_little_memory() -> None:
    chance = random.Random(6)
    owners = [f"carrier-{number}" for number in range(12)]
    networks = {
        ip_network((chance.getrandbits(32), chance.randint(12, 24)), strict=False): chance.choice(owners)
        for _ in range(100_000)
    }
    owned = [(read_prefix(str(network)), owner) for network, owner in networks.items()]
    tracemalloc.start()
    prefixes = Prefixes(owned)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(prefixes) > 50_000
    assert size < 3_000_000
    table = prefixes._tables[IPV4]
    table._highs, table._lows = _Counted("H", table._highs), _Counted("H", table._lows)
    for _ in range(1000):
        _Counted.reads = 0
        prefixes.find(str(ip_address(chance.getrandbits(32))))
        assert 0 < _Counted.reads <= 3 * len(prefixes).bit_length(), "three binary searches"
