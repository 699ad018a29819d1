"""FSDP: whole tensors of a sharded model, and the parts of whole ones."""

from torch import Tensor


def whole(x):
    """A tensor, of a sharded one all parts: every process has to ask."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def gathered(state, keep: bool):
    """A nest of dicts and lists with whole tensors; what were shards, in main memory and only if `keep`."""
    if isinstance(state, dict):
        return {k: gathered(v, keep) for k, v in state.items()}
    if isinstance(state, list):
        return [gathered(v, keep) for v in state]
    if not hasattr(state, "full_tensor"):
        return state
    found = state.full_tensor()
    return found.cpu() if keep else None


def part_like(p: Tensor, x: Tensor) -> Tensor:
    """Of a whole tensor the part that belongs to p, if p is sharded."""
    if not hasattr(p, "full_tensor") or getattr(x, "shape", None) != p.shape:
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None)
