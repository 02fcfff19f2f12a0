"""Does a worker keep protocol/SPEC.md? We play the orchestrator, and it is asked all that the standard promises."""
