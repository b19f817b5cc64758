"""Compute the figures of this page."""

from statistics import mean

from claims import percent, read, table

RESULTS = read(__file__)
SPARSE = read(__file__, "../sparse-v/results.json")
TRAINED, RANDOM = RESULTS["trained, 3 layers"], RESULTS["heads of Llama 3.2 1B, random weights"]
GIVEN = [
    "the entries that hold 80 % of the query's mass",
    "for Llama 3.2 1B's heads with random weights in four layers",
]
KINDS = {"keys": "keys", "queries": "queries", "means": "mean keys", "aligned": "aligned"}
BUDGETS = (1, 2, 3)
"""Indices of 1/16, 1/8 and 1/4 among the fractions that are read."""


def at(row: dict, name: str = "captured") -> list[str]:
    return [f"{row[name][place]:.3f}" for place in BUDGETS]


def random_row(kind: str) -> str:
    return ", ".join(at(RANDOM[f"{kind}, after rotation"]))


def said() -> list[str]:
    keys, means = TRAINED["keys, after rotation"], TRAINED["means, after rotation"]
    first = RANDOM["keys, after rotation"]
    rows = [
        [
            f"{label}, {when}",
            *at(row),
            *(f"{row[name][2]:.3f}" for name in ("precision", "recall", "f1")),
            percent(row["largest_cluster"]),
        ]
        for kind, label in KINDS.items()
        for when in ("after", "before")
        for row in [TRAINED[f"{kind}, {when} rotation"]]
    ]
    bounds = [[f"the {name}", *at(keys, key), "", "", "", ""] for name, key in
              (("largest weights", "largest"), ("latest entries", "latest"))]  # fmt: skip
    gain = [100 * (keys["captured"][place] - keys["latest"][place]) for place in (1, 2, 3)]
    random_gain = 100 * (first["captured"][2] - first["latest"][2])
    apart = [100 * abs(keys["captured"][p] - means["captured"][p]) for p in range(5)]
    near = mean(layer["near"] for layer in SPARSE["trained, 3 layers"]["code"])
    before = TRAINED["keys, before rotation"]
    lost = 1 - before["captured"][2] / keys["captured"][2]
    return [
        table(
            ["trained", "mass at 1/16", "1/8", "1/4", "precision at 1/8", "recall", "F1",
             "largest cluster"],
            [*rows, *bounds],
        ),
        f"With random weights: keys after rotation {random_row('keys')} (the best; largest "
        f"{', '.join(at(first, 'largest'))}; latest {', '.join(at(first, 'latest'))}), mean keys "
        f"{random_row('means')}, aligned {random_row('aligned')}, queries {random_row('queries')}",
        f"the two differ by {min(apart):.1f} to {max(apart):.1f} points of mass",
        f"loses {percent(lost)} of the captured mass at an eighth",
        f"{percent(near)} of the mass of code lies on the last 16 entries",
        f"{gain[0]:.1f} points at a sixteenth, {gain[1]:.1f} at an eighth and {gain[2]:.1f} at a quarter "
        f"with keys, against {random_gain:.1f} points at an eighth in the random model",
    ]  # fmt: skip
