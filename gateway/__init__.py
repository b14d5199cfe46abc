"""A node: the connections of devices, their sessions, and the pushes that go out over them."""
