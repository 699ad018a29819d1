"""Key-value caches beside the plain one: rolling, with shared prompts, of fixed shape; and which to take."""

from typing import NamedTuple

import torch
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
            if not (c.sees_all and bool((self.length == self.length[0]).all())):
                self.mask = self.visible(where)
        if c.positions == "rope":
            self.key_rope = rope_angles(where.unsqueeze(-2), c.head_dim, c.rope_theta, self.k[0].dtype)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = super().append(layer, k, v)
        if self.key_rope:
            k = rotate(k, *self.key_rope)
        return k, v


class SharedKeys(NamedTuple):
    """Keys of rows of which several continue the same prompt."""

    prompt_k: Tensor  # (P, K, S, D)
    prompt_v: Tensor
    prompt_mask: Tensor  # (P, 1, 1, S), True = attend: leaves out the padding of short prompts
    own: Tensor  # (B, K, T, D)


class SharedPromptCache(KVCache):
    """n rows continue each row of `prompts`, whose keys are stored once and read once for all of them."""

    def __init__(self, prompts: KVCache, n: int, slots: int):
        P = len(prompts.length)
        super().__init__(prompts.config, P * n, slots, prompts.device, prompts.k[0].dtype)
        self.prompt_k = [k[:, :, : prompts.read] for k in prompts.k]
        self.prompt_v = [v[:, :, : prompts.read] for v in prompts.v]
        slot = torch.arange(prompts.read)
        self.prompt_mask = (slot < prompts.length.unsqueeze(1)).view(P, 1, 1, -1)
        self.after = prompts.length.repeat_interleave(n)  # the position of each row's first token

    def begin(self, T: int, counts: Tensor | None = None) -> None:
        super().begin(T, counts)
        self.positions = self.positions + self.after.unsqueeze(1)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[SharedKeys, Tensor]:
        k, v = super().append(layer, k, v)
        return SharedKeys(self.prompt_k[layer], self.prompt_v[layer], self.prompt_mask, k), v

    @property
    def n(self) -> int:
        """Rows of each prompt."""
        return len(self.length) // len(self.prompt_mask)

    def select(self, rows: Tensor) -> None:
        """As many rows of each prompt, see `as_many_of_each`."""
        prompt = torch.unique_consecutive(rows // self.n)
        self.prompt_k = [k[prompt] for k in self.prompt_k]
        self.prompt_v = [v[prompt] for v in self.prompt_v]
        self.prompt_mask = self.prompt_mask[prompt]
        self.after = self.after[rows]
        super().select(rows)

    def as_many_of_each(self, left: list[int]) -> list[int]:
        """Rows `left`, filled up with others of the same prompts until all prompts have as many."""
        ended = torch.ones(len(self.length), dtype=torch.bool)
        ended[left] = False
        ended = ended.view(-1, self.n)
        most = (~ended).sum(1).max()
        rows = ended.byte().argsort(dim=1, stable=True)[:, :most]  # of each prompt, those left first
        rows = rows + self.n * torch.arange(len(ended)).unsqueeze(1)
        return rows[~ended.all(1)].flatten().tolist()


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

    def begin(self, T: int = 1, counts: Tensor | None = None) -> None:
        self.write = self.positions = self.next.unsqueeze(1).clone()  # (B, 1)
        self.next.add_(1)
        self.mask = self.visible(torch.arange(self.slots, device=self.device))

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self.next = self.next[rows]
