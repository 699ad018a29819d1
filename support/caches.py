"""Key-value caches beside the plain one of model.py: rolling, with shared prompts, and of fixed shape."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model import KVCache, ModelConfig, rope_angles, rotate


class RollingCache(KVCache):
    """Never fills: the first `keep` tokens stay, the others form a ring that forgets its oldest.

    Positions count inside the cache, as StreamingLLM found necessary (Xiao et al., 2023), so keys are stored
    unrotated and get their RoPE when they are read. Learned positions cannot roll: they are in the keys.
    """

    rolls = True

    def __init__(
        self, config: ModelConfig, rows: int, slots: int, device="cpu", dtype=torch.float32, keep: int = 4
    ):
        if not 0 <= keep < slots:
            raise ValueError(f"keep={keep} tokens of slots={slots}: a window must remain")
        if config.positions == "learned":
            raise ValueError("learned positions cannot roll: they are part of the keys in the cache")
        super().__init__(config, rows, slots, device, dtype)
        self.keep = keep
        self.ring = slots - keep
        self.key_rope = None

    def begin(self, T: int, counts: Tensor | None = None) -> None:
        """As KVCache.begin; after the first tokens, one at a time."""
        c = self.config
        empty = self.read == 0
        if T > 1 and not empty:
            raise ValueError("a rolling cache reads one token at a time after its first prompt")
        start = self.advance(T, counts).to(self.device)
        self.read = min(self.read, self.slots)
        self.mask = None
        slot = torch.arange(self.read, device=self.device)
        if empty:
            self.block = 0
            self.positions = slot[:T]
            where = slot
        else:
            new = start.unsqueeze(1)  # (B, 1): index of the new token in the row's whole text
            self.block = None
            self.positions = new.clamp(max=self.slots - 1)
            self.write = torch.where(new < self.slots, new, self.keep + (new - self.keep) % self.ring)
            # The slot behind the newest token's is the oldest of a full ring; ages count from there. A row
            # without a token now (counts 0) overwrites that oldest slot, which its next token takes anyway.
            overflow = (new + 1 - self.slots).clamp(min=0)
            age = (slot - self.keep - overflow) % self.ring
            where = torch.where(slot < self.keep, slot, self.keep + age)  # (B, S): position of each slot
            if not (c.sees_all and (self.length == self.length[0]).all()):
                self.mask = self.visible(where)
        if c.positions == "rope":
            self.key_rope = rope_angles(where.unsqueeze(-2), c.head_dim, c.rope_theta, self.k[0].dtype)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = super().append(layer, k, v)
        if self.key_rope:
            k = rotate(k, *self.key_rope)
        return k, v


class SharedKeys(NamedTuple):
    """Keys of rows that continue P prompts, at most n rows each: row b has place[b] in a grid (P, n)."""

    prompt_k: Tensor  # (P, K, S, D)
    prompt_v: Tensor
    prompt_mask: Tensor  # (P, 1, 1, S), True = attend: leaves out the padding of short prompts
    own: Tensor  # (B, K, T, D)
    own_mask: Tensor  # (T), True = attend: leaves out the slots that are still empty
    place: Tensor  # (B)
    n: int


class SharedPromptCache(KVCache):
    """n rows continue each row of `prompts`, whose keys are stored once and read once for all of them.

    The rows' own keys are read with the empty slots behind them: products of whole tensors are 3 times as
    fast on a CPU as those of slices, which are copied first. So slots are added as they are needed.
    """

    more = 32  # slots at a time

    def __init__(self, prompts: KVCache, n: int):
        P = len(prompts.length)
        super().__init__(prompts.config, P * n, self.more, prompts.device, prompts.k[0].dtype)
        self.prompt_k = [k[:, :, : prompts.read].contiguous() for k in prompts.k]
        self.prompt_v = [v[:, :, : prompts.read].contiguous() for v in prompts.v]
        slot = torch.arange(prompts.read)
        self.prompt_mask = (slot < prompts.length.unsqueeze(1)).view(P, 1, 1, -1)
        self.after = prompts.length.repeat_interleave(n)  # the position of each row's first token
        self.n = n
        self.place = torch.arange(P * n)

    def begin(self, T: int, counts: Tensor | None = None) -> None:
        if self.read + T > self.slots:
            self.slots += self.more
            for layer in range(len(self.k)):  # one after the other, as in `select`
                self.k[layer] = F.pad(self.k[layer], (0, 0, 0, self.more))
                self.v[layer] = F.pad(self.v[layer], (0, 0, 0, self.more))
        super().begin(T, counts)
        self.positions = self.positions + self.after.unsqueeze(1)
        self.own_mask = torch.arange(self.slots) < self.read

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[SharedKeys, Tensor]:
        super().append(layer, k, v)
        prompt = self.prompt_k[layer], self.prompt_v[layer], self.prompt_mask
        return SharedKeys(*prompt, self.k[layer], self.own_mask, self.place, self.n), self.v[layer]

    def select(self, rows: Tensor) -> None:
        """Keeps these rows, those of a prompt side by side, and the prompts that still have any."""
        prompt = self.place[rows] // self.n
        kept, prompt, counts = prompt.unique_consecutive(return_inverse=True, return_counts=True)
        first = counts.cumsum(0) - counts
        self.n = int(counts.max())
        self.place = self.n * prompt + torch.arange(len(rows)) - first[prompt]
        if len(kept) < len(self.prompt_mask):
            self.prompt_k = [k[kept] for k in self.prompt_k]
            self.prompt_v = [v[kept] for v in self.prompt_v]
            self.prompt_mask = self.prompt_mask[kept]
        self.after = self.after[rows]
        super().select(rows)


class FixedCache(KVCache):
    """Goes on from `cache` one token at a time by steps of the same shapes, which a GPU can record.

    Every slot is read, and a mask hides the empty ones; what changes from step to step is on the device. The
    caller counts slots.
    """

    def __init__(self, cache: KVCache):
        self.__dict__ |= vars(cache)
        self.next = cache.length.to(cache.device)  # (B) the position of each row's next token
        self.block = None
        self.read = cache.slots

    def begin(self, T: int, counts: Tensor | None = None) -> None:
        self.write = self.positions = self.next.unsqueeze(1).clone()  # (B, 1)
        self.next.add_(1)
        self.mask = self.visible(torch.arange(self.slots, device=self.device))

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self.next = self.next[rows]
