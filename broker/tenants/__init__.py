"""Who may do what: apps, their settings, secrets and groups, rules for topics, what they may spend, what was done."""
