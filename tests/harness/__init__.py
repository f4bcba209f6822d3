"""What tests share and is no test itself."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
