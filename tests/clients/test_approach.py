"""How a device gets to a server, with lines that are no sockets: what it makes of their ends."""

from __future__ import annotations

import asyncio
import time

import pytest

from clients.addresses import SILENT_DEATHS, Address, Hints
from clients.approach import Approach
from clients.reach import Line, Unreachable
from tests.patience import PATIENCE

A, B, C = (Address(f"10.0.0.{n}", 1883) for n in range(1, 4))
HINTS = Hints(stagger=0.2, greeting=5)


class Nothing(Line):
    """A line that is there."""

    def discard(self) -> None:
        pass


class World:
    """Which addresses are alive, and when which was tried."""

    def __init__(self, *addresses: Address, hints: Hints = HINTS) -> None:
        self.dead: set[Address] = set()
        self.refusing: set[Address] = set()
        self.tried: list[Address] = []
        self.tried_at: list[float] = []
        self.now = 1_800_000_000.0
        self.approach = Approach(
            addresses, hints, None, (), secret=False, clock=lambda: self.now, on_answer=lambda: None
        )
        self.approach.enter("home", None, link="wifi", carrier="")

    async def connect(self, address: Address) -> Nothing:
        self.tried.append(address)
        self.tried_at.append(asyncio.get_running_loop().time())
        if address in self.refusing:
            raise ConnectionRefusedError("refused")
        if address in self.dead:
            await asyncio.Event().wait()
        return Nothing()

    async def open(self, *first: Address) -> Address:
        self.tried, self.tried_at = [], []
        await asyncio.wait_for(self.approach.open(first, self.connect), PATIENCE)
        assert self.approach.at is not None
        return self.approach.at

    async def live(self, *, silent: bool, stable: bool = True) -> Address:
        """One connection, from its first attempt to its end."""
        found = await self.open()
        self.approach.greeted(found.host)
        self.approach.broke(greeted=True, stable=stable, silent=silent)
        self.approach.left()
        return found


async def test_after_a_silent_death_the_next_address_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clients.approach.SUSPICION", 1e-5)
    world = World(A, B, hints=Hints(stagger=10_000))
    await world.live(silent=True)
    world.dead.add(A)
    assert await world.open() == B
    assert world.tried == [A, B]
    assert world.tried_at[1] - world.tried_at[0] >= 0.09


async def test_a_path_that_dies_again_and_again_is_left() -> None:
    world = World(A, B)
    assert [await world.live(silent=True) for _ in range(SILENT_DEATHS + 1)] == [*[A] * SILENT_DEATHS, B]


async def test_what_breaks_at_once_comes_after_the_others() -> None:
    world = World(A, B)
    assert await world.live(silent=False, stable=False) == A
    assert await world.live(silent=False) == B


async def test_a_connection_on_which_nobody_speaks_has_failed_and_the_next_may_take_longer() -> None:
    world = World(A, B, hints=Hints(greeting=1000))
    loop = asyncio.get_running_loop()
    limits = []
    for expected in (A, B):
        assert await world.open() == expected
        assert world.approach.greet_by is not None
        limits.append(world.approach.greet_by - loop.time())
        world.approach.broke(greeted=False, stable=False, silent=True)
        world.approach.left()
    assert limits == [pytest.approx(1000, abs=PATIENCE), pytest.approx(2000, abs=PATIENCE)]
    assert world.approach.greet_by is None


async def test_with_one_address_nobody_hurries_the_server() -> None:
    world = World(A)
    await world.open()
    assert world.approach.greet_by is None


async def test_where_the_server_sent_us_is_tried_first_and_the_rest_behind_it() -> None:
    world = World(A, B)
    world.refusing = {C, A}
    assert await world.open(C) == B
    assert world.tried == [C, A, B]


async def test_what_was_cut_short_counts_by_how_long_it_was_tried() -> None:
    world = World(A, B, hints=Hints(stagger=0.5))
    world.dead = {A, B}

    async def connect(address: Address) -> Nothing:
        if address == B:
            world.approach.gave_up()  # as soon as it is tried
            opening.cancel()
        return await world.connect(address)

    opening = asyncio.ensure_future(world.approach.open((), connect))
    await asyncio.wait({opening})
    world.dead.clear()
    assert await world.open() == B


async def test_what_was_found_out_on_one_network_is_not_held_against_an_address_on_the_next() -> None:
    world = World(A, B)
    world.refusing, world.dead = {A}, {B}
    opening = asyncio.ensure_future(world.approach.open((), world.connect))
    while world.tried != [A, B]:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    home = world.approach.state()
    world.approach.enter("office", None, link="wifi", carrier="")
    opening.cancel()
    await asyncio.wait({opening})
    world.refusing, world.dead = set(), set()
    assert await world.open() == A
    world.approach.enter("home", home, link="wifi", carrier="")
    assert await world.open() == A


async def test_nothing_can_be_reached() -> None:
    world = World(A, B)
    world.refusing = {A, B}
    with pytest.raises(Unreachable, match=r"10\.0\.0\.1:1883: refused; .*10\.0\.0\.2:1883: refused"):
        await world.open()
    world.refusing = {A}
    assert await world.open() == B  # A was no better before
    world.approach.greeted("10.0.0.2")
    assert await world.open() == B


async def test_a_reset_after_a_good_while_says_nothing_about_an_address() -> None:
    world = World(A, B)
    assert [await world.live(silent=False) for _ in range(10)] == [A] * 10


async def test_the_end_of_nothing_is_nothing() -> None:
    world = World(A)
    world.approach.broke(greeted=True, stable=True, silent=True)
    world.approach.gave_up()
    assert world.approach.state() == {}
    await world.approach.close()


@pytest.mark.parametrize("secret", [True, False])
async def test_only_with_tls(secret: bool) -> None:
    tried: list[Address] = []

    async def connect(address: Address) -> Nothing:
        tried.append(address)
        raise OSError("no")

    own = Address("10.0.0.9", 8883, "tls")
    approach = Approach([own], HINTS, None, (), secret=secret, clock=time.time, on_answer=lambda: None)
    with pytest.raises(Unreachable):
        await approach.open([A], connect)
    assert tried == ([own] if secret else [A, own])
