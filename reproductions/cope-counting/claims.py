"""Compute the figures of this page."""

from statistics import mean

from claims import percent, read, table

RESULTS = read(__file__)
GIVEN = ["a guess is wrong nine times in ten"]
NAMES = {"cope": "CoPE", "rope": "RoPE", "alibi": "ALiBi", "nope": "NoPE"}


def wrong(position: str, rate: float) -> dict[str, list[float]]:
    rows = [
        row
        for row in RESULTS["rows"]
        if row["position"] == position and row["learning_rate"] == rate
    ]
    return {length: [row["wrong"][length] for row in rows] for length in ("64", "128", "256")}


def said() -> list[str]:
    best = {name: RESULTS["best"][name]["wrong"] for name in NAMES}
    cope, alibi = wrong("cope", 0.001), wrong("alibi", 0.001)
    rope = wrong("rope", 0.001)

    def each(losses: list[float]) -> str:
        return f"{100 * mean(losses):.1f} ({', '.join(f'{100 * x:.1f}' for x in losses)})"

    rows = [
        [NAMES[name], rate, *(each(x) for x in wrong(name, float(rate)).values())]
        for name in NAMES
        for rate in ("0.003", "0.001")
    ]
    return [
        table(["wrong answers, % (two seeds)", "rate", "64 tokens", "128", "256"], rows),
        f"CoPE makes {percent(mean(best['cope']['64']), 2)} mistakes at the length of training, RoPE "
        f"{percent(mean(best['rope']['64']), 1)}",
        f"at four times that length {percent(mean(best['cope']['256']))} against "
        f"{percent(mean(best['rope']['256']))}",
        f"At the smaller rate the lead is smaller: at four times the length CoPE is wrong in "
        f"{percent(mean(cope['256']))}, about as often as ALiBi "
        f"({percent(mean(alibi['256']))}), RoPE in {percent(mean(rope['256']))}",
    ]
