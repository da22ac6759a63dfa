"""A whole update as one CUDA graph: replayed with new data and an annealed clip, nothing is launched from Python.

python examples/cuda_graph.py        # without a GPU the same step runs as it is
"""

import torch

import ppo_fast as pf

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, ACTIONS = 4096, 6


def main() -> None:
    torch.manual_seed(0)
    policy = torch.nn.Linear(16, ACTIONS, device=DEVICE)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3, capturable=DEVICE == "cuda")
    config = pf.LossConfig().on(DEVICE)  # its numbers lie on the device, where a replay reads them
    # A graph reads the memory that it was captured with: new data is copied there.
    obs, actions = torch.zeros(ROWS, 16, device=DEVICE), torch.zeros(ROWS, dtype=torch.long, device=DEVICE)
    old_log_prob, advantages = torch.zeros(ROWS, device=DEVICE), torch.zeros(ROWS, device=DEVICE)
    kept = {}

    def step():
        optimizer.zero_grad(set_to_none=False)
        out = pf.categorical_ppo_loss(policy(obs), actions, old_log_prob, advantages, config)
        out.loss.backward()
        optimizer.step()
        kept["stats"] = out.stats

    def new_data():
        obs.normal_()
        actions.random_(ACTIONS)
        advantages.normal_()
        with torch.no_grad():
            log_prob, _ = pf.categorical_log_prob(policy(obs), actions, entropy=False)
            old_log_prob.copy_(log_prob)

    new_data()
    replay = step
    if DEVICE == "cuda":
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):  # warm: workspaces are made before anything is captured
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        replay = graph.replay
    for update in range(5):
        new_data()
        config.set(clip_low=0.2 * (1 - update / 10), clip_high=0.2 * (1 - update / 10))
        for _ in range(4):
            replay()
        stats = kept["stats"].to_dict()  # the one time that the host waits
        print(f"update {update}: approx_kl {stats['approx_kl']:.5f}, clipped {stats['clip_fraction']:.1%}")
    print(f"on {DEVICE}" + ("" if DEVICE == "cuda" else ": no CUDA graph without a GPU"))


if __name__ == "__main__":
    main()
