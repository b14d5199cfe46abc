"""Pauses that end together."""

from __future__ import annotations

import asyncio

import pytest

from broker.pulse import PULSE, end_of_pause, rest


@pytest.mark.parametrize(
    ("now", "pause", "end"),
    [
        (10.0, 0.25, 10.25),
        (10.125, 0.25, 10.25),
        (10.0, 1.0, 11.0),
        (10.125, 1.0, 11.0),
        (10.125, 0.0625, 10.1875),  # too short to meet a common moment
        (10.125, 0.125, 10.25),
        (10.1875, 0.125, 10.25),
    ],
)
def test_a_pause_ends_at_a_common_moment(now: float, pause: float, end: float) -> None:
    assert end_of_pause(now, pause) == end


async def test_the_shorter_rest_ends_one_moment_earlier() -> None:
    loop = asyncio.get_running_loop()
    before, went_on = loop.time(), []

    async def worker(pause: float) -> None:
        await rest(pause)
        went_on.append(pause)

    await asyncio.gather(worker(2 * PULSE), worker(PULSE))
    assert went_on == [PULSE, 2 * PULSE]
    assert loop.time() >= before + PULSE  # two moments, however near the first one was
