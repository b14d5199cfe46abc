"""The audience algebra against plain sets; and once through a real store."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from pyroaring import BitMap

from broker.audience import EVERYONE, Audience, combine, resolve
from broker.model import Term, TermKey

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


@given(audiences, indexes, platforms_of)
def test_an_audience_is_the_intersection_of_its_keys(
    audience: Audience, has: dict[TermKey, set[int]], platforms: list[str]
) -> None:
    postings = {term: BitMap(devnos) for term, devnos in has.items()}
    postings[EVERYONE] = BitMap(DEVNOS)
    for platform in PLATFORMS:
        postings[Term.PLATFORM, platform] = BitMap([n for n in DEVNOS if platforms[n] == platform])
    before = {term: devnos.copy() for term, devnos in postings.items()}

    result = combine(audience, {f"r{n}": n for n in DEVNOS}, {t: postings[t] for t in audience.terms()})

    assert set(result) == {n for n in DEVNOS if _wanted(audience, n, has, platforms[n])}
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
