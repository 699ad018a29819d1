"""The processes of a run, as torchrun starts them.

DDP: every process has the model. FSDP2: every process keeps a part of each parameter, gradient and optimizer
state (a DTensor). A "collective" must be called by every process.
"""

import contextlib
import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn

from support.processes import RANK, WORLD_SIZE


def start_group(device: torch.device) -> bool:
    """Connects the processes; True if that was done here, and not before by somebody else."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # or every process would shard onto the first GPU
    if WORLD_SIZE == 1 or dist.is_initialized():
        return False
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return True


def unwrapped(net: nn.Module) -> nn.Module:
    """The model behind torch.compile and DistributedDataParallel."""
    for wrapper in ("_orig_mod", "module"):
        net = getattr(net, wrapper, net)
    return net


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def total(x: Tensor) -> Tensor:
    """The sum of x over the processes, in place. Collective."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def gradient_sync(net: nn.Module, last: bool):
    """A context: gradients are exchanged once a step, with its last micro-batch."""
    if hasattr(net, "set_requires_gradient_sync"):  # FSDP
        net.set_requires_gradient_sync(last)
    elif hasattr(net, "no_sync") and not last:  # DDP
        return net.no_sync()
    return contextlib.nullcontext()


def shard(model: nn.Module, device: torch.device) -> nn.Module | None:
    """Shards the model in place; a layer's weights are gathered while the layer computes. Rank 0 gets a copy
    of the model in main memory, to save and to sample from; the others None.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for p in model.parameters():  # the same start everywhere
        dist.broadcast(p.data, 0)
    full = copy.deepcopy(model).cpu().eval() if RANK == 0 else None
    mesh = init_device_mesh(device.type, (WORLD_SIZE,))
    for layer in model.model["layers"]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return full


@torch.no_grad()
def gather_weights(model: nn.Module, full: nn.Module | None) -> None:
    """Copies the weights of a sharded model into `full`; nothing to do if that is the model. Collective."""
    if full is model:
        return
    copies = list(full.parameters()) if full is not None else []
    for i, p in enumerate(model.parameters()):
        weights = full_tensor(p)
        if copies:
            copies[i].copy_(weights)


def full_tensor(x):
    """The whole tensor, gathered if it is sharded. Collective."""
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


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """The inverse of `gather_state`: each process takes its part of a saved state."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, moments in state["state"].items():
        for name, value in moments.items():
            moments[name] = shard_like(params[i], value)
    optimizer.load_state_dict(state)


def shard_like(p: Tensor, x: Tensor) -> Tensor:
    """The part of the full tensor x that belongs to p, if p is sharded."""
    if not hasattr(p, "full_tensor") or getattr(x, "shape", None) != p.shape:
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None)
