#!/usr/bin/env python3
"""Fails on a dependency that deny.toml forbids: its licence, its source, a second version of it.

What `cargo deny check bans licenses sources` does with our deny.toml, for machines without cargo-deny.
Advisories take a database from the internet: `cargo deny check advisories`.
"""

import re
import subprocess
import sys
import tomllib


def dependencies(target):
    """Everything that is built for the target, with licence expressions; ours have none here."""
    command = ["cargo", "tree", "--workspace", "--locked", "--all-features", "--target", target,
               "--edges", "normal,build,dev", "--prefix", "none", "--no-dedupe", "--format", "{p}|{l}"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return sorted({line.removesuffix(" (*)") for line in lines if line.strip()})


def satisfied(expression, allowed, used):
    """Whether an SPDX expression can be met with allowed licences alone; notes which."""
    tokens = re.findall(r"\(|\)|[^\s()]+", expression.replace("/", " OR "))

    def either():
        met = both()
        while tokens and tokens[0] == "OR":
            tokens.pop(0)
            # Both sides have to be read.
            met = both() or met
        return met

    def both():
        met = one()
        while tokens and tokens[0] == "AND":
            tokens.pop(0)
            met = one() and met
        return met

    def one():
        token = tokens.pop(0)
        if token == "(":
            met = either()
            tokens.pop(0)
            return met
        if tokens[:1] == ["WITH"]:
            token = f"{token} WITH {tokens[1]}"
            del tokens[:2]
        if token in allowed:
            used.add(token)
        return token in allowed

    return either() and not tokens


def problems(deny, lines):
    allowed, used, versions = set(deny["licenses"]["allow"]), set(), {}
    for line in lines:
        package, licence = line.split("|")
        name, version, *rest = package.split(" ")
        version = version.removeprefix("v")
        versions.setdefault(name, set()).add(version)
        rest = [word for word in rest if word != "(proc-macro)"]
        if rest and not rest[0].startswith("(/"):
            yield f"{name} {version} comes from {' '.join(rest)}, not from the registry"
        if not licence:
            yield f"{name} {version} says nothing of its licence"
        elif not satisfied(licence, allowed, used):
            yield f"{name} {version} is under {licence}, which deny.toml does not allow"
    for licence in sorted(allowed - used):
        yield f"no dependency is under {licence}: remove it from deny.toml"
    skipped = {entry["crate"] for entry in deny["bans"].get("skip", [])}
    for name, found in versions.items():
        rest = sorted(version for version in found if f"{name}@{version}" not in skipped)
        if len(rest) > 1:
            yield f"{name} is there in versions {', '.join(rest)}: use one, or skip the others in deny.toml with the reason"
        skipped -= {f"{name}@{version}" for version in found if len(found) > 1}
    for crate in sorted(skipped):
        yield f"{crate} is there once or not at all: remove it from deny.toml's skip"


def main():
    with open("deny.toml", "rb") as file:
        deny = tomllib.load(file)
    wrong = list(problems(deny, dependencies(deny["graph"]["targets"][0])))
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
