"""Uploaded lists of registration ids or aliases, one on each line: audiences of up to a million devices."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Final, Literal
from uuid import uuid4

import msgspec

from clients.publishing.calls import NO_ANSWER, Calls, PushError, quoted

PATH: Final = "/v3/files"
PIECE: Final = 256 << 10  # bytes read from a file at once

By = Literal["registration_id", "alias"]
Source = Path | Iterable[str] | AsyncIterable[str]
"""A file that has one name on each line, or the names."""
Progress = Callable[[int, int | None], None]
"""Called with the bytes that went out so far and, of a file, with how many there are."""


class UploadedFile(msgspec.Struct, frozen=True):
    """`type`: what its `lines` are; times are UTC, `2026-01-31 23:59:59`."""

    file_id: str
    type: By
    file_name: str
    lines: int
    create_time: str
    expire_time: str


class Files:
    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def upload(
        self,
        source: Source,
        by: By = "registration_id",
        *,
        name: str | None = None,
        ttl: int | None = None,
        progress: Progress | None = None,
    ) -> str:
        """Returns the id. The list is read on its way out and never whole in memory. `ttl`: hours until the server
        removes it, at most its own limit. Refused as a whole if one line is too long or not UTF-8. An upload whose
        answer was lost is not repeated. Raises OSError if there is no such file."""
        if name is None:
            name = source.name if isinstance(source, Path) else "list"
        form = _Form(source, name, ttl, progress, await asyncio.to_thread(_size, source))
        answer = await self._calls.call(
            "POST", f"{PATH}/{by}", form.write, safe=False, content_type=form.content_type
        )
        return answer.check().read(_Uploaded).file_id

    async def all(self) -> list[UploadedFile]:
        """The oldest first."""
        return (await self._calls.get(PATH, _Listed)).files

    async def get(self, file_id: str) -> UploadedFile:
        return await self._calls.get(f"{PATH}/{quoted(file_id)}", UploadedFile)

    async def delete(self, file_id: str) -> None:
        await self._calls.do("DELETE", f"{PATH}/{quoted(file_id)}")


class _Uploaded(msgspec.Struct, frozen=True):
    file_id: str


class _Listed(msgspec.Struct, frozen=True):
    files: list[UploadedFile]


class _Form:
    """multipart/form-data (RFC 7578) with the list as `filename`, written as it is read."""

    def __init__(
        self, source: Source, name: str, ttl: int | None, progress: Progress | None, total: int | None
    ) -> None:
        self._source = source
        self._progress = progress
        self._total = total
        self._read = False
        boundary = uuid4().hex
        self.content_type = f"multipart/form-data; boundary={boundary}"
        hours = "" if ttl is None else _part(boundary, 'name="ttl"') + f"{ttl}\r\n"
        title = name.encode("ascii", "replace").decode().replace('"', "_").replace("\\", "_")
        head = hours + _part(boundary, f'name="filename"; filename="{title}"', "text/plain; charset=utf-8")
        self._head, self._tail = head.encode(), f"\r\n--{boundary}--\r\n".encode()

    async def write(self) -> AsyncIterator[bytes]:
        """Once more for each attempt, if the source can be read again."""
        if self._read and self._source is _as_iterator(self._source):
            raise PushError(NO_ANSWER, NO_ANSWER, "the upload did not work, and its source is used up")
        self._read = True
        sent = 0
        yield self._head
        async for piece in _pieces(self._source):
            yield piece
            sent += len(piece)
            if self._progress is not None:
                self._progress(sent, self._total)
        yield self._tail


def _part(boundary: str, disposition: str, content_type: str | None = None) -> str:
    kind = f"Content-Type: {content_type}\r\n" if content_type else ""
    return f"--{boundary}\r\nContent-Disposition: form-data; {disposition}\r\n{kind}\r\n"


def _as_iterator(source: Source) -> object:
    if isinstance(source, Path):
        return None
    return aiter(source) if isinstance(source, AsyncIterable) else iter(source)


def _size(source: Source) -> int | None:
    return source.stat().st_size if isinstance(source, Path) else None


async def _pieces(source: Source) -> AsyncIterator[bytes]:
    if isinstance(source, Path):
        file = await asyncio.to_thread(source.open, "rb")
        with file:
            while piece := await asyncio.to_thread(file.read, PIECE):
                yield piece
        return
    lines: list[str] = []
    size = 0
    async for line in _each(source):
        lines.append(line)
        size += len(line) + 1
        if size >= PIECE:
            yield _join(lines)
            lines, size = [], 0
    if lines:
        yield _join(lines)


async def _each(names: Iterable[str] | AsyncIterable[str]) -> AsyncIterator[str]:
    if isinstance(names, AsyncIterable):
        async for name in names:
            yield name
    else:
        for name in names:
            yield name


def _join(lines: list[str]) -> bytes:
    return "\n".join([*lines, ""]).encode()
