"""Runs one part in a separate process: ``python -m benchmarks.evidence.part NAME --result FILE``."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any

from .place import Place, Skip


def perform(name: str, place: Place) -> dict[str, Any]:
    """Run a part; exceptions become its result."""
    try:
        importlib.import_module(f"benchmarks.evidence.parts.{name}").run(place)
    except Skip as reason:
        return place.result("failed" if place.failures else "skipped", str(reason))
    except Exception as error:
        traceback.print_exc()
        return place.result("failed", f"{type(error).__name__}: {str(error)[:1000]}")
    return place.result("failed" if place.failures else "passed")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence.part", description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--result", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args(arguments)
    place = Place(options.device, options.rehearse, options.seconds, options.result)
    result = perform(options.name, place)
    text = json.dumps(result, indent=1)
    if options.result is not None:
        options.result.write_text(text)
    print("\n".join(["", *result["failures"], f"{options.name}: {result['outcome']} {result['reason']}"]))
    return 1 if result["outcome"] == "failed" else 0


if __name__ == "__main__":
    sys.exit(main())
