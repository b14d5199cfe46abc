"""Lines of several processes in one stream."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest

from broker.logs import PIPE_BLOCK, EventStream, as_text, log_event


class Pipe(io.StringIO):
    """Notes what came in one write."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[str] = []

    def write(self, text: str) -> int:
        self.blocks.append(text)
        return len(text)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    kept, pipe = logging.root.handlers, Pipe()
    logging.root.handlers = [EventStream(as_text, pipe, "host-3")]
    yield pipe
    logging.root.handlers = kept


def test_each_line_says_whose_it_is_once(pipe: Pipe) -> None:
    log = logging.getLogger("test")
    log_event(log, logging.WARNING, "full", connections=7)
    log_event(log, logging.WARNING, "joined", node="another")
    log.warning("plain")
    assert [block.split(" test ")[1] for block in pipe.blocks] == [
        "full node=host-3 connections=7\n",
        "joined node=another\n",
        "plain node=host-3\n",
    ]


async def test_no_write_is_more_than_a_pipe_takes_at_once_and_none_cuts_a_line(pipe: Pipe) -> None:
    log = logging.getLogger("test.many")
    log.setLevel(logging.INFO)
    for n in range(200):
        log_event(log, logging.INFO, "met", name="ü" * (n % 90), number=n)
    log_event(log, logging.WARNING, "flushed")
    assert len(pipe.blocks) > 3
    assert all(block.endswith("\n") and len(block.encode()) <= PIPE_BLOCK for block in pipe.blocks)
    assert len("".join(pipe.blocks).splitlines()) == 201
