"""The base address of an API, as people give it."""

from __future__ import annotations

from pathlib import Path

import pytest

from clients.device import Device
from clients.http import http_address
from clients.publisher import GroupPublisher, Publisher

WRONG = [
    "", "/", "127.0.0.1:8080", "localhost", "ftp://x", "htp:/foo", "http:/foo", "http://", "http:///x", "http://:80",
    "http://x:port", "http://x:70000", "http://x:0", "http://[::1", "http://x/?a=b", "http://x#y", "http://no x",
    " http://x", "http://x\n",
]  # fmt: skip


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("https://push.example.com/", "https://push.example.com"),
        ("HTTP://x", "HTTP://x"),
        ("http://[::1]:8080", "http://[::1]:8080"),
        ("https://example.com/push//", "https://example.com/push"),
    ],
)
def test_addresses(url: str, base: str) -> None:
    assert http_address(url) == base


@pytest.mark.parametrize("url", WRONG)
def test_what_is_none_is_refused_before_anything_is_sent(url: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be an http or https address"):
        http_address(url)
    with pytest.raises(ValueError, match="must be an http or https address"):
        Publisher("app", "secret", url)
    with pytest.raises(ValueError, match="must be an http or https address"):
        GroupPublisher("group", "secret", url)
    with pytest.raises(ValueError, match="must be an http or https address"):
        Device("app", on_push=print, device_key="key", api=url, journal=tmp_path / "journal")
