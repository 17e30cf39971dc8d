"""Is a bulk run that is killed the same as one that is not, and what does it cost?

Draws the captions of emoji scenes by `unclip sample --prompts` three times: undisturbed; killed (SIGKILL) at random
moments and started again until it is done; and as many by `--prompt`, all in one call. Compares all files of the first
two byte for byte.

    python experiments/benchmarks/bulk_drawing.py --bundle OUT/bundle --captions 2000 --kills 5

--steps takes fewer steps of sampling, which draws worse pictures sooner; upsamplers are left out then.
"""

import itertools
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure

from unclip_jax.bundle import load_bundle, save_bundle
from unclip_jax.data.emoji_scenes import scenes


def captions(count: int) -> list[str]:
    """The first captions of single objects, of the test split and then of the training's."""
    texts = itertools.chain(scenes("single", "test"), scenes("single", "train"))
    return [text for _, text in itertools.islice(texts, count)]


def with_steps(bundle: str, steps: int, folder: Path) -> Path:
    """Copies a cascade's CLIP, prior and decoder, to be sampled in so many steps."""
    for name in ("clip", "prior", "decoder"):
        found = load_bundle(f"{bundle}/{name}")
        config = found.config.copy_and_resolve_references().unlock()
        if "sampling" in config:
            config.sampling.steps = str(steps)
        kept = found.tokenizer_bytes, found.clip_identity, found.extra
        save_bundle(folder / name, found.stage, config.lock(), found.params, *kept)
    return folder


def command(flags, *options: str) -> list[str]:
    shared = [f"--bundle={flags.bundle}", "-n", "1", f"--seed={flags.seed}"]
    return [sys.executable, "-m", "unclip_jax", "sample", *shared, *options]


def run(line: list[str]) -> dict[str, float]:
    """Runs a command to its end: seconds of all, and pictures a second once the package is imported."""
    start = time.monotonic()
    done = subprocess.run(line, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    count, seconds = re.findall(r"(\d+) pictures in ([\d.]+) s", done.stderr)[-1]
    rate = measure.significant(int(count) / float(seconds))
    return {"pictures": int(count), "seconds": round(time.monotonic() - start, 1), "pictures_per_second": rate}


def killed(line: list[str], kills: int, seconds: float, chance: random.Random) -> list[float]:
    """Kills a command `kills` times: seconds that it had, drawn so that none is likely to finish before."""
    had = []
    for _ in range(kills):
        had.append(round(chance.uniform(0, 2 * seconds / (kills + 1)), 2))
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(had[-1])
            sys.exit("the command was done before it could be killed: give more --captions")
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return had


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def main() -> None:
    parser = measure.parser(__doc__, "bulk_drawing.json")
    parser.add_argument("--bundle", required=True, help="folder of a trained cascade")
    parser.add_argument("--captions", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--steps", type=int, default=0, help="of sampling, of each model; 0: the trained config's")
    flags = parser.parse_args()
    texts = captions(flags.captions)
    report = {"captions": len(texts), "steps": flags.steps, "seed": flags.seed} | measure.environment()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if flags.steps:
            flags.bundle = with_steps(flags.bundle, flags.steps, folder / "bundle")
        (folder / "captions.txt").write_text("\n".join(texts) + "\n")
        (folder / "few.txt").write_text("\n".join(texts[:64]) + "\n")
        bulk = f"--prompts={folder / 'captions.txt'}"
        report["compiling"] = run(command(flags, f"--prompts={folder / 'few.txt'}", f"--out={folder / 'few'}"))
        report["undisturbed"] = run(command(flags, bulk, f"--out={folder / 'undisturbed'}"))
        measure.say(json.dumps(report["undisturbed"]))
        again, seconds = command(flags, bulk, f"--out={folder / 'killed'}"), report["undisturbed"]["seconds"]
        report["killed_after_seconds"] = killed(again, flags.kills, seconds, random.Random(flags.seed))
        report["shards_after_kills"] = len(list((folder / "killed").glob("*.tar")))
        report["after_kills"] = run(again)
        ours, theirs = files(folder / "undisturbed"), files(folder / "killed")
        report |= {"files": len(ours), "same_bytes": ours == theirs}
        measure.say(json.dumps(report["after_kills"]) + f" same: {ours == theirs}")
        report["plain"] = run(command(flags, *(f"--prompt={text}" for text in texts), f"--out={folder / 'plain'}"))
    ways = ("undisturbed", "after_kills", "plain")
    print(measure.table(("run", "pictures", "seconds", "pictures/s"), [(way, *report[way].values()) for way in ways]))
    measure.write(flags.out, report)
    if not report["same_bytes"]:
        sys.exit("the files of the killed run differ")


if __name__ == "__main__":
    main()
