"""What goes wrong for a device."""

from __future__ import annotations

from gateway.mqtt import Reason


class DeviceError(Exception):
    """The server refused something this device said. `reason` is MQTT's, `code` the public API's (None: not
    given), `text` the server's explanation."""

    def __init__(self, text: str, reason: Reason = Reason.UNSPECIFIED_ERROR, code: int | None = None) -> None:
        super().__init__(text)
        self.text = text
        self.reason = reason
        self.code = code

    def __str__(self) -> str:
        number = f", code {self.code}" if self.code is not None else ""
        return f"{self.text} (reason 0x{self.reason:02x}{number})"


class DeviceStopped(DeviceError):
    """The device is closed, or was refused for good: it will not connect again."""
