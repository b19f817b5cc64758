"""Compute the figures of this page."""

from claims import read, table

RESULTS = read(__file__)
GIVEN = ["Muon at 0.01 (one rate for all, no sweep)"]
LENGTHS = (128, 256, 512, 1024, 2048)
ROW = {(row["variant"], row["length"]): row for row in RESULTS}
VARIANTS = tuple(dict.fromkeys(row["variant"] for row in RESULTS))


def percents(shares: list[float]) -> str:
    """Format percentages; 100 only if no answer is wrong."""
    return ", ".join("100" if share == 1 else f"{100 * share:.1f}" for share in shares)


def least(variant: str, length: int = 2048) -> float:
    return 100 * min(ROW[variant, length]["by_seed"])


def said() -> list[str]:
    reuse, mqa, shared = ROW["MQA, reuse", 2048], ROW["MQA", 2048], ROW["shared KV", 2048]
    window = ROW["MHA, window 128", 2048]
    latent = ROW["MLA, rank 32", 2048]
    return [
        table(
            ["exact match, % (seeds)", *(f"{n:,}" for n in LENGTHS), "cache bytes/token at 2,048"],
            [
                [
                    name,
                    *(percents(ROW[name, length]["by_seed"]) for length in LENGTHS),
                    f"{ROW[name, 2048]['cache_bytes_per_token']:,.0f}",
                ]
                for name in VARIANTS
            ],
        ),
        f"recalls {least('MQA, reuse'):.1f} % and more at 16 times the length of training in all three "
        "seeds",
        f"fall to {least('MQA'):.0f} and {least('shared KV'):.0f} % in the third",
        f"({reuse['cache_bytes_per_token']:.0f} bytes)",
        f"One KV head in each layer ({mqa['cache_bytes_per_token']:.0f} bytes), and one tensor for keys "
        f"and values ({shared['cache_bytes_per_token']:.0f})",
        f"({window['cache_bytes_per_token'] * 2048:,.0f} bytes at any length)",
        f"which then recalls {100 * max(latent['by_seed']):.0f} % at 2,048",
        f"the interval of {len(reuse['by_seed']) * 384:,} answers together is "
        f"{100 * reuse['interval'][0]:.1f} to {100 * reuse['interval'][1]:.1f} %",
    ]  # fmt: skip
