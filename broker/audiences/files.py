"""Uploaded lists of registration ids or aliases, one on each line, as audiences of pushes. A list is never in memory:
it is checked piece by piece on its way into the store, and resolved piece by piece on its way out."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import AsyncIterable, AsyncIterator, Callable
from typing import Final, Literal

import msgspec
from pyroaring import BitMap

from broker.errors import ApiError
from broker.limits import Limits, limits_of
from broker.model import App, Record, RecordChange, Term
from broker.store import PIECE, Conflict, Store, TooMany, every_record

Clock = Callable[[], float]
By = Literal["alias", "registration_id"]

KIND: Final = "file"
STEP: Final = 48 << 10  # bytes checked at once: about 2 ms of the event loop
MAX_LINE: Final = 4096  # with blanks around it
BOM: Final = b"\xef\xbb\xbf"
HOUR: Final = 3600
TRIES: Final = 10  # to remove a record that others change meanwhile

assert STEP + MAX_LINE <= PIECE


class StoredFile(msgspec.Struct, frozen=True):
    """A complete list."""

    file_id: str
    by: By
    name: str  # as it was uploaded
    lines: int
    size: int  # bytes as stored
    created_at: float
    expires_at: float


_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(StoredFile).decode


class Lines:
    """Checks the bytes of a list as they come. `feed` and `finish` return whole lines without blanks around them and
    without empty ones, each ending in a newline."""

    def __init__(self, limits: Limits, longest: int) -> None:
        self._limits = limits
        self._longest = longest  # bytes of one line
        self._rest = b""  # of a line whose end did not come yet
        self._seen = 0  # lines, empty ones included
        self._bytes = 0
        self.count = 0

    def feed(self, chunk: bytes) -> bytes:
        """`chunk`: at most STEP bytes. Raises ApiError that names the line."""
        self._bytes += len(chunk)
        if self._bytes > self._limits.max_file_size:
            raise ApiError(
                1005, f"the file is larger than {self._limits.max_file_size} bytes", http_status=413
            )
        head, newline, self._rest = (self._rest + chunk).rpartition(b"\n")
        lines = self._check(head) if newline else b""
        if len(self._rest) > MAX_LINE:
            raise self._too_long(self._seen)
        return lines

    def finish(self) -> bytes:
        rest, self._rest = self._rest, b""
        last = self._check(rest) if rest else b""
        if not self.count:
            raise ApiError(1003, "the file has no lines")
        return last

    def _check(self, head: bytes) -> bytes:
        if not self._seen:
            head = head.removeprefix(BOM)
        try:
            head.decode()
        except UnicodeDecodeError as error:
            line = self._seen + head.count(b"\n", 0, error.start) + 1
            raise ApiError(1003, f"line {line}: is not valid UTF-8") from None
        if b"\0" in head:  # UTF-16; and to SQLite's JSON a text ends there: another name
            line = self._seen + head.count(b"\n", 0, head.index(b"\0")) + 1
            raise ApiError(1003, f"line {line}: has a NUL character; the file must be UTF-8")
        if self._seen + head.count(b"\n") >= self._limits.max_file_lines:
            raise ApiError(1003, f"the file has more than {self._limits.max_file_lines} lines")
        lines = [line.strip() for line in head.split(b"\n")]
        if max(map(len, lines)) > self._longest:
            raise self._too_long(
                next(i for i, line in enumerate(lines, self._seen) if len(line) > self._longest)
            )
        self._seen += len(lines)
        kept = [line for line in lines if line]
        self.count += len(kept)
        return b"\n".join(kept) + b"\n" if kept else b""

    def _too_long(self, before: int) -> ApiError:
        return ApiError(1003, f"line {before + 1}: is longer than {self._longest} bytes")


class Files:
    """Every method raises ApiError; store failures pass as StoreError."""

    def __init__(self, store: Store, limits: Limits | None = None, clock: Clock = time.time) -> None:
        self._store = store
        self.limits = limits or Limits()
        self._clock = clock
        self._coming: Counter[int] = Counter()  # by app: uploads that are neither published nor discarded
        self.handlers = {KIND: self._expire}  # for the timekeeper

    async def write(self, app: App, by: By, name: str, chunks: AsyncIterable[bytes]) -> StoredFile:
        """Store a list as it comes. It does not exist before `publish`; else `discard` it."""
        limits = limits_of(self.limits, app)
        self._coming[app.app_id] += 1
        try:
            stored = await self._store.records.count(app.app_id, KIND)
            if stored >= limits.max_files:
                raise _too_many(limits)
            if stored + self._coming[app.app_id] > limits.max_files:
                raise ApiError(
                    1003, f"the app has {limits.max_files} files with those that are being uploaded"
                )
            return await self._write(app, by, name, chunks, limits)
        except BaseException:
            self._coming[app.app_id] -= 1
            raise

    async def _write(
        self, app: App, by: By, name: str, chunks: AsyncIterable[bytes], limits: Limits
    ) -> StoredFile:
        file_id, now = secrets.token_hex(12), self._clock()
        lines = Lines(limits, limits.name_size if by == "alias" else limits.registration_id_size)
        size = await self._store.files.write(app.app_id, file_id, _pieces(chunks, lines))
        return StoredFile(file_id, by, name, lines.count, size, now, now + limits.file_lifetime)

    async def publish(self, app: App, file: StoredFile, ttl: str | None = None) -> StoredFile:
        """From here on it exists. `ttl`: hours, as the caller sent them."""
        if ttl is not None:
            file = msgspec.structs.replace(file, expires_at=file.created_at + self._read_ttl(app, ttl))
        limits = limits_of(self.limits, app)
        change = RecordChange(
            app.app_id, KIND, file.file_id, _encode(file), 0, file.expires_at, at_most=limits.max_files
        )
        try:
            await self._store.records.save([change])
        except TooMany:
            raise _too_many(limits) from None
        self._coming[app.app_id] -= 1
        return file

    async def discard(self, app: App, file: StoredFile) -> None:
        """Of what was written and not published."""
        self._coming[app.app_id] -= 1
        await self._store.files.remove(app.app_id, file.file_id)

    async def list(self, app: App) -> list[StoredFile]:
        """The oldest first."""
        records = await every_record(self._store.records, app.app_id, KIND)
        now = self._clock()
        files = [file for file in map(_read, records) if now < file.expires_at]
        return sorted(files, key=lambda file: (file.created_at, file.file_id))

    async def find(self, app: App, file_id: str) -> StoredFile:
        file = await _find(self._store, app.app_id, file_id, self._clock())
        if file is None:
            raise ApiError(1003, f"there is no file {file_id:.64}", http_status=404)
        return file

    async def delete(self, app: App, file_id: str) -> None:
        await self.find(app, file_id)
        await self._remove(app.app_id, file_id)

    async def _expire(self, record: Record) -> None:
        await self._remove(record.app_id, record.key)

    async def _remove(self, app_id: int, file_id: str) -> None:
        """The record first: pieces without one are removed when the store is opened, too."""
        for _ in range(TRIES):
            record = await self._store.records.find(app_id, KIND, file_id)
            if record is None:
                break
            try:
                await self._store.records.save([RecordChange(app_id, KIND, file_id, None, record.version)])
                break
            except Conflict:
                continue
        await self._store.files.remove(app_id, file_id)

    def _read_ttl(self, app: App, ttl: str) -> int:
        most = limits_of(self.limits, app).file_lifetime // HOUR
        if not (ttl.isascii() and ttl.isdigit() and len(ttl) <= 6 and 1 <= int(ttl) <= most):
            raise ApiError(1003, f"ttl: must be 1 to {most} hours")
        return int(ttl) * HOUR


async def _pieces(chunks: AsyncIterable[bytes], lines: Lines) -> AsyncIterator[bytes]:
    async for chunk in chunks:
        for start in range(0, len(chunk), STEP):
            if piece := lines.feed(chunk[start : start + STEP]):
                yield piece
    if piece := lines.finish():
        yield piece


def _too_many(limits: Limits) -> ApiError:
    return ApiError(1003, f"the app has {limits.max_files} files already; delete one")


def _read(record: Record) -> StoredFile:
    return _decode(record.value)


async def _find(store: Store, app_id: int, file_id: str, now: float) -> StoredFile | None:
    record = await store.records.find(app_id, KIND, file_id)
    file = None if record is None else _read(record)
    return file if file is not None and now < file.expires_at else None


async def devices_of_file(store: Store, app_id: int, file_id: str, now: float) -> BitMap:
    """Those of the app's devices that the list names, found a piece at a time. Raises ApiError 1003 if there is no
    such file."""
    file = await _find(store, app_id, file_id, now)
    unknown = ApiError(1003, f"audience.file: there is no file {file_id:.64}")
    if file is None:
        raise unknown
    devnos, size = BitMap(), 0
    async for piece in store.files.read(app_id, file_id):
        size += len(piece)
        names = piece.decode().split("\n")
        if file.by == "alias":
            devnos |= await store.union_bitmap(app_id, Term.ALIAS, names)
        else:
            devnos |= await store.resolve_bitmap(app_id, names)
    if size != file.size:  # deleted meanwhile: part of it is not what the publisher meant
        raise unknown
    return devnos
