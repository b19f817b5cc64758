"""Compute the figures of this page."""

from claims import read, table

RESULTS = read(__file__)
GIVEN = [
    "the same model still had a loss of 4.9 nats at (64, 4) after 600 steps (guessing: 5.5)",
    "With Muon at 0.01 it had learnt by then",
    "Muon at 0.01 for all (no sweep)",
]
SEGMENTS = ("64, 4", "64, 8", "64, 16", "128, 32", "256, 64", "512, 128", "1024, 256")
NAMES = {
    "local + NoPE": "local + NoPE",
    "local + NoPE, MQA": "MQA",
    "reuse": "and a layer that reads the second's cache",
    "MLA, rank width / 2": "MLA of rank 32",
    "MLA, rank width / 4": "MLA of rank 16",
    "window 64": "window of 64",
    "RoPE": "RoPE in both layers",
}


def share(value: float) -> str:
    return "100" if value == 1 else f"{100 * value:.2f}" if value > 0.99 else f"{100 * value:.1f}"


def row_of(variant: str, width: int, steps: int, seed: int = 0) -> dict:
    keys = {"variant": variant, "width": width, "steps": steps, "seed": seed}
    (found,) = [row for row in RESULTS if all(row[key] == keys[key] for key in keys)]
    return found


def said() -> list[str]:
    order = sorted(
        RESULTS,
        key=lambda row: (
            row["width"],
            list(NAMES).index(row["variant"]),
            row["seed"],
            row["steps"],
        ),
    )
    dense = [
        row_of("local + NoPE", width, steps) for width, steps in ((32, 2000), (64, 500), (128, 500))
    ]
    dense += [row_of("local + NoPE, MQA", 64, 500), row_of("MLA, rank width / 2", 64, 1000)]
    least = min(min(row["right"].values()) for row in dense)
    early = row_of("local + NoPE", 64, 500, 1)["right"]
    reuse = row_of("reuse", 64, 500)
    return [
        table(
            ["width", "model", "steps, seed", *(s.replace("1024", "1,024") for s in SEGMENTS),
             "cache bytes/token"],
            [
                [
                    str(row["width"]),
                    NAMES[row["variant"]],
                    f"{row['steps']:,}, {row['seed']}",
                    *(share(row["right"][segment]) for segment in SEGMENTS),
                    f"{row['cache_bytes_per_token']:,}"
                    if row["cache_bytes_per_token"]
                    else f"constant: {row['cache_bytes_constant']:,}",
                ]
                for row in order
            ],
        ),
        f"{100 * least:.1f} % and more on every segment at widths 32, 64 and 128, with one KV head, and "
        f"from a latent that takes {row_of('MLA, rank width / 2', 64, 1000)['cache_bytes_per_token']} "
        f"bytes a token instead of {row_of('local + NoPE', 64, 500)['cache_bytes_per_token']}",
        f"a layer that reads another's cache has {100 * reuse['right']['1024, 256']:.1f} % at the longest",
        f"the second seed of width 64 has {100 * early['512, 128']:.1f} and "
        f"{100 * early['1024, 256']:.1f} % at the two longer segments after 500 steps",
    ]  # fmt: skip
