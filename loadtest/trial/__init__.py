"""The load test that any operator runs against any deployment: `holdfast-loadtest` (docs/loadtest.md)."""
