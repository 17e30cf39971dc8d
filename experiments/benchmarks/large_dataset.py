"""How fast do many records go from tars to a trained prior, and does memory stay flat?

    python experiments/benchmarks/large_dataset.py [--records 200000] [--steps 10000]

Draws so many varied emoji scenes at 32 px into tars as img2dataset writes them; builds a dataset of them by `data
build`, embeds it by `data embed` with a tiny CLIP, and trains a tiny prior on the embeddings by `train`, each command
in a process of its own, as a user runs it. Prints and writes to large_dataset.json the records a second of each, the
most memory that it and its workers had, and the trainer's memory over its steps.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measure
import psutil
from PIL import Image

from unclip_jax.data import varied_scenes

HERE = Path(__file__).parent
TAR_RECORDS, BATCH = 10_000, 8
EVERY = 1.0  # seconds between two looks at memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=200_000)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, help="keeps what is made; default: a temporary folder")
    args = parser.parse_args()
    report: dict[str, Any] = {"environment": measure.environment(), "records": args.records, "steps": args.steps}
    with tempfile.TemporaryDirectory() as temporary:
        for name, found in run(args.folder or Path(temporary), args.records, args.steps):
            report[name] = found
            measure.write(HERE / "large_dataset.json", report)
    print(json.dumps(report, indent=1))


def run(folder: Path, records: int, steps: int) -> Iterator[tuple[str, dict]]:
    """Draws, builds, trains a CLIP for a few steps, embeds, and trains a prior; yields what was measured of each."""
    write_tars(folder / "tars", records)
    tfds, clip, prior = (str(folder / name) for name in ("tfds", "clip", "prior"))
    data = ["--config.data.source=tfds:many", f"--config.data.data_dir={tfds}", "--config.data.workers=0"]
    source = f"tars:{folder / 'tars'}/*.tar"
    build = ["data", "build", "--source", source, "--out", tfds, "--name", "many", "--workers", "2"]
    yield "build", timed([*build, "--exact-duplicates"], records)
    text = ["--config.model.text.context=36"]
    timed(["train", "--config=configs/clip.py:tiny", f"--workdir={clip}", *data, *text, "--config.train.steps=20"], 0)
    given = ["--config=configs/prior_diffusion.py:tiny", *data, f"--config.clip.bundle={clip}/bundle"]
    given += ["--config.model.context=36"]
    yield "embed", timed(["data", "embed", *given, "--out", f"{folder}/embeddings"], records)
    given += [f"--config.data.embeddings={folder}/embeddings", f"--config.train.steps={steps}"]
    # Without the analytic variances, which are found after the last step.
    given += ["--config.sampling.sampler=ddim", f"--config.train.batch_size={BATCH}", "--config.optim.warmup_steps=0"]
    given += ["--config.train.eval_size=16", "--config.train.draw_size=8"]
    yield "train", timed(["train", *given, f"--workdir={prior}"], BATCH * steps, Path(prior) / "metrics.jsonl")


def write_tars(folder: Path, records: int) -> None:
    """Writes PNG and TXT of varied scenes, TAR_RECORDS to a tar; tars that are there are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, records, TAR_RECORDS):
        path = folder / f"{start // TAR_RECORDS:05}.tar"
        if path.exists():
            continue
        with tarfile.open(path.with_suffix(".part"), "w") as archive:
            for index in range(start, min(start + TAR_RECORDS, records)):
                scene, _, caption = varied_scenes.scene_at("train", index)
                packed = io.BytesIO()
                Image.fromarray(varied_scenes.render(scene, 32)).save(packed, "PNG")
                for ending, content in (("png", packed.getvalue()), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{index:09}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        path.with_suffix(".part").rename(path)


def timed(words: list[str], records: int, metrics: Path | None = None) -> dict:
    """Runs a command of the package; returns its seconds, records a second and memory.

    metrics: of a training run, by which its memory is told at each tenth of its steps.
    """
    began, looks, ended = time.monotonic(), [], threading.Event()
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen([sys.executable, "-m", "unclip_jax", *words], env=environment)

    def look() -> None:
        while not ended.wait(EVERY):
            looks.append((last_step(metrics), resident(process.pid)))

    thread = threading.Thread(target=look)
    thread.start()
    status = process.wait()
    ended.set()
    thread.join()
    if status:
        raise SystemExit(f"{' '.join(words[:2])} ended with status {status}")
    seconds = time.monotonic() - began
    found = {"seconds": round(seconds, 1), "records_per_second": round(records / seconds, 1)}
    found["most_mib"] = round(max((mib for _, mib in looks), default=0))
    if metrics:
        found["mib_by_step"] = tenths({step: round(mib) for step, mib in looks if step}, last_step(metrics))
    return found


def tenths(by_step: dict[int, int], last: int) -> dict[int, int]:
    """Keeps the first look after each tenth of the steps."""
    found = {}
    for k in range(1, 10):
        later = [step for step in by_step if step >= k * last / 10]
        if later:
            found[min(later)] = by_step[min(later)]
    return found


def resident(pid: int) -> float:
    """Memory of a process and its children in MiB; pages that they share count once for each."""
    try:
        whole = psutil.Process(pid)
        return sum(p.memory_info().rss for p in (whole, *whole.children(recursive=True))) / 2**20
    except psutil.NoSuchProcess:
        return 0.0


def last_step(metrics: Path | None) -> int:
    lines = metrics.read_text().splitlines() if metrics and metrics.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


if __name__ == "__main__":
    main()
