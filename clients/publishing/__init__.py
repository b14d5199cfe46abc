"""The parts of the publisher SDK, one for each domain of the API; `clients.publisher` puts them together."""
