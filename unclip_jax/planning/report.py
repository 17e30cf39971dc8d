"""Formats a plan: as an object for programs, which --json prints, and as a table for people."""

from collections import Counter
from typing import Any

from unclip_jax.planning.chips import GIB, Chip
from unclip_jax.planning.compiling import Compiled
from unclip_jax.planning.estimate import Estimate, mfu

TERA, GIGA, DAY = 1e12, 1e9, 86400.0
# Collectives that shuffle arrays around, listed one by one: many of them mean that arrays lie otherwise than needed.
SHUFFLES = ("all-to-all", "collective-permute")
BOUNDS = {
    "compute": "all FLOPs at the chip's peak",
    "memory": "memory traffic at the memory's bandwidth",
    "collectives": "bytes to other chips, over all links at once",
    "cycles": "the compiler's estimate, operation by operation",
    "measured": "median of calls on noise",
}


def flop_report(flops: int, executed: int, examples: int, chips: int) -> dict[str, Any]:
    """Reports the FLOPs of a call by the formulas. flops: each counted once; executed: with recomputed ones.

    Both are of all chips together, which process so many examples in the call.
    """
    return {
        "tflops_per_example": flops / examples / TERA,
        "tflops_per_chip_step": flops / chips / TERA,
        "recomputed_tflops_per_chip_step": (executed - flops) / chips / TERA,
    }


def memory_report(parts: dict[str, int], needed: int, limit: int) -> dict[str, Any]:
    """Reports the memory of each chip. parts: bytes by part; needed: bytes in all; limit: bytes that the chip has."""
    return {
        "memory_gib": {name: count / GIB for name, count in parts.items() if count},
        "hbm_gib_per_chip": needed / GIB,
        "hbm_limit_gib": limit / GIB,
        "fits": needed <= limit,
    }


def program_report(compiled: Compiled) -> dict[str, Any]:
    """Reports what each chip moves and sends in a call, and the compiler's own count of FLOPs."""
    counts, sent = Counter(), Counter()
    for each in compiled.collectives:
        counts[each.kind] += each.count
        sent[each.kind] += each.sent_bytes
    shuffles = [each for each in compiled.collectives if each.kind in SHUFFLES]
    return {
        "compiler_tflops_per_chip_step": compiled.compiler_flops / TERA,
        "moved_gb_per_chip_step": compiled.moved_bytes / GIGA,
        "collectives": {kind: {"count": counts[kind], "sent_gb": sent[kind] / GIGA} for kind in counts},
        "permutes": [
            {"kind": each.kind, "count": each.count, "sent_gb": each.sent_bytes / GIGA, "of": each.source}
            for each in shuffles
        ],
        "compile_seconds": compiled.compile_seconds,
    }


def timing_report(
    seconds: float, bound: str, estimate: Estimate | None, flops: float, examples: int, chip: Chip | None
) -> dict[str, Any]:
    """Reports the time of a call on so many examples.

    seconds, bound: the time, and the key of BOUNDS that it comes from. estimate: None where the chip is not known.
    flops: of each chip, each counted once.
    """
    return {
        "seconds": estimate._asdict() if estimate else {},
        "estimate": bound,
        "step_seconds": seconds,
        "mfu": mfu(flops, seconds, chip) if chip else None,
        "examples_per_second": examples / seconds,
    }


def table(report: dict[str, Any]) -> str:
    """Formats a whole plan, as `plan.plan` returns it, as a table of several lines."""
    lines = _parts(report)
    if "tflops_per_example" in report:
        lines += ["", f"{'TFLOPs per example':34}{report['tflops_per_example']:12.4g}"]
    if "chips" in report:
        where = f"{report['chips']} x {report['device']}"
        where += f", one of {report['hosts']} hosts" if report.get("hosts", 1) > 1 else ""
        lines += [f"\n{report['call']} on {where}; on each chip:", *_memory(report)]
    if "step_seconds" in report:
        lines += [*_program(report), *_timing(report)]
    if report.get("fits") is False:
        lines += ["", "It does not fit. " + _proposal(report)]
    return "\n".join(lines)


def _parts(report: dict[str, Any]) -> list[str]:
    parts, total = report["parts"], report["params"]
    width = max(map(len, parts))
    rows = sorted(parts.items(), key=lambda row: -row[1])
    lines = [f"{name:{width}}  {count:>15,}  {100 * count / total:5.1f} %" for name, count in rows]
    return [*lines, f"{'total':{width}}  {total:>15,}"]


def _memory(report: dict[str, Any]) -> list[str]:
    lines = [f"  {name:32}{count:12.2f} GiB" for name, count in report["memory_gib"].items()]
    need, limit = report["hbm_gib_per_chip"], report["hbm_limit_gib"]
    verdict = "fits" if report["fits"] else "too much"
    return [*lines, f"  {'total memory':32}{need:12.2f} GiB of {limit:.2f}: {verdict}"]


def _program(report: dict[str, Any]) -> list[str]:
    rows = [
        ("FLOPs of the model", report["tflops_per_chip_step"], "TFLOPs"),
        ("recomputed FLOPs (remat)", report["recomputed_tflops_per_chip_step"], "TFLOPs"),
        ("compiler's FLOPs, loops once", report["compiler_tflops_per_chip_step"], "TFLOPs"),
        ("to and from memory", report["moved_gb_per_chip_step"], "GB"),
    ]
    kinds = report["collectives"].items()
    rows += [(f"sent by {kind} (x {each['count']})", each["sent_gb"], "GB") for kind, each in kinds]
    lines = [f"  {name:32}{value:12.4g} {unit}" for name, value, unit in rows if value or "remat" in name]
    return lines + [f"    {each['kind']} x {each['count']} of {each['of']}" for each in report["permutes"][:8]]


def _timing(report: dict[str, Any]) -> list[str]:
    lines = [f"  {name:32}{value:12.4g} s  {BOUNDS[name]}" for name, value in report["seconds"].items() if value]
    bound, seconds = report["estimate"], report["step_seconds"]
    says = "measured" if bound == "measured" else f"at least; {bound} is the limit"
    lines += ["", f"{'seconds per ' + report['of']:34}{seconds:12.4g}  {says}"]
    if report["mfu"] is not None:
        name = "MFU" if bound == "measured" else "MFU, at most"
        lines.append(f"{name:34}{100 * report['mfu']:12.1f} %")
    lines.append(f"{'examples per second, all chips':34}{report['examples_per_second']:12.4g}")
    if "days" in report:
        lines.append(f"{'days for ' + format(report['steps'], ',') + ' steps':34}{report['days']:12.4g}")
    return [*lines, f"{'seconds to compile':34}{report['compile_seconds']:12.0f}"]


def _proposal(report: dict[str, Any]) -> str:
    if not report.get("proposal"):
        if report["of"] == "call":
            return "--config.mesh.fsdp=N splits the parameters over N chips, as `unclip sample --fsdp N` does."
        return "No values of mesh.fsdp, optim.accumulate and remat were found with which it does: take more chips."
    flags = " ".join(f"--config.{name}={value}" for name, value in report["proposal"].items())
    then = report["proposed"]
    return (
        f"With these flags it does: {flags}\n({then['hbm_gib_per_chip']:.2f} GiB, {then['step_seconds']:.4g} s per "
        f"{then['of']}; run the same command with these flags for the whole plan)"
    )
