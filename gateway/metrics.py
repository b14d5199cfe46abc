"""What a node counts. docs/operating.md explains each for the operator."""

from __future__ import annotations

from broker.metrics import Metrics
from gateway.tcp_info import RTT_BOUNDS


class NodeMetrics:
    """Labels are bounded: transports, protocol versions, and reasons that the code names."""

    def __init__(self, metrics: Metrics) -> None:
        self.accepted = metrics.counters("connections_accepted", "Connections accepted.", "transport")
        self.connects = metrics.counters(
            "connects", "CONNECTs answered with success.", "transport", "version", "role"
        )
        self.refusals = metrics.counters("refusals", "Connections and CONNECTs refused.", "reason")
        self.disconnects = metrics.counters("disconnects", "Connections that ended after CONNECT.", "reason")
        self.takeovers = metrics.counter("takeovers", "Connections closed because the device came back.")
        self.sent = metrics.counters("deliveries_sent", "Pushes written to devices.", "kind")
        self.acked = metrics.counters("deliveries_acked", "Pushes acknowledged by devices.", "kind")
        self.abandoned = metrics.counter(
            "deliveries_abandoned",
            "Pushes unacknowledged when their connection ended; sent again on the next.",
        )
        self.evicted = metrics.counter(
            "deliveries_evicted", "Broadcasts the newest-N rule dropped at connect."
        )
        self.too_large = metrics.counter(
            "deliveries_too_large",
            "Pushes over the Maximum Packet Size a device announced, or its carrier's.",
        )
        self.latency = metrics.histograms(
            "delivery_seconds", "From a push's acceptance to a device's acknowledgement.", "kind"
        )
        self.inbound = metrics.counters("publishes_received", "Messages from devices and publishers.", "kind")
        self.publishes_refused = metrics.counters(
            "publishes_refused", "Messages from devices and publishers that changed nothing.", "reason"
        )
        self.topic_messages = metrics.counter("topic_messages_sent", "Ordinary messages sent to subscribers.")
        self.topic_dropped = metrics.counter(
            "topic_messages_dropped", "Ordinary messages that found no room in a session."
        )
        self.fetches = metrics.counter("inbox_fetches", "Devices whose inbox was read from the store.")
        self.settle_errors = metrics.counter(
            "settle_errors", "Batches of receipts the store did not take; they are tried again."
        )
        self.session_errors = metrics.counter(
            "session_errors", "Batches of session changes the store did not take; they are tried again."
        )
        self.fenced = metrics.counter(
            "acks_fenced", "Acknowledgements that did not count: another node had taken the device."
        )
        self.sweeps = metrics.counters("sweeps", "Apps looked up for what no doorbell told.", "reason")
        self.swept = metrics.counters("swept", "What sweeps found.", "kind")
        self.skipped = metrics.counter("fanout_skipped", "Devices skipped by a broadcast: socket too slow.")
        self.tcp_rtt = metrics.histograms(
            "tcp_rtt_seconds",
            "Round-trip times of a sample of connections, as the kernel has them.",
            "carrier",
            bounds=RTT_BOUNDS,
        )
        self.tcp_segments = metrics.counters(
            "tcp_segments",
            "Data segments sent to a sample of connections, repeated ones included.",
            "carrier",
        )
        self.tcp_retransmits = metrics.counters("tcp_retransmits", "Of these, the repeated ones.", "carrier")
        self.acked_targeted = self.acked.labels("targeted")
        self.acked_broadcast = self.acked.labels("broadcast")
        self.latency_targeted = self.latency.labels("targeted")
        self.latency_broadcast = self.latency.labels("broadcast")

    def count_in_flight(self) -> float:
        """Pushes in all windows."""
        sent = sum(child.value for child in self.sent.children.values())
        return sent - self.acked_targeted.value - self.acked_broadcast.value - self.abandoned.value
