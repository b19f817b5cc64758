"""Compute the figures of this page."""

from claims import beyond, read, table

RESULTS = read(__file__)
GIVEN = [
    "needs 1.2 % more steps than grouped-query attention with as many cache bytes, and 11 % more than "
    "multi-head attention",
    "MQA 4.1 % more than grouped queries",
    "0.86M parameters (wider MLPs use the parameters that a smaller cache saves) and train for 400 steps of 2,048 bytes",
    "After 0.8M tokens",
    "a model 43 times larger",
]


def said() -> list[str]:
    gqa, mha = RESULTS["GQA"], RESULTS["MHA"]
    shared, normed = RESULTS["shared KV"], RESULTS["shared KV, normed"]
    ends = [100 * x for x in shared["more_steps_interval"]["GQA"]]
    normed_ends = [100 * x for x in normed["more_steps_interval"]["GQA"]]
    mha_ends = [100 * x for x in mha["more_steps_interval"]["GQA"]]
    to_mha = [100 * x for x in shared["more_steps_interval"]["MHA"]]
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
        f"shared KV needs {100 * shared['more_steps_than']['GQA']:.0f} % more steps than GQA at equal "
        f"bytes ({ends[0]:.0f} to {ends[1]:.0f} %), and "
        f"{100 * shared['more_steps_than']['MHA']:.0f} % more than MHA "
        f"({to_mha[0]:.0f} to {to_mha[1]:.0f} %)",
        f"Gemma's form, which rotates little, needs {100 * normed['more_steps_than']['GQA']:.0f} % "
        f"({normed_ends[0]:.0f} to {normed_ends[1]:.0f} %)",
        f"MHA and GQA do not differ clearly ({mha_ends[0]:+.0f} to {mha_ends[1]:+.0f} %)",
    ]  # fmt: skip
