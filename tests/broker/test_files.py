"""Uploaded lists: checked while they come, resolved while they are read, gone when they are due."""

from __future__ import annotations

import asyncio
import itertools
import sqlite3
from base64 import b64encode
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import BodyPartReader, ClientSession, MultipartReader, StreamReader
from aiohttp.base_protocol import BaseProtocol
from hypothesis import given
from hypothesis import strategies as st

from broker.api.files import Body
from broker.audiences.audience import Audience, resolve
from broker.audiences.files import KIND, STEP, Files, Lines, devices_of_file
from broker.errors import ApiError
from broker.limits import Limits
from broker.store import PIECE

BOUNDARY = "x-boundary"
FORM = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
GZIP = FORM | {"Content-Encoding": "gzip"}


def _form(*fields: tuple[str, str, bytes]) -> bytes:
    """(name, file name, value): the body of a form."""
    parts = []
    for name, file_name, value in fields:
        also = f'; filename="{file_name}"' if file_name else ""
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{also}\r\n\r\n'
        parts.append(head.encode() + value + b"\r\n")
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


async def _upload(service: Any, by: str, text: str, *more: tuple[str, str, bytes]) -> str:
    form = _form(("filename", "list.txt", text.encode()), *more)
    answer = await service.call("POST", f"/v3/files/{by}", form, headers=FORM)
    assert answer.status == 200, answer.body
    assert answer.json.keys() == {"file_id"}
    return str(answer.json["file_id"])


async def _stored_files(service: Any) -> list[str]:
    """Ids in the table of pieces, from a connection of our own."""
    connection = sqlite3.connect(service.store._path)
    try:
        return [row[0] for row in connection.execute("SELECT DISTINCT file FROM files")]
    finally:
        connection.close()


# The lines


def _feed(text: bytes, cuts: list[int], limits: Limits | None = None, longest: int = 40) -> tuple[bytes, int]:
    lines = Lines(limits or Limits(), longest)
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    out = b"".join(lines.feed(text[a:b]) for a, b in itertools.pairwise(edges))
    return out + lines.finish(), lines.count


names = st.text(st.sampled_from("aé世 \t\r"), max_size=8)


@given(st.lists(names, min_size=1), st.lists(st.integers(0, 1000), max_size=6), st.booleans(), st.booleans())
def test_lines_are_what_is_between_newlines(
    given_lines: list[str], cuts: list[int], bom: bool, last_newline: bool
) -> None:
    text = "\n".join([*given_lines, "end"]) + ("\n" if last_newline else "")
    raw = (b"\xef\xbb\xbf" if bom else b"") + text.encode()
    out, count = _feed(raw, cuts)
    wanted = [line for line in (line.strip(" \t\r") for line in text.split("\n")) if line]
    assert out.decode().split("\n")[:-1] == wanted
    assert count == len(wanted)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "the file has no lines"),
        (b" \r\n\n", "the file has no lines"),
        (b"\n" * 5000, "the file has more than 9 lines"),
        (b"a\nb\xff\n", "line 2: is not valid UTF-8"),
        (b"a\n\nb\0c\n", "line 3: has a NUL character"),
        ("ab\n".encode("utf-16-le"), "line 1: has a NUL character"),
        (b"a\n\n\nb\n" + b"x" * 41, "line 5: is longer than 40 bytes"),
        (b"a\n" + b"x" * 41 + b"\nb\n", "line 2: is longer than 40 bytes"),
        (b"a\n" + b"x" * 5000 + b"\n\xff", "line 2: is longer than 40 bytes"),
        (b"x" * 5000, "line 1: is longer than 40 bytes"),
        (b"a\nb\n\n\nc\nd\ne\n\nf\ng\n", "the file has more than 9 lines"),
        (b"a\n" * 40_000, "the file is larger than 50000 bytes"),
    ],
)
@pytest.mark.parametrize("step", [1, 7, STEP])
def test_a_bad_line_is_named(text: bytes, message: str, step: int) -> None:
    limits = Limits(max_file_lines=9 if len(text) < 10_000 else 100_000, max_file_size=50_000)
    if step == 1 and len(text) > 10_000:
        return
    with pytest.raises(ApiError) as caught:
        _feed(text, list(range(step, len(text), step)), limits)
    assert message in caught.value.message
    assert (caught.value.code, caught.value.http_status) == (
        (1005, 413) if "larger" in message else (1003, 400)
    )


