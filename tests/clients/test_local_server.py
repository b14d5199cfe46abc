from __future__ import annotations

from pathlib import Path

import pytest

from clients.local_server import LocalServer, ServerFailed


def test_a_restart_keeps_addresses_and_app(tmp_path: Path) -> None:
    server = LocalServer(tmp_path)
    server.start()
    try:
        before = server.addresses, server.app, server.pid
        server.restart()
        assert (server.addresses, server.app) == before[:2]
        assert server.pid != before[2]
        assert server.running
        assert server.terminate() == 0
        assert not server.running
    finally:
        server.kill()


def test_apps_and_metrics_come_from_the_admin_listener(server: LocalServer) -> None:
    first, second = server.create_app("one"), server.create_app("one")
    assert first.app_key != second.app_key
    assert any(name.startswith("holdfast_") for name in server.metrics())


def test_a_server_that_cannot_start_says_why(server: LocalServer, tmp_path: Path) -> None:
    rival = LocalServer(server.data_dir.parent)
    with pytest.raises(ServerFailed, match="data"):
        rival.start()
    assert not rival.running
    with pytest.raises(ServerFailed, match="--no-such-flag"):
        LocalServer(tmp_path, "--no-such-flag").start()
