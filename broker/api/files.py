"""/v3/files and /v3/push/file: upload a list of names, push to those it names.

The bytes of an upload are all there as soon as the caller is fast, and then nothing of aiohttp's waits for anything:
so every read is counted, whatever it is for, and gives the event loop a turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
import orjson
from aiohttp import BodyPartReader, StreamReader, hdrs, web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.multipart import MultipartReader

from broker.api.call import BODY, DONE, Call, Endpoint, too_slow
from broker.api.pushes import accepted_answer
from broker.audiences.files import STEP, By, Files, StoredFile
from broker.errors import PUSH, ApiError
from broker.limits import limits_of
from broker.pushing.pushes import Pushes
from broker.pushing.requests import decode
from broker.tenants.audit import printable

FIELD: Final = "filename"  # what SDKs call the field with the list
TTL_SIZE: Final = 16
MAX_FIELDS: Final = 16  # of one upload
MAX_HEADS: Final = (
    64 << 10
)  # bytes of one upload beside its list: boundaries, heads, other fields, what is before


BROKEN: Final = (
    ValueError,
    AssertionError,
    HttpProcessingError,
    web.RequestPayloadError,
    ConnectionError,
)
"""What aiohttp's reader of multipart bodies makes of a wrong one."""


class FileAudience(msgspec.Struct, frozen=True):
    file: Any = None


class FilePush(msgspec.Struct, frozen=True):
    """What a push by file must have; the rest is read with it as a push."""

    audience: FileAudience | str | None = None


_read_file_push: Final = msgspec.json.Decoder(FilePush).decode


def file_endpoints(files: Files, pushes: Pushes) -> list[Endpoint]:
    def upload(by: By) -> Endpoint:
        async def receive(call: Call) -> bytes:
            file = await _receive(files, call, by)
            return orjson.dumps({"file_id": file.file_id})

        # Its body is not read into memory.
        return Endpoint("POST", (f"/v3/files/{by}", f"/v3/push/files/{by}"), PUSH, receive, scope="file")

    async def list_files(call: Call) -> bytes:
        found = [_describe(file) for file in await files.list(call.app)]
        return orjson.dumps({"total_count": len(found), "files": found})

    async def get(call: Call) -> bytes:
        return orjson.dumps(_describe(await files.find(call.app, call.path("id"))))

    async def delete(call: Call) -> bytes:
        await files.delete(call.app, call.path("id"))
        return DONE

    async def push(call: Call) -> bytes:
        audience = decode(_read_file_push, call.raw, PUSH).audience
        if not isinstance(audience, FileAudience) or not audience.file:
            raise ApiError(1002, 'audience.file is required: {"file_id": …}')
        return accepted_answer(await pushes.push(call.app, call.raw))

    one = ("/v3/files/{id}", "/v3/push/files/{id}")
    return [
        upload("alias"),
        upload("registration_id"),
        Endpoint("GET", ("/v3/files", "/v3/push/files"), PUSH, list_files, scope="file"),
        Endpoint("GET", one, PUSH, get, scope="file"),
        Endpoint("DELETE", one, PUSH, delete, scope="file"),
        Endpoint("POST", ("/v3/push/file",), PUSH, push, BODY),
    ]


async def _receive(files: Files, call: Call, by: By) -> StoredFile:
    """Store the list while it comes; it exists once the whole body was right."""
    if not call.request.content_type.startswith("multipart/"):
        raise ApiError(1003, f"the body must be multipart/form-data, with the list in the field {FIELD}")
    if call.request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity":
        raise ApiError(1003, "the body must not be compressed")
    most = limits_of(files.limits, call.app).max_file_size + MAX_HEADS
    if (call.request.content_length or 0) > most:
        raise _too_large(most)
    file: StoredFile | None = None
    ttl: str | None = None
    try:
        async for part in _parts(
            call.request, Body(call.request.content, most, files.limits.request_timeout)
        ):
            if part.name == FIELD and file is None:
                file = await files.write(call.app, by, printable((part.filename or "")[:255]), _chunks(part))
            elif part.name == "ttl":
                ttl = (await _read_field(part)).decode("utf-8", "replace").strip() or None
        if file is None:
            raise ApiError(1002, f"the field {FIELD} with the list is required")
        return await files.publish(call.app, file, ttl)
    except BaseException as error:
        if file is not None:
            await files.discard(call.app, file)
        if isinstance(error, BROKEN):
            raise ApiError(1003, f"the body is not valid multipart/form-data: {str(error)[:200]}") from None
        raise


class Body(StreamReader):
    """What MultipartReader reads from: the body, up to `most` bytes of it and MAX_HEADS of lines. `patience`: seconds
    that each read may take, so that a caller who vanished gives its place among the app's files back."""

    def __init__(self, content: StreamReader, most: int, patience: float) -> None:
        self._content = content
        self._most = most
        self._patience = patience
        self._left = most
        self._heads = MAX_HEADS

    async def read(self, n: int = -1) -> bytes:
        return await self._count(self._content.read(n))

    async def readline(self, *, max_line_length: int | None = None) -> bytes:
        line = await self._count(self._content.readline(max_line_length=max_line_length))
        self._heads -= len(line)
        if self._heads < 0:
            raise ApiError(1003, f"the body has more than {MAX_HEADS} bytes of heads")
        return line

    def unread_data(self, data: bytes) -> None:
        self._left += len(data)
        self._content.unread_data(data)

    def at_eof(self) -> bool:
        return self._content.at_eof()

    async def _count(self, reading: Awaitable[bytes]) -> bytes:
        try:
            async with asyncio.timeout(self._patience):
                chunk = await reading
        except TimeoutError:
            raise ApiError(1003, too_slow(self._patience), http_status=408) from None
        self._left -= len(chunk)
        if self._left < 0:
            raise _too_large(self._most)
        await asyncio.sleep(0)
        return chunk


def _too_large(most: int) -> ApiError:
    return ApiError(1005, f"the body is larger than {most} bytes", http_status=413)


async def _parts(request: web.Request, body: Body) -> AsyncIterator[BodyPartReader]:
    reader = MultipartReader(request.headers, body)
    for _ in range(MAX_FIELDS):
        part = await reader.next()
        if part is None:
            return
        if isinstance(part, MultipartReader) or hdrs.CONTENT_ENCODING in part.headers:
            raise ApiError(
                1003, "the body must be plain multipart/form-data, without parts in parts or compression"
            )
        yield part
    raise ApiError(1003, f"the body has more than {MAX_FIELDS} fields")


async def _chunks(part: BodyPartReader) -> AsyncIterator[bytes]:
    while chunk := await part.read_chunk(STEP):
        yield bytes(chunk)


async def _read_field(part: BodyPartReader) -> bytes:
    """A short one."""
    value = await part.read_chunk(STEP)
    if len(value) > TTL_SIZE or not part.at_eof():
        raise ApiError(1003, f"{part.name}: is too long")
    return bytes(value)


def _describe(file: StoredFile) -> dict[str, object]:
    return {
        "file_id": file.file_id,
        "type": file.by,
        "file_name": file.name,
        "lines": file.lines,
        "create_time": _time(file.created_at),
        "expire_time": _time(file.expires_at),
    }


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S")
