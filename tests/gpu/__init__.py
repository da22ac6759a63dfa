"""Tests that need an NVIDIA GPU: `make gpu`, or pytest -m gpu tests/gpu. Everywhere else they are collected and skipped."""
