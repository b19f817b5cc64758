"""Write the configuration reference into docs/configuration.md.

Run: python docs/configuration.py
"""

from __future__ import annotations

from pathlib import Path

from mukv.runs.config import Run
from mukv.schema.reference import markdown
from mukv.storage.files import write_atomic

PAGE = Path(__file__).with_name("configuration.md")

if __name__ == "__main__":
    write_atomic(PAGE, markdown(Run))
