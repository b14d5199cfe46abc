"""Uploaded lists and saved segments through the publisher SDK."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import given
from hypothesis import strategies as st

from clients.publisher import (
    Audience,
    FileAudience,
    NewDevice,
    Notification,
    Publisher,
    PushError,
    PushRequest,
    RetrySettings,
)
from clients.publishing.files import PIECE, Source, _pieces

HELLO = Notification("Hello")


@pytest.fixture
async def devices(publisher: Publisher) -> None:
    await publisher.import_devices(
        [
            NewDevice("a", "android", "ann", ["red"], attributes={"level": 1}),
            NewDevice("b", "ios", "ben", ["red"], attributes={"level": 5}),
            NewDevice("c", "ios", "ann", ["blue"]),
        ]
    )


async def targets(publisher: Publisher, audience: Audience) -> int | None:
    accepted = await publisher.push(PushRequest(audience, HELLO))
    return (await publisher.reports.push(accepted.msg_id)).target


def of_file(file_id: str) -> Audience:
    return Audience(file=FileAudience(file_id))


# Files


async def names() -> AsyncIterator[str]:
    for name in ("a", "c", "unknown"):
        yield name


async def test_lists_are_uploaded_from_wherever_they_are(
    publisher: Publisher, devices: None, tmp_path: Path
) -> None:
    path = tmp_path / 'li"st ä.txt'
    path.write_text("a\nb\nunknown\n")
    sources: list[tuple[Source, int]] = [(path, 2), (["a"], 1), (iter(["a", "b", "c"]), 3), (names(), 2)]
    for source, count in sources:
        file_id = await publisher.files.upload(source)
        assert await targets(publisher, of_file(file_id)) == count
    by_alias = await publisher.files.upload(["ann"], "alias", name="anns", ttl=2)
    assert await targets(publisher, of_file(by_alias)) == 2

    listed = await publisher.files.all()
    assert [(file.type, file.lines) for file in listed] == [
        ("registration_id", 3),
        ("registration_id", 1),
        ("registration_id", 3),
        ("registration_id", 3),
        ("alias", 1),
    ]
    assert await publisher.files.get(by_alias) == listed[-1]
    assert (listed[-1].file_name, listed[0].file_name) == ("anns", "li_st ?.txt")
    await publisher.files.delete(by_alias)
    with pytest.raises(PushError) as caught:
        await publisher.files.get(by_alias)
    assert caught.value.http_status == 404


async def test_the_progress_of_an_upload(publisher: Publisher, devices: None, tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("\n".join(f"device-{n:020}" for n in range(20_000)) + "\na\n")
    size, seen = path.stat().st_size, list[tuple[int, int | None]]()
    file_id = await publisher.files.upload(path, progress=lambda sent, total: seen.append((sent, total)))
    assert [total for _, total in seen] == [size] * 3
    assert [sent for sent, _ in seen] == [PIECE, 2 * PIECE, size]
    assert await targets(publisher, of_file(file_id)) == 1


async def test_a_list_that_is_wrong_is_refused_whole(publisher: Publisher, tmp_path: Path) -> None:
    with pytest.raises(PushError, match="line 2") as caught:
        await publisher.files.upload(["a", "x" * 100])
    assert caught.value.code == 1003
    with pytest.raises(PushError, match="no lines"):
        await publisher.files.upload([])
    assert await publisher.files.all() == []
    with pytest.raises(FileNotFoundError):
        await publisher.files.upload(tmp_path / "missing")


class Busy:
    """Refuses the first upload undone (429), and keeps what the others said."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    async def answer(self, request: web.Request) -> web.Response:
        self.bodies.append(await request.read())
        if len(self.bodies) == 1:
            return web.json_response({"error": {"code": 2002, "message": "later"}}, status=429)
        return web.json_response({"file_id": "f"})

    async def upload(self, source: Source) -> str:
        application = web.Application()
        application.router.add_post("/v3/files/registration_id", self.answer)
        async with (
            TestServer(application) as server,
            Publisher("a", "s", str(server.make_url("")), retry=RetrySettings(base=0.0)) as publisher,
        ):
            return await publisher.files.upload(source)


async def test_an_upload_that_was_refused_undone_is_repeated_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "list"
    path.write_text("a\nb\n")
    sources: list[Source] = [path, ["a", "b"]]
    for source in sources:
        busy = Busy()
        assert await busy.upload(source) == "f"
        assert len(busy.bodies) == 2
        assert busy.bodies[0] == busy.bodies[1]
        assert b"\r\n\r\na\nb\n\r\n--" in busy.bodies[0]


async def test_an_iterator_cannot_be_uploaded_twice() -> None:
    busy = Busy()
    with pytest.raises(PushError, match="used up"):
        await busy.upload(iter(["a"]))
    assert len(busy.bodies) == 1


@given(st.lists(st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), max_size=300)))
async def test_pieces_are_the_lines_whatever_their_lengths(lines: list[str]) -> None:
    found = b"".join([piece async for piece in _pieces(lines)])
    assert found.decode().split("\n") == ([*lines, ""] if lines else [""])


def many() -> Iterator[str]:
    for number in range(200_000):
        yield f"{number:020}"


async def test_a_long_iteration_goes_out_in_pieces() -> None:
    sizes = [len(piece) async for piece in _pieces(many())]
    assert sum(sizes) == 200_000 * 21
    assert max(sizes) < PIECE + 21


# Segments


async def test_segments(publisher: Publisher, devices: None) -> None:
    segment = await publisher.segments.create("red", {"tag": "red"})
    assert await publisher.segments.get(segment.id) == segment
    assert await targets(publisher, Audience(segment=[segment.id])) == 2
    changed = await publisher.segments.replace(
        segment.id, "strong", {"attribute": "level", "op": ">", "value": 2}
    )
    assert (changed.id, changed.name) == (segment.id, "strong")
    assert await targets(publisher, Audience(segment=[segment.id])) == 1
    found = await publisher.segments.estimate(segment.id)
    assert (found.registered, found.online) == (1, 0)
    both: dict[str, Any] = {"and": [{"platform": "ios"}, {"not": {"tag": "red"}}]}
    assert (await publisher.segments.estimate_rule(both)).registered == 1
    assert [one async for one in publisher.segments.all()] == [changed]
    await publisher.segments.delete(segment.id)
    assert [one async for one in publisher.segments.all()] == []


async def test_wrong_segments_say_where(publisher: Publisher) -> None:
    with pytest.raises(PushError, match="rule"):
        await publisher.segments.create("x", {"colour": "red"})
    with pytest.raises(PushError) as caught:
        await publisher.segments.get("none")
    assert (caught.value.code, caught.value.http_status) == (1003, 404)
