"""That no single app and no single address decides what a whole network's devices are told."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.carriers.panels import KEYS, PANELS, SPOKEN, Silences, count_in, panel_of, voice_of
from broker.carriers.silences import BINS, LEAST, LEAST_DEATHS, advise, bin_of, weigh
from broker.carriers.tally import Tally

WISH, LEAST_TOLD, MOST_TOLD = 240, 30, 1200
APPS = range(10)
ADDRESSES = [f"198.51.{n}.7" for n in range(40)]

Panels = dict[int, int]


def voice(app: int, address: str) -> int:
    return voice_of(app, panel_of(address))


def ended(
    panels: Panels, apps: range, addresses: list[str], silence: float, count: int, *, died: bool
) -> None:
    """So often for each app and address."""
    for app in apps:
        for address in addresses:
            for _ in range(count):
                count_in(panels, voice(app, address), bin_of(silence), died=died)


def told(panels: Panels) -> int:
    silences = Silences()
    silences.add(panels, 1.0)
    return silences.advise(WISH, LEAST_TOLD, MOST_TOLD)


def all_as_one(panels: Panels) -> int:
    """Without panels."""
    survived, died = [0.0] * BINS, [0.0] * BINS
    for key, count in panels.items():
        panel, number = divmod(key, BINS)
        if panel < 2 * PANELS:
            (died if panel % 2 else survived)[number] += count
    return advise(weigh(survived, died), WISH, LEAST_TOLD, MOST_TOLD)


@pytest.fixture
def sound() -> Panels:
    """A network that lets 230 seconds pass, seen by all apps from everywhere."""
    panels: Panels = {}
    ended(panels, APPS, ADDRESSES, 230, 20, died=False)
    return panels


@pytest.fixture
def forgetful() -> Panels:
    """One that forgets before 200 seconds, and lets 100 pass."""
    panels: Panels = {}
    ended(panels, APPS, ADDRESSES, 100, 20, died=False)
    ended(panels, APPS, ADDRESSES, 200, 1, died=True)
    return panels


def test_what_all_apps_see_everywhere_is_told(forgetful: Panels) -> None:
    assert told(forgetful) == all_as_one(forgetful) == 100


def test_an_app_that_drops_its_connections_everywhere_shortens_nobodys_heartbeat(sound: Panels) -> None:
    ended(sound, range(3, 4), ADDRESSES, 40, 100, died=True)
    assert all_as_one(sound) < 60
    assert told(sound) == WISH


def test_one_address_that_forges_devices_of_all_apps_shortens_nobodys_heartbeat(sound: Panels) -> None:
    ended(sound, APPS, ADDRESSES[:1], 40, 400, died=True)
    assert all_as_one(sound) < 60
    assert told(sound) == WISH


def test_the_only_app_of_an_installation_is_not_poisoned_from_one_address() -> None:
    panels: Panels = {}
    ended(panels, range(1), ADDRESSES, 230, 100, died=False)
    ended(panels, range(1), ADDRESSES[:1], 40, 4000, died=True)
    assert told(panels) == WISH


@pytest.mark.parametrize(("apps", "addresses"), [(range(3, 4), ADDRESSES), (APPS, ADDRESSES[:1])])
def test_who_forges_survival_alone_gets_nobody_beyond_the_profiles_word(
    forgetful: Panels, apps: range, addresses: list[str]
) -> None:
    count = 240 * len(APPS) * len(ADDRESSES) // (len(apps) * len(addresses))
    ended(forgetful, apps, addresses, 1500, count, died=False)
    assert all_as_one(forgetful) > 600
    assert told(forgetful) == WISH


def test_one_app_in_one_place_is_believed_where_there_is_nobody_else() -> None:
    panels: Panels = {}
    ended(panels, range(1), ADDRESSES[:1], 100, LEAST, died=False)
    ended(panels, range(1), ADDRESSES[:1], 200, LEAST_DEATHS, died=True)
    assert told(panels) == 100


def test_a_few_devices_elsewhere_do_not_hold_up_what_all_others_know() -> None:
    panels: Panels = {}
    ended(panels, range(1), ADDRESSES, 100, 100, died=False)
    ended(panels, range(1), ADDRESSES, 200, 3, died=True)
    for app in (1, 2, 3):
        few = int(SPOKEN * 100 * len(ADDRESSES)) - 1
        ended(panels, range(app, app + 1), ADDRESSES[:1], 230, few, died=False)
    assert told(panels) == 100


def test_two_apps_that_disagree_leave_the_profile_its_word() -> None:
    panels: Panels = {}
    ended(panels, range(1), ADDRESSES, 230, 100, died=False)
    ended(panels, range(1, 2), ADDRESSES, 40, 100, died=True)
    assert told(panels) == WISH


counts = st.dictionaries(st.integers(0, KEYS - 1), st.integers(1, 3000), max_size=80)


@given(counts, st.integers(10, 2000))
def test_the_profiles_bounds_hold_whatever_is_counted(panels: Panels, wish: int) -> None:
    silences = Silences()
    silences.add(panels, 1.0)
    assert 30 <= silences.advise(wish, 30, 1200) <= 1200
    assert Silences().advise(240, 30, 1200) == 240


def test_a_voice_is_that_of_the_app_and_the_network_of_the_address() -> None:
    assert voice(7, "198.51.100.1") == voice(7, "198.51.100.254") == voice(7, "::ffff:198.51.100.9")
    assert voice(7, "2001:db8:1::1") == voice(7, "2001:db8:1:ffff::9")
    assert len({voice(0, address) for address in ADDRESSES}) == PANELS
    assert len({voice(app, "") for app in APPS}) == PANELS
    assert {voice(app, address) for app in APPS for address in ADDRESSES} == set(range(PANELS * PANELS))


def test_what_is_kept_of_a_network_is_bounded_whoever_counts() -> None:
    tally = Tally()
    for voice in range(PANELS * PANELS):
        for silence in range(BINS):
            for died in (False, True):
                count_in(tally.panels, voice, silence, died=died)
    assert len(tally.panels) == KEYS
    tally.panels = dict.fromkeys(tally.panels, 100_000)  # of a day
    assert len(msgspec.msgpack.encode(tally)) < 10_000
