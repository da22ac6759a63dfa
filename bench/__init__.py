"""Microbenchmarks: one file an op, each with its floor, its peers and its parity check. `ppo-fast bench --help`."""
