"""The actor of one request: it carries out what its core decides, and keeps account of what that took."""
