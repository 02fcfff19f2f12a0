"""Guesses without a model, and drafts for a target with another vocabulary."""