# Over HTTP


async def test_a_file_is_uploaded_listed_pushed_to_and_deleted(service: Any) -> None:
    for name in ("a", "b", "c"):
        await service.register(name, alias=f"alias_{name}", platform="ios" if name == "a" else "android")
    ids = await _upload(service, "registration_id", "a\r\n  b \n\nnobody\nb\n")
    service.now += 1
    aliases = await _upload(service, "alias", "alias_b\nalias_c", ("ttl", "", b"2"))
    listed = (await service.call("GET", "/v3/files")).json
    assert listed["total_count"] == 2
    assert [file["file_id"] for file in listed["files"]] == [ids, aliases]
    assert (await service.call("GET", f"/v3/push/files/{aliases}")).json == {
        "file_id": aliases,
        "type": "alias",
        "file_name": "list.txt",
        "lines": 2,
        "create_time": "2027-01-15 08:00:01",
        "expire_time": "2027-01-15 10:00:01",
    }
    for audience, targets in (
        ({"file": {"file_id": ids}}, {"a", "b"}),
        ({"file": {"file_id": aliases}}, {"b", "c"}),
        ({"file": {"file_id": ids}, "alias": ["alias_b"]}, {"b"}),
    ):
        push = {"platform": "all", "audience": audience, "notification": {"alert": "x"}}
        answer = await service.call("POST", "/v3/push/file", push)
        assert answer.status == 200, answer.body
        msg_id = int(answer.json["msg_id"])
        record = (await service.store.find_messages(service.app.app_id, [msg_id]))[msg_id]
        found = await service.store.names(service.app.app_id, list(record.targets))
        assert set(found.values()) == targets

    assert (await service.call("DELETE", f"/v3/files/{ids}")).body == b""
    assert (await service.call("GET", f"/v3/files/{ids}")).status == 404
    assert not [piece async for piece in service.store.files.read(service.app.app_id, ids)]
    push["audience"] = {"file": {"file_id": ids}}
    answer = await service.call("POST", "/v3/push/file", push)
    assert (answer.status, answer.code, ids in answer.message) == (400, 1003, True)


async def test_what_is_refused_leaves_nothing(start: Any) -> None:
    service = await start(limits=Limits(max_file_lines=5, max_file_size=200_000, max_files=1))
    good = ("filename", "x.txt", b"a\nb\n")
    many = b"".join(b"%d\n" % n for n in range(30_000))
    rows: list[tuple[bytes, dict[str, str], int, int, str]] = [
        (b"a\nb\n", {"Content-Type": "text/plain"}, 400, 1003, "must be multipart/form-data"),
        (b"{}", {}, 400, 1003, "must be multipart/form-data"),
        (_form(), FORM, 400, 1002, "the field filename with the list is required"),
        (_form(("file", "x.txt", b"a\n")), FORM, 400, 1002, "the field filename with the list is required"),
        (_form(("filename", "x.txt", b"")), FORM, 400, 1003, "the file has no lines"),
        (_form(("filename", "x.txt", b"a\n\xff\n")), FORM, 400, 1003, "line 2: is not valid UTF-8"),
        (
            _form(("filename", "x.txt", b"a\n" + b"x" * 65)),
            FORM,
            400,
            1003,
            "line 2: is longer than 64 bytes",
        ),
        (_form(("filename", "x.txt", b"a\n" * 6)), FORM, 400, 1003, "more than 5 lines"),
        (_form(("filename", "x.txt", many)), FORM, 400, 1003, "more than 5 lines"),
        (_form(("filename", "x.txt", b"\n" * 6)), FORM, 400, 1003, "more than 5 lines"),
        (_form(("filename", "x.txt", b"a\n")), GZIP, 400, 1003, "must not be compressed"),
        (_form(("x", "", b"1" * 300_000), good), FORM, 413, 1005, "body is larger than 265536 bytes"),
        (b"1" * 70_000 + b"\r\n" + _form(good), FORM, 400, 1003, "more than 65536 bytes of heads"),
        (_form(good) + b"1" * 70_000, FORM, 400, 1003, "more than 65536 bytes of heads"),
        (_form(good, ("ttl", "", b"0")), FORM, 400, 1003, "ttl: must be 1 to 720 hours"),
        (_form(good, ("ttl", "", b"721")), FORM, 400, 1003, "ttl: must be 1 to 720 hours"),
        (_form(good, ("ttl", "", b"soon")), FORM, 400, 1003, "ttl: must be 1 to 720 hours"),
        (_form(good, ("ttl", "", b"1" * 100)), FORM, 400, 1003, "ttl: is too long"),
        (_form(*[("x", "", b"1")] * 17), FORM, 400, 1003, "more than 16 fields"),
        (_form(("\x06\u00e9", "", b"1"), good), FORM, 400, 1003, "not valid multipart/form-data"),
        (b"--" + b"x-boundary\r\n: nothing\r\n\r\n", FORM, 400, 1003, "not valid multipart/form-data"),
        (b"--x-boundary\r\n" + b"x" * 100_000, FORM, 400, 1003, "not valid multipart/form-data"),
        (b"--x-boundary\r\n" + b"a: b\r\n" * 10_000, FORM, 400, 1003, "not valid multipart/form-data"),
        (b"no form at all", FORM, 400, 1003, "not valid multipart/form-data"),
        (_form(good)[:-20], FORM, 400, 1003, "not valid multipart/form-data"),
        (b"", {"Content-Type": "multipart/form-data"}, 400, 1003, "not valid multipart/form-data"),
    ]
    for body, headers, status, code, message in rows:
        answer = await service.call("POST", "/v3/files/registration_id", body, headers=headers)
        assert (answer.status, answer.code, message in answer.message) == (status, code, True), answer.body
    assert (await service.call("GET", "/v3/files")).json == {"total_count": 0, "files": []}
    assert await _stored_files(service) == []
    for expected in (200, 400):
        answer = await service.call("POST", "/v3/push/files/alias", _form(good), headers=FORM)
        assert answer.status == expected, answer.body
    assert "the app has 1 files already" in answer.message


