"""Which plan is fastest: expected times from measured latencies and acceptance, and whether to speculate at all."""
