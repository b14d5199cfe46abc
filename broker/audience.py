"""Who a push is for: the keys of an audience AND together, over posting lists of devnos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
from pyroaring import BitMap

from broker.model import Term, TermKey
from broker.store import Store


class Audience(msgspec.Struct, frozen=True, gc=False):
    """() in a field means that it does not restrict. A Struct: one is made for each push, in a tenth of the time
    of a frozen dataclass."""

    everyone: bool = False
    registration_ids: tuple[str, ...] = ()  # any of them
    aliases: tuple[str, ...] = ()  # any of them
    tags: tuple[str, ...] = ()  # any of them
    tags_and: tuple[str, ...] = ()  # all of them
    tags_not: tuple[str, ...] = ()  # none of them
    platforms: tuple[str, ...] = ()  # any of them

    def terms(self) -> list[TermKey]:
        """The posting lists that it needs."""
        terms = [(Term.ALIAS, alias) for alias in self.aliases] if self.aliases else []
        if self.platforms:
            terms += [(Term.PLATFORM, platform) for platform in self.platforms]
        for tags in (self.tags, self.tags_and, self.tags_not):
            if tags:
                terms += [(Term.TAG, tag) for tag in tags]
        if not (self.registration_ids or self.aliases or self.tags or self.tags_and or self.platforms):
            terms.append(EVERYONE)
        return terms


EVERYONE: TermKey = (Term.ALL, "")


async def resolve(store: Store, app_id: int, audiences: Sequence[Audience]) -> list[BitMap]:
    """The devnos of each audience, in one or two calls of the store; the caller owns the results."""
    ids = [registration_id for audience in audiences for registration_id in audience.registration_ids]
    devnos = await store.resolve(app_id, ids) if ids else {}
    terms = list(dict.fromkeys(term for audience in audiences for term in audience.terms()))
    postings = dict(zip(terms, await store.postings(app_id, terms), strict=True)) if terms else {}
    return [combine(audience, devnos, postings) for audience in audiences]


def combine(audience: Audience, devnos: Mapping[str, int], postings: Mapping[TermKey, BitMap]) -> BitMap:
    """`devnos` has the known registration ids. Posting lists are left as they are."""
    sets = []
    if audience.registration_ids:
        sets.append(BitMap([devnos[i] for i in audience.registration_ids if i in devnos]))
    if audience.aliases:
        sets.append(BitMap.union(*[postings[Term.ALIAS, alias] for alias in audience.aliases]))
    if audience.tags:
        sets.append(BitMap.union(*[postings[Term.TAG, tag] for tag in audience.tags]))
    if audience.platforms:
        sets.append(BitMap.union(*[postings[Term.PLATFORM, platform] for platform in audience.platforms]))
    if audience.tags_and:
        sets += [postings[Term.TAG, tag] for tag in audience.tags_and]
    if not sets:
        sets.append(postings[EVERYONE])
    result = BitMap.intersection(*sets) if len(sets) > 1 or not audience.registration_ids else sets[0]
    for tag in audience.tags_not:
        result -= postings[Term.TAG, tag]
    return result
