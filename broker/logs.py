"""Logs: one line per event, as text or JSON, on stderr.

An event is a few fixed words and named values: `log_event(log, logging.INFO, "device connected", app=key)`.
Values may come from a peer: they are cut at `VALUE_LIMIT` and escaped, so that none can start a line.

A node logs each connect and disconnect, tens of thousands a second in a reconnect storm, on the event loop. So
an event goes to the stream without a LogRecord, and lines are written in blocks: `FLUSH_AFTER` late at most
where an event loop runs, at once without one and from WARNING on. (Per event: 25 us with a record and a write
each, 5 us so; 2026-11-21.)
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Final, Literal, TextIO

import orjson

VALUE_LIMIT: Final = 300  # characters; a peer could send a client id of 64 KB with every CONNECT
SECRETS: Final = frozenset(
    ("admin_key", "device_key", "master_secret", "password", "payload", "secret", "signing_key", "token")
)

PIPE_BLOCK: Final = 4096  # bytes that a pipe takes from one process at a time (PIPE_BUF)

FLUSH_AFTER: Final = 0.1  # seconds: what a crash may cost of the log

_PLAIN: Final = re.compile(r"[!#-<>-\[\]-~]+")  # needs no quotes: printable ASCII but for space " = and \
_PLAIN_PAIRS: Final = re.compile(rf"\w+={_PLAIN.pattern}(?: \w+={_PLAIN.pattern})*")

LINE_ENDS: Final = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}
"""JSON allows these in a string; some readers split lines at them."""


class EventStream(logging.Handler):
    """Where all lines of the process go."""

    def __init__(self, form: Form, stream: TextIO, node: str = "") -> None:
        """`node`: the stream has lines of several processes, and this is the name of ours."""
        super().__init__()
        self._form = form
        self._node = node
        self._stream = stream
        self._lines: list[str] = []
        self._waiting = False  # a flush is on its way

    def emit(self, record: logging.LogRecord) -> None:
        """From the logging module: libraries, and whatever has a traceback."""
        values = {"traceback": self._traceback(record)} if record.exc_info else {}
        self.write(record.created, record.levelno, record.name, record.getMessage(), values)

    def _traceback(self, record: logging.LogRecord) -> Traceback:
        return Traceback(logging.Formatter().formatException(record.exc_info))  # type: ignore[arg-type]

    def write(self, created: float, level: int, name: str, event: str, values: Mapping[str, object]) -> None:
        if self._node and "node" not in values:
            values = {"node": self._node, **values}
        self._lines.append(self._form(created, level, name, event, values))
        if level >= logging.WARNING or not self._flush_later():
            self.flush()

    def _flush_later(self) -> bool:
        if not self._waiting:
            try:
                asyncio.get_running_loop().call_later(FLUSH_AFTER, self.flush)
            except RuntimeError:  # no loop in this thread: a command, or one of the store's threads
                return False
            self._waiting = True
        return True

    def flush(self) -> None:
        self._waiting = False
        lines, self._lines = self._lines, []
        for block in _blocks(lines) if self._node else ["".join(lines)] if lines else []:
            self._stream.write(block)
            self._stream.flush()


def _blocks(lines: list[str]) -> Iterator[str]:
    """Of whole lines, small enough that a pipe takes each at once: another process cannot write into one."""
    block, room = "", PIPE_BLOCK
    for line in lines:
        size = len(line.encode("utf-8", "surrogateescape"))
        if block and size > room:
            yield block
            block, room = "", PIPE_BLOCK
        block, room = block + line, room - size
    if block:
        yield block


class Traceback(str):
    """Several lines, shown indented in text."""

    __slots__ = ()


Form = Callable[[float, int, str, str, Mapping[str, object]], str]


def log_event(logger: logging.Logger, level: int, event: str, **values: object) -> None:
    """Log one event. Names in SECRETS are shown as (hidden)."""
    if not logger.isEnabledFor(level):
        return
    for handler in logging.root.handlers:
        if isinstance(handler, EventStream):
            handler.write(time.time(), level, logger.name, event, values)
            return
    # `set_up_logs` was not called: a test, or a program that sets up logging in its own way
    logger.log(level, "%s %s", event, {name: _shown(name, value) for name, value in values.items()})


def set_up_logs(
    form: Literal["text", "json"], level: str, stream: TextIO = sys.stderr, *, node: str = ""
) -> None:
    """Send all logs of this process to `stream`. Called once, by `serve`. `node`: of several that share the
    stream."""
    lines = EventStream(as_json if form == "json" else as_text, stream, node)
    logging.basicConfig(level=level.upper(), handlers=[lines], force=True)


def as_text(created: float, level: int, name: str, event: str, values: Mapping[str, object]) -> str:
    """`2026-01-31T12:00:00.000Z INFO gateway.node device connected app=…`; tracebacks are indented."""
    told = _told if len(event) <= VALUE_LIMIT else _told.__wrapped__  # a long one is not kept
    head = f"{_time(created)} {told(level, name, event)}"
    pairs = " ".join([f"{key}={value!s}" for key, value in values.items()])
    if (
        len(pairs) <= VALUE_LIMIT
        and pairs.count("=") == len(values)  # none in a value
        and _PLAIN_PAIRS.fullmatch(pairs)
        and SECRETS.isdisjoint(values)
    ):
        return f"{head} {pairs}\n"  # nearly all: the rest would do nothing to it
    words = [head]
    traceback = ""
    for key, value in values.items():
        if isinstance(value, Traceback):
            traceback = "".join(f"    | {escape(part)}\n" for part in value.splitlines())
        else:
            words.append(f"{key}={_quoted(_shown(key, value))}")
    return " ".join(words) + "\n" + traceback


def as_json(created: float, level: int, name: str, event: str, values: Mapping[str, object]) -> str:
    """An object per line: time, level, logger, event, then the event's values; traceback if there is one."""
    line: dict[str, object] = {
        "time": _time(created),
        "level": logging.getLevelName(level).lower(),
        "logger": name,
        "event": _encodable(event),
    }
    for key, value in values.items():
        line[key] = _encodable(value) if isinstance(value, Traceback) else _shown(key, value)
    return orjson.dumps(line).decode().translate(LINE_ENDS) + "\n"


def escape(text: str) -> str:
    """`text` with control and other unprintable characters as \\u escapes."""
    return (
        text if text.isprintable() else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)
    )


def _quoted(value: object) -> str:
    text = str(value)
    if _PLAIN.fullmatch(text):
        return text
    plain = text.isprintable() and text and not any(c in ' "=\\' for c in text)
    return text if plain else '"' + escape(text.replace("\\", "\\\\").replace('"', '\\"')) + '"'


def _shown(name: str, value: object) -> object:
    return "(hidden)" if name in SECRETS else _limited(value)


def _limited(value: object) -> object:
    """Small numbers as they are; all else as text of bounded length."""
    if type(value) is int and -(2**53) < value < 2**53:
        return value
    if isinstance(value, bool | float):
        return value
    text = str(value)
    if text.isascii() and len(text) <= VALUE_LIMIT:
        return text
    return _encodable(text if len(text) <= VALUE_LIMIT else text[:VALUE_LIMIT] + "…")


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()  # lone surrogates


def _time(created: float) -> str:
    second = int(created)
    return f"{_second(second)}.{int((created - second) * 1000):03d}Z"


@functools.lru_cache(maxsize=256)
def _told(level: int, name: str, event: str) -> str:
    return f"{logging.getLevelName(level)} {name} {escape(event)}"


@functools.lru_cache(maxsize=4)
def _second(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")
