"""What happened in a generation, kept in a file and drawn: every draft, verification, acceptance, rejection and cancel."""
