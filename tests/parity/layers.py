"""One layer of a model of transformers, and the same layer of mukv."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mukv.attention import Attention, Bag, Mask
from mukv.attention.indexer import EntryChoice
from mukv.core.compute import Compute
from mukv.core.params import map_params
from tests.parity.models import torch

VECTORS = ("position_bias", "sinks", "base", "A_log", "dt_bias")
"""Ends of the names of weights that are added to logits or to their like."""
Seen = tuple[np.ndarray, np.ndarray]
"""Input and output of a layer, [batch token width]."""


def drawn(model: Any) -> Any:
    """Draw weights for the model, none of which is a one or a zero, which would have no effect."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(torch.randn_like(weight) * 0.3)
            elif name.endswith(VECTORS):
                weight.normal_(0, 1)
            elif weight.ndim >= 2:
                weight.normal_(0, 1.5 / weight.shape[-1] ** 0.5)
    return model.eval()


def seen(layers: Sequence[Any], run: Callable[[], Any]) -> list[Seen]:
    """Return what entered and left each layer while `run` runs the model."""
    found: dict[int, Seen] = {}

    def keep(layer: Any, given: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
        x = named["hidden_states"] if "hidden_states" in named else given[0]
        y = out[0] if isinstance(out, tuple) else out
        found[id(layer)] = x.numpy(), y.numpy()

    handles = [layer.register_forward_hook(keep, with_kwargs=True) for layer in layers]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return [found[id(layer)] for layer in layers]


def shaped(mixer: Any, d_model: int, write: Any, read: Any) -> tuple[Any, Any]:
    """Return the weights of a layer as JAX arrays, in the shapes that it declares."""
    declared = mixer.write_params(d_model), mixer.read_params(d_model)
    return map_params(
        lambda param, weight: jnp.asarray(weight.reshape(param.shape)), declared, (write, read)
    )


def bags_of(attention: Attention, write: Any, x: jax.Array, position: jax.Array) -> list[Bag]:
    """Return the entries that a layer writes for whole rows."""
    written = attention.by_store(attention.write(write, x, position))
    return [bag.entries(written[name], position) for name, bag in attention.bags.items()]


def output(
    attention: Attention,
    weights: tuple[Any, Any],
    x: np.ndarray,
    compute: Compute,
    choice: EntryChoice | None = None,
) -> np.ndarray:
    """Return the output of a layer for whole rows. weights: for writing and for reading. choice: of
    another layer."""
    write, read = weights
    position = jnp.tile(jnp.arange(x.shape[1]), (len(x), 1))

    @jax.jit
    def forward(x: jax.Array) -> jax.Array:
        bags = bags_of(attention, write, x, position)
        mask = Mask(aligned=True, choice=choice)
        return attention.read(read, x, position, bags, mask, compute)[0]

    return np.asarray(forward(jnp.asarray(x)))


def assert_agree(found: np.ndarray, expected: np.ndarray) -> None:
    """Assert that outputs, which are not tiny, are equal to 1e-5 of the largest."""
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
