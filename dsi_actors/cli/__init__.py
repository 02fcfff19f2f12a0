"""The commands of `dsi-actors`, one in each module. Benchmarks are in dsi_actors/benches."""
