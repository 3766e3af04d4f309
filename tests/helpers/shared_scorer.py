"""One of two processes of tests/training/test_logprobs.py: its share of the rows through a scorer that both hold.

python -m tests.helpers.shared_scorer KIND WRAPPER FILE        # under torchrun; FILE gets the gradients
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dirl_cli.diffusion.layout import Rows, pack
from dirl_cli.diffusion.states import trajectory_strip
from dirl_cli.training.logprobs import LogprobModel
from tests.helpers.answers import ANSWERS, BLOCK
from tests.helpers.small import MASK, PAD, random_lm


def shared_rows() -> list[Rows]:
    """An even number of micro-batches."""
    strips = [trajectory_strip(one, BLOCK, MASK) for group in ANSWERS for one in group]
    return pack(strips, 40, BLOCK, PAD).split(1)[:2]


def backpropagate(scorer: nn.Module, micro_batches: list[Rows]) -> None:
    for rows in micro_batches:
        scorer(rows)[0].sum().backward()


def data_parallel(scorer: LogprobModel) -> nn.Module:
    return DistributedDataParallel(scorer)


def sharded(scorer: LogprobModel) -> nn.Module:
    for layer in scorer.model.model.layers:
        fully_shard(layer)
    return fully_shard(scorer)


def sharded_head(scorer: LogprobModel) -> nn.Module:
    fully_shard(scorer.model.lm_head)
    return sharded(scorer)


if __name__ == "__main__":
    kind, wrapper, file = sys.argv[1:]
    dist.init_process_group("gloo")
    lm = random_lm(kind)
    scorer = LogprobModel(lm.model, lm.unsampled_ids, chunk=7)
    wrapped = {f.__name__: f for f in (data_parallel, sharded, sharded_head)}[wrapper](scorer)
    backpropagate(wrapped, shared_rows()[dist.get_rank() :: 2])
    whole = [p.grad if wrapper == "data_parallel" else p.grad.full_tensor() for p in scorer.parameters()]
    if dist.get_rank() == 0:
        torch.save([2 * gradient for gradient in whole], file)  # both wrappers take the mean over processes
    del wrapped  # whose threads would outlive the group
    dist.barrier()
    dist.destroy_process_group()
