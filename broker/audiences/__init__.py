"""Devices, what is known of them, and who a push is for."""
