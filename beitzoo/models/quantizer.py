"""The codebook of a VQ-KD tokenizer: how features are rounded to codes, and how codes learn.

BEiT v2 (https://arxiv.org/abs/2208.06366), section 2.2; `norm_ema_quantizer.py` of the original. Codes learn by moving
averages of the features that are rounded to them, not by gradients.

Shapes: V codes of the codebook, D channels of a code, N features.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Features whose distances to all codes are in memory at a time.
_CHUNK = 4096


class Codebook(nn.Module):
    """Unit vectors that features are rounded to.

    Attributes:
        weight: The codes, (V, D).
        cluster_size: Moving average of how many features of an update were rounded to each code, (V,).
        embed_avg: There for the original's checkpoints, which have it.
        initted: Whether the codes have their start, (1,). A codebook of random codes has.
    """

    initted: Tensor

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(codes, dim)), requires_grad=False)
        self.cluster_size = nn.Parameter(torch.zeros(codes), requires_grad=False)
        self.embed_avg = nn.Parameter(self.weight.detach().clone(), requires_grad=False)
        self.register_buffer("initted", torch.ones(1))


class Quantizer(nn.Module):
    """The nearest code of each feature by the angle between them, which for unit vectors is the nearest by distance.

    Attributes:
        embedding: The codes.
        cluster_size: How often each code was used since `reset_uses`, (V,).
    """

    cluster_size: Tensor

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.embedding = Codebook(codes, dim)
        self.register_buffer("cluster_size", torch.zeros(codes))

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """Map features (..., D) of any length to codes (...), int64; in their own precision under any autocast."""
        with torch.autocast(features.device.type, enabled=False):
            return _nearest(F.normalize(features, dim=-1), self.embedding.weight)

    @torch.no_grad()
    def start(self, features: Tensor, generator: torch.Generator | None) -> None:
        """Give the codes their start from the features of one update, (N, D).

        Args:
            features: Of any length.
            generator: Draws the first centres of k-means, on the CPU. None leaves the codes as they are.
        """
        book = self.embedding
        if generator is not None:
            book.weight.copy_(kmeans(features, book.weight.shape[0], generator))
        # As if all had been used alike: a code has time to be found before it counts as unused.
        book.cluster_size.fill_(features.shape[0] / book.weight.shape[0])
        book.initted.fill_(1)
        self.reset_uses()

    @torch.no_grad()
    def tally(self, features: Tensor, codes: Tensor) -> Tensor:
        """Sum up unit vectors (..., D) by their codes (...); the last of D + 1 columns counts them.

        Tallies of several batches and processes add up to that of all. They are of float64, (V, D + 1): then
        neither order nor number of parts shows in what codes learn from them.
        """
        features = features.flatten(0, -2).double()
        rows = torch.cat((features, torch.ones_like(features[:, :1])), dim=1)
        sums = rows.new_zeros(self.embedding.weight.shape[0], rows.shape[1])
        return sums.index_add_(0, codes.flatten(), rows)

    @torch.no_grad()
    def learn(self, tally: Tensor, decay: float) -> None:
        """Move each code towards the mean of the features of an update that were rounded to it; unused ones stay."""
        book, counts = self.embedding, tally[:, -1]
        means = F.normalize(tally[:, :-1], dim=1)
        moved = F.normalize(decay * book.weight + (1 - decay) * means, dim=1).to(book.weight.dtype)
        book.weight.copy_(torch.where(counts[:, None] > 0, moved, book.weight))
        book.cluster_size.lerp_(counts.to(book.cluster_size.dtype), 1 - decay)
        self.cluster_size += counts.to(self.cluster_size.dtype)

    def dead(self, updates: int, decay: float) -> Tensor:
        """Find codes that are used no more than one that was used as often as the mean, but not for so many updates.

        Returns:
            Their numbers, int64.
        """
        uses = self.embedding.cluster_size
        return (uses < uses.mean() * decay**updates).nonzero().flatten()

    @torch.no_grad()
    def restart(self, codes: Tensor, features: Tensor) -> None:
        """Replace codes (K,) by features (K, D); they count as used as often as the mean."""
        book = self.embedding
        book.weight[codes] = F.normalize(features, dim=1).to(book.weight.dtype)
        book.cluster_size[codes] = book.cluster_size.mean()

    def reset_uses(self) -> None:
        """Begin to count anew how often each code is used."""
        self.cluster_size.zero_()


def perplexity(uses: Tensor) -> float:
    """Return how many codes, used alike, would be as hard to guess as those that were used so often, (V,)."""
    shares = uses.double() / uses.double().sum().clamp(min=1)
    return float(torch.special.entr(shares).sum().exp())


def kmeans(features: Tensor, codes: int, generator: torch.Generator, iterations: int = 10) -> Tensor:
    """Find the centres of features by their angles.

    Args:
        features: Of any length, (N, D).
        codes: Number of centres.
        generator: On the CPU; draws the features that are the first centres.
        iterations: As in the original.

    Returns:
        Unit vectors, (codes, D).
    """
    features = F.normalize(features, dim=1)
    count = features.shape[0]
    if count >= codes:
        drawn = torch.randperm(count, generator=generator)[:codes]
    else:
        drawn = torch.randint(count, (codes,), generator=generator)
    centres = features[drawn.to(features.device)]
    for _ in range(iterations):
        nearest = torch.cat([_nearest(chunk, centres) for chunk in features.split(_CHUNK)])
        sums = torch.zeros_like(centres, dtype=torch.float64).index_add_(0, nearest, features.double())
        used = torch.bincount(nearest, minlength=codes) > 0
        centres = torch.where(used[:, None], F.normalize(sums, dim=1).to(centres.dtype), centres)
    return centres


def _nearest(features: Tensor, codes: Tensor) -> Tensor:
    """Map unit vectors (..., D) to the numbers of the nearest codes.

    By distance, as in the original, not by product: codes are unit vectors to rounding only.
    """
    squares = features.square().sum(-1, keepdim=True) + codes.square().sum(1)
    return (squares - 2 * (features @ codes.t())).argmin(dim=-1)
