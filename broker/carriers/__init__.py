"""Carriers: how devices of one network are treated, who is in it, and what was learned of it (decision 0023)."""