async def test_a_file_name_is_printable(service: Any) -> None:
    form = _form(("filename", "x", b"a\n")).replace(b'="x"', b"*=UTF-8''a%1B%5B2J.txt")
    assert (await service.call("POST", "/v3/files/alias", form, headers=FORM)).status == 200
    (file,) = (await service.call("GET", "/v3/files")).json["files"]
    assert file["file_name"] == "a\ufffd[2J.txt"


async def test_uploads_at_once_make_no_more_files_than_the_limit(start: Any) -> None:
    service = await start(limits=Limits(max_files=2))
    going, file = asyncio.Event(), _form(("filename", "x.txt", b"a\n"))

    async def slow() -> AsyncIterator[bytes]:
        yield b"a\n"
        await going.wait()

    first = asyncio.create_task(service.broker.files.write(service.app, "alias", "x", slow()))
    assert (await service.call("POST", "/v3/files/alias", file, headers=FORM)).status == 200
    answer = await service.call("POST", "/v3/files/alias", file, headers=FORM)
    assert "the app has 2 files with those that are being uploaded" in answer.message
    going.set()
    await service.broker.files.discard(service.app, await first)
    answers = [await service.call("POST", "/v3/files/alias", file, headers=FORM) for _ in range(2)]
    assert [answer.status for answer in answers] == [200, 400]
    assert len(await service.broker.files.list(service.app)) == 2


async def test_uploads_to_several_brokers_make_no_more_files_than_the_limit(start: Any) -> None:
    service = await start(limits=Limits(max_files=1))

    async def chunks() -> AsyncIterator[bytes]:
        yield b"a\n"

    both = [service.broker.files, Files(service.store, service.limits)]
    written = [await files.write(service.app, "alias", "x", chunks()) for files in both]
    await both[0].publish(service.app, written[0])
    with pytest.raises(ApiError, match="1 files already"):
        await both[1].publish(service.app, written[1])


async def test_an_upload_without_a_length_is_cut_off_at_the_limit(start: Any) -> None:
    service = await start(limits=Limits(max_file_size=200_000))

    async def chunks() -> AsyncIterator[bytes]:
        yield _form(("x", "", b"1" * 300_000))

    secret = b64encode(f"{service.app.key}:{service.app.master_secret}".encode()).decode()
    headers = FORM | {"Authorization": f"Basic {secret}"}
    async with (
        ClientSession() as session,
        session.post(f"{service.base}/v3/files/alias", data=chunks(), headers=headers) as answer,
    ):
        assert answer.status == 413
        assert "the body is larger than 265536 bytes" in await answer.text()


