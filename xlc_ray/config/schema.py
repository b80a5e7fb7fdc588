"""JSON Schemas of all settings, by which editors complete and check the YAML.

python -m xlc_ray.config.schema > configs/schema.json
python -m xlc_ray.config.schema sweep > configs/sweeps/schema.json
"""

from __future__ import annotations

import json
import sys
from typing import Any

from xlc_ray.config import Config
from xlc_ray.config.sweep import SweepConfig


def text() -> str:
    """What stands in configs/schema.json."""
    return _text(Config.model_json_schema())


def sweep_text() -> str:
    """What stands in configs/sweeps/schema.json."""
    schema = SweepConfig.model_json_schema()
    base = schema["properties"]["base"]
    schema["properties"]["base"] = {"anyOf": [{"type": "string"}, {"$ref": base["$ref"]}]} | {
        "description": base["description"]
    }
    return _text(schema)


def _text(schema: dict[str, Any]) -> str:
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    print(sweep_text() if sys.argv[1:] == ["sweep"] else text(), end="")
