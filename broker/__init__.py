"""What a push is, who it is for, where it is kept and where it goes."""
