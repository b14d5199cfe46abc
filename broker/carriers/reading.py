"""Profiles from their files: inheritance, and every mistake with its file, line, key, and what is allowed.

A directory is read whole or not at all. Each file is checked by itself first, key by key, so a mistake is told where
it was written and not where it was inherited; then what the merged sections say together.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec

from broker.carriers.prefixes import Prefix, read_prefix
from broker.carriers.profile import DEFAULT, Address, CarrierProfile, Recognise
from broker.config import OFF, OFF_ALLOWED, allowed, nearest

MAX_PROFILES: Final = 1000  # each is a label of metrics
MAX_ERRORS: Final = 50  # told: a list of networks that is no such list would fill the log
INHERITS: Final = "inherits"
OWN_KEYS: Final = ("name", "title", INHERITS)
ADDRESSES: Final = "addresses"
RECOGNISE: Final = "recognise"
SECTIONS: Final[Mapping[str, type[msgspec.Struct]]] = {
    item.name: item.type
    for item in msgspec.structs.fields(CarrierProfile)
    if isinstance(item.type, type) and issubclass(item.type, msgspec.Struct)
}
IN_ORDER: Final = (
    # section, the lower, the higher
    ("heartbeat", "least", "start"),
    ("heartbeat", "start", "most"),
    ("acks", "least", "first"),
    ("acks", "first", "most"),
    ("reconnect", "base", "cap"),
    ("delivery", "first_window", "window"),
)
NEEDED: Final = (
    # of a TCP setting, another one
    ("keepalive_interval", "keepalive_idle"),
    ("keepalive_count", "keepalive_idle"),
    (
        "retry_pause",
        "user_timeout",
    ),  # without it TCP gives up after a number of retries, which would come faster
)
LISTENERS: Final = ("tcp", "tls", "ws")
PORT: Final = re.compile(r"[1-9]\d{0,4}", re.ASCII)
OPERATOR: Final = re.compile(r"\d{1,6}", re.ASCII)
LISTENERS_ALLOWED: Final = "one of tcp, tls, ws, or a port"
OPERATORS_ALLOWED: Final = "MCC and MNC in digits, such as 46000, or the beginning of one"

_NAME: Final = re.compile("[a-z][a-z0-9-]{0,39}")
_HEADER: Final = re.compile(r"\s*(\[\[?)\s*([\w.-]+)\s*\]")
_KEY: Final = re.compile(r"\s*([\w.-]+)\s*=")
_QUOTED: Final = re.compile(r"""(["'])(.*?)\1""")
_SYNTAX_LINE: Final = re.compile(r" \(at line (\d+), column \d+\)")

Place = tuple[str | int, ...]  # of a key in a document


class CarrierError(Exception):
    """Profiles that cannot be used; `errors` has one line for each mistake: file, line, key, and what is allowed."""

    def __init__(self, errors: list[str]) -> None:
        super().__init__("\n".join(errors))
        self.errors = errors


@dataclass(slots=True)
class Networks:
    """Whose each network is, and where that was said; what one profile claims no other may."""

    of: dict[Prefix, tuple[str, str]] = field(default_factory=dict)

    def claim(self, text: str, name: str, place: str) -> None:
        """Raises ValueError that says what is wrong."""
        prefix = read_prefix(text)
        other, where = self.of.setdefault(prefix, (name, place))
        if other != name:
            raise ValueError(f"is claimed at {where} for {other}, too")


@dataclass(frozen=True, slots=True)
class Read:
    """What a directory says. `networks` and `proxies`: of which profile they are, by its name."""

    profiles: Mapping[str, CarrierProfile]
    networks: Mapping[Prefix, tuple[str, str]]
    proxies: Mapping[Prefix, tuple[str, str]]


def read_profiles(directory: Path) -> Read:
    """All `*.toml` of it. Raises CarrierError. 100,000 networks take a second: not on the event loop."""
    try:
        files = sorted(filter(_is_profile, directory.iterdir()), key=lambda file: file.stem)
    except OSError as error:
        raise CarrierError([f"{directory}: cannot be read: {error.strerror}"]) from error
    if len(files) > MAX_PROFILES:
        raise CarrierError([f"{directory}: {len(files)} profiles, at most {MAX_PROFILES} are allowed"])
    reader = _Reader(directory)
    for file in files:
        reader.take(file)
    if directory / f"{DEFAULT}.toml" not in files:
        reader.errors.append(f"{directory}: has no {DEFAULT}.toml, from which the other profiles inherit")
    profiles = {name: profile for name in reader.sources if (profile := reader.profile(name)) is not None}
    for name, profile in profiles.items():
        reader.claim(name, profile.recognise)
    if reader.errors:
        more = len(reader.errors) - MAX_ERRORS
        raise CarrierError(
            [*reader.errors[:MAX_ERRORS], *([f"and {more} more mistakes"] if more > 0 else [])]
        )
    return Read(profiles, reader.networks.of, reader.proxies.of)


def _is_profile(file: Path) -> bool:
    """Hidden ones are an editor's."""
    return file.suffix == ".toml" and not file.name.startswith(".")


@dataclass(frozen=True, slots=True)
class _Source:
    """One file."""

    file: Path
    inherits: str | None
    values: dict[str, Any]  # sections as dicts, as far as they are right
    lines: Mapping[Place, int]
    texts: Mapping[str, int]  # the line of each text between quotes

    def at(self, path: Place, text: str = "") -> str:
        """`file:line` of a key, or of what is nearest around it; with `text`, of that in its list."""
        around = (path[:depth] for depth in range(len(path), 0, -1))
        line = next((self.lines[place] for place in around if place in self.lines), 1)
        return f"{self.file}:{max(line, self.texts.get(text, 0))}"


class _Reader:
    """Gathers profiles, and every mistake in them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.errors: list[str] = []
        self.sources: dict[str, _Source] = {}
        self._unreadable: set[str] = set()
        self.networks = Networks()
        self.proxies = Networks()
        self._claims: dict[tuple[str, str], str] = {}

    # One file by itself

    def take(self, file: Path) -> None:
        try:
            text = file.read_text(encoding="utf-8")
            document = tomllib.loads(text)
        except (OSError, UnicodeDecodeError) as error:
            self.errors.append(f"{file}: cannot be read: {error}")
            self._unreadable.add(file.stem)
        except tomllib.TOMLDecodeError as error:
            self.errors.append(_not_toml(file, text, str(error)))
            self._unreadable.add(file.stem)
        else:
            self._take_document(file, text, document)

    def _take_document(self, file: Path, text: str, document: dict[str, Any]) -> None:
        parent = document.get(INHERITS, DEFAULT)
        inherits = None if file.stem == DEFAULT or not isinstance(parent, str) else parent
        source = _Source(file, inherits, {"name": file.stem}, _lines_of(text), _texts_in(text))
        self.sources[file.stem] = source
        if not _NAME.fullmatch(file.stem):
            self._wrong(source, (), f"the file's name must be {_NAME.pattern} and .toml")
        for key, value in document.items():
            match key:
                case "name" | "title" | "inherits":
                    self._take_own(source, key, value)
                case "addresses":
                    source.values[key] = self._read_addresses(source, value)
                case _ if key in SECTIONS:
                    self._take_section(source, key, value)
                case _:
                    self._wrong(source, (key,), f"{key}: no such key or section{_near(key)}")

    def _take_own(self, source: _Source, key: str, value: object) -> None:
        if not isinstance(value, str):
            self._wrong(source, (key,), f"{key} = {value!r}: must be text")
        elif key == "name" and value != source.file.stem:
            self._wrong(
                source, (key,), f'name = "{value}": must be "{source.file.stem}", as the file is called'
            )
        elif key == INHERITS and source.file.stem == DEFAULT:
            self._wrong(source, (key,), f"inherits: {DEFAULT} is what the others inherit from")
        elif key == "title":
            source.values[key] = value

    def _take_section(self, source: _Source, section: str, values: object) -> None:
        if section == RECOGNISE and source.file.stem == DEFAULT:
            self._wrong(
                source, (section,), f"{section}: {DEFAULT} is for those that no other profile recognises"
            )
        elif not isinstance(values, dict):
            self._wrong(source, (section,), f"{section}: must be a table")
        else:
            source.values[section] = self._read_table(source, (section,), SECTIONS[section], values)

    def _read_addresses(self, source: _Source, values: object) -> list[dict[str, Any]]:
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            self._wrong(source, (ADDRESSES,), f"{ADDRESSES}: must be tables, each under [[{ADDRESSES}]]")
            return []
        return [
            self._read_table(source, (ADDRESSES, number), Address, value)
            for number, value in enumerate(values)
        ]

    def _read_table(
        self, source: _Source, path: Place, struct: type[msgspec.Struct], values: dict[str, Any]
    ) -> dict[str, Any]:
        """Those of the values that are right."""
        fields = {item.name: item for item in msgspec.structs.fields(struct)}
        for key in (key for key, item in fields.items() if item.required and key not in values):
            self._wrong(source, path, f"{path[0]}: {key} is missing")
        right = {}
        for key, value in values.items():
            if key not in fields:
                self._wrong(source, (*path, key), f"{path[0]}.{key}: no such key{nearest(key, fields)}")
                continue
            try:
                right[key] = _convert(value, fields[key].type)
            except ValueError as error:
                self._wrong(source, (*path, key), f"{path[0]}.{key} = {_shown(value)}: {error}")
        return right

    # What it inherits

    def profile(self, name: str) -> CarrierProfile | None:
        """None: it, or one that it inherits from, has a mistake."""
        before = len(self.errors)
        values = self._merge(name, ())
        if values is None:
            return None
        self._check_order(self.sources[name], values)
        if len(self.errors) > before:
            return None
        try:
            return msgspec.convert(values, CarrierProfile)
        except msgspec.ValidationError:
            assert self.errors  # of one of its files, told before
            return None

    def _merge(self, name: str, heirs: tuple[str, ...]) -> dict[str, Any] | None:
        source = self.sources[name]
        if source.inherits is None:
            return source.values
        if source.inherits in (name, *heirs):
            self._wrong(source, (INHERITS,), f'inherits = "{source.inherits}": goes round in a circle')
            return None
        if source.inherits not in self.sources:
            others = nearest(source.inherits, set(self.sources) - {name})
            if source.inherits not in (DEFAULT, *self._unreadable):  # that has been said
                self._wrong(source, (INHERITS,), f'inherits = "{source.inherits}": no such profile{others}')
            return None
        inherited = self._merge(source.inherits, (*heirs, name))
        return None if inherited is None else _merged(inherited, source.values)

    def _check_order(self, source: _Source, values: dict[str, Any]) -> None:
        for section, low, high in IN_ORDER:
            settings = {**_defaults(section), **values.get(section, {})}
            if settings[low] > settings[high]:
                key = low if low in source.values.get(section, {}) else high
                more = f"must be at most {section}.{high} = {settings[high]:g}"
                self._wrong(source, (section, key), f"{section}.{low} = {settings[low]:g}: {more}")
        tcp = {**_defaults("tcp"), **values.get("tcp", {})}
        for key, needed in NEEDED:
            if tcp[key] is not None and tcp[needed] is None:
                self._wrong(source, ("tcp", key), f"tcp.{key}: needs tcp.{needed}, which is off")

    # Who is in it

    def claim(self, name: str, recognise: Recognise) -> None:
        source = self.sources[name]
        for key, one_of in (("proxies", self.proxies), ("networks", self.networks)):
            for text in getattr(recognise, key):
                place = source.at((RECOGNISE, key), text)
                self._claim_network(one_of, text, name, place, key)
        for file in recognise.network_files:
            self._claim_file(source, self._directory / file)
        for text in recognise.listeners:
            if text not in LISTENERS and not (PORT.fullmatch(text) and int(text) <= 65_535):
                self._claims_wrongly(source, "listeners", text, f"must be {LISTENERS_ALLOWED}")
            self._claim_word(source, "listeners", text)
        for text in recognise.operators:
            if not OPERATOR.fullmatch(text):
                self._claims_wrongly(source, "operators", text, f"must be {OPERATORS_ALLOWED}")
            self._claim_word(source, "operators", text)
        for text in {name, *(text.casefold() for text in recognise.names)}:
            self._claim_word(source, "names", text)
        for text in recognise.links:
            self._claim_word(source, "links", text)

    def _claim_network(self, one_of: Networks, text: str, name: str, place: str, key: str) -> None:
        try:
            one_of.claim(text, name, place)
        except ValueError as error:
            self.errors.append(f"{place}: {RECOGNISE}.{key}: {text!r} {error}")

    def _claim_file(self, source: _Source, file: Path) -> None:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:  # no UTF-8; or a NUL in its name
            self._claims_wrongly(source, "network_files", file.name, f"cannot be read: {error}")
            return
        for number, line in _networks_in(text):
            self._claim_network(self.networks, line, source.file.stem, f"{file}:{number}", "network_files")

    def _claim_word(self, source: _Source, key: str, text: str) -> None:
        other = self._claims.setdefault((key, text), source.file.stem)
        if other != source.file.stem:
            self._claims_wrongly(source, key, text, f"is claimed by {other}, too")

    def _claims_wrongly(self, source: _Source, key: str, text: str, error: str) -> None:
        self.errors.append(f"{source.at((RECOGNISE, key), text)}: {RECOGNISE}.{key}: {text!r} {error}")

    def _wrong(self, source: _Source, path: Place, error: str) -> None:
        self.errors.append(f"{source.at(path)}: {error}")


def _not_toml(file: Path, text: str, error: str) -> str:
    found = _SYNTAX_LINE.search(error)
    line = int(found[1]) if found else len(text.splitlines())
    return f"{file}:{line}: not valid TOML: {_SYNTAX_LINE.sub('', error)}"


def _convert(value: object, kind: Any) -> Any:
    """Raises ValueError that says what is allowed."""
    words = allowed(msgspec.inspect.type_info(kind))
    if value == OFF and words.endswith(OFF_ALLOWED):
        return None
    try:
        taken = msgspec.convert(value, kind)
    except msgspec.ValidationError:
        taken = math.nan
    if isinstance(taken, float) and not math.isfinite(taken):
        raise ValueError(f"must be {words}")
    return taken


def _near(key: str) -> str:
    """The section that has it, or what is called nearly so."""
    within = [f"{section}.{key}" for section, struct in SECTIONS.items() if key in struct.__struct_fields__]
    return nearest(within[0] if within else key, within or (*OWN_KEYS, *SECTIONS, ADDRESSES))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _merged(inherited: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A section's keys one by one; a list is taken whole. Who is in a carrier is not inherited."""
    merged = {key: value for key, value in inherited.items() if key not in (*OWN_KEYS, RECOGNISE)}
    for key, value in own.items():
        merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
    return merged


def _defaults(section: str) -> dict[str, Any]:
    return {item.name: item.default for item in msgspec.structs.fields(SECTIONS[section])}


def _networks_in(text: str) -> Iterator[tuple[int, str]]:
    """Lines that are not empty and no comment, with their numbers."""
    for number, line in enumerate(text.splitlines(), 1):
        network = line.partition("#")[0].strip()
        if network:
            yield number, network


def _texts_in(text: str) -> dict[str, int]:
    """Where each text between quotes stands first."""
    found: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.startswith("#"):
            for quoted in _QUOTED.finditer(line):
                found.setdefault(quoted[2], number)
    return found


def _lines_of(text: str) -> dict[Place, int]:
    """Where keys and sections begin, which tomllib does not tell. No key here has text of more than one line, so a
    line is a key, a header, or of a list."""
    found: dict[Place, int] = {}
    section: Place = ()
    many: dict[Place, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            section = tuple(header[2].split("."))
            if header[1] == "[[":
                many[section] = many.get(section, -1) + 1
                found.setdefault(section, number)
                section = (*section, many[section])
            found.setdefault(section, number)
        elif key := _KEY.match(line):
            found.setdefault((*section, *key[1].split(".")), number)
    return found
