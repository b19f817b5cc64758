"""Compute the figures of this page."""

from claims import read, table

RESULTS = read(__file__)
GIVEN = ["exponent -0.51 is fitted there between 1e9 and 1e11 tokens"]
ROWS = {
    "cosine_tuned": "cosine, tuned for this target",
    "power": "power scheduler, as fitted: exponent 0",
    "power_published": "power scheduler, exponent -0.51, amplitude fitted",
    "cosine_not_tuned": "cosine at the rate of the short horizon",
    "cosine_power": "cosine, rate by the `power` rule of `train.budget`",
    "cosine_sde": "cosine, numbers by the `sde` rule",
}
HEAD = {"4 x tokens": "4 x tokens", "8 x tokens": "8 x tokens", "half batch": "half the batch",
        "twice the batch": "twice the batch"}  # fmt: skip


def said() -> list[str]:
    targets = RESULTS["targets"]

    def gaps(key: str, names: list[str]) -> list[float]:
        return [targets[name][key] - targets[name]["cosine_tuned"] for name in names]

    longer = ["4 x tokens", "8 x tokens"]
    more = [*longer, "half batch"]
    ahead = [-gap for gap in gaps("power", list(targets))]
    published, kept = gaps("power_published", longer), gaps("cosine_not_tuned", more)
    mended = [1 - a / b for a, b in zip(gaps("cosine_power", more), kept, strict=True)]
    sde = gaps("cosine_sde", list(targets))
    return [
        table(
            ["", *HEAD.values()],
            [
                [label, *(f"{targets[name][key]:.3f}" for name in HEAD)]
                for key, label in ROWS.items()
            ],
        ),
        f"As fitted it is {min(ahead):.2f} to {max(ahead):.2f} nats better than cosine tuned for each "
        "target",
        f"With -0.51 and the amplitude that is best with it, it falls behind by {published[0]:.2f} and "
        f"{published[1]:.2f} nats at four and eight times the tokens",
        f"cosine's rate costs {min(kept):.2f} to {max(kept):.2f} nats where there are more steps",
        f"The power rule makes up for {100 * min(mended):.0f} to {100 * max(mended):.0f} % of it",
        f"the sde rule loses {min(sde):.2f} to {max(sde):.2f} nats",
    ]
