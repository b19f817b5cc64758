"""Compute the figures of this page."""

from claims import beyond, read, table

RESULTS = read(__file__)
GIVEN = [
    "perplexities of 13.60 with pairs of layers and 13.81 with half heads at 5,120 bytes a token",
    "0.86M parameters (wider MLPs use the parameters that a smaller cache saves) and train for 400 steps of 2,048 bytes",
]


def said() -> list[str]:
    gqa, pairs = RESULTS["GQA"], RESULTS["cross-layer pairs"]
    half = RESULTS["GQA, half heads"]
    low, high = (100 * x for x in pairs["more_steps_interval"]["GQA, half heads"])
    gap = pairs["bits_per_byte"] - half["bits_per_byte"]
    return [
        table(
            ["", "parameters", "cache bytes/token", "best rate", "bits/byte (by seed)",
             "steps beyond GQA's, % (interval)"],
            [
                [
                    name,
                    f"{row['parameters']:,}",
                    f"{row['cache_bytes_per_token']:,.0f}",
                    f"{row['learning_rate']:g}",
                    f"{row['bits_per_byte']:.3f} ("
                    + ", ".join(f"{loss:.3f}" for loss in row["by_seed"])
                    + ")",
                    ""
                    if row is gqa
                    else beyond(row["more_steps_than"]["GQA"], row["more_steps_interval"]["GQA"]),
                ]
                for name, row in RESULTS.items()
            ],
        ),
        f"pairs of layers need {100 * pairs['more_steps_than']['GQA, half heads']:.0f} % more steps "
        f"than half heads, with an interval of {low:+.0f} to {high:+.0f} %",
        f"they end {gap:.3f} bits per byte apart, where seeds of one variant deviate by "
        f"{pairs['deviation']:.3f} to {half['deviation']:.3f}",
    ]  # fmt: skip
