"""Profiles from files: what is inherited, and that a mistake names file, line, key, and what is allowed."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import pytest

from broker.carriers.catalog import shipped
from broker.carriers.profile import Address, CarrierProfile
from broker.carriers.reading import SECTIONS, CarrierError, read_profiles

Write = Callable[[Mapping[str, str]], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(files: Mapping[str, str]) -> Path:
        for name, text in {"default.toml": "", **files}.items():
            (tmp_path / name).write_text(text)
        return tmp_path

    return write


def errors(directory: Path) -> list[str]:
    with pytest.raises(CarrierError) as caught:
        read_profiles(directory)
    assert str(caught.value) == "\n".join(caught.value.errors)
    return [error.removeprefix(f"{directory}/") for error in caught.value.errors]


# What is inherited


def test_what_a_file_does_not_say_comes_from_the_profile_that_it_inherits_from(write: Write) -> None:
    directory = write(
        {
            "default.toml": "[heartbeat]\nleast = 20\n[acks]\nfirst = 12\n[[addresses]]\nhost = 'main'\nport = 1\n",
            "base.toml": "title = 'Base'\n[heartbeat]\nmost = 500\n[recognise]\noperators = ['46000']\n",
            "leaf.toml": "inherits = 'base'\n[heartbeat]\nstart = 100\n",
        }
    )
    profiles = read_profiles(directory).profiles
    leaf = profiles["leaf"]
    assert (leaf.heartbeat.least, leaf.heartbeat.start, leaf.heartbeat.most) == (20, 100, 500)
    assert leaf.acks.first == 12.0
    assert [address.host for address in leaf.addresses] == ["main"]
    assert (leaf.name, leaf.title) == ("leaf", "")
    assert leaf.recognise.operators == ()
    assert profiles["default"].heartbeat.most == 1200


def test_a_list_is_taken_whole_and_an_empty_one_too(write: Write) -> None:
    address = "[[addresses]]\nhost = 'a'\nport = 1\n"
    directory = write(
        {
            "default.toml": address * 2,
            "one.toml": address.replace("'a'", "'b'"),
            "none.toml": "addresses = []",
        }
    )
    profiles = read_profiles(directory).profiles
    assert [len(profiles[name].addresses) for name in ("default", "one", "none")] == [2, 1, 0]


def test_off_takes_back_what_was_inherited(write: Write) -> None:
    directory = write(
        {
            "default.toml": "[tcp]\nmss = 1360\ncongestion = 'bbr'\n",
            "a.toml": "[tcp]\nmss = 'off'\ncongestion = 'off'\n",
        }
    )
    tcp = read_profiles(directory).profiles["a"].tcp
    assert (tcp.mss, tcp.congestion) == (None, None)


def test_hidden_files_and_those_of_others_are_no_profiles(write: Write) -> None:
    directory = write({".a.toml": "[", "b.txt": "[", "c.toml~": "["})
    assert list(read_profiles(directory).profiles) == ["default"]


# The profiles that come along


def test_the_ten_carriers_of_the_issue_come_along() -> None:
    names = {
        "cernet",
        "china-mobile",
        "china-telecom",
        "china-tietong",
        "china-unicom",
        "default",
        "generic-cellular",
    }
    names |= {"generic-wifi", "great-wall-broadband", "overseas", "satellite"}
    assert set(read_profiles(shipped()).profiles) == names


def test_the_default_says_everything_and_changes_nothing() -> None:
    document = tomllib.loads((shipped() / "default.toml").read_text())
    for section in set(SECTIONS) - {"recognise"}:
        assert set(document[section]) == {item.name for item in msgspec.structs.fields(SECTIONS[section])}, (
            section
        )
    profile = read_profiles(shipped()).profiles["default"]
    assert profile == CarrierProfile(name="default", title=profile.title)


@pytest.mark.parametrize("file", sorted(shipped().glob("*.toml")), ids=lambda file: file.stem)
def test_each_value_has_its_source_or_says_that_it_is_a_default(file: Path) -> None:
    """A comment stands above it, or above the first of the lines it is one of."""
    explained = True
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if line.startswith("#"):
            explained = True
        elif not line or line.startswith("["):
            explained = False
        elif not line.startswith(("name", "title", "inherits", "links")):
            assert explained, f"{file.name}:{number}: {line}"


def test_each_key_is_in_the_documentation_with_its_default() -> None:
    document = (Path(__file__).parents[2] / "docs/carriers.md").read_text()
    [page] = re.findall(r"(?ms)^## Every key$(.*?)^## ", document)
    rows = dict(re.findall(r"(?m)^\| `([a-z_.]+)` \|(.*?)\|", page))
    tables = {**SECTIONS, "addresses": Address}
    keys = {
        f"{name}.{item.name}": item
        for name, table in tables.items()
        for item in msgspec.structs.fields(table)
    }
    assert set(rows) == {"title", "inherits", *keys}
    for path, item in keys.items():
        default = {None: "off", (): "", "": "", msgspec.NODEFAULT: ""}.get(item.default, f"{item.default}")
        assert rows[path].strip(" `") == default.removesuffix(".0"), path


# Mistakes

ROWS = [
    ("[heartbeat]\nleast = 5\n", ":2: heartbeat.least = 5: must be a whole number from 10 to 65535"),
    ("\n\nheartbeat.least = 5\n", ":3: heartbeat.least = 5: must be a whole number from 10 to 65535"),
    ("heartbeat = { least = 5 }\n", ":1: heartbeat.least = 5: must be a whole number from 10 to 65535"),
    ("[acks]\n# slow\nfirst = 0\n", ":3: acks.first = 0: must be a number above 0"),
    ("[acks]\nfirst = inf\n", ":2: acks.first = inf: must be a number above 0"),
    ("[acks]\nfirst = '9'\n", ":2: acks.first = '9': must be a number above 0"),
    ("[delivery]\norder = 'newest'\n", ":2: delivery.order = 'newest': must be one of oldest, urgent"),
    ("[tcp]\nmss = 1\n", ':2: tcp.mss = 1: must be a whole number from 88 to 32767, or "off"'),
    ("[tcp]\nfragment = 1\n", ':2: tcp.fragment = 1: must be true or false, or "off"'),
    ("[delivery]\nwindow = 'off'\n", ":2: delivery.window = 'off': must be a whole number from 1 to 65535"),
    ("[heartbeat]\nlest = 5\n", ":2: heartbeat.lest: no such key; did you mean least?"),
    ("[heart]\nleast = 5\n", ":1: heart: no such key or section; did you mean heartbeat?"),
    ("window = 5\n", ":1: window: no such key or section; did you mean delivery.window?"),
    ("zzz = 5\n", ":1: zzz: no such key or section; there is name, title, inherits, recognise, "),
    ("heartbeat = 5\n", ":1: heartbeat: must be a table"),
    ("addresses = 5\n", ":1: addresses: must be tables, each under [[addresses]]"),
    ("[[addresses]]\nhost = 'a'\n", ":1: addresses: port is missing"),
    (
        "[[addresses]]\nhost = 'a'\nport = 1\n[[addresses]]\nhost = 'b'\nport = 0\n",
        ":6: addresses.port = 0: must be a whole number from 1 to 65535",
    ),
    ("[[addresses]]\nhost = ''\nport = 1\n", ":2: addresses.host = '': must be text of at least 1 character"),
    ("[recognise]\nlinks = ['5g']\n", ":2: recognise.links = ['5g']: must be a list, and in it one of "),
    (
        "[recognise]\nnetworks = '10.0.0.0/8'\n",
        ":2: recognise.networks = '10.0.0.0/8': must be a list, and in it text",
    ),
    (
        "[recognise]\nnetworks = [\n  '10.0.0.0/8',\n  '10.0.0.1/8',\n]\n",
        ":4: recognise.networks: '10.0.0.1/8' must be a network such as 192.0.2.0/24, without bits after its length",
    ),
    (
        "[recognise]\nproxies = ['edge']\n",
        ":2: recognise.proxies: 'edge' must be a network such as 192.0.2.0/24",
    ),
    (
        "[recognise]\nlisteners = ['udp']\n",
        ":2: recognise.listeners: 'udp' must be one of tcp, tls, ws, or a port",
    ),
    (
        "[recognise]\nlisteners = ['65536']\n",
        ":2: recognise.listeners: '65536' must be one of tcp, tls, ws, or a port",
    ),
    ("[recognise]\noperators = ['cmcc']\n", ":2: recognise.operators: 'cmcc' must be MCC and MNC in digits"),
    (
        "[recognise]\nnetwork_files = ['gone.txt']\n",
        ":2: recognise.network_files: 'gone.txt' cannot be read: ",
    ),
    (
        '[recognise]\nnetwork_files = ["a\\u0000b"]\n',
        ":2: recognise.network_files: 'a\\x00b' cannot be read: ",
    ),
    ("title = 'a'\nname = 'other'\n", ':2: name = "other": must be "wrong", as the file is called'),
    ("title = 5\n", ":1: title = 5: must be text"),
    ("inherits = 5\n", ":1: inherits = 5: must be text"),
    ("\ninherits = 'defualt'\n", ':2: inherits = "defualt": no such profile; did you mean default?'),
    ("inherits = 'wrong'\n", ':1: inherits = "wrong": goes round in a circle'),
    ("[heartbeat]\nstart = 2000\n", ":2: heartbeat.start = 2000: must be at most heartbeat.most = 1200"),
    ("[heartbeat]\nmost = 100\n", ":2: heartbeat.start = 240: must be at most heartbeat.most = 100"),
    ("[acks]\nleast = 90\n", ":2: acks.least = 90: must be at most acks.first = 30"),
    ("[reconnect]\ncap = 0.5\n", ":2: reconnect.base = 1: must be at most reconnect.cap = 0.5"),
    ("[delivery]\nwindow = 8\n", ":2: delivery.first_window = 32: must be at most delivery.window = 8"),
    ("[tcp]\nkeepalive_count = 3\n", ":2: tcp.keepalive_count: needs tcp.keepalive_idle, which is off"),
    ("[tcp]\nretry_pause = 0\n", ':2: tcp.retry_pause = 0: must be a whole number from 1 to 120, or "off"'),
    ("[tcp]\nretry_pause = 3\n", ":2: tcp.retry_pause: needs tcp.user_timeout, which is off"),
    ("[acks]\nfirst = 30\nfirst = 30\n", ":3: not valid TOML: Cannot overwrite a value"),
    ("[acks]\nfirst = [\n", ":2: not valid TOML: "),
]


@pytest.mark.parametrize(("text", "expected"), ROWS, ids=[row[0] for row in ROWS])
def test_a_mistake_names_file_line_key_and_what_is_allowed(write: Write, text: str, expected: str) -> None:
    [error] = errors(write({"wrong.toml": text}))
    assert error.startswith(f"wrong.toml{expected}")


def test_every_mistake_is_told_not_only_the_first(write: Write) -> None:
    directory = write({"a.toml": "[acks]\nfirst = 0\nlast = 1\n", "b.toml": "[", "c.toml": "inherits = 'x'"})
    assert [error[:9] for error in errors(directory)] == ["a.toml:2:", "a.toml:3:", "b.toml:1:", "c.toml:1:"]


def test_a_list_of_something_else_does_not_fill_the_log(write: Write) -> None:
    directory = write({"a.toml": "[recognise]\nnetwork_files = ['a.txt']\n", "a.txt": "row\n" * 1000})
    found = errors(directory)
    assert (len(found), found[-1]) == (51, "and 950 more mistakes")


def test_a_mistake_is_told_where_it_was_written_and_not_where_it_was_inherited(write: Write) -> None:
    files = {"base.toml": "[acks]\nfirst = 0\n", "leaf.toml": "inherits = 'base'\n", "broken.toml": "["}
    found = errors(write({**files, "heir.toml": "inherits = 'broken'\n"}))
    assert [error.split(":")[0] for error in found] == ["base.toml", "broken.toml"]


def test_a_circle_is_told_of_each_file_in_it(write: Write) -> None:
    found = errors(
        write({"a.toml": "inherits = 'b'", "b.toml": "inherits = 'c'", "c.toml": "inherits = 'a'"})
    )
    assert len(found) == 3
    assert all("goes round in a circle" in error for error in found)


@pytest.mark.parametrize("name", ["Upper.toml", "two words.toml", "9.toml", "a_b.toml", f"{'a' * 41}.toml"])
def test_a_name_is_one_that_a_metric_can_carry(write: Write, name: str) -> None:
    [error] = errors(write({name: ""}))
    assert error.startswith(f"{name}:1: the file's name must be ")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("proxies = ['10.0.0.0/8']", "recognise.proxies: '10.0.0.0/8' is claimed at "),
        ("networks = ['10.0.0.0/8']", "recognise.networks: '10.0.0.0/8' is claimed at "),
        ("listeners = ['tls']", "recognise.listeners: 'tls' is claimed by a, too"),
        ("operators = ['460']", "recognise.operators: '460' is claimed by a, too"),
        ("names = ['Tietong']", "recognise.names: 'tietong' is claimed by a, too"),
        ("links = ['wifi']", "recognise.links: 'wifi' is claimed by a, too"),
    ],
)
def test_two_profiles_cannot_recognise_the_same(write: Write, text: str, line: str) -> None:
    [error] = errors(write({"a.toml": f"[recognise]\n{text}\n", "b.toml": f"[recognise]\n{text}\n"}))
    assert error.startswith(f"b.toml:2: {line}")


def test_what_is_recognised_is_checked_beside_other_mistakes(write: Write) -> None:
    found = errors(
        write({"a.toml": "[recognise]\nnetworks = ['10.0.0.0/64']\n", "b.toml": "[acks]\nfirst = 'x'\n"})
    )
    assert sorted(error.partition(":")[0] for error in found) == ["a.toml", "b.toml"]


def test_a_profile_may_say_the_same_twice(write: Write) -> None:
    text = "[recognise]\nnetworks = ['10.0.0.0/8', '10.0.0.0/8']\nnames = ['a', 'A']\n"
    assert len(read_profiles(write({"a.toml": text})).networks) == 1


def test_a_network_file_has_a_network_a_line_and_its_mistakes_their_lines(write: Write) -> None:
    files = {
        "a.toml": "[recognise]\nnetwork_files = ['a.txt']\n",
        "b.toml": "[recognise]\nnetworks = ['11.0.0.0/8']\n",
    }
    directory = write({**files, "a.txt": "# of 2026\n10.0.0.0/8  # all of it\n\n2001:db8::/32\n"})
    networks = read_profiles(directory).networks
    assert {(str(prefix), name) for prefix, (name, _) in networks.items()} == {
        ("10.0.0.0/8", "a"),
        ("2001:db8::/32", "a"),
        ("11.0.0.0/8", "b"),
    }
    wrong, claimed = errors(write({**files, "a.txt": "\n10.0.0.0/64\n11.0.0.0/8\n"}))
    assert wrong.startswith("a.txt:2: recognise.network_files: '10.0.0.0/64' must be a network")
    assert (
        claimed == f"b.toml:2: recognise.networks: '11.0.0.0/8' is claimed at {directory}/a.txt:3 for a, too"
    )


def test_the_default_is_for_those_that_no_other_profile_recognises(write: Write) -> None:
    [error] = errors(write({"default.toml": "[recognise]\nlinks = ['wifi']\n"}))
    assert error.startswith("default.toml:1: recognise: default is for those")
    [error] = errors(write({"default.toml": "inherits = 'a'\n", "a.toml": ""}))
    assert error.startswith("default.toml:1: inherits: default is what the others inherit from")


def test_a_directory_without_a_default_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("")
    assert errors(tmp_path) == [f"{tmp_path}: has no default.toml, from which the other profiles inherit"]


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    [error] = errors(tmp_path / "none")
    assert error == f"{tmp_path}/none: cannot be read: No such file or directory"


def test_text_that_is_no_utf8_is_refused(write: Write) -> None:
    directory = write({})
    (directory / "a.toml").write_bytes(b"title = '\xff'")
    [error] = errors(directory)
    assert "a.toml: cannot be read: 'utf-8' codec" in error
