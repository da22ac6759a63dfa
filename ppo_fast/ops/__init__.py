"""One file an op: its public function with docstring, checks and autograd. Formulas stand in reference.py and csrc/math."""
