"""Holdfast beside other MQTT servers and the limit of the machine: `python -m loadtest.peers`."""
