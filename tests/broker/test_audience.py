"""The audience algebra against plain sets; and once through a real store."""

from __future__ import annotations

import random
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from pyroaring import BitMap

from broker.audiences.audience import Audience, combine, resolve
from broker.audiences.files import By
from broker.audiences.segment_rules import EVERYONE
from broker.errors import ApiError
from broker.model import Device, Term, TermKey

DEVNOS = range(12)
NAMES = ["x", "y", "z"]
PLATFORMS = ["android", "ios", "hmos"]

devno_sets = st.sets(st.sampled_from(DEVNOS))
names = st.lists(st.sampled_from(NAMES), max_size=3).map(tuple)
indexes = st.fixed_dictionaries(
    {(Term.TAG, name): devno_sets for name in NAMES} | {(Term.ALIAS, name): devno_sets for name in NAMES}
)
platforms_of = st.lists(st.sampled_from(PLATFORMS), min_size=len(DEVNOS), max_size=len(DEVNOS))
audiences = st.builds(
    Audience,
    everyone=st.booleans(),
    registration_ids=st.lists(st.sampled_from([f"r{n}" for n in range(15)]), max_size=6).map(tuple),
    aliases=names,
    tags=names,
    tags_and=names,
    tags_not=names,
    platforms=st.lists(st.sampled_from(PLATFORMS), max_size=2).map(tuple),
)


def _wanted(audience: Audience, devno: int, has: dict[TermKey, set[int]], platform: str) -> bool:
    """The rule of every key, one device at a time."""
    return (
        (not audience.registration_ids or f"r{devno}" in audience.registration_ids)
        and (not audience.aliases or any(devno in has[Term.ALIAS, a] for a in audience.aliases))
        and (not audience.tags or any(devno in has[Term.TAG, t] for t in audience.tags))
        and all(devno in has[Term.TAG, t] for t in audience.tags_and)
        and not any(devno in has[Term.TAG, t] for t in audience.tags_not)
        and (not audience.platforms or platform in audience.platforms)
    )


@given(audiences, indexes, platforms_of, st.none() | devno_sets, st.none() | devno_sets)
def test_an_audience_is_the_intersection_of_its_keys(
    audience: Audience,
    has: dict[TermKey, set[int]],
    platforms: list[str],
    segment: set[int] | None,
    file: set[int] | None,
) -> None:
    audience = replace(audience, segment="" if segment is None else "s", file_id="" if file is None else "f")
    listed = [BitMap(devnos) for devnos in (segment, file) if devnos is not None]
    postings = {term: BitMap(devnos) for term, devnos in has.items()}
    postings[EVERYONE] = BitMap(DEVNOS)
    for platform in PLATFORMS:
        postings[Term.PLATFORM, platform] = BitMap([n for n in DEVNOS if platforms[n] == platform])
    before = {term: devnos.copy() for term, devnos in postings.items()}

    known = {f"r{n}": n for n in DEVNOS}
    result = combine(audience, known, {t: postings[t] for t in audience.terms()}, listed)

    assert set(result) == {
        n
        for n in DEVNOS
        if _wanted(audience, n, has, platforms[n])
        and all(n in devnos for devnos in (segment, file) if devnos is not None)
    }
    result.clear()
    assert postings == before, "posting lists belong to the store"


async def test_many_audiences_cost_one_look_up(service: Any) -> None:
    a = await service.register("a", platform="ios", alias="ann", tags=["red", "big"])
    b = await service.register("b", platform="android", alias="ann", tags=["red"])
    c = await service.register("c", platform="android", alias="bob", tags=["big"])
    rows: list[tuple[Audience, list[int]]] = [
        (Audience(everyone=True), [a.devno, b.devno, c.devno]),
        (Audience(everyone=True, platforms=("android",)), [b.devno, c.devno]),
        (Audience(registration_ids=("a", "nobody")), [a.devno]),
        (Audience(registration_ids=("a", "b"), platforms=("ios",)), [a.devno]),
        (Audience(registration_ids=("nobody",)), []),
        (Audience(aliases=("ann",)), [a.devno, b.devno]),
        (Audience(aliases=("ann", "bob"), tags=("big",)), [a.devno, c.devno]),
        (Audience(tags_and=("red", "big")), [a.devno]),
        (Audience(tags_not=("red",)), [c.devno]),
        (Audience(tags=("unknown",)), []),
    ]
    found = await resolve(service.store, service.app.app_id, [audience for audience, _ in rows])
    assert [list(devnos) for devnos in found] == [devnos for _, devnos in rows]


