"""Loaded into a trainer's pytest: enables the integration that PPO_FAST_PEER names, before any test is collected."""

from __future__ import annotations

import importlib
import os
import warnings


def pytest_configure(config):
    name = os.environ.get("PPO_FAST_PEER")
    if name:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a trainer's warnings at import would be errors in some suites
            importlib.import_module(f"ppo_fast.integrations.{name}").enable()


def pytest_report_header():
    return f"ppo_fast: {os.environ.get('PPO_FAST_PEER') or 'not enabled'}"
