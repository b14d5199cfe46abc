"""What is asked of one trial, and what can go wrong before anything is measured."""

from __future__ import annotations

from dataclasses import dataclass

MIXED_AWAY = 5.0  # seconds


class TrialError(Exception):
    """The trial cannot be run, or not go on; nothing is said about the server."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Rates are a second, times seconds, sizes bytes."""

    scenario: str
    devices: int = 1000
    rate: float = 0.0  # of what the scenario says; 0: nothing is pushed
    seconds: float = 30.0
    connect_rate: float = 500.0
    processes: int = 1
    keep_alive: int = 240
    patience: float = 10.0
    payload: int = 100
    first_device: int = 0
    connections: int = 64  # of the publisher, over HTTP
    waiting: int = 5  # pushes that wait for each device of offline-backlog
    churn: float = 0.1  # share of the devices that go away in a minute of mixed-day
    away: float = MIXED_AWAY  # for how long they do, on average
    receipts: float = 0.3  # for each push of mixed-day
    window: float = 1.0  # of the report's lines
