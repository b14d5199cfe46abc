"""The embedded store's tables and threads, behind broker/store_sqlite.py."""
