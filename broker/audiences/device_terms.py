"""What a change makes of a device, and the index terms that hold for one: the same in every store. Pure functions."""

from __future__ import annotations

from broker.audiences.attributes import changed as changed_attributes
from broker.audiences.attributes import term_changes as attribute_changes
from broker.audiences.attributes import terms as attribute_terms
from broker.model import Device, DeviceChange, Term, TermKey


def terms(device: Device) -> set[TermKey]:
    """The index terms that hold for a device."""
    found: set[TermKey] = {(Term.ALL, ""), (Term.PLATFORM, device.platform)}
    found.update((Term.TAG, tag) for tag in device.tags)
    if device.alias is not None:
        found.add((Term.ALIAS, device.alias))
    for name, value in device.attributes.items():
        found.update(attribute_terms(name, value))
    return found


def term_changes(before: Device, after: Device) -> tuple[set[TermKey], set[TermKey]]:
    """What holds no more, and what holds now; found from the fields that differ, for most changes touch one."""
    old = {(Term.TAG, tag) for tag in before.tags - after.tags}
    new = {(Term.TAG, tag) for tag in after.tags - before.tags}
    if before.platform != after.platform:
        old.add((Term.PLATFORM, before.platform))
        new.add((Term.PLATFORM, after.platform))
    if before.alias != after.alias:
        old.update([(Term.ALIAS, before.alias)] if before.alias is not None else ())
        new.update([(Term.ALIAS, after.alias)] if after.alias is not None else ())
    if before.attributes is not after.attributes:
        old_terms, new_terms = attribute_changes(before.attributes, after.attributes)
        old |= old_terms
        new |= new_terms
    return old, new


def changed(device: Device, change: DeviceChange) -> Device:
    tags = device.tags if change.set_tags is None else change.set_tags
    return Device(  # dataclasses.replace takes ten times as long
        device.app_id,
        device.devno,
        device.registration_id,
        device.platform if change.platform is None else change.platform,
        device.alias if change.alias is None else change.alias or None,
        (tags | change.add_tags) - change.remove_tags,
        device.mobile if change.mobile is None else change.mobile or None,
        device.token_generation + change.revoke_tokens,
        device.created_at,
        device.last_online_at,
        changed_attributes(device.attributes, change.attributes),
    )


def differ(before: Device, after: Device) -> bool:
    """As rows: 1 and true are equal to Python, and other values to us."""
    return after != before or repr(after.attributes) != repr(before.attributes)


def too_many(device: Device, change: DeviceChange) -> str | None:
    """What the device has too many of after the change."""
    tags, attributes = len(device.tags), len(device.attributes)
    if change.add_tags and change.most_tags is not None and tags > change.most_tags:
        return f"tags: a device has at most {change.most_tags}, not {tags}"
    if change.attributes and change.most_attributes is not None and attributes > change.most_attributes:
        return f"attributes: a device has at most {change.most_attributes}, not {attributes}"
    return None
