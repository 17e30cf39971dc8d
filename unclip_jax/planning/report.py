"""Reports a plan: as an object for programs, and as a table for people."""

from collections import Counter

from unclip_jax.planning.chips import GIB, Chip
from unclip_jax.planning.compiling import Compiled
from unclip_jax.planning.estimate import Estimate

TERA, GIGA, DAY = 1e12, 1e9, 86400.0
SWARM = ("all-to-all", "collective-permute")  # signs of arrays that lie otherwise than they are needed
BOUNDS = {
    "compute": "all FLOPs at the chip's peak",
    "memory": "what it moves at the memory's bandwidth",
    "collectives": "what it sends over all links at once",
    "cycles": "the compiler's estimate, operation by operation",
    "measured": "median of calls on noise",
}


def flop_report(flops: int, executed: int, examples: int, chips: int) -> dict:
    """FLOPs of a call by the formulas, of all chips together: each done once, and as executed."""
    return {
        "tflops_per_example": flops / examples / TERA,
        "tflops_per_chip_step": flops / chips / TERA,
        "recomputed_tflops_per_chip_step": (executed - flops) / chips / TERA,
    }


def memory(parts: dict[str, int], needed: int, limit: int) -> dict:
    """Reports each chip's memory, from bytes."""
    return {
        "memory_gib": {name: count / GIB for name, count in parts.items() if count},
        "hbm_gib_per_chip": needed / GIB,
        "hbm_limit_gib": limit / GIB,
        "fits": needed <= limit,
    }


def program(compiled: Compiled) -> dict:
    """Reports what each chip moves in a call, and the compiler's own counts."""
    counts, sent = Counter(), Counter()
    for each in compiled.collectives:
        counts[each.kind] += each.count
        sent[each.kind] += each.sent
    swarm = [each for each in compiled.collectives if each.kind in SWARM]
    return {
        "compiler_tflops_per_chip_step": compiled.flops / TERA,
        "moved_gb_per_chip_step": compiled.moved / GIGA,
        "collectives": {kind: {"count": counts[kind], "sent_gb": sent[kind] / GIGA} for kind in counts},
        "permutes": [{"kind": e.kind, "count": e.count, "sent_gb": e.sent / GIGA, "of": e.source} for e in swarm],
        "compile_seconds": compiled.seconds,
    }


def timing(seconds: float, bound: str, estimate: Estimate | None, flops: float, examples: int, chip: Chip | None):
    """Reports the time of a call. flops: of each chip, nothing done twice; bound: what told the seconds, of BOUNDS."""
    return {
        "seconds": estimate._asdict() if estimate else {},
        "estimate": bound,
        "step_seconds": seconds,
        "mfu": flops / seconds / chip.flops if chip else None,
        "examples_per_second": examples / seconds,
    }


def table(report: dict) -> str:
    """Formats the whole report for reading."""
    lines = _parts(report)
    if "tflops_per_example" in report:
        lines += ["", f"{'TFLOPs of an example':34}{report['tflops_per_example']:12.4g}"]
    if "chips" in report:
        lines += [f"\n{report['call']}, on {report['chips']} x {report['device']}, of each:", *_memory(report)]
    if "step_seconds" in report:
        lines += [*_program(report), *_timing(report)]
    if report.get("fits") is False:
        lines += ["", "It does not fit. " + _proposal(report)]
    return "\n".join(lines)


def _parts(report: dict) -> list[str]:
    parts, total = report["parts"], report["params"]
    width = max(map(len, parts))
    rows = sorted(parts.items(), key=lambda row: -row[1])
    lines = [f"{name:{width}}  {count:>15,}  {100 * count / total:5.1f} %" for name, count in rows]
    return [*lines, f"{'total':{width}}  {total:>15,}"]


def _memory(report: dict) -> list[str]:
    lines = [f"  {name:32}{count:12.2f} GiB" for name, count in report["memory_gib"].items()]
    need, limit = report["hbm_gib_per_chip"], report["hbm_limit_gib"]
    verdict = "fits" if report["fits"] else "too much"
    return [*lines, f"  {'memory in all':32}{need:12.2f} GiB of {limit:.2f}: {verdict}"]


def _program(report: dict) -> list[str]:
    rows = [
        ("model's FLOPs", report["tflops_per_chip_step"], "TFLOPs"),
        ("those done again (remat)", report["recomputed_tflops_per_chip_step"], "TFLOPs"),
        ("FLOPs by compiler, loops once", report["compiler_tflops_per_chip_step"], "TFLOPs"),
        ("to and from memory", report["moved_gb_per_chip_step"], "GB"),
    ]
    kinds = report["collectives"].items()
    rows += [(f"sent by {kind}, {each['count']} times", each["sent_gb"], "GB") for kind, each in kinds]
    lines = [f"  {name:32}{value:12.4g} {unit}" for name, value, unit in rows if value or "remat" in name]
    return lines + [f"    {each['kind']} x {each['count']} of {each['of']}" for each in report["permutes"][:8]]


def _timing(report: dict) -> list[str]:
    lines = [f"  {name:32}{value:12.4g} s  {BOUNDS[name]}" for name, value in report["seconds"].items() if value]
    bound, seconds = report["estimate"], report["step_seconds"]
    says = "measured" if bound == "measured" else f"at least, by {bound}"
    lines += ["", f"{'seconds of a ' + report['of']:34}{seconds:12.4g}  {says}"]
    if report["mfu"] is not None:
        name = "MFU" if bound == "measured" else "MFU, at most"
        lines.append(f"{name:34}{100 * report['mfu']:12.1f} %")
    lines.append(f"{'examples in a second, all chips':34}{report['examples_per_second']:12.4g}")
    if "days" in report:
        lines.append(f"{'days of ' + format(report['steps'], ',') + ' steps':34}{report['days']:12.4g}")
    return [*lines, f"{'seconds of compiling':34}{report['compile_seconds']:12.0f}"]


def _proposal(report: dict) -> str:
    if not report.get("proposal"):
        return "No setting of mesh.fsdp, optim.accumulate and remat was found that does: take more chips."
    flags = " ".join(f"--config.{name}={value}" for name, value in report["proposal"].items())
    then = report["proposed"]
    return (
        f"This does: {flags}\n({then['hbm_gib_per_chip']:.2f} GiB, {then['step_seconds']:.4g} s for a {then['of']}; "
        "the same command with these flags says more)"
    )
