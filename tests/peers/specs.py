"""Which tests of which trainer are run, and what they need beside the trainer."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Peer:
    """One trainer. Its package and test files lie together in a throw-away folder, ahead of everything on the path."""

    #: Name in `ppo_fast.integrations`.
    name: str
    #: Distribution on PyPI and the version whose tests these are.
    package: str
    version: str
    #: Pinned distributions that are installed beside it, without their dependencies: what .venv lacks.
    beside: tuple[str, ...] = ()
    #: Where the test files come from: "sdist" of that version, "wheel" where that has them, or a repository and the tag to
    #: clone.
    tests_from: str | tuple[str, str] = "sdist"
    #: Files or folders for pytest, in the root of the sdist or the repository; none: it has no tests of its own.
    paths: tuple[str, ...] = ("tests",)
    #: tests/integrations/test_<this>.py, where that is another name than its own.
    parity: str = ""
    #: More arguments for pytest: -k, --deselect with the reason in a comment.
    arguments: tuple[str, ...] = ()
    #: Where no wheel can be installed: folders of the repository that are put on the path in place of it.
    from_source: tuple[str, ...] = ()
    #: Folders of the repository that are removed, so that tests find the installed package and not the checkout's.
    shadows: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


#: Ray and Hydra with what importing them needs.
RAY = (
    "ray==2.60.0", "hydra-core==1.3.8", "omegaconf==2.4.0", "antlr4-python3-runtime==4.9.3", "msgpack==1.2.4",
    "requests==2.34.2", "urllib3==2.8.0",
    "idna==3.20", "certifi==2026.10.18", "charset-normalizer==3.5.2", "jsonschema==4.26.0", "attrs==26.1.0",
    "referencing==0.37.0", "rpds-py==2026.9.1", "jsonschema-specifications==2025.9.1",
)  # fmt: skip
PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "sb3",
            "stable-baselines3",
            "2.9.2",
            paths=("tests/test_gae.py", "tests/test_distributions.py", "tests/test_run.py", "tests/test_save_load.py"),
            arguments=("-k", "gae or PPO or ppo or distribution or Distribution or A2C or a2c or entropy or log_prob"),
        ),
        Peer(
            "sb3_contrib",
            "sb3-contrib",
            "2.9.2",
            paths=("tests/test_invalid_actions.py", "tests/test_lstm.py", "tests/test_distributions.py"),
            parity="sb3",
        ),
        Peer(
            "nemo_rl",
            "nemo-rl",  # of that name there is a placeholder on PyPI: its repository is put on the path
            "0.6.0",
            beside=(
                *RAY,
                "transformers==5.11.0",
                "tokenizers==0.22.2",
                "huggingface-hub==1.11.0",
                "httpx",
                "httpcore",
                "h11",
                "anyio",
                "sniffio",
            ),
            from_source=(".",),
            tests_from=("https://github.com/NVIDIA-NeMo/RL", "main"),
            paths=("tests/unit/algorithms/test_ppo.py", "tests/unit/algorithms/test_loss_functions.py"),
            # its conftest starts Ray; its tests of losses ask for a GPU, which stubs/nemo_rl/cuda_is_cpu.py spares them
            arguments=(
                "-c",
                "/dev/null",
                "--rootdir",
                ".",
                "--noconftest",
                "-p",
                "cuda_is_cpu",
                "-k",
                "gae or raw_reward or mse_value or clipped_pg or nll or calculate_kl or masked_mean",
            ),
        ),
        Peer(
            "slime",
            "slime",  # of that name there is a placeholder on PyPI: its repository is put on the path
            "0.3.1",
            from_source=(".",),
            tests_from=("https://github.com/THUDM/slime", "v0.3.1"),
            paths=(
                "tests/test_chunked_gae.py",
                "tests/test_discounted_returns.py",
                "tests/test_ppo_logprob_entropy.py",
                "tests/test_policy_loss.py",
            ),
            arguments=("-k", "not 131072 and not 8192 and not vocab_parallel"),  # minutes each, the last with processes
        ),
        Peer(
            "verl",
            "verl",
            "0.9.1",
            beside=(*RAY, "orjson==3.13.0", "codetiming==1.4.0"),
            tests_from="wheel",
            paths=tuple(
                f"tests/trainer/ppo/test_{name}_on_cpu.py"
                for name in (
                    "core_algos",
                    "loss_aggregation",
                    "dynamic_policy_losses",
                    "value_loss_normalization",
                    "reinforce_pp_multiturn",
                    "metric_utils",
                )
            ),
        ),
        Peer(
            "rsl_rl",
            "rsl-rl-lib",
            "5.5.1",
            tests_from=("https://github.com/leggedrobotics/rsl_rl", "v5.5.1"),
            paths=(
                "tests/algorithms/test_ppo.py",
                "tests/storage",
                "tests/modules",
                "tests/extensions",
                "tests/runners",
            ),
            shadows=("rsl_rl",),
        ),
        Peer(
            "skrl",
            "skrl",
            "2.1.1",
            tests_from=("https://github.com/Toni-SM/skrl", "2.0.0"),
            paths=tuple(f"tests/agents/torch/test_{name}.py" for name in ("a2c", "amp", "ppo", "rpo", "trpo")),
            arguments=("-p", "skrl_fields"),  # the public repository has the tests of 2.0; see the stub
            shadows=("skrl",),
        ),
        Peer(
            "torchrl",
            "torchrl",
            "0.14.1",
            tests_from=("https://github.com/pytorch/rl", "v0.14.1"),
            paths=("test/objectives/test_values.py", "test/objectives/test_ppo.py"),
            arguments=("-k", "gae or GAE or adv or Adv or (TestPPO and not compile)"),
            shadows=("torchrl",),
        ),
        Peer(
            "tianshou",
            "tianshou",
            "2.0.1",
            beside=(
                "deepdiff==9.1.0",
                "orderly-set==5.5.0",
                "cachebox==6.2.10",
                "sensai-utils==1.6.0",
                "overrides==7.7.0",
                "h5py==3.16.0",
                "pettingzoo==1.27.0",
            ),
            tests_from=("https://github.com/thu-ml/tianshou", "v2.0.1"),
            paths=("test/base/test_returns.py", "test/base/test_policy.py"),
            shadows=("tianshou",),
        ),
        # rl_games has one test, `assert True`; the wheel of ray has none
        Peer("rl_games", "rl-games", "1.6.5", paths=(), beside=("tensorboardx==2.6.5",)),
        Peer(
            "rllib",
            "ray",
            "2.60.0",
            paths=(),
            beside=(
                *RAY[1:],
                "tensorboardx==2.6.5",
                "dm-tree==0.1.10",
                "absl-py==2.5.1",
                "wrapt==2.5.2",
                "pyarrow==26.0.1",
                "scipy==1.17.1",
            ),
        ),
        # 1.16.0 has no tests in its archive; those of 1.10.0.dev0, the last commit stored here. What they download stands in
        # stubs/trl/hub.py; what that has not fails in both runs, as do tests of functions that are gone since.
        Peer(
            "trl",
            "trl",
            "1.16.0",
            tests_from=("https://github.com/huggingface/trl", "v1.10.0"),
            shadows=("trl",),
            paths=("tests/test_utils.py", "tests/test_grpo_trainer.py"),
            arguments=(
                "-p",
                "hub",
                "-k",
                "SelectiveLogSoftmax or EntropyFromLogits or ChunkedLogProb or PatchChunked or NanStd or (TestGRPO and not "
                "VLM and not Slow and not vllm and not liger and not environment) or HighEntropyMask",
            ),
        ),
        Peer(
            "openrlhf",
            "openrlhf",
            "0.11.2",
            tests_from="wheel",
            paths=tuple(
                f"tests/test_{name}.py"
                for name in ("loss_aggregation", "actor_entropy_temperature", "kl_estimator_gradient", "experience")
            ),
            arguments=("-p", "stand_ins"),
        ),
    )
}
