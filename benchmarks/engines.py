"""Build TensorRT engines twice, for several bundles, targets and precisions; none is run.

    python benchmarks/engines.py build/wan21 tiny --target sm_86,sm_89,sm_120 -o engines.json

Prints a Markdown table with one row per bundle, target and precision: number of engines, MiB,
seconds and peak memory of the builder, how many engines of the second build had the same bytes, and
the hash of all their hashes. The JSON lists every engine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

from fvae_deploy.make.engines import make_engines, row_facts
from fvae_deploy.stream.report import machine


def combined(hashes: list[str]) -> str:
    """Return the hash of these hashes, in the order of the parts."""
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:12]


def main() -> None:
    """Build the engines, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundles", nargs="+", help="built-in models or folders of bundles")
    parser.add_argument("--target", default="sm_86,sm_89,sm_120")
    parser.add_argument("--precision", default="fp16,bf16")
    parser.add_argument("--calibrate", type=Path, action="append", default=[])
    parser.add_argument("--builds", type=int, default=2, help="how often each is built")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    facts = []
    print(
        "| bundle | target | precision | engines | MiB | seconds | most MiB | same bytes | sha256 |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for bundle in options.bundles:
        for target in options.target.split(","):
            for precision in options.precision.split(","):
                builds = [
                    make_engines(bundle, [target], [precision], calibration=options.calibrate)
                    for _ in range(options.builds)
                ]
                rows = builds[0]
                others = [[row.built.sha256 for row in build] for build in builds[1:]]
                same = [
                    all(other[i] == row.built.sha256 for other in others)
                    for i, row in enumerate(rows)
                ]
                facts += [
                    {
                        "bundle": Path(bundle).name,
                        **row_facts(row),
                        "same_bytes": equal if others else None,
                    }
                    for row, equal in zip(rows, same, strict=True)
                ]
                print(
                    f"| {Path(bundle).name} | {target} | {precision} | {len(rows)} | "
                    f"{sum(row.built.bytes for row in rows) / 2**20:.1f} | "
                    f"{sum(row.seconds for row in rows):.1f} | "
                    f"{max(row.peak_bytes for row in rows) / 2**20:.0f} | "
                    f"{f'{sum(same)} of {len(same)}' if others else '-'} | "
                    f"{combined([row.built.sha256 for row in rows])} |",
                    flush=True,
                )
                content = {"machine": machine(), "builds": options.builds, "rows": facts}
                options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
