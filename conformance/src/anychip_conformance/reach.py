"""The table of reach: dimensions that kernels see, and the sizes at which the suite tries each.

A size stands here because something changes at it (a type, a tile, a grid, a table) or because a real model has it. A
test holds the table against the cases: every size has a visitor.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimension:
    """`largest` says where the largest size comes from."""

    name: str
    counts: str
    sizes: tuple[int, ...]
    largest: str


def around(*sizes: int) -> tuple[int, ...]:
    """Each size, what is one less, and what is one more."""
    return tuple(size + step for size in sizes for step in (-1, 0, 1))


REACH: tuple[Dimension, ...] = (
    Dimension(
        name="rows",
        counts="requests of a step",
        sizes=(1, *around(16, 32, 64, 128, 256, 512), 1024, 1025),
        largest="more than engines are configured with; sixteen tiles of 64",
    ),
    Dimension(
        name="tokens",
        counts="tokens of a step",
        sizes=(1, *around(64, 128, 256, 512), 1025, 2049, *around(4096), 8193),
        largest="steps of 8,192 tokens, which servers are configured with",
    ),
    Dimension(
        name="elementwise rows",
        counts="rows of an op that treats each alone",
        sizes=(*around(128, 256), 1025, 4097, *around(65_536)),
        largest="the second and third axis of a CUDA grid end at 65,535",
    ),
    Dimension(
        name="chunk",
        counts="tokens of one request in a step",
        sizes=(*around(64, 128, 256, 512), 1025, 2049),
        largest="chunks of 2,048 tokens",
    ),
    Dimension(
        name="context",
        counts="keys that a query sees",
        sizes=(*around(128, 256, 512, 1024, 2048, 4096, 8192), 16_385, 32_767, 32_769, 65_535, 65_537, 131_072),
        largest="Llama 3, Qwen 3, GPT-OSS: 131,072 positions",
    ),
    Dimension(
        name="positions",
        counts="a token's place in its sequence",
        sizes=(*around(4096), *around(32_768, 65_536), 131_071, 262_143, 1_048_575),
        largest="Qwen 2.5 1M and others: 2^20 positions",
    ),
    Dimension(
        name="pages",
        counts="blocks of one request, which its row of the block table holds",
        sizes=(*around(128, 256), 511, 1023, 1024, 1025, 4097, 8192),
        largest="131,072 positions in blocks of 16",
    ),
    Dimension(
        name="blocks moved",
        counts="blocks that one call copies, zeroes, takes out or puts back",
        sizes=(1, *around(64, 128, 256), 512, 1025),
        largest="a prompt of 16,384 tokens in blocks of 16",
    ),
    Dimension(
        name="window",
        counts="keys that a sliding window lets a query see",
        sizes=(*around(128), 512, 513, *around(1024), *around(4096), 32_768),
        largest="Mistral 7B: 4,096; Qwen 2: 32,768",
    ),
    Dimension(
        name="heads",
        counts="query heads, and KV heads where each has its own",
        sizes=(1, *around(16, 32, 64), 71, 96, 127, 128),
        largest="Llama 3.1 405B and DeepSeek V3: 128",
    ),
    Dimension(
        name="group",
        counts="query heads of one KV head",
        sizes=(1, 2, 3, 4, 5, 7, 8, 12, 15, 16, 17, 48, 71, 128),
        largest="Falcon 7B: 71; latent attention: 128",
    ),
    Dimension(
        name="head_dim",
        counts="numbers of a head",
        sizes=(32, 64, 80, 96, 128, 192, 256, 512),
        largest="Gemma: 256, and 512 in its global layers",
    ),
    Dimension(
        name="latent_dim",
        counts="numbers of a latent row",
        sizes=(64, 128, 256, 512),
        largest="DeepSeek V2 and V3: 512",
    ),
    Dimension(
        name="hidden",
        counts="numbers of a hidden state",
        sizes=(*around(128, 1024, 2048, 4096), 5120, 7168, *around(8192), 12_288, 16_384),
        largest="Llama 3.1 405B: 16,384",
    ),
    Dimension(
        name="intermediate",
        counts="numbers between gate and down",
        sizes=(*around(128, 1024, 4096), 11_008, 14_336, *around(16_384), 28_672, 53_248),
        largest="Llama 3.1 405B: 53,248",
    ),
    Dimension(
        name="columns",
        counts="columns of a product, over which it sums",
        sizes=(*around(128, 256, 512, 1024, 4096), 8192, 16_384, 28_672, 53_248),
        largest="down of Llama 3.1 405B: 53,248",
    ),
    Dimension(
        name="groups",
        counts="groups of columns with a scale of their own",
        sizes=(4, *around(128, 256), 512, 896, 1664),
        largest="53,248 columns in groups of 32",
    ),
    Dimension(
        name="features",
        counts="rows of a product's matrix",
        sizes=(*around(64, 128, 256, 1024, 4096), 32_769, 65_537, 152_064),
        largest="the head of Qwen 2.5: 152,064",
    ),
    Dimension(
        name="vocabulary",
        counts="token ids",
        sizes=(*around(1024, 4096), *around(32_768, 65_536), 128_256, 131_073, 152_064, 262_144),
        largest="Gemma 3: 262,144; Qwen 2.5: 152,064",
    ),
    Dimension(
        name="experts",
        counts="experts of a layer",
        sizes=(8, *around(16, 32, 64, 128, 256), 384, 512),
        largest="DeepSeek V3: 256; Kimi K2: 384; Qwen 3 Next: 512",
    ),
    Dimension(
        name="top_k",
        counts="experts of a token",
        sizes=(1, 2, 3, 4, 6, 7, 8, 9, 10, 16),
        largest="DeepSeek V3: 8 of 256; Qwen 3 Next: 10 of 512",
    ),
    Dimension(
        name="tokens of an expert",
        counts="tokens of a step that pick the same expert",
        sizes=around(32, 64, 128, 256, 512),
        largest="a prompt whose tokens all pick one",
    ),
    Dimension(
        name="ids kept",
        counts="top_k of a draw, and likeliest ids that are reported",
        sizes=(1, 20, *around(64, 128, 256), 1025),
        largest="what requests ask for",
    ),
    Dimension(
        name="times",
        counts="times that a token stands in an output",
        sizes=(*around(64, 128), 255, 256, 16_384, 32_768, 65_536),
        largest="an output of nothing else",
    ),
    Dimension(
        name="rank",
        counts="rank of an adapter",
        sizes=(8, 16, 32, 63, 64, 65, 128, 256),
        largest="the largest that adapters are trained with",
    ),
    Dimension(
        name="adapters",
        counts="slots of adapters",
        sizes=(1, 8, 31, 32, 33, 64, 128),
        largest="more than engines are configured with",
    ),
    Dimension(
        name="sequence",
        counts="tokens of a sequence that an encoder sees whole",
        sizes=(*around(128, 256, 512), 1025, 1500),
        largest="Whisper: 1,500",
    ),
    Dimension(
        name="width",
        counts="numbers of a state",
        sizes=(*around(64, 128, 256), 1024, 4097),
        largest="a row of Mamba's channels",
    ),
    Dimension(
        name="calls",
        counts="calls of one object",
        sizes=(*around(128, 256), 1025),
        largest="a counter of one byte, and four times that",
    ),
    Dimension(
        name="steps",
        counts="steps since the start",
        sizes=around(64, 128, 256),
        largest="a counter of one byte",
    ),
    Dimension(
        name="ranks",
        counts="ranks of a group",
        sizes=(2, 3, 4),
        largest="what the suite starts processes for",
    ),
    Dimension(
        name="message",
        counts="bytes that a rank brings to a collective",
        sizes=(4092, 4096, 4100, 65_532, 65_536, 65_540, 262_144, 524_292, 1_048_576),
        largest="GroupSpec.max_message_bytes of the suite's groups: 1 MiB",
    ),
)


def dimension(name: str) -> Dimension:
    return next(found for found in REACH if found.name == name)


def table() -> str:
    """The table as docs/reference/conformance.md prints it."""
    rows = [
        f"| {found.name} | {found.counts} | {', '.join(f'{size:,}' for size in found.sizes)} | {found.largest} |"
        for found in REACH
    ]
    return "\n".join(["| dimension | what it counts | sizes | the largest |", "|---|---|---|---|", *rows])
