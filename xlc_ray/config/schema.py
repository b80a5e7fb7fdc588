"""JSON Schema of all settings, by which editors complete and check the YAML: python -m xlc_ray.config.schema."""

from __future__ import annotations

import json

from xlc_ray.config import Config


def text() -> str:
    """What stands in configs/schema.json."""
    return json.dumps(Config.model_json_schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    print(text(), end="")
