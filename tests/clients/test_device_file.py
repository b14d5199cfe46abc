"""Files of devices are read in batches; a line that is wrong is named."""

from __future__ import annotations

import io
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.device_file import MAX_BATCH, MAX_LINE, BadLine, read_batches, read_value
from clients.publisher import BATCH, NewDevice


def read(text: str | bytes) -> list[NewDevice]:
    raw = text.encode() if isinstance(text, str) else text
    return [device for batch in read_batches(io.BytesIO(raw)) for device in batch.devices]


# CSV


def test_csv() -> None:
    text = """registration_id,tags,alias,attribute.app_version,attribute.age,mobile,platform,attribute.paying
a,"red, blue;green  big",ann,2.10,41,+49 30 1,ios,true
 b ,,,,,,,

"c",'x',,,"""
    assert read(text + ',,,"""41"""') == [
        NewDevice(
            "a",
            "ios",
            "ann",
            ["red", "blue", "green", "big"],
            "+49 30 1",
            {"app_version": "2.10", "age": 41, "paying": True},
        ),
        NewDevice("b"),
        NewDevice("c", tags=["'x'"], attributes={"paying": "41"}),
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("id,alias\na,b\n", "line 1: there is no column 'id'; there are registration_id, platform"),
        ("registration_id,attribute.\na,b\n", "line 1: there is no column 'attribute.'"),
        ("alias\na\n", "line 1: the header must name registration_id"),
        ("registration_id,alias,alias\na,b,c\n", "line 1: the header must name registration_id, and each column"),
        ("\nregistration_id,alias\na,b\nb\n", "line 4: 1 columns, and the header has 2"),
        ("registration_id,alias\na,b,c\n", "line 2: 3 columns, and the header has 2"),
        ("registration_id,alias\n,b\n", "line 2: registration_id is empty"),
        ('registration_id\n"a"b\n', "line 2: "),
        ("registration_id\na\nb\na\n", "line 4: registration_id: a is in line 2 already"),
        (b"registration_id\na\n\xff\n", "line 3: not UTF-8"),
        ("registration_id\n" + "x" * (MAX_LINE + 1), f"line 2: longer than {MAX_LINE} bytes"),
        ("registration_id\n" + '"' + "x\n" * 200_000, "field larger than field limit"),
    ],
)  # fmt: skip
def test_a_bad_line_of_csv_is_named(text: str | bytes, told: str) -> None:
    with pytest.raises(BadLine) as caught:
        read(text)
    assert told in str(caught.value)


def test_a_mark_at_the_start_and_any_line_end_are_no_part_of_it() -> None:
    assert read(b"\xef\xbb\xbfregistration_id,alias\r\na,b\r\n") == [NewDevice("a", alias="b")]
    assert read(b'\xef\xbb\xbf{"registration_id": "a"}\r\n') == read(b'{"registration_id": "a"}')


# JSON lines


def test_json_lines() -> None:
    rows: list[dict[str, Any]] = [
        {"registration_id": "a", "platform": "ios", "alias": "ann", "tags": ["red"], "mobile": "1"},
        {"registration_id": "b", "attributes": {"age": 41, "paying": False, "app_version": "2.9"}},
    ]
    text = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    assert [json.loads(msgspec.json.encode(device)) for device in read(text)] == rows


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"registration_id": "a"}\n\nx', "line 3: JSON is malformed"),
        ('{"registration_id": "a"}\n[]', "line 2: Expected `object`"),
        ('{"registration_id": "a", "tag": ["x"]}', "line 1: Object contains unknown field `tag`"),
        ('{"alias": "a"}', "line 1: Object missing required field `registration_id`"),
        ('{"registration_id": "a"}\n{"registration_id": "a"}', "line 2: registration_id: a is in line 1 already"),
    ],
)  # fmt: skip
def test_a_bad_line_of_json_is_named(text: str, told: str) -> None:
    with pytest.raises(BadLine) as caught:
        read(text)
    assert str(caught.value).startswith(told)


# Batches


@pytest.mark.parametrize("text", ["", "\n\n", "registration_id\n", "registration_id\n\n\n"])
def test_nothing_is_no_batch(text: str) -> None:
    assert read(text) == []


@given(st.integers(1, 2 * BATCH + 1))
def test_a_batch_is_what_a_call_takes(count: int) -> None:
    raw = b"registration_id\n" + b"".join(b"d%d\n" % number for number in range(count))
    batches = list(read_batches(io.BytesIO(raw)))
    assert [len(batch.devices) for batch in batches[:-1]] == [BATCH] * ((count - 1) // BATCH)
    lines = [line for batch in batches for line in batch.lines]
    assert lines == list(range(2, count + 2))
    assert [device.registration_id for batch in batches for device in batch.devices] == [
        f"d{line - 2}" for line in lines
    ]
    assert batches[-1].read == len(raw)


def test_big_devices_make_small_batches() -> None:
    tags = " ".join(f"{number:040}" for number in range(1000))
    raw = "registration_id,tags\n" + "".join(f"d{number},{tags}\n" for number in range(300))
    batches = list(read_batches(io.BytesIO(raw.encode())))
    assert sum(len(batch.devices) for batch in batches) == 300
    assert len(batches) > 1
    assert all(len(msgspec.json.encode(batch.devices)) <= MAX_BATCH + BATCH for batch in batches)


def test_a_line_is_read_when_its_batch_is_asked_for() -> None:
    raw = b"registration_id\n" + b"".join(b"d%d\n" % number for number in range(BATCH)) + b"d\nd,x\n"
    batches = read_batches(io.BytesIO(raw))
    assert len(next(batches).devices) == BATCH
    with pytest.raises(BadLine, match=f"line {BATCH + 3}: "):
        next(batches)


# Values of attributes


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1), ("1.5", 1.5), ("-1e3", -1000.0), ("true", True), ("false", False), ("Ulm", "Ulm"), ('"2.9"', "2.9"),
        ("2.9.1", "2.9.1"), ("007", "007"), ("null", "null"), ("[1]", "[1]"), ("{}", "{}"), ("NaN", "NaN"),
        ('"', '"'),
    ],
)  # fmt: skip
def test_a_value_is_a_number_or_true_or_false_or_text(text: str, value: object) -> None:
    found = read_value("x", text)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("name", ["app_version", "carrier", "language", "region"])
def test_some_are_always_text(name: str) -> None:
    assert [read_value(name, text) for text in ("2.9", "true", "de")] == ["2.9", "true", "de"]