async def test_an_upload_that_is_all_there_leaves_others_their_turn() -> None:
    loop = asyncio.get_running_loop()
    content = StreamReader(BaseProtocol(loop), 1 << 30, loop=loop)
    content.feed_data(_form(("x", "", b"1" * 500_000), ("y", "", b"\n" * 500_000)))
    content.feed_eof()
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    reader = MultipartReader(FORM, Body(content, 2_000_000, 30.0))
    while part := await reader.next():
        assert isinstance(part, BodyPartReader)
    counting.cancel()
    assert turns > 1_000_000 // BodyPartReader.chunk_size
    assert reader.at_eof()


@pytest.mark.parametrize("audience", [None, "all", {}, {"tag": ["x"]}, {"file": {}}, {"file": None}])
async def test_a_push_by_file_needs_a_file(service: Any, audience: Any) -> None:
    push = {"platform": "all", "audience": audience, "notification": {"alert": "x"}}
    answer = await service.call("POST", "/v3/push/file", push)
    assert (answer.status, answer.code) == (400, 1002), answer.body
    assert "audience.file is required" in answer.message


async def test_unknown_files_and_other_apps_files(service: Any) -> None:
    file_id = await _upload(service, "alias", "x")
    other = await service.apps.create("other")
    for method, path in (("GET", "/v3/files/nothing"), ("DELETE", "/v3/files/nothing")):
        answer = await service.call(method, path)
        assert (answer.status, answer.code) == (404, 1003)
    answer = await service.call("GET", f"/v3/files/{file_id}", auth=(other.key, other.master_secret))
    assert answer.status == 404
    with pytest.raises(ApiError):
        await resolve(service.store, other.app_id, [Audience(file_id=file_id)], service.now)


# Its life


async def test_a_file_ends_when_it_is_due(service: Any) -> None:
    file_id = await _upload(service, "alias", "x", ("ttl", "", b"1"))
    app_id, store = service.app.app_id, service.store
    (record,) = await store.records.list(app_id, KIND)
    assert record.due == service.now + 3600
    service.now += 3599
    await devices_of_file(store, app_id, file_id, service.now)
    service.now += 1
    with pytest.raises(ApiError):
        await devices_of_file(store, app_id, file_id, service.now)
    assert await service.broker.files.list(service.app) == []
    await service.broker.timekeeper.run_due()
    assert await store.records.list(app_id, KIND) == []
    assert await _stored_files(service) == []
    await service.broker.files.handlers[KIND](record)  # another broker was faster


async def test_a_file_that_is_deleted_while_it_is_read_is_no_half_audience(service: Any) -> None:
    await service.register("0")
    file_id = await _upload(service, "registration_id", "0\n1\n")
    app_id, store = service.app.app_id, service.store
    await store.files.remove(app_id, file_id)  # as if just after its record was found
    with pytest.raises(ApiError) as caught:
        await devices_of_file(store, app_id, file_id, service.now)
    assert caught.value.code == 1003


async def test_pieces_without_a_record_go_when_the_store_is_opened(service: Any) -> None:
    kept = await _upload(service, "alias", "x")

    async def pieces() -> AsyncIterator[bytes]:
        yield b"x" * PIECE
        yield b"y"

    for orphan in ("", "a", "z"):  # before and after the one that stays
        await service.store.files.write(service.app.app_id, orphan, pieces())
    assert sorted(await _stored_files(service)) == sorted([kept, "", "a", "z"])
    await service.store.close()
    await service.store.open()
    assert await _stored_files(service) == [kept]


async def test_a_large_file_is_many_pieces_and_one_audience(service: Any) -> None:
    wanted = [f"device-{n:05d}" for n in range(0, 6000, 2)]
    for start in range(0, len(wanted), 1000):
        devices = [{"registration_id": name} for name in wanted[start : start + 1000]]
        answer = await service.call("POST", "/v1/devices/import", {"devices": devices})
        assert answer.status == 200, answer.body
    file_id = await _upload(service, "registration_id", "".join(f"device-{n:05d}\n" for n in range(6000)))
    pieces = [piece async for piece in service.store.files.read(service.app.app_id, file_id)]
    assert len(pieces) > 1
    assert all(len(piece) <= PIECE and piece.endswith(b"\n") for piece in pieces)
    found = await devices_of_file(service.store, service.app.app_id, file_id, service.now)
    assert len(found) == 3000
