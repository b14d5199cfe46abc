"""What others run: device SDK, publisher SDK, command line. Imports gateway.mqtt, nothing else of ours."""
