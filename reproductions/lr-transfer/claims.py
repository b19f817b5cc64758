"""Compute the figures of this page."""

from claims import read, table

RESULTS = read(__file__)
GIVEN = [
    "found SP with full alignment and tuned constants ahead of muP and of plain SP: 2.724, 2.740 and "
    "2.787 nats at 270M, 2.471, 2.483 and 2.493 at 1B",
    "The limits of `mukv transfer`, 0.3 octaves and 0.03 nats",
]
SHORT = {"one rate, the embedding's raised": "one rate, the embedding's raised with the width"}


def said() -> list[str]:
    one, plain = RESULTS["one rate for all"], RESULTS["SP, no alignment"]
    full, mup = RESULTS["SP, full alignment"], RESULTS["muP"]
    base = full["optima"]["64"]
    gaps = [mup["optima"][w]["loss"] - full["optima"][w]["loss"] for w in ("128", "256", "512")]
    tuned = [RESULTS[n]["optima"]["256"]["loss"] for n in RESULTS if n != "muP"]
    at_best = {}
    for row in full["losses"]:
        if row["width"] == 256:
            at_best.setdefault(row["log2_rate"], []).append(row["loss"])
    nearest = min(at_best, key=lambda rate: sum(at_best[rate]))
    spread = max(at_best[nearest]) - min(at_best[nearest])

    def wide(row: dict) -> str:
        return f"{row['drift']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f})"

    return [
        table(
            ["to width 256", "drift, octaves per octave", "two standard errors",
             "loss at 256, tuned there", "loss at 256 at the rate of 64"],
            [
                [
                    SHORT.get(name, name),
                    f"{row['to_256']['drift']:+.2f}",
                    f"{row['to_256']['low']:+.2f} to {row['to_256']['high']:+.2f}",
                    f"{row['optima']['256']['loss']:.3f}",
                    f"{row['optima']['256']['loss'] + row['to_256']['gap']:.3f}",
                ]
                for name, row in RESULTS.items()
            ],
        ),
        f"all five are the same network: {base['loss']:.3f} nats at 2^{base['rate']:.1f}",
        f"From 64 to 512: muP drifts by {wide(mup)}, {mup['optima']['512']['loss']:.3f} nats at 512 "
        f"when tuned there and {mup['gap']:.4f} more at the rate of 64; SP with full alignment by "
        f"{wide(full)}, {full['optima']['512']['loss']:.3f} nats and {full['gap']:.4f} more",
        f"loses {one['gap']:.2f} nats at the transferred rate over two octaves of width",
        f"SP without alignment loses {plain['gap']:.2f}",
        f"are within {max(tuned) - min(tuned):.3f} nats of each other, which is less than the three "
        f"seeds of one of them differ ({spread:.2f})",
        f"muP falls behind SP with full alignment as the width grows, each tuned at its own width: by "
        f"{gaps[0]:.3f} nats at 128, {gaps[1]:.3f} at 256 and {gaps[2]:.3f} at 512",
    ]  # fmt: skip
