"""What a configuration amounts to, without allocating anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from mukv.config import Run
from mukv.core import params
from mukv.core.mesh import specification


def describe(run: Run) -> dict[str, Any]:
    """Parameters, FLOPs and cache bytes as plain data; the field names are public.

    Bytes are those of the compute type. A layer with a window costs a constant, any other an
    amount per token; one that reads another layer's entries costs nothing.
    """
    model = run.model
    compute = run.train.compute.resolve(model.vocab_size)
    layers = []
    for layer in model.layers:
        entry = model.cache_bytes_per_token(layer, compute.type)
        fused = compute.fused and layer.attention.fusable
        layers.append(
            {
                "layer": layer.index,
                "attention": layer.attention.describe(),
                "position": layer.attention.position.kind,
                "window": layer.window,
                "reads": layer.reads,
                "core": "fused" if fused else "plain",
                "cache_bytes_per_token": 0 if layer.window else entry,
                "cache_bytes_constant": entry * (layer.window or 0),
            }
        )
    return {
        "parameters": params.count(model.params()),
        "flops_per_token": model.flops_per_token(run.train.length),
        "cache_bytes_per_token": sum(layer["cache_bytes_per_token"] for layer in layers),
        "cache_bytes_constant": sum(layer["cache_bytes_constant"] for layer in layers),
        "dtype": compute.dtype,
        "layers": layers,
        "weights": weights(run),
    }


def weights(run: Run) -> list[dict[str, Any]]:
    """Each weight with its role, scaling and place on the mesh that the configuration asks for."""
    mesh = jax.sharding.AbstractMesh((run.mesh.data, run.mesh.tensor), ("data", "tensor"))
    rows = []
    for name, param in params.named(run.model.params()).items():
        resolved = run.model.scaling.resolve(param)
        rows.append(
            {
                "weight": name,
                "dims": dict(param.dims),
                "role": param.role,
                "deviation": 0.0 if param.init != "normal" else resolved.deviation,
                "multiplier": resolved.multiplier,
                "learning_rate": resolved.learning_rate,
                "decays": resolved.decays,
                "sharding": [
                    None if axis is None else str(axis)
                    for axis in specification(param.dims, mesh)
                ],
            }
        )
    return rows


def show(facts: Mapping[str, Any], run: Run, console: Console) -> None:
    """The same for a person."""
    console.print(
        f"[bold]{facts['parameters']:,}[/] parameters, "
        f"[bold]{facts['flops_per_token']:,}[/] training FLOPs per token at "
        f"{run.train.length:,} tokens, cache [bold]{facts['cache_bytes_per_token']:,}[/] bytes "
        f"per token + {facts['cache_bytes_constant']:,} ({facts['dtype']})"
    )
    layers = Table("layer", "attention", "position", "window", "reads", "core", "cache bytes/token")
    for group in _alike(facts["layers"]):
        first, last = group[0], group[-1]
        number = str(first["layer"])
        constant = f" (ring of {first['cache_bytes_constant']:,})" if first["window"] else ""
        layers.add_row(
            number if first is last else f"{number}-{last['layer']}",
            first["attention"],
            first["position"],
            str(first["window"] or "all"),
            "own" if first["reads"] is None else ", ".join(str(g["reads"]) for g in group),
            first["core"],
            f"{first['cache_bytes_per_token']:,}{constant}",
        )
    console.print(layers)
    table = Table("weight", "dims", "role", "deviation", "multiplier", "rate x", "decays", "split")
    for row in facts["weights"]:
        split = [
            f"{name}/{axis}"
            for name, axis in zip(row["dims"], row["sharding"], strict=True)
            if axis is not None
        ]
        table.add_row(
            row["weight"],
            " ".join(f"{name}={size}" for name, size in row["dims"].items()),
            row["role"],
            f"{row['deviation']:.4g}",
            f"{row['multiplier']:.4g}",
            f"{row['learning_rate']:.4g}",
            "yes" if row["decays"] else "no",
            " ".join(split) or "whole",
        )
    console.print(table)


def _alike(layers: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Neighbouring layers that differ only in their number."""
    groups: list[list[dict[str, Any]]] = []
    for layer in layers:
        same = ("attention", "position", "window", "core", "cache_bytes_per_token")
        if (
            groups
            and all(groups[-1][0][key] == layer[key] for key in same)
            and (groups[-1][0]["reads"] is None) == (layer["reads"] is None)
        ):
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return groups



