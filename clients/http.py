"""What HTTP callers share."""

from __future__ import annotations

from base64 import b64encode
from urllib.parse import urlsplit


def http_address(url: str) -> str:
    """The base address of an API, without a slash at its end. Raises ValueError if no request could go there."""
    wrong = ValueError(f"{url}: must be an http or https address, such as http://127.0.0.1:8080")
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # of a port, or of brackets
        raise wrong from None
    if not usable or parts.query or parts.fragment or any(map(str.isspace, url)):
        raise wrong
    return url.rstrip("/")


def login_headers(app_key: str, secret: str) -> dict[str, str]:
    """HTTP Basic (RFC 7617), and the type of all our bodies."""
    login = b64encode(f"{app_key}:{secret}".encode()).decode()
    return {"Authorization": f"Basic {login}", "Content-Type": "application/json"}
