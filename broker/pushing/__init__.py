"""What a publisher sends: read, checked, held to the app's rules, stored; and taken back."""
