"""Where devices are to connect: asked over HTTP or with one datagram, answered with a small signed document."""
