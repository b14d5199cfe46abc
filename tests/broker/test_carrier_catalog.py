"""Which profile a device has, and why; a reload that fails changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from broker.carriers.catalog import Carriers, Catalog, read_link, shipped
from broker.carriers.command import carriers
from broker.carriers.reading import CarrierError

FILES = {
    "default": "",
    "railway": """[recognise]
operators = ['46020']
names = ['Tietong', '铁通']
networks = ['10.1.0.0/16', '2001:db8::/32']
""",
    "mobile": "[recognise]\noperators = ['46000', '46002']\nnetworks = ['10.0.0.0/8']\n",
    "china": "[recognise]\noperators = ['460']\nlinks = ['cellular']\n",
    "abroad": "[recognise]\noperators = ['2', '4', '46']\n",
    "wireless": "[recognise]\nlinks = ['wifi', 'ethernet']\n",
    "railway-edge": "inherits = 'railway'\n[recognise]\nproxies = ['192.0.2.0/24', '192.0.2.7/32']\n",
    "inner-edge": "[recognise]\nproxies = ['192.0.2.8/29']\n",
    "secure": "[recognise]\nlisteners = ['tls', '8883']\n",
    "odd-port": "[recognise]\nlisteners = ['1884']\n",
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / f"{name}.toml").write_text(text)
    return tmp_path


@pytest.fixture
def catalog(directory: Path) -> Catalog:
    return Catalog.read(directory)


@pytest.mark.parametrize(
    ("address", "listener", "port", "proxy", "name"),
    [
        ("203.0.113.1", "tcp", 1883, "", "default"),
        ("10.2.3.4", "tcp", 1883, "", "mobile"),
        ("10.1.3.4", "tcp", 1883, "", "railway"),
        ("::ffff:10.1.3.4", "tcp", 1883, "", "railway"),
        ("2001:db8::5", "tcp", 1883, "", "railway"),
        ("10.1.3.4", "tls", 8884, "", "secure"),
        ("10.1.3.4", "ws", 8883, "", "secure"),
        ("10.1.3.4", "tls", 1884, "", "odd-port"),
        ("10.1.3.4", "tls", 1884, "192.0.2.1", "railway-edge"),
        ("10.1.3.4", "tls", 1884, "192.0.2.7", "railway-edge"),
        ("10.1.3.4", "tcp", 1883, "192.0.2.9", "inner-edge"),
        ("10.1.3.4", "tcp", 1883, "198.51.100.1", "railway"),
        ("", "tcp", 0, "", "default"),
        ("unknown", "tcp", 0, "unknown", "default"),
    ],
)
def test_a_way_in_wins_over_an_address(
    catalog: Catalog, address: str, listener: str, port: int, proxy: str, name: str
) -> None:
    assert catalog.at_accept(address, listener=listener, port=port, proxy=proxy).name == name
    assert catalog.knows_ports


@pytest.mark.parametrize(
    ("accepted", "carrier", "link", "name"),
    [
        ("default", "", "", "default"),
        ("default", "46020", "", "railway"),
        ("default", "46020", "cellular", "railway"),
        ("default", "460-20", "5g", "railway"),
        ("default", " 460 20 ", "", "railway"),
        ("default", "46001", "", "china"),
        ("default", "46100", "", "abroad"),
        ("default", "310260", "", "default"),
        ("default", "234150", "", "abroad"),
        ("default", "2341500", "", "default"),
        ("default", "٤٦٠٢٠", "", "default"),
        ("default", "Tietong", "", "railway"),
        ("default", "TIETONG", "wifi", "railway"),
        ("default", "铁通", "", "railway"),
        ("default", "railway", "", "railway"),
        ("default", "x" * 65, "", "default"),
        ("default", "Nobody's", "", "default"),
        ("default", "Nobody's", "wifi", "wireless"),
        ("default", "", "cellular", "china"),
        ("default", "", "carrier pigeon", "default"),
        ("default", "46020", "wifi", "wireless"),
        ("default", "46020", "satellite", "default"),
        ("mobile", "", "wifi", "mobile"),
        ("mobile", "46020", "wifi", "mobile"),
        ("mobile", "46020", "cellular", "railway"),
        ("mobile", "Tietong", "wifi", "railway"),
        ("secure", "46020", "cellular", "secure"),
        ("railway-edge", "46000", "cellular", "railway-edge"),
    ],
)
def test_what_a_device_declares_wins_over_its_address_and_not_over_its_way_in(
    catalog: Catalog, accepted: str, carrier: str, link: str, name: str
) -> None:
    assert catalog.at_connect(catalog.profiles[accepted], carrier, link).name == name


def test_a_link_is_one_of_a_few_whatever_a_device_says() -> None:
    assert [read_link(text) for text in ("wifi", "WIFI", "", "x" * 1000)] == [
        "wifi",
        "other",
        "other",
        "other",
    ]


@pytest.mark.parametrize(
    ("carrier", "link", "name"),
    [
        ("46000", "cellular", "china-mobile"),
        ("46001", "cellular", "china-unicom"),
        ("46011", "cellular", "china-telecom"),
        ("46015", "cellular", "generic-cellular"),
        ("310260", "cellular", "overseas"),
        ("46692", "cellular", "overseas"),
        ("90103", "", "satellite"),
        ("46000", "wifi", "generic-wifi"),
        ("中国铁通", "wifi", "china-tietong"),
        ("长城宽带", "ethernet", "great-wall-broadband"),
        ("CMCC", "", "china-mobile"),
        ("", "satellite", "satellite"),
        ("", "cellular", "generic-cellular"),
    ],
)
def test_the_profiles_that_come_along_recognise_theirs(carrier: str, link: str, name: str) -> None:
    catalog = Catalog.read(None)
    assert catalog.at_connect(catalog.default, carrier, link).name == name


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("2409:8a00::1", "china-mobile"),
        ("2408:8207::1", "china-unicom"),
        ("240e:390::1", "china-telecom"),
        ("2001:da8:8000::1", "cernet"),
        ("192.0.2.1", "default"),
    ],
)
def test_and_some_addresses(address: str, name: str) -> None:
    assert Catalog.read(None).at_accept(address, listener="tcp", port=1883).name == name
    assert not Catalog.read(None).knows_ports


# Reload


def test_a_reload_takes_what_changed_and_old_profiles_stay_with_who_has_them(directory: Path) -> None:
    holder = Carriers(directory)
    before = holder.catalog.profiles["mobile"]
    (directory / "mobile.toml").write_text(FILES["mobile"] + "[heartbeat]\nmost = 500\n")
    (directory / "wireless.toml").unlink()
    holder.reload()
    after = holder.catalog.profiles["mobile"]
    assert (before.heartbeat.most, after.heartbeat.most) == (1200, 500)
    assert "wireless" not in holder.catalog.profiles
    assert holder.catalog.at_connect(before, "", "wifi") is before


def test_one_bad_file_and_everything_stays_as_it_was(directory: Path) -> None:
    holder = Carriers(directory)
    before = holder.catalog
    (directory / "mobile.toml").write_text("[heartbeat]\nmost = 500\n")
    (directory / "china.toml").write_text("\n[heartbeat]\nmost = 5\n")
    with pytest.raises(
        CarrierError, match=r"china\.toml:3: heartbeat\.most = 5: must be a whole number from 10 "
    ):
        holder.reload()
    assert holder.catalog is before


# The commands


def run(*arguments: str) -> Result:
    return CliRunner().invoke(carriers, list(arguments))


def test_check_prints_the_profiles(directory: Path) -> None:
    for answer in (run("check", str(directory)), run("check", "--carriers-directory", str(directory))):
        assert answer.exit_code == 0
        rows = answer.output.splitlines()
        assert rows[0].split() == [
            "name",
            "heartbeat",
            "acks",
            "window",
            "order",
            "networks",
            "addresses",
            "title",
        ]
        assert [row.split()[0] for row in rows[1:]] == sorted(FILES)
        [railway] = [row for row in rows if row.startswith("railway ")]
        assert railway.split() == [
            "railway",
            "240",
            "(30",
            "to",
            "1200)",
            "30",
            "(10",
            "to",
            "60)",
            "32",
            "to",
            "32",
            "oldest",
            "2",
            "0",
        ]
    assert "china-tietong" in run("check").output


def test_check_prints_every_mistake_and_fails(directory: Path) -> None:
    (directory / "china.toml").write_text("[heartbeat]\nmost = 5\nleast = 5\n")
    answer = run("check", str(directory))
    assert answer.exit_code == 1
    assert [line.split(": ")[0] for line in answer.output.splitlines()] == [
        f"{directory}/china.toml:2",
        f"{directory}/china.toml:3",
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["203.0.113.1"], "default: no other profile recognises it\nheartbeat 240 s, from 30 to 1200\n"),
        (["10.1.2.3"], "railway: its address is in 10.1.0.0/16 ({}/railway.toml:4)\n"),
        (["10.2.2.3"], "mobile: its address is in 10.0.0.0/8 ({}/mobile.toml:3)\n"),
        (["10.2.2.3", "--carrier", "46020"], "railway: it declares carrier 46020\n"),
        (["10.2.2.3", "--carrier", "46020", "--link", "wifi"], "mobile: its address is in 10.0.0.0/8 ("),
        (["203.0.113.1", "--carrier", "46020", "--link", "wifi"], "wireless: it declares link wifi\n"),
        (["10.2.2.3", "--listener", "tls"], "secure: the way it comes in\n"),
        (["10.2.2.3", "--port", "1884"], "odd-port: the way it comes in\n"),
        (["10.2.2.3", "--proxy", "192.0.2.7"], "railway-edge: the way it comes in\n"),
    ],
)
def test_find_says_whose_an_address_is_and_why(directory: Path, arguments: list[str], expected: str) -> None:
    answer = run("find", "--carriers-directory", str(directory), *arguments)
    assert answer.exit_code == 0, answer.output
    assert answer.output.startswith(expected.format(directory))


def test_find_needs_an_address(directory: Path) -> None:
    answer = run("find", "phone")
    assert answer.exit_code == 2
    assert "ADDRESS: 'phone' must be an IPv4 or IPv6 address" in answer.output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--link", "wify"], "'wify' is not one of 'cellular', 'ethernet', 'other', 'satellite', 'wifi'"),
        (["--listener", "udp"], "'udp' is not one of 'tcp', 'tls', 'ws'"),
        (["--port", "65536"], "65536 is not in the range 0<=x<=65535"),
        (["--proxy", "edge"], "--proxy: 'edge' must be an IPv4 or IPv6 address"),
    ],
)
def test_find_refuses_what_no_device_can_have(arguments: list[str], expected: str) -> None:
    answer = run("find", "203.0.113.1", *arguments)
    assert answer.exit_code == 2
    assert expected in answer.output


def test_find_says_that_a_carrier_is_nobodys(directory: Path) -> None:
    answer = run("find", "203.0.113.1", "--carriers-directory", str(directory), "--carrier", "nonsense")
    assert "no other profile recognises it; carrier 'nonsense' changes nothing" in answer.output


def test_the_profiles_that_come_along_are_right() -> None:
    assert run("check").exit_code == 0
    assert shipped().is_dir()
