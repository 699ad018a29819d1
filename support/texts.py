"""The texts that one generation writes: random numbers, stop tokens, forced tokens, and who listens."""

import torch
from torch import Tensor

from model import sample


class Texts:
    """The rows that a generation writes. Line j of the batch continues row alive[j]."""

    def __init__(
        self, prompts, n: int, steps: int, seed, stop_tokens, options: dict, device: torch.device,
        vocab_size: int, stream=None, force=None, adjust=None,
    ):  # fmt: skip
        rows = len(prompts) * n
        seeds = range(seed, seed + rows) if isinstance(seed, int) else seed
        if len(seeds) != rows:
            raise ValueError(f"{len(seeds)} seeds for {rows} rows")
        # All the randomness that sampling needs: one number in [0, 1) per row and step, (rows, steps).
        streams = [torch.rand(steps, generator=torch.Generator().manual_seed(s)) for s in seeds]
        self.uniforms = torch.stack(streams).to(device)
        self.seen = None  # (rows, V), True for the tokens of each row
        if options.get("repetition_penalty", 1.0) != 1.0:
            seen = torch.zeros(rows, vocab_size, dtype=torch.bool)
            for row in range(rows):
                seen[row, list(prompts[row // n])] = True
            self.seen = seen.to(device)
        self.options = options
        self.stop_tokens = stop_tokens
        self.stream, self.force, self.adjust = stream, force, adjust
        # Reading a token makes a GPU wait: at every step only if somebody wants to see or change it.
        self.read_every = 1 if stream or force or adjust or device.type == "cpu" else 16
        self.unread: list[Tensor] = []
        self.alive = list(range(rows))
        self.rows: list[list[int]] = [[] for _ in range(rows)]  # the new tokens
        self.queues: list[list[int]] = [[] for _ in range(rows)]  # forced tokens that wait for their turn
        self.ended: set[int] = set()

    def draw(self, logits: Tensor, uniform: Tensor, token: Tensor | None = None) -> Tensor:
        """The next token of each line, (B), after `token`."""
        if self.seen is not None and token is not None:
            self.seen.scatter_(1, token.unsqueeze(1), True)
        if self.adjust:
            logits = self.adjust(self.alive, logits)
        return sample(logits, uniform, seen=self.seen, **self.options)

    def take(self, token: Tensor, last: bool) -> Tensor:
        """Notes the drawn token of each line, (B), or what `force` puts in its place; returns it."""
        if self.force:
            token = torch.tensor([*map(self.forced, self.alive, token.tolist())], device=token.device)
        self.unread.append(token)
        if last or len(self.unread) == self.read_every:
            for row, new in zip(self.alive, torch.stack(self.unread, dim=1).tolist(), strict=True):
                self.add(row, new)
            self.unread = []
        return token

    def forced(self, row: int, drawn: int) -> int:
        queue = self.queues[row]
        if not queue and row not in self.ended:
            queue.extend(self.force(row, self.rows[row]))
        return queue.pop(0) if queue else drawn

    def add(self, row: int, new: list[int]) -> None:
        """Appends tokens up to the first stop token, behind which the row has ended."""
        for token in new:
            if row in self.ended:
                return
            self.rows[row].append(token)
            if self.stream:
                self.stream(row, token)
            if token in self.stop_tokens:
                self.ended.add(row)

    def left(self) -> list[int]:
        """The lines whose rows go on."""
        return [j for j, row in enumerate(self.alive) if row not in self.ended]

    def keep(self, lines: list[int]) -> None:
        """Forgets all other lines of the batch."""
        self.alive = [self.alive[j] for j in lines]
        self.uniforms = self.uniforms[lines]
        if self.seen is not None:
            self.seen = self.seen[lines]
