from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from clients.journal import NETWORKS_KEPT, TRIM_EVERY, Credentials, Journal, JournalError


def test_what_was_kept_is_there_after_reopening(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "journal"
    journal = Journal(path, 10)
    assert (journal.credentials(), journal.seen()) == (None, [])
    credentials = Credentials("app", "phone", "token", 5.0)
    journal.keep(Credentials("app", "phone", "old", 1.0))
    journal.keep(credentials)
    for msg_id in (3, 1, 2):
        journal.remember(msg_id)
    journal.close()
    journal = Journal(path, 10)
    assert (journal.credentials(), journal.seen()) == (credentials, [3, 1, 2])
    journal.close()
    assert path.stat().st_mode & 0o077 == 0


def test_only_the_newest_ids_are_kept(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", 5)
    for msg_id in range(2 * TRIM_EVERY):
        journal.remember(msg_id)
    assert journal.seen() == list(range(2 * TRIM_EVERY - 5, 2 * TRIM_EVERY))
    assert journal._db.execute("SELECT count(*) FROM handled").fetchone() == (5,)
    journal.close()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    first = Journal(tmp_path / "journal", 5)
    with pytest.raises(JournalError, match="another process has it open"):
        Journal(tmp_path / "journal", 5)
    first.close()


def test_what_is_no_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "journal").write_text("something else, and long enough to be looked at" * 100)
    with pytest.raises(JournalError, match="journal: file is not a database"):
        Journal(tmp_path / "journal", 5)


def test_writing_to_a_closed_journal_raises(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", 5)
    journal.close()
    with pytest.raises(JournalError):
        journal.remember(1)


def test_the_token_is_not_in_the_repr() -> None:
    assert "secret" not in repr(Credentials("app", "phone", "secret", 1.0))


def test_what_remember_returned_from_survives_kill_9(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from clients.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]), 10_000)\n"
        "for i in range(10_000): journal.remember(i); print(i, flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "journal")], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        told = [int(next(process.stdout)) for _ in range(50)]
        os.kill(process.pid, signal.SIGKILL)
        told += [int(line) for line in process.stdout]
    journal = Journal(tmp_path / "journal", 10_000)
    seen = journal.seen()
    journal.close()
    assert seen[: len(told)] == told
    assert len(seen) - len(told) <= 1


def test_networks_are_kept_and_the_last_one_is_last(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", 5)
    assert journal.networks() == {}
    journal.keep_network("home", {"addresses": {}})
    journal.keep_network("office", {"heartbeat": {"good": 270.0}})
    journal.keep_network("home", {"addresses": {"good": "tcp://a:1"}})
    journal.close()
    journal = Journal(tmp_path / "journal", 5)
    assert list(journal.networks().items()) == [
        ("office", {"heartbeat": {"good": 270.0}}),
        ("home", {"addresses": {"good": "tcp://a:1"}}),
    ]
    journal.close()


def test_only_the_newest_networks_are_kept(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", 5)
    for n in range(NETWORKS_KEPT + 3):
        journal.keep_network(f"hotel {n}", {})
    journal.keep_network("hotel 5", {})
    assert list(journal.networks()) == [
        *(f"hotel {n}" for n in range(3, NETWORKS_KEPT + 3) if n != 5),
        "hotel 5",
    ]
    journal.close()


def test_other_values_are_kept_by_name(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", 5)
    assert journal.kept("dispatch") is None
    journal.keep_value("dispatch", b"one")
    journal.keep_value("dispatch", b"two")
    assert journal.kept("dispatch") == b"two"
    journal.close()


def test_a_journal_of_a_version_before_is_opened(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "journal") as before:
        before.execute("CREATE TABLE handled (n INTEGER PRIMARY KEY, msg_id INTEGER NOT NULL) STRICT")
        before.execute("INSERT INTO handled VALUES (1, 7)")
    before.close()
    journal = Journal(tmp_path / "journal", 5)
    assert (journal.seen(), journal.networks(), journal.kept("dispatch")) == ([7], {}, None)
    journal.close()
