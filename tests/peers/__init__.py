"""Other trainers' own tests, run without and with our integration enabled: `make peers`, or `python -m tests.peers sb3`."""
