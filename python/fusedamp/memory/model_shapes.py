"""Parameter shapes of well-known networks, for estimates without building them."""

from __future__ import annotations

from collections.abc import Callable

Shapes = list[tuple[int, ...]]


def gpt2(vocabulary: int, context: int, width: int, layers: int) -> Shapes:
    """List the parameters of GPT-2 in order (Radford et al. 2019); the head is tied to the embedding."""
    norm: Shapes = [(width,), (width,)]
    attention: Shapes = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    feed_forward: Shapes = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(vocabulary, width), (context, width), *(norm + attention + norm + feed_forward) * layers, *norm]


def llama(vocabulary: int, width: int, hidden: int, keys: int, layers: int) -> Shapes:
    """List the parameters of Llama (Touvron et al. 2023), with ``keys`` rows in the key and value
    projections."""
    attention: Shapes = [(width, width), (keys, width), (keys, width), (width, width)]
    feed_forward: Shapes = [(hidden, width), (hidden, width), (width, hidden)]
    layer: Shapes = [*attention, *feed_forward, (width,), (width,)]
    return [(vocabulary, width), *layer * layers, (width,), (vocabulary, width)]


def bert(vocabulary: int, width: int, layers: int) -> Shapes:
    """List the parameters of BERT (Devlin et al. 2019) with its pooler, without a task head."""
    norm: Shapes = [(width,), (width,)]
    square: Shapes = [(width, width), (width,)]
    feed_forward: Shapes = [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    layer = square * 4 + norm + feed_forward + norm
    return [(vocabulary, width), (512, width), (2, width), *norm, *layer * layers, *square]


MODELS: dict[str, Callable[[], Shapes]] = {
    "bert-base": lambda: bert(30_522, 768, 12),
    "gpt2": lambda: gpt2(50_257, 1_024, 768, 12),
    "gpt2-medium": lambda: gpt2(50_257, 1_024, 1_024, 24),
    "gpt2-large": lambda: gpt2(50_257, 1_024, 1_280, 36),
    "gpt2-xl": lambda: gpt2(50_257, 1_024, 1_600, 48),
    "llama-2-7b": lambda: llama(32_000, 4_096, 11_008, 4_096, 32),
    "llama-3-8b": lambda: llama(128_256, 4_096, 14_336, 1_024, 32),
}
