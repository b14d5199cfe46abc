"""Files of devices: CSV with a header, or JSON lines; read in batches, each what one call of the API takes."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import BinaryIO, Final

import msgspec
import orjson

from clients.publisher import BATCH, NewDevice
from clients.publishing.devices import AttributeValue

MAX_LINE: Final = 1 << 20  # bytes: a file of another kind may have no line ends, and would be read whole
MAX_BATCH: Final = 4 << 20  # bytes of devices in one call: half of what the API takes
COLUMNS: Final = ("registration_id", "platform", "alias", "tags", "mobile")
ATTRIBUTE: Final = "attribute."
TEXT_ATTRIBUTES: Final = frozenset({"app_version", "carrier", "language", "region"})  # never numbers
_BETWEEN_TAGS: Final = re.compile(r"[\s,;]+")


class BadLine(Exception):
    """Of a file; the text begins with its number, counted from 1."""

    def __init__(self, number: int, why: str) -> None:
        super().__init__(f"line {number}: {why}")


class _JsonLine(NewDevice, frozen=True, forbid_unknown_fields=True):
    """A key with a slip in it is not left out without a word."""


_read_json: Final = msgspec.json.Decoder(_JsonLine).decode
_encode: Final = msgspec.json.Encoder().encode


@dataclass(slots=True)
class Batch:
    """`lines`: where each device stands. `read`: bytes of the file up to here."""

    devices: list[NewDevice] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    size: int = 0
    read: int = 0


def read_batches(file: BinaryIO) -> Iterator[Batch]:
    """In the order of the file, each line read when its batch is asked for. A file that begins with `{` is JSON
    lines, any other CSV. Raises BadLine; nothing of the batch with that line was given out."""
    lines, batch = _Lines(file), Batch()
    seen: dict[str, int] = {}  # registration id -> line, of this batch: no call takes one twice
    for number, device in _read_devices(lines):
        size = len(_encode(device))
        if batch.devices and (len(batch.devices) == BATCH or batch.size + size > MAX_BATCH):
            yield batch
            batch, seen = Batch(), {}
        before = seen.setdefault(device.registration_id, number)
        if before != number:
            raise BadLine(number, f"registration_id: {device.registration_id} is in line {before} already")
        batch.devices.append(device)
        batch.lines.append(number)
        batch.size += size
        batch.read = lines.read
    if batch.devices:
        yield batch


class _Lines:
    """`number` of the newest line, and bytes `read` up to its end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.number = 0
        self.read = 0

    def __iter__(self) -> Iterator[str]:
        while raw := self._file.readline(MAX_LINE + 1):
            self.number += 1
            self.read += len(raw)
            if len(raw) > MAX_LINE:
                raise BadLine(self.number, f"longer than {MAX_LINE} bytes")
            try:
                yield raw.decode("utf-8-sig" if self.number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise BadLine(self.number, "not UTF-8") from None


def _read_devices(lines: _Lines) -> Iterator[tuple[int, NewDevice]]:
    texts = iter(lines)
    first = next((text for text in texts if text.strip()), "")
    read = _read_json_lines if first.lstrip().startswith("{") else _read_csv
    return read(lines, chain([first], texts))


def _read_json_lines(lines: _Lines, texts: Iterable[str]) -> Iterator[tuple[int, NewDevice]]:
    for text in texts:
        if not text.strip():
            continue
        try:
            yield lines.number, _read_json(text)
        except msgspec.DecodeError as error:
            raise BadLine(lines.number, str(error)) from None


def _read_csv(lines: _Lines, texts: Iterable[str]) -> Iterator[tuple[int, NewDevice]]:
    rows = csv.reader(texts, strict=True)
    header: list[str] = []
    try:
        for cells in rows:
            if not any(map(str.strip, cells)):
                continue
            if header:
                yield lines.number, _from_cells(header, cells, lines.number)
            else:
                header = _checked([cell.strip() for cell in cells], lines.number)
    except csv.Error as error:
        raise BadLine(lines.number, str(error)) from None


def _checked(header: list[str], number: int) -> list[str]:
    for name in header:
        if name not in COLUMNS and not (name.startswith(ATTRIBUTE) and name != ATTRIBUTE):
            allowed = f"{', '.join(COLUMNS)} and {ATTRIBUTE}NAME"
            raise BadLine(number, f"there is no column {name[:40]!r}; there are {allowed}")
    if "registration_id" not in header or len(set(header)) < len(header):
        raise BadLine(number, "the header must name registration_id, and each column once")
    return header


def _from_cells(header: Sequence[str], cells: Sequence[str], number: int) -> NewDevice:
    """An empty cell says nothing."""
    if len(cells) != len(header):
        raise BadLine(number, f"{len(cells)} columns, and the header has {len(header)}")
    given = {name: text for name, cell in zip(header, cells, strict=True) if (text := cell.strip())}
    if "registration_id" not in given:
        raise BadLine(number, "registration_id is empty")
    attributes = {
        name.removeprefix(ATTRIBUTE): read_value(name.removeprefix(ATTRIBUTE), text)
        for name, text in given.items()
        if name.startswith(ATTRIBUTE)
    }
    return NewDevice(
        given["registration_id"],
        given.get("platform"),
        given.get("alias"),
        [tag for tag in _BETWEEN_TAGS.split(given["tags"]) if tag] if "tags" in given else None,
        given.get("mobile"),
        attributes or None,
    )


def read_value(name: str, text: str) -> AttributeValue:
    """Of an attribute: a number, true or false where the text is one, else the text; in double quotes it is text in
    any case."""
    if name in TEXT_ATTRIBUTES:
        return text
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return text
    return value if isinstance(value, str | float | int) else text
