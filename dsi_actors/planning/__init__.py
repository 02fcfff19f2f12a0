"""From latencies to settings."""
