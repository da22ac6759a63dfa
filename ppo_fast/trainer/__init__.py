"""Thin trainers on top of the public ops: `ppo_fast.trainer.control` for gymnasium environments."""
