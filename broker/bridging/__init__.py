"""Messages of a foreign MQTT broker that become pushes."""
