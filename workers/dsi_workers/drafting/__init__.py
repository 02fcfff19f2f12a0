"""Prompt lookup (drafts without a model), and drafts for a target with another vocabulary."""
