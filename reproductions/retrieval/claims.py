"""Compute the figures of this page."""

from statistics import mean

from claims import percent, read, table
from intervals import resampled

FIRST, SECOND = read(__file__), read(__file__, "seed-1.json")
FACTS = 6
KNOWN = {False: "", True: "_question_known"}
GIVEN = [
    "600 steps of Muon, 4.9M bytes",
    "at 25 % of the bytes, with the question known, yes in both seeds",
    "at 25 % of the bytes of the cache, the best policy keeps at least 95 % of the accuracy",
    "recalled 99.7 % with KeyDiff at 0.625 in 4 bits, 90.1 % at 0.25",
    "A policy passes when it keeps 95 % of what the full cache recalls",
    "Among those with at most 25 % of the bytes",
    "Another seed recalls 25 % after 600 steps, so it has 800 steps here",
]


def rows_of(results: dict, entries: str = "bfloat16") -> dict[tuple[str, float], dict]:
    found = [row for row in results["rows"] if row["entries"] == entries]
    return {(row["policy"], row["budget"]): row for row in found}


ROWS, OTHER = rows_of(FIRST), rows_of(SECOND)
COMPOSED = [name for (name, _), row in ROWS.items() if "right_to_choose_by" in row]


def recalled(row: dict, known: bool) -> float:
    return row["accuracy" + KNOWN[known]]


def interval(row: dict, known: bool) -> tuple[float, float]:
    return resampled([int(digit) for digit in row["right_by_text" + KNOWN[known]]], FACTS)


def with_interval(row: dict, known: bool) -> str:
    low, high = interval(row, known)
    return f"{recalled(row, known):.3f} ({low:.3f} to {high:.3f})"


def to_choose_by(row: dict, known: bool) -> float:
    counts = row["right_to_choose_by" + KNOWN[known]]
    return sum(map(int, counts)) / (FACTS * len(counts))


def chosen(rows: dict, known: bool, limit: float) -> str:
    """Return the composition with the best accuracy on the other texts among those with few enough
    bytes.
    """
    fit = [name for name in COMPOSED if rows[name, 1.0]["share_of_bytes"] <= limit]
    return max(fit, key=lambda name: to_choose_by(rows[name, 1.0], known))


def verdict(rows: dict, known: bool) -> str:
    """Return the fraction of the full cache's accuracy that the chosen composition has."""
    name = chosen(rows, known, 0.25)
    row, full = rows[name, 1.0], rows["full", 1.0]
    low, high = (100 * end / recalled(full, known) for end in interval(row, known))
    kept = 100 * recalled(row, known) / recalled(full, known)
    return f"`{name}` at {percent(row['share_of_bytes'], 1)}, keeps {kept:.1f} % ({low:.1f} to {high:.1f})"


def alone(name: str) -> list[str]:
    rows = [ROWS[name, budget] for budget in (0.5, 0.25, 0.125)]
    cells = [f"{row['accuracy']:.3f}, {row['accuracy_question_known']:.3f}" for row in rows]
    shares = [f"{100 * row['share_of_bytes']:.0f}" for row in rows]
    return [f"`{name}`", *cells, (", ".join(shares) if len(set(shares)) > 1 else shares[0]) + " %"]


def said() -> list[str]:
    judged = FIRST["about"]["texts"]["judged"]
    least = min(ROWS[name, 1.0]["share_of_bytes"] for name in COMPOSED)
    smallest = "keydiff:64+int4"
    single, whole = rows_of(FIRST, "float32"), ROWS["full", 1.0]
    keepers = [name for name, budget in ROWS if budget == 0.125]
    adaptive = recalled(ROWS["keydiff:0.25+adaptive+int4", 1.0], False)
    uniform = recalled(ROWS["keydiff:0.25+int4", 1.0], False)
    return [
        table(
            ["composed", "bytes of full (by text)", "question unknown (95 % interval)",
             "known (interval)", "seed 1: unknown", "known"],
            [
                [
                    f"`{name}`",
                    f"{100 * row['share_of_bytes']:.1f} % ({100 * row['least_share']:.0f} to "
                    f"{100 * row['largest_share']:.0f})",
                    with_interval(row, False),
                    with_interval(row, True),
                    with_interval(OTHER[name, 1.0], False),
                    with_interval(OTHER[name, 1.0], True),
                ]
                for name in ("full", "int8", "int4", *COMPOSED)
                for row in [ROWS[name, 1.0]]
            ],
        ),
        table(
            ["alone: unknown, known", "1/2", "1/4", "1/8", "bytes of full"],
            [alone(name) for name in keepers],
        ),
        f"64 held-out texts of {min(judged)} to {max(judged)} tokens ({mean(judged):.0f} in the mean) with 6 "
        "facts each, 384 questions",
        f"The full cache recalls {percent(recalled(whole, False), 1)} of them",
        f"seed 0: {verdict(ROWS, False)}; seed 1: {verdict(OTHER, False)}",
        f"seed 0: {verdict(ROWS, True)}; seed 1: {verdict(OTHER, True)}",
        f"the smallest composition, KeyDiff with 64 entries in 4 bits, has {percent(least, 1)} of the bytes "
        f"and recalls {percent(recalled(ROWS[smallest, 1.0], False), 1)} and "
        f"{percent(recalled(OTHER[smallest, 1.0], False), 1)} without the question",
        f"int8 is {percent(single['int8', 1.0]['share_of_bytes'], 1)} ({recalled(single['int8', 1.0], False):.3f}) "
        f"and int4 {percent(single['int4', 1.0]['share_of_bytes'], 1)} "
        f"({recalled(single['int4', 1.0], False):.3f})",
        f"A budget shared by the heads gains nothing here ({adaptive:.3f} against {uniform:.3f} at a quarter of "
        "the entries)",
        f"clusters of the prompt, which keep {percent(recalled(ROWS['clusters', 0.125], False))} at an eighth",
    ]  # fmt: skip
