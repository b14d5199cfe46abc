"""Where a call comes from: the socket's peer, or what proxies that are trusted say it is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from aiohttp.web_request import BaseRequest

from broker.tenants.networks import is_within, read_address

FORWARDED_FOR: Final = "X-Forwarded-For"
FORWARDED_PROTO: Final = "X-Forwarded-Proto"


class Peers:
    """`trusted`: networks of proxies whose X-Forwarded-… headers are believed; `https_only`: others are refused."""

    def __init__(self, trusted: Iterable[str] = (), *, https_only: bool = False) -> None:
        self._trusted = tuple(trusted)
        self.https_only = https_only

    def address(self, request: BaseRequest) -> str:
        """Of the caller, "" if unknown."""
        return self.caller(request.remote or "", request.headers.getall(FORWARDED_FOR, ()))

    def is_secure(self, request: BaseRequest) -> bool:
        """Over TLS, here or at a trusted proxy."""
        said = request.headers.getall(FORWARDED_PROTO, ())
        return request.secure or self.was_secure(request.remote or "", said)

    def caller(self, peer: str, said: Iterable[str]) -> str:
        """`said`: X-Forwarded-For, which counts from the right: each trusted address vouches for the one to its left,
        and the first that is not trusted is the caller. What stands further left anybody can have written."""
        address = _plain(peer)
        if not self._trusted:
            return address
        for part in reversed(",".join(said).split(",")):
            if not is_within(address, self._trusted):
                break
            before = _plain(_without_port(part.strip()))
            if read_address(before) is None:
                break
            address = before
        return address

    def was_secure(self, peer: str, said: Iterable[str]) -> bool:
        """`said`: X-Forwarded-Proto; the last is what the nearest proxy wrote."""
        last = ",".join(said).rpartition(",")[2].strip().lower()
        return last == "https" and is_within(peer, self._trusted)


def _plain(text: str) -> str:
    address = read_address(text)
    return text if address is None else str(address)


def _without_port(text: str) -> str:
    """`192.0.2.1:80` and `[2001:db8::1]:80`, as some proxies write it."""
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0] if text.count(":") == 1 else text
