"""Triton kernels: the same raw calls as ppo_fast._C, for NVIDIA, AMD and Intel GPUs, without a compiler on the machine.

One file an op. Inputs are checked before they come here (`ppo_fast/ops`); outputs are allocated by the caller.
"""
