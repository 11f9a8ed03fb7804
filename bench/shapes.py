"""Parameter shapes of real models, written by hand: what an optimizer sees, and no model code.

The totals are asserted in ``tests/test_bench.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

Shape = tuple[int, ...]


def _linear(fan_in: int, fan_out: int) -> list[Shape]:
    return [(fan_out, fan_in), (fan_out,)]


def _norm(width: int) -> list[Shape]:
    return [(width,), (width,)]


def mlp(*widths: int) -> list[Shape]:
    """Weights and biases of linear layers between ``widths``."""
    return [shape for fan_in, fan_out in pairwise(widths) for shape in _linear(fan_in, fan_out)]


def resnet50() -> list[Shape]:
    """ResNet-50 for 1,000 classes (He et al. 2016, arXiv:1512.03385): 53 convolutions with batch norms, one linear."""

    def convolution(channels_in: int, channels_out: int, size: int) -> list[Shape]:
        return [(channels_out, channels_in, size, size), *_norm(channels_out)]

    shapes = convolution(3, 64, 7)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += convolution(channels, width, 1) + convolution(width, width, 3) + convolution(width, 4 * width, 1)
            if block == 0:
                shapes += convolution(channels, 4 * width, 1)
            channels = 4 * width
    return shapes + _linear(channels, 1000)


def _attention_block(width: int, hidden: int) -> list[Shape]:
    """A pre-norm block with one matrix for query, key and value: 12 tensors."""
    attention = _linear(width, 3 * width) + _linear(width, width)
    return _norm(width) + attention + _norm(width) + mlp(width, hidden, width)


def vit_b16() -> list[Shape]:
    """ViT-B/16 at 224 pixels for 1,000 classes (Dosovitskiy et al. 2021, arXiv:2010.11929)."""
    embeddings: list[Shape] = [(1, 1, 768), (1, 197, 768), (768, 3, 16, 16), (768,)]
    return embeddings + _attention_block(768, 3072) * 12 + _norm(768) + _linear(768, 1000)


def gpt2() -> list[Shape]:
    """GPT-2 124M (Radford et al. 2019), its output layer tied to the embedding."""
    return [(50257, 768), (1024, 768), *_attention_block(768, 3072) * 12, *_norm(768)]


def bert_large() -> list[Shape]:
    """BERT-large uncased with its pooler (Devlin et al. 2019, arXiv:1810.04805)."""
    width = 1024
    attention = _linear(width, width) * 4 + _norm(width)
    layer = attention + mlp(width, 4 * width, width) + _norm(width)
    return [(30522, width), (512, width), (2, width), *_norm(width), *layer * 24, *_linear(width, width)]


def llama_1b() -> list[Shape]:
    """A Llama of 1.24 billion parameters: 16 layers, grouped-query attention, tied embeddings, no biases."""
    width, hidden, key_value = 2048, 8192, 512
    attention: list[Shape] = [(width, width), (key_value, width), (key_value, width), (width, width)]
    feed_forward: list[Shape] = [(hidden, width), (hidden, width), (width, hidden)]
    layer = attention + feed_forward + [(width,), (width,)]
    return [(128256, width), *layer * 16, (width,)]


def dlrm_mlps() -> list[Shape]:
    """The dense part of a recommender (Naumov et al. 2019, arXiv:1906.00091; the widths of MLPerf's DLRM)."""
    return mlp(13, 512, 256, 128) + mlp(479, 1024, 1024, 512, 256, 1)


def rl_policy() -> list[Shape]:
    """A policy for four observations and two actions."""
    return mlp(4, 64, 2)


def nnue() -> list[Shape]:
    """An evaluation network like a chess engine's: one wide feature transformer, 14 buckets of tiny layers."""
    buckets: Iterator[Shape] = (shape for _ in range(14) for shape in mlp(1024, 7, 6, 1))
    return [(640, 1024), (1024,), *buckets]


def equal(num_tensors: int, numel: int) -> list[Shape]:
    """Flat tensors of one size."""
    return [(numel,)] * num_tensors
