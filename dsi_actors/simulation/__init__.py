"""The same core with simulated workers: discrete events instead of processes and clocks."""
