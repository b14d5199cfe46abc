"""Who a push is for: the keys of an audience AND together, over posting lists of devnos."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import msgspec
from pyroaring import BitMap

from broker.audiences.files import devices_of_file
from broker.audiences.segment_rules import EVERYONE, find_segment, resolve_rules
from broker.errors import ApiError
from broker.model import Term, TermKey
from broker.store import Store


class Audience(msgspec.Struct, frozen=True, gc=False):
    """() or "" in a field means that it does not restrict. A Struct: one is made for each push, in a tenth of the
    time of a frozen dataclass."""

    everyone: bool = False
    registration_ids: tuple[str, ...] = ()  # any of them
    aliases: tuple[str, ...] = ()  # any of them
    tags: tuple[str, ...] = ()  # any of them
    tags_and: tuple[str, ...] = ()  # all of them
    tags_not: tuple[str, ...] = ()  # none of them
    platforms: tuple[str, ...] = ()  # any of them
    segment: str = ""  # id of a segment
    file_id: str = ""  # of an uploaded list

    @property
    def is_list(self) -> bool:
        """Registration ids and nothing else: there is nothing to combine."""
        return bool(self.registration_ids) and not (
            self.everyone
            or self.aliases
            or self.tags
            or self.tags_and
            or self.tags_not
            or self.platforms
            or self.segment
            or self.file_id
        )

    def terms(self) -> list[TermKey]:
        """The posting lists that it needs, beside those of its segment."""
        terms = [(Term.ALIAS, alias) for alias in self.aliases] if self.aliases else []
        if self.platforms:
            terms += [(Term.PLATFORM, platform) for platform in self.platforms]
        for tags in (self.tags, self.tags_and, self.tags_not):
            if tags:
                terms += [(Term.TAG, tag) for tag in tags]
        if not self._says_who():
            terms.append(EVERYONE)
        return terms

    def _says_who(self) -> bool:
        """Or only who not."""
        return bool(
            self.registration_ids
            or self.aliases
            or self.tags
            or self.tags_and
            or self.platforms
            or self.segment
            or self.file_id
        )


async def resolve(
    store: Store, app_id: int, audiences: Sequence[Audience], now: float | None = None
) -> list[BitMap]:
    """The devnos of each audience, in one or two calls of the store, and a few more for those with a segment or a
    file; the caller owns the results. `now` (None: the computer's clock) is what "last active" counts back from.
    Raises ApiError 1003 if there is no such segment or file."""
    ids = [registration_id for audience in audiences for registration_id in audience.registration_ids]
    devnos = await store.resolve(app_id, ids) if ids else {}
    wanted = (term for audience in audiences if not audience.is_list for term in audience.terms())
    terms = list(dict.fromkeys(wanted))
    postings = dict(zip(terms, await store.postings(app_id, terms), strict=True)) if terms else {}
    return [
        _named(audience, devnos)
        if audience.is_list
        else combine(audience, devnos, postings, await _listed(store, app_id, audience, now))
        for audience in audiences
    ]


def _named(audience: Audience, devnos: Mapping[str, int]) -> BitMap:
    ids = audience.registration_ids
    if len(ids) > 1:
        return BitMap([devnos[i] for i in ids if i in devnos])
    devno = devnos.get(ids[0])  # the usual case: twice as fast
    return BitMap() if devno is None else BitMap((devno,))


async def _listed(store: Store, app_id: int, audience: Audience, now: float | None) -> list[BitMap]:
    """The devices of its segment and of its file."""
    listed = []
    now = time.time() if now is None else now
    if audience.segment:
        segment = await find_segment(store, app_id, audience.segment)
        if segment is None:
            raise ApiError(1003, f"audience.segment: there is no segment {audience.segment:.64}")
        listed += await resolve_rules(store, app_id, [segment.read_rule()], now)
    if audience.file_id:
        listed.append(await devices_of_file(store, app_id, audience.file_id, now))
    return listed


def combine(
    audience: Audience,
    devnos: Mapping[str, int],
    postings: Mapping[TermKey, BitMap],
    listed: Sequence[BitMap] = (),
) -> BitMap:
    """`devnos` has the known registration ids, `listed` its segment's and its file's devices. Posting lists are left
    as they are."""
    sets = list(listed)
    if audience.registration_ids:
        sets.append(_named(audience, devnos))
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
