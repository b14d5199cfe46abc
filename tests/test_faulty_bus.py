"""What the proxy of the failure suite takes for one value of RESP, and which of them it may lose."""

from __future__ import annotations

import pytest

from tests.faulty_bus import end_of, is_message

MESSAGE = b">3\r\n$8\r\nsmessage\r\n$8\r\n{node:5}\r\n$2\r\n\r\n\r\n"
VALUES = [
    b"+OK\r\n",
    b":12\r\n",
    b"_\r\n",
    b"$-1\r\n",
    b"$0\r\n\r\n",
    b"$4\r\n\r\n>3\r\n",
    b"*0\r\n",
    b"*-1\r\n",
    b"*2\r\n*1\r\n:1\r\n$1\r\nx\r\n",
    b"%1\r\n+key\r\n*2\r\n:1\r\n:2\r\n",
    b"|1\r\n+ttl\r\n:1\r\n+value\r\n",
    MESSAGE,
]


@pytest.mark.parametrize("value", VALUES)
def test_a_value_ends_where_the_next_begins_and_not_before(value: bytes) -> None:
    assert end_of(value) == len(value)
    assert end_of(b"xx" + value + b"+OK\r\n", 2) == 2 + len(value)
    assert [end_of(value[:end]) for end in range(len(value))] == [None] * len(value)


@pytest.mark.parametrize(
    "value",
    [*VALUES[:-1], b">3\r\n$10\r\nssubscribe\r\n$1\r\nc\r\n:1\r\n", b"$9\r\n$smessage\r\n", MESSAGE[:10]],
)
def test_only_messages_are_touched(value: bytes) -> None:
    assert is_message(MESSAGE)
    assert not is_message(value)
