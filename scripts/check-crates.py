#!/usr/bin/env python3
"""Fails on a dependency between our crates that ARCHITECTURE.md forbids."""

import json
import subprocess
import sys

ALLOWED = {
    "api": set(),
    "failpoint": set(),
    "types": set(),
    "sys": set(),
    "store": {"types", "sys"},
    "streaming": set(),
    "lane": set(),
    "image": {"store", "sys", "types"},
    "net": {"store", "sys", "types"},
    "vmm": {"lane", "store", "sys", "types"},
    "volume": {"store", "sys", "types"},
    "agent": {"api", "lane", "volume", "store", "sys", "types"},
    "shim": {"api", "failpoint", "lane", "vmm", "volume", "store", "sys", "types"},
    "cri": {"api", "failpoint", "image", "lane", "net", "streaming", "vmm", "store", "sys", "types"},
}
PREFIX = "a3s-box-"


def main() -> int:
    output = subprocess.run(
        ["cargo", "metadata", "--no-deps", "--format-version", "1", "--locked"],
        check=True, capture_output=True, text=True,
    ).stdout
    wrong = []
    for package in json.loads(output)["packages"]:
        name = package["name"].removeprefix(PREFIX)
        if name not in ALLOWED:
            wrong.append(f"{name}: not in ARCHITECTURE.md's map; add it there and here")
            continue
        ours = {
            dependency["name"].removeprefix(PREFIX)
            for dependency in package["dependencies"]
            if dependency["name"].startswith(PREFIX) and dependency["kind"] is None
        }
        wrong += [f"{name} must not depend on {other}" for other in sorted(ours - ALLOWED[name])]
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
