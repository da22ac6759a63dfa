"""Our ops inside other people's trainers: one module each, `ppo_fast.integrations.sb3` and so on, of the same shape.

    from ppo_fast.integrations import sb3

    sb3.enable()        # every trainer of that package in this process, from now on
    sb3.disable()       # exactly as it was
    with sb3.enabled(): ...

Importing a module here imports its trainer and changes nothing. `enable()` first checks the installed version and the
parameters of everything that it will replace; where one does not fit it raises a line that says so, with nothing touched.
Modules whose trainer offers subclasses or registries have those too; each docstring says what runs on our kernels. CleanRL's
scripts offer nothing to hook into: `python -m ppo_fast.integrations.cleanrl ppo.py` rewrites one.
"""

#: Every integration and the distribution on PyPI that it is for.
TRAINERS = {
    "sb3": "stable-baselines3",
    "sb3_contrib": "sb3-contrib",
    "rsl_rl": "rsl-rl-lib",
    "skrl": "skrl",
    "torchrl": "torchrl",
    "rllib": "ray",
    "rl_games": "rl-games",
    "tianshou": "tianshou",
    "verl": "verl",
    "trl": "trl",
    "openrlhf": "openrlhf",
    "nemo_rl": "nemo-rl",
    "slime": "slime",
}
