from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson
import pytest

from broker.bus import Broadcast, Targeted
from broker.errors import ApiError
from broker.limits import Limits
from broker.model import DeliveryState, OwedRequest
from broker.pushing.pushes import Accepted, Pushes
from broker.store import StoreError, StoreFull, StoreUnavailable

HELLO = {"notification": {"alert": "hi"}}


def _push(**changes: Any) -> bytes:
    return orjson.dumps({"platform": "all", "audience": "all"} | HELLO | changes)


async def _refused(service: Any, raw: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await service.pushes.push(service.app, raw)
    return caught.value


async def _only_bell(service: Any) -> Any:
    """The bell of the push; those of the set-up (apps, credentials) came before it."""
    while not isinstance(bell := await service.doorbell(), Targeted | Broadcast):
        pass
    return bell


async def test_few_targets_get_an_inbox_row_each_and_a_copy_with_the_bell(service: Any) -> None:
    device = await service.register("a")
    accepted = await service.pushes.push(service.app, _push(options={"sendno": 3, "time_to_live": 60}))
    assert accepted.sendno == "3"
    owed = await service.store.fetch_owed([OwedRequest(service.app.app_id, device.devno, 0, 10)])
    bell = await _only_bell(service)
    assert isinstance(bell, Targeted)
    assert list(bell.devnos) == [device.devno]
    for message in (owed[0][0], bell.message):
        assert (message.msg_id, orjson.loads(message.body)) == (accepted.msg_id, HELLO)
        assert (message.created_at, message.expires_at) == (service.now, service.now + 60)


async def test_more_than_fanout_limit_targets_make_one_broadcast(start: Any) -> None:
    service = await start(limits=Limits(fanout_limit=2))
    devices = [await service.register(f"d{n}") for n in range(3)]
    accepted = await service.pushes.push(service.app, _push())
    bell = await _only_bell(service)
    assert isinstance(bell, Broadcast)
    assert bell.broadcast.message.msg_id == accepted.msg_id
    assert list(bell.broadcast.targets) == [device.devno for device in devices]
    live = await service.store.live_broadcasts(service.app.app_id)
    assert [b.message.msg_id for b in live] == [accepted.msg_id]
    two = await service.pushes.push(service.app, _push(audience={"registration_id": ["d0", "d1"]}))
    assert isinstance(await _only_bell(service), Targeted), two


async def test_a_push_for_now_only_rings_and_keeps_nothing_to_fetch(service: Any) -> None:
    device = await service.register("a")
    accepted = await service.pushes.push(service.app, _push(options={"time_to_live": 0}))
    assert (await _only_bell(service)).message.expires_at == service.now
    assert await service.store.fetch_owed([OwedRequest(service.app.app_id, device.devno, 0, 10)]) == [[]]
    record = (await service.store.find_messages(service.app.app_id, [accepted.msg_id]))[accepted.msg_id]
    assert record.state(device.devno, service.now) is DeliveryState.EXPIRED


async def test_a_used_cid_answers_the_first_push_and_rings_nobody(service: Any) -> None:
    await service.register("a")
    first = await service.pushes.push(service.app, _push(cid="c1", options={"sendno": 1}))
    await _only_bell(service)
    assert await service.pushes.push(service.app, _push(cid="c1", options={"sendno": 2})) == first
    other = await service.pushes.push(service.app, _push())
    assert (await _only_bell(service)).message.msg_id == other.msg_id


async def test_an_audience_without_devices_is_1011(service: Any) -> None:
    error = await _refused(service, _push(audience={"tag": ["none"]}, options={"sendno": 9}))
    assert (error.code, error.sendno) == (1011, "9")
    assert (await _refused(service, _push())).code == 1011


async def test_another_apps_devices_are_no_targets(service: Any) -> None:
    await service.register("a", alias="ann", tags=["red"])
    service.app = await service.apps.create("other")
    for audience in (
        "all",
        {"registration_id": ["a"]},
        {"alias": ["ann"]},
        {"tag": ["red"]},
        {"tag_not": ["x"]},
    ):
        assert (await _refused(service, _push(audience=audience))).code == 1011


async def test_validate_checks_everything_and_sends_nothing(service: Any) -> None:
    with pytest.raises(ApiError) as caught:
        await service.pushes.validate(service.app, _push())
    assert caught.value.code == 1011
    device = await service.register("a")
    assert await service.pushes.validate(service.app, _push(options={"sendno": 4})) == Accepted(0, "4")
    assert await service.store.fetch_owed([OwedRequest(service.app.app_id, device.devno, 0, 10)]) == [[]]


async def test_a_batch_has_a_result_for_each_cid(service: Any) -> None:
    a = await service.register("a", platform="ios", alias="ann")
    b = await service.register("b", platform="android", alias="ann")
    item = {"platform": "all"} | HELLO
    pushlist = {
        "c1": item | {"target": "a"},
        "c2": item | {"target": "b", "options": {"sendno": 2}},
        "c3": item | {"target": "nobody"},
        "c4": item | {"target": "b", "platform": ["ios"]},
        "c5": item | {"target": "a", "message": {}},
        "c6": item,
    }
    results = await service.pushes.push_batch(service.app, orjson.dumps({"pushlist": pushlist}), "regid")
    assert {cid: getattr(result, "code", 200) for cid, result in results.items()} == {
        "c1": 200, "c2": 200, "c3": 1011, "c4": 1011, "c5": 1002, "c6": 1002,
    }  # fmt: skip
    assert results["c2"].sendno == "2"
    assert list((await _only_bell(service)).devnos) == [a.devno]
    assert list((await _only_bell(service)).devnos) == [b.devno]

    raw = orjson.dumps({"pushlist": {"c7": item | {"target": "ann"}, "c8": item | {"target": "bob"}}})
    results = await service.pushes.push_batch(service.app, raw, "alias")
    assert isinstance(results["c7"], Accepted)
    assert results["c8"].code == 1011
    assert list((await _only_bell(service)).devnos) == [a.devno, b.devno]
    again = await service.pushes.push_batch(service.app, raw, "alias")
    assert again["c7"] == results["c7"]


@dataclass
class _Broken:
    """A store that refuses to append, in front of a real one."""

    store: Any
    error: StoreError

    async def append(self, messages: object, changes: object = ()) -> None:
        raise self.error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


@pytest.mark.parametrize(
    ("error", "message"), [(StoreFull(), "no room left"), (StoreUnavailable(), "not available")]
)
async def test_what_the_store_cannot_keep_is_not_accepted(
    service: Any, error: StoreError, message: str
) -> None:
    await service.register("a")
    pushes = Pushes(_Broken(service.store, error), service.bus)  # type: ignore[arg-type]
    pushlist = {"pushlist": {"c1": HELLO | {"platform": "all", "target": "a"}}}
    with pytest.raises(ApiError, match=message) as caught:
        await pushes.push(service.app, _push(options={"sendno": 1}))
    assert (caught.value.code, caught.value.http_status, caught.value.sendno) == (1030, 503, "1")
    with pytest.raises(ApiError, match=message):
        await pushes.push_batch(service.app, orjson.dumps(pushlist))
