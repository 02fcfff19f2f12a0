"""The actor that starts local worker processes, watches them, and starts them again when they die."""
