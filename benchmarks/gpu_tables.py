"""Markdown tables of a JSON of `gpu.py`, for docs/gpu.md and README, so that nobody copies numbers.

Rows that are missing in the JSON are missing here; what failed or was left out is listed last.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Document = Mapping[str, Any]


def tables(document: Document) -> str:
    """Return all tables, each under a heading."""
    sections = (
        ("Machine", _machine(document)),
        ("For README: networks", _summary(document)),
        ("Kernels against their references", _trials(document)),
        ("Kernels, times", _speeds(document)),
        ("Networks, maps and states on the GPU", _networks(document)),
        ("U-Nets", _denoisers(document)),
        ("Tiled and whole", _tiled(document)),
        ("`tiny` through an engine, from and to host memory", _engines(document)),
        ("A volume, file to file", _volumes(document)),
        ("Not measured", _missing(document)),
    )
    texts = [f"### {title}\n\n{text}" for title, text in sections if text]
    if document["setting"]["rehearse"]:
        texts.insert(0, "**A rehearsal on a CPU with a stand-in: none of these numbers counts.**")
    return "\n\n".join(texts)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, or nothing if it has no rows."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(header)} |", "|---" * len(header) + "|", *lines]) * bool(
        lines
    )


def rows_of(document: Document, *parts: str, job: str = "") -> Iterator[Row]:
    """Yield the rows of these parts, or of all; with `job`, of jobs with that in their name."""
    for name, jobs in document["parts"].items():
        if not parts or name in parts:
            for each in jobs:
                if job in each["job"]:
                    yield from (row for row in each["rows"] if "left_out" not in row)


def number(value: Any, digits: int = 3) -> str:
    """Return a number with so many digits that count, or a dash for none."""
    if isinstance(value, bool):
        return yes(value)
    if not isinstance(value, int | float):
        return str(value) if value else "-"
    if value and abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:,.{digits}g}" if abs(value) < 10**digits else f"{value:,.0f}"


def percent(value: Any) -> str:
    """Return a share in percent, or a dash for none."""
    return f"{value:.0%}" if isinstance(value, int | float) else "-"


def yes(value: Any) -> str:
    """Return yes or no, or a dash for none."""
    return "-" if value is None else "yes" if value else "no"


def _machine(document: Document) -> str:
    cells = []
    for row in rows_of(document, "machine"):
        kind = row["kind"]
        values = {key: value for key, value in row.items() if key != "kind"}
        if kind == "machine":
            packages = ", ".join(f"{k} {v}" for k, v in values["packages"].items())
            text = f"{values['processor']}, {values['cores']} cores; {packages}"
        elif kind == "nvidia-smi":
            text = "; ".join(values["output"].splitlines())
        else:
            text = ", ".join(f"{key} {number(value)}" for key, value in values.items())
        cells.append((kind, text.replace("|", "/")))
    return table(("", ""), cells)


def _forms(document: Document) -> dict[tuple[str, str, str, Any], dict[str, Row]]:
    """Return rows of networks by network, form, precision and graph, then by direction."""
    found: dict[tuple[str, str, str, Any], dict[str, Row]] = {}
    for row in rows_of(document, job="gpu_networks"):
        if "slices_per_second" in row:
            key = (row["network"], row["form"], row["precision"], row.get("cuda_graph"))
            found.setdefault(key, {})[row["direction"]] = row
    return found


def _both(found: Mapping[str, Row], key: str, show: Any = number) -> str:
    return ", ".join(show(found.get(way, {}).get(key)) for way in ("encode", "decode"))


def _networks(document: Document) -> str:
    header = ("network", "form", "precision", "CUDA graph", "slices/s", "of the ceiling", "TFLOP/s")
    rows = (
        (
            network,
            form,
            precision,
            yes(graph),
            _both(found, "slices_per_second"),
            _both(found, "share", percent),
            _both(found, "flop_per_second", lambda n: number(n and n / 1e12)),
            _both(found, "peak_mib"),
            _both(found, "error_mean"),
            _both(found, "error_max"),
            _both(found, "same_bits", yes),
        )
        for (network, form, precision, graph), found in _forms(document).items()
    )
    more = ("peak MiB", "mean error", "largest error", "graph: same bits")
    return table((*header, *more), rows)


def _summary(document: Document) -> str:
    """Return the fastest form of every network and precision, by encode and decode together."""
    best: dict[tuple[str, str], tuple[float, str, Mapping[str, Row]]] = {}
    for (network, form, precision, graph), found in _forms(document).items():
        if len(found) == 2:
            seconds = sum(1 / row["slices_per_second"] for row in found.values())
            name = f"{form}, CUDA graph" if graph else form
            kept = best.get((network, precision))
            if kept is None or seconds < kept[0]:
                best[network, precision] = (seconds, name, found)
    return table(
        (
            "network",
            "precision",
            "fastest form",
            "slices/s, both",
            "encode, decode",
            "of the ceiling",
        ),
        (
            (
                network,
                precision,
                form,
                number(1 / seconds),
                _both(found, "slices_per_second"),
                _both(found, "share", percent),
            )
            for (network, precision), (seconds, form, found) in best.items()
        ),
    )


def _trials(document: Document) -> str:
    kinds = ("float32", "float16", "bfloat16")
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows_of(document, "trials"):
        found.setdefault(row["kernel"], {}).setdefault(row["type"], []).append(row)

    def cell(rows: list[Row]) -> str:
        if not rows:
            return "-"
        worst = max((row["error"] for row in rows if row["error"] is not None), default=None)
        passed = sum(row["passed"] for row in rows)
        return f"{passed} of {len(rows)}, {number(worst)}"

    return table(
        ("passed, largest error", *kinds),
        ((f"`{name}`", *(cell(of.get(kind, [])) for kind in kinds)) for name, of in found.items()),
    )


def _speeds(document: Document) -> str:
    def milliseconds(seconds: Any) -> str:
        return f"{1e3 * seconds:.3f}" if seconds else "-"

    def times(row: Row) -> str:
        both = row["torch_seconds"] and row["seconds"]
        return f"{row['torch_seconds'] / row['seconds']:.2f}" if both else "-"

    return table(
        (
            "kernel",
            "launch",
            "ms",
            "torch ms",
            "torch ms / ms",
            "TFLOP/s",
            "of the ceiling",
            "blocks",
        ),
        (
            (
                f"`{row['kernel']}`",
                row["spec"],
                milliseconds(row["seconds"]),
                milliseconds(row["torch_seconds"]),
                times(row),
                number(row["tflop_per_second"]),
                percent(row["share"]),
                row["blocks"],
            )
            for row in rows_of(document, "speeds")
        ),
    )


def _denoisers(document: Document) -> str:
    return table(
        ("network", "precision", "CUDA graph", "steps/s", "of the ceiling", "peak MiB", "errors"),
        (
            (
                row["network"],
                row["precision"],
                yes(row["cuda_graph"]),
                number(row["steps_per_second"]),
                percent(row["share"]),
                number(row["peak_mib"]),
                f"{number(row['error_mean'])}, {number(row['error_max'])}",
            )
            for row in rows_of(document, job="denoiser")
        ),
    )


def _tiled(document: Document) -> str:
    return table(
        ("network", "form", "precision", "direction", "same bits", "mean, largest difference"),
        (
            (
                row["network"],
                row["form"],
                row["precision"],
                row["direction"],
                yes(row["same_bits"]),
                f"{number(row['error_mean'])}, {number(row['error_max'])}",
            )
            for row in rows_of(document, job="tiled")
        ),
    )


def _engines(document: Document) -> str:
    return table(
        ("engine", "precision", "passed", "encode, decode, slices/s", "largest error, HU", "tiled"),
        (
            (
                row["engine"],
                row["precision"],
                yes(row["passed"]),
                _both(row["throughput"], "slices_per_second"),
                number((row["parity"] or {}).get("hu_max")),
                number(row["tiled_difference"]),
            )
            for row in rows_of(document)
            if row.get("kind") == "engine"
        ),
    )


def _volumes(document: Document) -> str:
    return table(
        ("slices", "precision", "kernels", "s", "first time, s", "slices/s"),
        (
            (
                "x".join(map(str, row["shape"])),
                row["precision"],
                number(row["kernels"]),
                number(row["seconds"]),
                number(row["first_seconds"]),
                number(row["slices_per_second"]),
            )
            for row in rows_of(document, "volume")
        ),
    )


def _missing(document: Document) -> str:
    """Return what was left out, stopped, killed or failed, with the last line of its output."""
    rows = [(name, why) for name, why in document["left_out"].items()]
    for jobs in document["parts"].values():
        for job in jobs:
            if job["outcome"] != "done":
                last = (job.get("output", "").splitlines() or [""])[-1].replace("|", "/")
                rows.append((job["job"], f"{job['outcome']} {last}".strip()))
            for row in job["rows"]:
                if why := row.get("left_out") or row.get("failure"):
                    words = (
                        row.get(key, "") for key in ("form", "precision", "direction", "trial")
                    )
                    name = " ".join([job["job"], *(word for word in words if word)])
                    rows.append((name, why.replace("|", "/")))
    if not document["finished"]:
        rows.append(("the rest", "the run was interrupted"))
    return table(("", ""), rows)