class World:
    """An app's devices, and what its segments and files should say of them."""

    def __init__(self, service: Any, seed: int) -> None:
        self.service = service
        self.random = random.Random(seed)
        self.devices: list[Device] = []

    async def fill(self) -> None:
        some = self.random
        for n in range(40):
            device = await self.service.register(
                f"r{n}",
                platform=some.choice(PLATFORMS),
                alias=some.choice([*NAMES, None]),
                tags=[name for name in NAMES if some.random() < 0.4],
                attributes={
                    "age": some.randint(-2, 3),
                    "app_version": some.choice(["1.2", "1.10", "2"]),
                    **({"paying": True} if some.random() < 0.5 else {}),
                },
            )
            self.devices.append(device)

    def rule(self, depth: int = 0) -> tuple[Any, set[int]]:
        """A rule as JSON, and the devnos it holds for."""
        some, every = self.random, {device.devno for device in self.devices}
        kind = some.choice(
            ["tag", "age", "version", "paying", "platform", "and", "or", "not"][: 5 if depth == 3 else 8]
        )
        match kind:
            case "tag":
                name = some.choice(NAMES)
                return {"tag": name}, self._those(lambda device: name in device.tags)
            case "platform":
                name = some.choice(PLATFORMS)
                return {"platform": name}, self._those(lambda device: device.platform == name)
            case "age":
                low, high = some.randint(-3, 3), some.randint(-3, 3)
                rule = {"attribute": "age", "op": "between", "value": [low, high]}
                return rule, self._those(lambda device: low <= device.attributes["age"] <= high)
            case "version":
                rule = {"attribute": "app_version", "op": "<", "value": "1.9"}
                return rule, self._those(lambda device: device.attributes["app_version"] == "1.2")
            case "paying":
                rule = {"attribute": "paying", "op": "exists"}
                return rule, self._those(lambda device: "paying" in device.attributes)
            case "not":
                rule, devnos = self.rule(depth + 1)
                return {"not": rule}, every - devnos
        (one, left), (other, right) = self.rule(depth + 1), self.rule(depth + 1)
        return {kind: [one, other]}, left & right if kind == "and" else left | right

    def _those(self, holds: Any) -> set[int]:
        return {device.devno for device in self.devices if holds(device)}

    async def segment(self) -> tuple[str, set[int]]:
        rule, devnos = self.rule()
        raw = orjson.dumps({"name": "x", "rule": rule})
        return (await self.service.broker.segments.create(self.service.app, raw)).id, devnos

    async def file(self) -> tuple[str, set[int]]:
        by: By = self.random.choice(["alias", "registration_id"])
        pool = [*NAMES, "nobody"] if by == "alias" else [f"r{n}" for n in range(50)]
        names = self.random.sample(pool, self.random.randint(1, len(pool)))

        async def chunks() -> Any:
            yield "\n".join(names).encode()

        files = self.service.broker.files
        file = await files.publish(self.service.app, await files.write(self.service.app, by, "x", chunks()))
        return file.file_id, self._those(
            lambda device: (device.alias if by == "alias" else device.registration_id) in names
        )


@pytest.mark.parametrize("seed", range(5))
async def test_segments_and_files_through_a_real_store(service: Any, seed: int) -> None:
    world = World(service, seed)
    await world.fill()
    has: dict[TermKey, set[int]] = {}
    for name in NAMES:
        has[Term.TAG, name] = world._those(lambda device, name=name: name in device.tags)
        has[Term.ALIAS, name] = world._those(lambda device, name=name: device.alias == name)
    some = world.random
    for _ in range(20):
        segment, of_segment = await world.segment() if some.random() < 0.7 else ("", None)
        file, of_file = (
            ("", None) if len(await service.broker.files.list(service.app)) > 18 else await world.file()
        )
        audience = Audience(
            tags=tuple(some.sample(NAMES, some.randint(0, 2))),
            tags_not=tuple(some.sample(NAMES, some.randint(0, 1))),
            aliases=tuple(some.sample(NAMES, some.choice([0, 0, 2]))),
            segment=segment,
            file_id=file,
        )
        (found,) = await resolve(service.store, service.app.app_id, [audience], service.now)
        assert set(found) == {
            device.devno
            for device in world.devices
            if _wanted(audience, device.devno, has, device.platform)
            and (of_segment is None or device.devno in of_segment)
            and (of_file is None or device.devno in of_file)
        }, audience


@pytest.mark.parametrize("audience", [Audience(segment="gone"), Audience(file_id="gone")])
async def test_what_does_not_exist_is_no_audience(service: Any, audience: Audience) -> None:
    with pytest.raises(ApiError) as caught:
        await resolve(service.store, service.app.app_id, [audience], service.now)
    assert (caught.value.code, "gone" in caught.value.message) == (1003, True)
