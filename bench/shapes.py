"""Parameter shapes of real models, written by hand; their totals are asserted in ``tests/api/test_bench.py``."""

from __future__ import annotations

from itertools import pairwise

Shape = tuple[int, ...]


def _linear(fan_in: int, fan_out: int) -> list[Shape]:
    return [(fan_out, fan_in), (fan_out,)]


def _norm(width: int) -> list[Shape]:
    return [(width,), (width,)]


def _mlp(*widths: int) -> list[Shape]:
    return [shape for fan_in, fan_out in pairwise(widths) for shape in _linear(fan_in, fan_out)]


def _attention_block(width: int, hidden: int) -> list[Shape]:
    """A pre-norm block with one matrix for query, key and value: 12 tensors."""
    attention = _linear(width, 3 * width) + _linear(width, width)
    return _norm(width) + attention + _norm(width) + _mlp(width, hidden, width)


def _resnet50() -> list[Shape]:
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


def _vit_b16() -> list[Shape]:
    embeddings: list[Shape] = [(1, 1, 768), (1, 197, 768), (768, 3, 16, 16), (768,)]
    return embeddings + _attention_block(768, 3072) * 12 + _norm(768) + _linear(768, 1000)


def _bert_large(width: int = 1024) -> list[Shape]:
    attention = _linear(width, width) * 4 + _norm(width)
    layer = attention + _mlp(width, 4 * width, width) + _norm(width)
    return [(30522, width), (512, width), (2, width), *_norm(width), *layer * 24, *_linear(width, width)]


def _llama_1b(width: int = 2048, hidden: int = 8192, key_value: int = 512) -> list[Shape]:
    attention: list[Shape] = [(width, width), (key_value, width), (key_value, width), (width, width)]
    feed_forward: list[Shape] = [(hidden, width), (hidden, width), (width, hidden)]
    return [(128256, width), *(attention + feed_forward + _norm(width)) * 16, (width,)]


PARAMETER_SETS: dict[str, list[Shape]] = {
    "4x4": [(4,)] * 4,
    "4x16": [(16,)] * 4,
    # A policy for four observations and two actions.
    "rl-policy": _mlp(4, 64, 2),
    "148x16": [(16,)] * 148,
    # An evaluation network like a chess engine's: one wide feature transformer, 14 buckets of tiny layers.
    "nnue": [(640, 1024), (1024,), *_mlp(1024, 7, 6, 1) * 14],
    # The dense part of a recommender (Naumov et al. 2019, arXiv:1906.00091; the widths of MLPerf's DLRM).
    "dlrm-mlps": _mlp(13, 512, 256, 128) + _mlp(479, 1024, 1024, 512, 256, 1),
    "1000x16": [(16,)] * 1000,
    "10000x16": [(16,)] * 10_000,
    "4x4M": [(4 << 20,)] * 4,
    # ResNet-50 for 1,000 classes (He et al. 2016, arXiv:1512.03385): 53 convolutions with batch norms, one linear.
    "resnet50": _resnet50(),
    # ViT-B/16 at 224 pixels for 1,000 classes (Dosovitskiy et al. 2021, arXiv:2010.11929).
    "vit-b16": _vit_b16(),
    # GPT-2 124M (Radford et al. 2019), its output layer tied to the embedding.
    "gpt2-124m": [(50257, 768), (1024, 768), *_attention_block(768, 3072) * 12, *_norm(768)],
    # BERT-large uncased with its pooler (Devlin et al. 2019, arXiv:1810.04805).
    "bert-large": _bert_large(),
    # A Llama of 1.24 billion parameters: 16 layers, grouped-query attention, tied embeddings, no biases.
    "llama-1b": _llama_1b(),
    "1x1G": [(10**9,)],
}
