"""What became of pushes: reports, and callbacks to publishers."""
