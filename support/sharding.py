"""FSDP2: every process keeps a part of each parameter, gradient and optimizer state (a DTensor)."""

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn


def shard(model: nn.Module, device: torch.device) -> nn.Module | None:
    """Shards the model in place; a layer's weights are gathered while the layer computes. Rank 0 gets a copy
    of the model in main memory, to save and to sample from; the others None.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for p in model.parameters():  # the same start everywhere
        dist.broadcast(p.data, 0)
    full = copy.deepcopy(model).cpu().eval() if dist.get_rank() == 0 else None
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.model["layers"]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return full


@torch.no_grad()
def gather_weights(model: nn.Module, full: nn.Module | None) -> None:
    """Copies the weights of a sharded model into `full`. Collective: every rank must call it."""
    copies = list(full.parameters()) if full is not None else []
    for i, p in enumerate(model.parameters()):
        weights = full_tensor(p)
        if copies:
            copies[i].copy_(weights)


def full_tensor(x):
    """A tensor; of a sharded one all parts. Collective: every rank must call it."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def gather_state(state, keep: bool):
    """A nest of dicts and lists with its sharded tensors gathered, in main memory and only if `keep`.
    Collective.
    """
    if isinstance(state, dict):
        return {k: gather_state(v, keep) for k, v in state.items()}
    if isinstance(state, list):
        return [gather_state(v, keep) for v in state]
    if not hasattr(state, "full_tensor"):
        return state
    full = state.full_tensor()
    return full.cpu() if keep else None


def shard_like(p: Tensor, x: Tensor) -> Tensor:
    """The part of the full tensor x that belongs to p, if p is sharded."""
    if not hasattr(p, "full_tensor") or getattr(x, "shape", None) != p.shape:
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None)
