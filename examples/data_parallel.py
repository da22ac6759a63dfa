"""Two processes that share a batch: advantages are whitened over both, and the averaged gradient is that of one process.

python examples/data_parallel.py
"""

import tempfile

import torch
import torch.distributed as dist

import ppo_fast as pf

RANKS, T, N = 2, 12, 6
CONFIG = pf.LossConfig()


def batch():
    """Every process draws the same and takes its share; the masks leave the shares unequal."""
    torch.manual_seed(0)
    rewards, values, features = torch.randn(T, N), torch.randn(T, N), torch.randn(T, N, 4)
    mask = torch.arange(T)[:, None] < torch.tensor([12, 3, 7, 10, 12, 2])
    return rewards, values, features, mask


def gradient(columns, group=None, ranks=1):
    rewards, values, features, mask = (x[:, columns] for x in batch())
    weight = torch.full((4,), 0.1, requires_grad=True)
    advantages, _ = pf.gae(rewards, values, mask=mask)
    advantages = pf.whiten(advantages, mask=mask, group=group)  # mean and deviation over all ranks
    tokens = mask.sum()
    if group is not None:
        dist.all_reduce(tokens, group=group)
    log_prob = features @ weight
    out = pf.ppo_loss(
        log_prob, torch.zeros_like(log_prob), advantages, CONFIG, mask=mask,
        denominator=tokens / ranks,  # data parallel averages gradients, so each rank's share is taken `ranks` times
    )  # fmt: skip
    out.loss.backward()
    return weight.grad


def process(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    share = slice(rank * N // RANKS, (rank + 1) * N // RANKS)
    got = gradient(share, dist.group.WORLD, RANKS)
    dist.all_reduce(got)
    got /= RANKS  # as DistributedDataParallel does
    torch.testing.assert_close(got, gradient(slice(None)))
    print(f"rank {rank}: the gradient of the whole batch")
    dist.destroy_process_group()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(process, (folder,), nprocs=RANKS)


if __name__ == "__main__":
    main()
