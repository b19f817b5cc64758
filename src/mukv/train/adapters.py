"""What `train.adapter` can name. To add one, write a class in a file and a line in ADAPTERS."""

from __future__ import annotations

from typing import Annotated

from mukv.core.table import PartTable
from mukv.train.adapted import Adapting
from mukv.train.adapter import Adapter
from mukv.train.eviction import EvictionGates

ADAPTERS = PartTable("adapter", Adapting, {"low_rank": Adapter, "eviction": EvictionGates})
AnyAdapter = Annotated[Adapting, ADAPTERS]
