"""The parts of the fleet's store, on Redis or Valkey. The data model: docs/decisions/0019-a-fleet-on-redis.md."""
