"""Names of the keys. What stands in braces is the hash tag: keys with the same one are in one slot of a cluster, and
one script may touch them together.

    {7}            what an app has once: its log, its records, its settings
    {7.12}         one partition of its devices: 4,096 devnos
    {7/1234}       one message
    {7:5}          a 64th of its names: registration ids, aliases, tags, attributes
    {node:5}       one node
"""

from __future__ import annotations

from typing import Final

PARTITION_BITS: Final = 12
PARTITION: Final = 1 << PARTITION_BITS
"""Devices of one partition. 100 million devices are 24,414 partitions, which reach all shards of any cluster; a
full bitmap of one is 512 bytes, its routes are 48 KB."""


def tag_of_app(app_id: int) -> str:
    return f"{{{app_id}}}"


def of_app(app_id: int, what: str) -> str:
    return f"{{{app_id}}}:{what}"


def of_partition(app_id: int, partition: int, what: str) -> str:
    return f"{{{app_id}.{partition}}}:{what}"


def of_message(app_id: int, msg_id: int, what: str) -> str:
    return f"{{{app_id}/{msg_id}}}:{what}"


def of_node(number: int, what: str) -> str:
    return f"{{node:{number}}}:{what}"


def of_piece(app_id: int, file_id: str, number: int) -> str:
    """A piece of a file: as many slots as there are pieces."""
    return f"{{{app_id}/{file_id}.{number}}}:piece"
