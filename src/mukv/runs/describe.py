"""Compute parameters, FLOPs, cache bytes and shardings of a configuration, without allocating
arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

import jax

from mukv.attention.cores import CORES
from mukv.attention.indexed import REASON
from mukv.core import params
from mukv.core.compute import settled
from mukv.core.mesh import MeshShape, axes_of, specification
from mukv.core.names import even, gibibytes
from mukv.model.counting import cached, entry_bytes, flops_per_token, state_bytes
from mukv.runs.config import Run
from mukv.runs.start import resolved_params, trained_params
from mukv.show.terminal import Console, styled, table


def describe(run: Run) -> dict[str, Any]:
    """Return parameters, FLOPs and cache bytes of a configuration as plain data for `--json`; the
    field names are public.

    Cache entries are counted in the compute type, states in float32. States and caches with a
    window take a constant number of bytes; caches without a window take bytes per token; a layer
    that reads another layer's cache takes none. The model's `cache_bytes_constant` includes arrays
    that decoding keeps outside of the layers. `core` names the attention core of a training step;
    `cores_refused` gives the reason for each faster core that is not used; `step_core` and
    `step_cores_refused` are those of a step of decoding with a full cache. `training_bytes` counts
    the float32 arrays that training keeps, summed over all devices, with frozen weights.
    """
    model = run.model
    compute = settled(run.train.compute)
    layers = []
    grows = Fraction(0)
    for stack, rate in zip(model.stacks, model.rates, strict=True):
        for layer in stack.layers:
            entry = entry_bytes(stack, layer, compute.type)
            each, constant = Fraction(0), state_bytes(layer)
            for name, bag in layer.bags.items() if layer.writes else ():
                if bag.window is None:
                    each += Fraction(entry[name], rate.entry * bag.every)
                else:
                    constant += entry[name] * bag.places(bag.window)
            grows += each
            queries = max(1, run.train.length // rate.query)
            position = getattr(layer.attention, "position", None)
            # In training a layer reads the entries of its own tokens.
            bags = layer.attention.bags.values()
            aligned = len(bags) == 1 and all(bag.every == 1 for bag in bags)
            dropped = run.train.policy is not None and bool(layer.whole)
            # A choice of as many entries as there are is none.
            chosen = layer.most is not None and layer.most < queries
            demand = {"shows": REASON if chosen else None, "aligned": aligned, "dropped": dropped}
            context = 1 if queries % run.mesh.context else run.mesh.context
            core = layer.attention.core(queries, compute, **demand, context=context)
            step = layer.attention.step_core(stack.d_model, compute)
            chooser = layer.indexed_by
            layers.append(
                {
                    "layer": stack.first + layer.index,
                    "attention": layer.attention.describe(),
                    "position": position.kind if position else "none",
                    "window": layer.window,
                    "reads": None if layer.reads is None else stack.first + layer.reads,
                    "indexed_by": None if chooser is None else stack.first + chooser,
                    "tokens_per_entry": rate.entry,
                    "core": core and core.name,
                    "cores_refused": core.refused if core else {},
                    "step_core": step and step.name,
                    "step_cores_refused": step.refused if step else {},
                    "cached": cached(stack, layer),
                    "cache_bytes_per_token": plain(each),
                    "cache_bytes_constant": constant,
                }
            )
    return {
        "parameters": params.count(model.params()),
        "active_parameters": params.active(model.params()),
        "trained_parameters": params.count(trained_params(run)),
        "flops_per_token": flops_per_token(model, run.train.length, _adapters(run)),
        "training_bytes": training_bytes(run),
        "cache_bytes_per_token": plain(grows),
        "cache_bytes_constant": sum(layer["cache_bytes_constant"] for layer in layers)
        + model.state_bytes(compute.type),
        "dtype": compute.dtype,
        "layers": layers,
        "weights": weights(run),
    }


def training_bytes(run: Run) -> dict[str, int]:
    """Return the bytes of the trained weights, their gradient, the optimizer's state and, if
    adapters are trained, the frozen weights."""
    training, declared = run.train.effective, trained_params(run)
    optimizer = training.optimizer.transform(declared, resolved_params(run))
    shapes = params.abstract(declared)
    state = jax.tree.leaves(jax.eval_shape(optimizer.init, shapes))
    weights = 4 * params.count(declared)
    return {
        "weights": weights,
        "gradient": weights,
        "optimizer": sum(leaf.size * leaf.dtype.itemsize for leaf in state),
        "frozen": 0 if training.adapter is None else 4 * params.count(run.model.params()),
    }


def _adapters(run: Run) -> Any:
    """Return the declared weights of the adapters; None for a run without adapters."""
    return None if run.train.adapter is None else trained_params(run)


def plain(number: Fraction) -> int | float:
    """Return an int if the fraction is a whole number, else a float."""
    return int(number) if number.denominator == 1 else float(number)


def shown(number: float) -> str:
    """Format a number with thousands separators; with one decimal if it is not an int."""
    return f"{number:,}" if isinstance(number, int) else f"{number:,.1f}"


def weights(run: Run) -> list[dict[str, Any]]:
    """Return name, dimensions, role, scaling and sharding of each weight.

    The sharding is the mesh axis of each dimension, on the mesh of the configuration. In a run with
    adapters, the frozen weights come first, with a learning rate of zero, then the adapters.
    """
    mesh = run.mesh.abstract
    rows = []
    scaling = params.named(run.model.resolved(run.train.optimizer.family))
    declared = params.named(run.model.params())
    if run.train.adapter is not None:
        scaling = {n: replace(w, learning_rate=0.0, decays=False) for n, w in scaling.items()}
        scaling |= params.named(resolved_params(run))
        declared |= params.named(trained_params(run))
    for name, param in declared.items():
        resolved = scaling[name]
        rows.append(
            {
                "weight": name,
                "dims": dict(param.dims),
                "role": param.role,
                "deviation": 0.0 if param.init != "normal" else resolved.deviation,
                "multiplier": resolved.multiplier,
                "learning_rate": resolved.learning_rate,
                "epsilon": resolved.epsilon,
                "decays": resolved.decays,
                "sharding": [
                    " x ".join(axes_of(part)) or None for part in specification(param.dims, mesh)
                ],
            }
        )
    return rows


def show(facts: Mapping[str, Any], run: Run, console: Console) -> None:
    """Print the facts of `describe` as tables."""
    active = facts["active_parameters"]
    used = f", {active:,} of them used by a token" if active < facts["parameters"] else ""
    console.print(styled("parameters  ", (f"{facts['parameters']:,}", "bold"), used))
    if run.train.adapter is not None:
        trained = facts["trained_parameters"]
        share = f" in adapters, {trained / facts['parameters']:.2%} of them; all others are frozen"
        console.print(styled("trained     ", (f"{trained:,}", "bold"), share))
    console.print(
        styled(
            *("training    ", (f"{facts['flops_per_token']:,}", "bold")),
            f" FLOPs per token at {run.train.length:,} tokens",
        )
    )
    held = facts["training_bytes"]
    parts = ", ".join(_sizes(held))
    total = (gibibytes(sum(held.values())), "bold")
    console.print(styled("            ", total, f" besides activations: {parts}"))
    console.print(
        styled(
            *("cache       ", (shown(facts["cache_bytes_per_token"]), "bold")),
            f" bytes per token and {facts['cache_bytes_constant']:,} bytes besides "
            f"({facts['dtype']})",
        )
    )
    for words in dict.fromkeys(layer["attention"] for layer in facts["layers"]):
        console.print(f"attention   {words}")
    reasons = [reason for layer in facts["layers"] for reason in layer["cores_refused"].items()]
    for name, reason in dict.fromkeys(reasons):
        console.print(f"core        not {name}: {reason}")
    for words in dict.fromkeys(map(_step, facts["layers"])):
        console.print(f"decoding    {words}")
    console.print()
    columns = ("layer", "attention", "position", "window", "reads", "core", "cached")
    layers = table(columns, ("cache\nbytes/token", "fixed\nbytes"))
    groups = _alike(facts["layers"])
    costs = even([group[0]["cache_bytes_per_token"] for group in groups])
    for group, cost in zip(groups, costs, strict=True):
        first, last = group[0], group[-1]
        number = str(first["layer"])
        fixed = first["cache_bytes_constant"]
        layers.add_row(
            number if first is last else f"{number}-{last['layer']}",
            first["attention"].split(" ")[0],
            first["position"],
            str(first["window"] or "all"),
            _reads(group),
            first["core"] or "none",
            _cached(first),
            cost,
            f"{fixed:,}" if fixed else "",
        )
    console.print(layers, "", sep="\n")
    columns = ("init\ndeviation", "multiplier", "learning rate,\nmultiple", "decay")
    scaled = table(("weight", "shape / mesh axis"), columns)
    rows = _merged(facts["weights"])
    keys = ("deviation", "multiplier", "learning_rate")
    numbers = zip(*(even([row[key] for _, row in rows], 3) for key in keys), strict=True)
    for (name, row), cells in zip(rows, numbers, strict=True):
        axes = zip(row["dims"].values(), row["sharding"], strict=True)
        scaled.add_row(
            name,
            " x ".join(str(size) if axis is None else f"{size}/{axis}" for size, axis in axes),
            *cells,
            "yes" if row["decays"] else "no",
        )
    console.print(scaled)


def show_step(facts: Mapping[str, Any], console: Console) -> None:
    """Print the facts of `estimate` on a training step on a kind of device."""
    mesh, held = MeshShape(**facts["mesh"]), facts["bytes_per_device"]
    console.print(
        styled(
            *("step        ", (f"{mesh.size:,} x {facts['device']}", "bold")),
            f", mesh {mesh}, batch {facts['batch']:,} x {facts['length']:,} tokens; each figure is "
            "of one device",
        )
    )
    room = f" of {gibibytes(facts['memory'])}: {', '.join(_sizes(held))}"
    console.print(styled("memory      ", (gibibytes(held["total"]), "bold"), room))
    console.print(f"cache       {gibibytes(facts['cache_bytes_per_device'])} in decoding")
    policies = table(("train.compute.rematerialise",), ("activations", "total", "fits"))
    for name, each in facts["rematerialise"].items():
        sizes = gibibytes(each["activations"]), gibibytes(each["total"])
        policies.add_row(name, *sizes, "yes" if each["fits"] else "no")
    console.print(policies)
    if not facts["fits"]:
        console.print(_way_out(facts))
    more = facts["recomputed_flops_per_device"]
    again = f" and {more:.3g} to recompute" if more else ""
    console.print(f"work        {facts['flops_per_device']:.3g} FLOPs{again}")
    unused = {axis for axis in ("replica", "context") if mesh.sizes[axis] == 1}
    moved = (
        f"{gibibytes(size)} over {axis}"
        for axis, size in facts["collective_bytes"].items()
        if axis not in unused
    )
    console.print(f"collectives {', '.join(moved)}")
    times = (
        f"{name.replace('_', ' ')} {1000 * t:,.0f}"
        for name, t in facts["seconds"].items()
        if name.removesuffix("_links") not in unused
    )
    console.print(f"least ms    {', '.join(times)}")
    bounds = facts["mfu_bound"], facts["mfu_bound_without_overlap"]
    console.print(
        styled(
            *("MFU         ", (f"at most {bounds[0]:.0%}", "bold")),
            f", {bounds[1]:.0%} if collectives do not overlap; limited by "
            f"{facts['limited_by'].replace('_', ' ')}",
        )
    )
    console.print()


def _way_out(facts: Mapping[str, Any]) -> str:
    """Return a line with the settings under which a step that does not fit would fit."""
    ways: list[str] = []
    if fitting := [name for name, each in facts["rematerialise"].items() if each["fits"]]:
        ways.append(f"train.compute.rematerialise={fitting[0]}")
    if nearest := facts["nearest_mesh"]:
        rows = nearest["replica"] * nearest["data"]
        keys = [f"mesh.{axis}={nearest[axis]}" for axis in ("data", "tensor")]
        if nearest["context"] != facts["mesh"]["context"]:
            keys.append(f"mesh.context={nearest['context']}")
        keys += [f"train.batch={rows}"] if rows > facts["batch"] else []
        ways.append(f"the nearest mesh, {' '.join(keys)}")
    return (
        f"            does not fit; {' or '.join(ways) or 'a smaller model or shorter rows'} would"
    )


def _merged(weights: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Merge rows that differ only in their stage or layer. The name of a merged row begins with the
    number of rows."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in weights:
        facts = {name: value for name, value in row.items() if name != "weight"}
        inside = row["weight"].split(".", 2)[-1]
        groups.setdefault(f"{inside} {facts}", []).append(row)
    merged = []
    for rows in groups.values():
        stages = rows[0]["weight"].startswith("stage")
        name = rows[0]["weight"].split(".", 2)[-1] if stages else rows[0]["weight"]
        merged.append((f"{len(rows)} x {name}" if len(rows) > 1 else name, rows[0]))
    return merged


def _sizes(held: Mapping[str, int]) -> list[str]:
    """Format the bytes of each part of memory but the total, such as "3.3 MiB of weights"."""
    words = {"frozen": "frozen weights", "working": "temporary arrays"}
    sizes = {words.get(name, name): size for name, size in held.items() if name != "total"}
    return [f"{gibibytes(size)} of {name}" for name, size in sizes.items() if size]


def _cached(layer: dict[str, Any]) -> str:
    """Return the shape, [heads x width], of each tensor that a layer caches of an entry, and the
    least number of tokens that share an entry, if it is not one."""
    tensors = ", ".join(f"{name} {h}x{width}" for name, (h, width) in layer["cached"].items())
    tokens = layer["tokens_per_entry"]
    return f"{tensors} per {tokens} tokens" if tensors and tokens > 1 else tensors


def _reads(layers: list[dict[str, Any]]) -> str:
    """Return whose entries layers read, and which layers choose among them."""

    def numbers(key: str) -> str:
        return ", ".join(dict.fromkeys(str(layer[key]) for layer in layers))

    source = "own" if layers[0]["reads"] is None else numbers("reads")
    chosen = layers[0]["indexed_by"] is not None
    return f"{source}, chosen by {numbers('indexed_by')}" if chosen else source


def _step(layer: Mapping[str, Any]) -> str:
    """Return the core of a step of decoding, and why faster ones are not used."""
    reasons = [
        f"not {name}: {reason}"
        for name, reason in layer["step_cores_refused"].items()
        if CORES[name].steps
    ]
    return "; ".join([f"core {layer['step_core'] or 'none'}", *reasons])


def _alike(layers: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Group adjacent layers that differ only in their index."""
    groups: list[list[dict[str, Any]]] = []
    for layer in layers:
        same = ("attention", "position", "window", "core", "cores_refused", "cache_bytes_per_token")
        others = ("reads", "indexed_by")
        if (
            groups
            and all(groups[-1][0][key] == layer[key] for key in same)
            and all((groups[-1][0][key] is None) == (layer[key] is None) for key in others)
        ):
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return groups
