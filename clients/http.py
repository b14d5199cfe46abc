"""What HTTP callers share."""

from __future__ import annotations

from base64 import b64encode


def login_headers(app_key: str, secret: str) -> dict[str, str]:
    """HTTP Basic (RFC 7617), and the type of all our bodies."""
    login = b64encode(f"{app_key}:{secret}".encode()).decode()
    return {"Authorization": f"Basic {login}", "Content-Type": "application/json"}
