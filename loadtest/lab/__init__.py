"""Lossy networks on one machine: real TCP between namespaces, through a relay that loses, delays and forgets."""
