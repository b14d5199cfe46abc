"""`holdfast carriers`: what was learned; `check` and `find`: what the profiles say, without a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import click

from broker.carriers.catalog import LINKS, Catalog, shipped
from broker.carriers.learning import KEPT_DAYS
from broker.carriers.prefixes import Prefix, pack
from broker.carriers.profile import CarrierProfile
from broker.carriers.reading import CarrierError, Read, read_profiles
from broker.config import Config, config_options
from broker.printing import print_json, print_rows, print_table

PROFILE_COLUMNS: Final = ("name", "heartbeat", "acks", "window", "order", "networks", "addresses", "title")
LEARNED_COLUMNS: Final = (
    *("carrier", "link", "online", "connects", "lifetime", "silent", "heartbeat"),
    *("ack_p50", "ack_p99", "answered", "round_trip", "retransmits"),
)


@click.group(invoke_without_command=True)
@click.option(
    "--days",
    type=click.IntRange(1, KEPT_DAYS),
    default=1,
    show_default=True,
    help="Today, by UTC, and so many days before it less one.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@config_options("server.data_dir", "store.url")
@click.pass_context
def carriers(context: click.Context, config: Config, days: int, as_json: bool) -> None:
    """Carriers: what was learned of each, and how its devices are treated.

    Without a command: a table of the networks, with what their connections lived through.
    """
    if context.invoked_subcommand is None:
        from broker.command import list_carriers  # it has the stores, of which the others need none

        learned = list_carriers(config, days)
        if as_json:
            print_json(learned)
        else:
            print_table(LEARNED_COLUMNS, [_learned_row(network) for network in learned])


def _learned_row(network: Mapping[str, Any]) -> dict[str, object]:
    return {
        **{name: network[name] for name in ("carrier", "link", "online", "connects", "heartbeat")},
        "lifetime": _seconds(network["lifetime_p50"]),
        "silent": _percent(network["silent_share"]),
        "ack_p50": _seconds(network["ack_p50"]),
        "ack_p99": _seconds(network["ack_p99"]),
        "answered": _percent(network["answered_share"]),
        "round_trip": _seconds(network["round_trip"]),
        "retransmits": _percent(network["retransmit_share"]),
    }


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f} s" if value >= 10 else f"{value:.3f} s"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f} %"


_where = config_options("carriers.directory")


@carriers.command()
@click.argument("directory", required=False, type=click.Path(path_type=Path))
@_where
def check(config: Config, directory: Path | None) -> None:
    """Check profiles: print what they say, or every mistake with its file and line.

    DIRECTORY is that of the settings where it is left out.
    """
    found = _read(directory or config.carriers.directory)
    counts = dict.fromkeys(found.profiles, 0)
    for name, _ in found.networks.values():
        counts[name] += 1
    print_rows([PROFILE_COLUMNS, *(_row(profile, counts[name]) for name, profile in found.profiles.items())])


@carriers.command()
@click.argument("address")
@click.option("--carrier", default="", help="What the device declares: MCC+MNC or a name.")
@click.option("--link", type=click.Choice(sorted(LINKS)), default=None, help="What it declares.")
@click.option(
    "--listener",
    type=click.Choice(["tcp", "tls", "ws"]),
    default="tcp",
    show_default=True,
    help="Where it comes in.",
)
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Where it comes in.")
@click.option("--proxy", default="", metavar="ADDRESS", help="The address of ours that a PROXY header names.")
@_where
def find(
    config: Config, address: str, carrier: str, link: str | None, listener: str, port: int, proxy: str
) -> None:
    """Say which profile a device with this address has, and why."""
    packed = _packed(address, "ADDRESS")
    if proxy:
        _packed(proxy, "--proxy")
    link = link or ""
    found = _read(config.carriers.directory)
    catalog = Catalog(found)
    accepted = catalog.at_accept(address, listener=listener, port=port, proxy=proxy)
    by_link = catalog.at_connect(accepted, "", link)
    profile = catalog.at_connect(accepted, carrier, link)
    if profile is not by_link:
        why = f"it declares carrier {carrier}"
    elif profile is not accepted:
        why = f"it declares link {link}"
    else:
        why = _why_accepted(accepted, found, packed)
        if carrier:
            why += f"; carrier {carrier!r} changes nothing"
    click.echo(f"{profile.name}: {why}")
    heartbeat = profile.heartbeat
    click.echo(f"heartbeat {heartbeat.start} s, from {heartbeat.least} to {heartbeat.most}")


def _packed(address: str, name: str) -> bytes:
    packed = pack(address)
    if packed is None:
        raise click.BadParameter(f"{address!r} must be an IPv4 or IPv6 address", param_hint=name)
    return packed


def _read(directory: Path | None) -> Read:
    try:
        return read_profiles(directory or shipped())
    except CarrierError as error:
        for line in error.errors:
            click.echo(line)
        raise SystemExit(1) from error


def _why_accepted(accepted: CarrierProfile, found: Read, packed: bytes) -> str:
    if accepted.recognise.proxies or accepted.recognise.listeners:
        return "the way it comes in"
    prefix = _innermost(found.networks, packed)
    if prefix is None:
        return "no other profile recognises it"
    return f"its address is in {prefix} ({found.networks[prefix][1]})"


def _innermost(networks: Mapping[Prefix, object], packed: bytes) -> Prefix | None:
    around = (prefix for prefix in networks if packed in prefix)
    return min(around, key=lambda prefix: prefix.last - prefix.first, default=None)


def _row(profile: CarrierProfile, networks: int) -> Sequence[str]:
    heartbeat, acks, delivery = profile.heartbeat, profile.acks, profile.delivery
    return (
        profile.name,
        f"{heartbeat.start} ({heartbeat.least} to {heartbeat.most})",
        f"{acks.first:g} ({acks.least:g} to {acks.most:g})",
        f"{delivery.first_window} to {delivery.window}",
        delivery.order,
        str(networks),
        str(len(profile.addresses)),
        profile.title,
    )
