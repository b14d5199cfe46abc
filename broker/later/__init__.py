"""What happens at a time: schedules, and pushes that go in parts."""
