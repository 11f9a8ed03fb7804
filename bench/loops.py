"""Models of whole training loops, which show how much of a step's time the optimizer gives back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONTEXT, VOCABULARY, WIDTH = 64, 512, 128
# Parameters, and the loss on one batch.
Model = tuple[list[nn.Parameter], Callable[[], Tensor]]


def small_mlp(device: torch.device) -> Model:
    """A classifier of 6 tensors."""
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)).to(device)
    inputs, targets = torch.randn(128, 64, device=device), torch.randint(10, (128,), device=device)
    return list(model.parameters()), lambda: F.cross_entropy(model(inputs), targets)


def small_gpt(device: torch.device) -> Model:
    """A language model of 53 tensors: 4 pre-norm blocks with causal attention."""
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
    blocks = nn.TransformerEncoder(layer, 4, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
    embedding, positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
    head = nn.Linear(WIDTH, VOCABULARY, bias=False)
    model = nn.ModuleList([embedding, positions, blocks, head]).to(device)
    mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT, device)
    tokens = torch.randint(VOCABULARY, (16, CONTEXT + 1), device=device)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].flatten()

    def compute_loss() -> Tensor:
        hidden = blocks(embedding(inputs) + positions.weight, mask, is_causal=True)
        return F.cross_entropy(head(hidden).flatten(0, 1), targets)

    return list(model.parameters()), compute_loss


MODELS = {"small-mlp": small_mlp, "small-gpt": small_gpt}
