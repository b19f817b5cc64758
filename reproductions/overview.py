"""Compute the figures of the overview."""

import importlib.util
from pathlib import Path
from statistics import mean
from types import ModuleType

from claims import percent, read

HERE = Path(__file__).parent
GIVEN = [
    "barely, in one model at 256 bytes: clusters of keys after rotation",
    "at most 1.3 million weights where they are trained",
    "one projection for keys and values costs little",
    "25 % of the cache's bytes keep 95 % of what is recalled",
    "yes at 25 % with the question known",
]


def page(folder: str) -> ModuleType:
    """Return the claims of a folder."""
    path = HERE / folder / "claims.py"
    spec = importlib.util.spec_from_file_location(f"page_{folder.replace('-', '_')}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def said() -> list[str]:
    shared = read(__file__, "shared-kv/results.json")["shared KV"]
    low, high = (100 * end for end in shared["more_steps_interval"]["GQA"])
    reuse = read(__file__, "cross-layer-reuse/results.json")["cross-layer pairs"]
    reuse_low, reuse_high = (100 * x for x in reuse["more_steps_interval"]["GQA, half heads"])
    cope = page("cope-counting")
    counting = {
        rate: [mean(cope.wrong(name, rate)["256"]) for name in ("cope", "rope")]
        for rate in (0.003, 0.001)
    }
    transfer = read(__file__, "lr-transfer/results.json")
    mup, full = transfer["muP"], transfer["SP, full alignment"]
    behind = mup["optima"]["512"]["loss"] - full["optima"]["512"]["loss"]
    power = page("power-scheduler").RESULTS["targets"]
    ahead = [row["cosine_tuned"] - row["power"] for row in power.values()]
    published = [
        power[name]["power_published"] - power[name]["cosine_tuned"]
        for name in ("4 x tokens", "8 x tokens")
    ]
    sparse, clusters, mqar = page("sparse-v"), page("query-clusters"), page("mqar")
    heads = [layer["agreement"] for layers in sparse.TRAINED.values() for layer in layers]
    quarter = [lost[0] for lost in sparse.by_model("each head").values()]
    keys = clusters.TRAINED["keys, after rotation"]
    gain = 100 * (keys["captured"][2] - keys["latest"][2])
    again = page("uptraining")
    gained = [again.closed(name) for name in again.ROWS if name != "original"]
    seen = again.SETTINGS["steps"] * again.SETTINGS["batch"] * again.SETTINGS["length"]
    latent = again.beyond("latent, 128 + 64", "after", "original", "after")
    concept, retrieval = page("concept-model"), page("retrieval")
    flops, later = concept.FLOPS, concept.FLOPS_LATER
    kept = [
        100
        * retrieval.recalled(rows[retrieval.chosen(rows, False, 0.25), 1.0], False)
        / retrieval.recalled(rows["full", 1.0], False)
        for rows in (retrieval.ROWS, retrieval.OTHER)
    ]
    least = min(retrieval.ROWS[name, 1.0]["share_of_bytes"] for name in retrieval.COMPOSED)
    flip, memory = page("positions"), page("attention-memory")
    return [
        f"{100 * shared['more_steps_than']['GQA']:.0f} % more steps than GQA at equal bytes ({low:.0f} to {high:.0f} %)",
        f"pairs need {100 * reuse['more_steps_than']['GQA, half heads']:.0f} % more steps, with an interval of "
        f"{reuse_low:+.0f} to {reuse_high:+.0f} %",
        f"at the better of two rates CoPE is wrong in {percent(counting[0.003][0])} at four times the length, RoPE in "
        f"{percent(counting[0.003][1])}; at the other rate in {percent(counting[0.001][0])} and {percent(counting[0.001][1])}",
        f"drift {mup['drift']:+.2f} and {full['drift']:+.2f} octaves per octave to 512, with one rate for all "
        f"{transfer['one rate for all']['drift']:+.2f} to 256; muP's loss falls behind, by {behind:.3f} nats at 512",
        f"{min(ahead):.2f} to {max(ahead):.2f} nats ahead of tuned cosine, but with exponent 0; -0.51 loses "
        f"{published[0]:.2f} to {published[1]:.2f} nats",
        f"the top tenth holds {percent(sparse.over_layers(sparse.TRAINED['dialogue'], 'top', '0.1'))} to "
        f"{percent(sparse.over_layers(sparse.TRAINED['code'], 'top', '0.1'))} of the mass; two heads share "
        f"{percent(min(heads))} to {percent(max(heads))} of what either needs",
        f"in two pretrained models a quarter of the values costs {min(quarter):.2f} to {max(quarter):.2f} nats",
        f"in part, in one seed of SmolLM2 135M: {seen:,} tokens remove {percent(min(gained))} to "
        f"{percent(max(gained))} of what the conversion added to the loss; latent attention at half the bytes stays "
        f"{100 * latent[0]:.0f} % above the original's perplexity ({100 * latent[1]:.0f} to {100 * latent[2]:.0f} %)",
        f"capture {gain:.1f} points more mass than the latest entries at an eighth of the entries",
        f"in one or two seeds and at one rate, at widths 32, 64 and 128: {100 * least_right(mqar):.1f} % and more",
        f"{flops['bytes']['bits_per_byte'] - flops['words']['bits_per_byte']:.3f} bits per byte ahead after 1.6 MB, "
        f"{later['bytes']['bits_per_byte'] - later['words']['bits_per_byte']:.3f} after 4.9 MB",
        f"at 32k words decode {concept.faster('bytes'):.0f} times as fast as GQA, {concept.faster('bytes, MQA'):.0f} times "
        f"as MQA, {concept.faster('windows, last 128'):.1f} times as windows",
        f"without it the composition chosen on other texts keeps {kept[0]:.1f} % in one seed and {kept[1]:.1f} % in the "
        f"other; 1/8 could not be tested, since the smallest composition has {percent(least)} of the bytes",
        f"flip-flop at 16 times the length, means of three seeds: ALiBi {flip.flip('ALiBi', 4096)} %, CoPE "
        f"{flip.flip('CoPE', 4096)} % (mostly one seed), RoPE {flip.flip('RoPE', 4096)} % (guess 50 %)",
        f"reuse recalls {memory.least('MQA, reuse'):.1f} % and more in three seeds; MQA and shared KV fall to "
        f"{memory.least('MQA'):.0f} and {memory.least('shared KV'):.0f} % in one",
    ]  # fmt: skip


def least_right(mqar: ModuleType) -> float:
    """Return the worst score among the models that learned all segments."""
    points = ((32, 2000), (64, 500), (128, 500))
    rows = [mqar.row_of("local + NoPE", width, steps) for width, steps in points]
    return min(min(row["right"].values()) for row in rows)
