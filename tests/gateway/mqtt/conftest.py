from collections.abc import Callable

import pytest

from gateway.mqtt import MQTTError, Packet, decode

MAX = 1 << 20

ReadEveryWay = Callable[[bytes, int], Packet]
FailEveryWay = Callable[[bytes, int], MQTTError]


def _read_every_way(raw: bytes, version: int) -> Packet:
    """Whole, byte by byte, behind other bytes and before others; from bytes and from bytearray."""
    whole = decode(raw, 0, version, MAX)
    assert whole is not None
    packet, end = whole
    assert end == len(raw)
    for size in range(len(raw)):
        assert decode(raw[:size], 0, version, MAX) is None, f"complete after {size} bytes"
    assert decode(b"\xff\xff" + raw, 2, version, MAX) == (packet, len(raw) + 2)
    assert decode(raw + b"\xff\xff", 0, version, MAX) == (packet, len(raw))
    assert decode(bytearray(raw), 0, version, MAX) == (packet, len(raw))
    assert decode(raw, 0, version, len(raw)) == (packet, len(raw))
    return packet


def _fail_every_way(raw: bytes, version: int) -> MQTTError:
    """The same error however it arrives; nothing is decoded from a part of it."""
    with pytest.raises(MQTTError) as whole:
        decode(raw, 0, version, MAX)
    for size in range(len(raw)):
        assert _outcome(raw[:size], version) in (None, (type(whole.value), whole.value.reason))
    for variant, start in ((raw + b"\0\0", 0), (b"\0" + raw, 1), (bytearray(raw), 0)):
        with pytest.raises(type(whole.value)):
            decode(variant, start, version, MAX)
    return whole.value


def _outcome(raw: bytes, version: int) -> object:
    try:
        return decode(raw, 0, version, MAX)
    except MQTTError as error:
        return type(error), error.reason


@pytest.fixture(scope="session")
def read_every_way() -> ReadEveryWay:
    return _read_every_way


@pytest.fixture(scope="session")
def fail_every_way() -> FailEveryWay:
    return _fail_every_way
