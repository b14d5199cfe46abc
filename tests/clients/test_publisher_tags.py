"""Tags and aliases through the publisher SDK."""

from __future__ import annotations

import pytest

from clients.publisher import Publisher, PushError

NAMES = ["red", "红色", "a&b=c", "x#y!", "p|q", "v1.2+3"]  # what a path must not take for something else


@pytest.fixture
async def two(publisher: Publisher) -> None:
    for name, platform in (("a", "android"), ("b/b", "ios")):
        await publisher.register_device(name, platform=platform)


@pytest.mark.parametrize("tag", NAMES)
async def test_a_tag_is_given_taken_and_deleted(publisher: Publisher, two: None, tag: str) -> None:
    await publisher.tags.change(tag, add=["a", "b/b"])
    assert await publisher.tags.all() == [tag]
    assert await publisher.tags.has(tag, "b/b")
    await publisher.tags.change(tag, remove=["a"])
    assert not await publisher.tags.has(tag, "a")
    await publisher.tags.delete(tag, ["android", "hmos"])
    assert await publisher.tags.has(tag, "b/b")
    await publisher.tags.delete(tag)
    assert await publisher.tags.all() == []


@pytest.mark.parametrize("alias", NAMES)
async def test_an_alias_is_shown_and_deleted(publisher: Publisher, two: None, alias: str) -> None:
    for name in ("a", "b/b"):
        await publisher.update_device(name, alias=alias)
    assert await publisher.aliases.devices(alias) == ["a", "b/b"]
    assert await publisher.aliases.devices(alias, ["ios", "other"]) == ["b/b"]
    await publisher.aliases.delete(alias, ["ios"])
    assert await publisher.aliases.devices(alias) == ["a"]
    await publisher.aliases.delete(alias)
    assert await publisher.aliases.devices(alias) == []


async def test_refusals(publisher: Publisher, two: None) -> None:
    for call in (
        publisher.tags.has("red", "nobody"),
        publisher.tags.change("red", add=["a", "nobody"]),
        publisher.tags.change("red"),
        publisher.tags.delete("red", ["palm"]),
        publisher.aliases.devices("red", ["palm"]),
    ):
        with pytest.raises(PushError) as caught:
            await call
        assert caught.value.code == 7002
    assert await publisher.tags.all() == []
