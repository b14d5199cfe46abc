"""The public HTTP API: `http.py` puts the endpoints of the other modules together, `call.py` is what they share."""
