"""Key-value caches beside the plain one: a rolling one, one with shared prompts, one of fixed shape."""

from typing import NamedTuple

import torch
from torch import Tensor

from model import KVCache, ModelConfig, attention_mask, rope_angles, rotate


class RollingCache(KVCache):
    """Never fills: the first `keep` tokens stay, the others form a ring that forgets its oldest.

    Positions count inside the cache, as StreamingLLM found necessary (Xiao et al., 2023), so keys are stored
    unrotated and get their RoPE when they are read. Learned positions cannot roll: they are in the keys.
    """

    rolls = True

    def __init__(self, config: ModelConfig, rows: int, slots: int, device="cpu", dtype=None, keep: int = 4):
        if not 0 <= keep < slots:
            raise ValueError(f"keep={keep} tokens of slots={slots}: a window must remain")
        if config.positions == "learned":
            raise ValueError("learned positions cannot roll: they are part of the keys in the cache")
        super().__init__(config, rows, slots, device, dtype or torch.float32)
        self.keep, self.ring, self.key_rope = keep, slots - keep, None

    def begin(self, T: int, counts: Tensor | None = None) -> None:
        """As KVCache.begin; after the first tokens, one at a time."""
        c, empty, start = self.config, not any(self.lengths), self.length
        if T > 1 and not empty:
            raise ValueError("a rolling cache reads one token at a time after its first prompt")
        self.count(T, counts)
        self.read = min(max(self.lengths), self.slots)
        slot = torch.arange(self.read, device=start.device)
        if empty:
            self.block, self.positions, where = 0, slot[:T], slot
        else:
            at = start.unsqueeze(1)  # (B, 1): index of the new token in the row's whole text
            self.block, self.positions = None, at.clamp(max=self.slots - 1)
            self.write = torch.where(at < self.slots, at, self.keep + (at - self.keep) % self.ring)
            # The slot behind the newest token's is the oldest of a full ring; ages count from there. A row
            # without a token now (counts 0) overwrites that oldest slot, which its next token takes anyway.
            overflow = (at + 1 - self.slots).clamp(min=0)
            age = (slot - self.keep - overflow) % self.ring
            where = torch.where(slot < self.keep, slot, self.keep + age)  # (B, S): position of each slot
        if c.positions == "rope":
            self.key_rope = rope_angles(where.unsqueeze(-2), c.head_dim, c.rope_theta, self.k[0].dtype)
        self.mask = None
        if not empty and not (self.even and c.sees_all):
            mask = attention_mask(self.positions, where, c.sliding_window, c.sparse_stride)
            self.mask = mask.unsqueeze(-3)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = super().append(layer, k, v)
        return (k if self.key_rope is None else rotate(k, *self.key_rope)), v


class SharedKeys(NamedTuple):
    """Keys of rows of which several continue the same prompt."""

    prompt_k: Tensor  # (P, K, S, D)
    prompt_v: Tensor
    prompt_mask: Tensor  # (P, 1, 1, S), True = attend: leaves out the padding of short prompts
    own: Tensor  # (B, K, T, D)


class SharedPromptCache(KVCache):
    """n rows continue each row of `prompts`, whose keys are stored once and read once for all of them."""

    def __init__(self, prompts: KVCache, n: int, slots: int):
        rows, keys = n * len(prompts.lengths), prompts.k[0]
        super().__init__(prompts.config, rows, slots, keys.device, keys.dtype)
        self.prompt_k = [k[:, :, : prompts.read] for k in prompts.k]
        self.prompt_v = [v[:, :, : prompts.read] for v in prompts.v]
        slot = torch.arange(prompts.read, device=keys.device)
        self.prompt_mask = (slot < prompts.length.unsqueeze(1)).view(-1, 1, 1, prompts.read)
        self.after = prompts.length.repeat_interleave(n)  # the position of each row's first token

    def begin(self, T: int, counts: Tensor | None = None) -> None:
        super().begin(T, counts)
        self.positions = self.positions + self.after.unsqueeze(1)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[SharedKeys, Tensor]:
        k, v = super().append(layer, k, v)
        return SharedKeys(self.prompt_k[layer], self.prompt_v[layer], self.prompt_mask, k), v

    def select(self, rows: Tensor) -> None:
        """As many rows of each prompt, see `as_many_of_each`."""
        prompt = torch.unique_consecutive(rows // (len(self.lengths) // len(self.prompt_mask)))
        self.prompt_k = [k[prompt] for k in self.prompt_k]
        self.prompt_v = [v[prompt] for v in self.prompt_v]
        self.prompt_mask, self.after = self.prompt_mask[prompt], self.after[rows]
        super().select(rows)

    def as_many_of_each(self, left: list[int]) -> list[int]:
        """Rows `left`, filled up with others of the same prompts until all prompts have as many."""
        n = len(self.lengths) // len(self.prompt_mask)
        rows: dict[int, list[int]] = {j // n: [] for j in left}
        for j in left:
            rows[j // n].append(j)
        most = max(map(len, rows.values()))
        for prompt, some in rows.items():
            others = [j for j in range(prompt * n, prompt * n + n) if j not in some]
            some += others[: most - len(some)]
        return [j for some in rows.values() for j in some]


class FixedCache(KVCache):
    """Goes on from `cache` one token at a time by steps of the same shapes, which a GPU can record.

    Every slot is read, and a mask hides the empty ones; what changes from step to step is on the device. The
    caller counts slots.
    """

    def __init__(self, cache: KVCache):
        self.__dict__ |= vars(cache)
        self.length = cache.length.clone()
        self.block, self.read = None, cache.slots

    def begin(self, T: int = 1, counts: Tensor | None = None) -> None:
        c = self.config
        self.write = self.positions = self.length.unsqueeze(1).clone()  # (B, 1)
        self.length.add_(1)
        slots = torch.arange(self.slots, device=self.length.device)
        mask = attention_mask(self.positions, slots, c.sliding_window, c.sparse_stride)
        self.mask = mask.unsqueeze(-3)
