"""Save and load what is calibrated once per model: arrays by layer, beside the model's weights.

A calibration has a fingerprint of the weights that it was made with, and is refused for others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mukv.core.errors import BadInput
from mukv.core.params import named
from mukv.core.typing import Array
from mukv.storage.files import new_folder, write_atomic
from mukv.storage.json_text import to_json
from mukv.storage.weights import FILE, load_weights, save_weights

FACTS = "calibration.json"
Arrays = Mapping[int, Mapping[str, Array]]
"""Arrays of each writing layer by its index, and by name."""


@dataclass(frozen=True)
class CalibrationForm:
    """A kind of calibration.

    folder: name of its folder in that of a model
    format: its name in files
    noun: what it consists of, for errors
    option: argument of `mukv analyze --calibrate` that makes one
    """

    folder: str
    format: str
    noun: str
    option: str
    version: int = 1

    def save(self, model: Path, layers: Arrays, of: str, about: Mapping[str, Any]) -> Path:
        """Save arrays in a model's folder; return the path of the folder that has them.

        of: fingerprint of the model's weights. about: further facts
        """
        path = model / self.folder
        tree = {f"layer{index}": dict(arrays) for index, arrays in layers.items()}
        facts = {"format": self.format, "version": self.version, **about}
        facts |= {"fingerprint": of, "layers": list(layers)}
        with new_folder(path, overwrite=True) as made:
            save_weights(made, tree, {"fingerprint": of})
            write_atomic(made / FACTS, to_json(facts, indent=2) + "\n")
        return path

    def load(
        self, model: Path, weights: Mapping[str, Any]
    ) -> tuple[dict[int, dict[str, Array]], dict[str, Any], str]:
        """Load arrays from a model's folder; return them, the facts and the fingerprint.

        weights: the model's weights, as stored

        Raises BadInput if there are none, or they are damaged or were made for other weights.
        """
        path = model / self.folder
        try:
            about = json.loads((path / FACTS).read_text("utf-8"))
        except OSError:
            allowed = f"a calibration; `mukv analyze MODEL --calibrate {self.option}` makes one"
            raise BadInput(str(path), "no calibration", allowed) from None
        except ValueError:
            allowed = "a file that `mukv analyze` wrote"
            raise BadInput(str(path / FACTS), "not JSON", allowed) from None
        if not isinstance(about, dict) or about.get("format") != self.format:
            allowed = f"format must be {self.format!r}"
            raise BadInput(str(path / FACTS), "another format", allowed)
        if about.get("version") != self.version:
            allowed = f"version must be {self.version}"
            raise BadInput(str(path / FACTS), about.get("version"), allowed)
        tree, metadata = load_weights(path)
        own = fingerprint(weights)
        for found in (about.get("fingerprint"), metadata.get("fingerprint")):
            if found != own:
                raise BadInput(
                    str(path / FILE),
                    f"{self.noun} of the weights {str(found)[:12]}",
                    f"this model's are {own[:12]}: calibrate it with `mukv analyze MODEL "
                    f"--calibrate {self.option}`",
                )
        layers = {
            int(name.removeprefix("layer")): jax.tree.map(jnp.asarray, arrays)
            for name, arrays in tree.items()
        }
        return dict(sorted(layers.items())), about, own


def fingerprint(weights: Mapping[str, Any]) -> str:
    """Compute the SHA-256 of all weights, names and shapes included."""
    total = hashlib.sha256()
    for name, leaf in sorted(named(weights).items()):
        array = np.ascontiguousarray(leaf)
        total.update(f"{name} {array.dtype} {array.shape}".encode())
        total.update(array.tobytes())
    return total.hexdigest()
