"""Shared KV: the key and the value of a head become one vector, which is cached once.

Its first dimensions are the key. The value is predicted by least squares from the key before its
rotation, and from further dimensions: the principal components of the residual. The map from the
vector to the value moves into the output projection. With as many further dimensions as a value has
the conversion is exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mukv.attention import Grouped, SharedKV
from mukv.conversion.base import Conversion, ConvertedLayer, Misfit, SourceLayer, plain_misfits
from mukv.conversion.fits import components, fit
from mukv.position import AnyPosition, RoPE


@dataclass(frozen=True)
class SharedVectors(Conversion):
    """Shared KV attention with the KV heads of the model.

    width: of the vector; that of a key if None. At twice that, nothing changes.
    """

    width: int | None = None

    def misfits(self, attention: Grouped) -> Iterator[Misfit]:
        yield from plain_misfits(attention, self.width)
        if attention.gate == "channel":
            yield "gate", attention.gate, "head or null: the channels of a value are not kept"

    def excess(self, attention: Grouped) -> Iterator[tuple[str, str]]:
        least = attention.head_dim
        if self.width is not None and not least <= self.width <= 2 * least:
            yield "width", f"possible with heads of {least}: shared_kv:{least} to {2 * least}"

    def converted_layer(self, source: SourceLayer) -> ConvertedLayer:
        attention = source.attention
        narrow = attention.head_dim
        width = self.width or narrow
        keys, values = source.of_examples("key"), source.of_examples("value")
        key, value = source.weight("key"), source.weight("value")
        output = source.weight("output").reshape(attention.kv_heads, source.group, narrow, -1)
        vectors, outputs = [], []
        for head in range(attention.kv_heads):
            predicted = fit(keys[head], values[head])
            left = values[head] - keys[head] @ predicted
            weighed = output[head].swapaxes(0, 1).reshape(narrow, -1)
            down, up = components(left, weighed @ weighed.T, width - narrow)
            more = (value[:, head] - key[:, head] @ predicted) @ down
            vectors.append(np.concatenate([key[:, head], more], axis=1))
            outputs.append(np.concatenate([predicted, up]) @ output[head])
        read: dict[str, Any] = dict(source.read)
        query = source.weight("query")
        read["query"] = np.pad(query, [(0, 0), (0, 0), (0, width - narrow)])
        read["output"] = np.concatenate(outputs)
        made = SharedKV(
            position=widened(attention.position, narrow, width),
            heads=attention.heads,
            scale=attention.scale or narrow**-0.5,
            softcap=attention.softcap,
            sinks=attention.sinks,
            gate=attention.gate,
            kv_heads=attention.kv_heads,
            head_dim=width,
        )
        return ConvertedLayer(made, read, {"value": np.stack(vectors, axis=1)})


def widened(position: AnyPosition, narrow: int, width: int) -> AnyPosition:
    """Return an encoding that rotates the same dimensions of a wider head."""
    if not isinstance(position, RoPE) or width == narrow:
        return position
    turning = int(position.partial * narrow)
    share = turning / width
    if int(share * width) < turning:  # the encoding rounds down
        share = float(np.nextafter(share, 1))
    return replace(position, partial=share)
