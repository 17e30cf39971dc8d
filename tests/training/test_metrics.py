import json
import struct
import sys
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.errors import UserError
from unclip_jax.paths import to_path
from unclip_jax.training import metrics
from unclip_jax.training.metrics import MetricLogger


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only when told to: clock(seconds)."""
    now = [1000.0]
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def advance(seconds):
        now[0] += seconds

    return advance


def logger(workdir, start_step=0, batch_size=8):
    return MetricLogger(str(workdir), 100, batch_size, start_step, "toy")


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events(workdir):
    """(step, tag, value) of every scalar in the TensorBoard files, read record by record."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            data = data[16 + length :]
    return found


def test_one_json_object_a_line_and_the_same_in_tensorboard(tmp_path, clock):
    with logger(tmp_path / "run") as log:
        clock(2.0)
        log.log(10, {"learning_rate": jnp.float32(0.5), "loss": jnp.float32(0.25)})
        clock(4.0)
        log.log(20, {"learning_rate": 0.5, "loss": 0.125})
    assert records(tmp_path / "run") == [
        {"step": 10, "loss": 0.25, "images_per_second": 40.0, "data_wait": 0.0, "seconds": 2.0, "learning_rate": 0.5},
        {"step": 20, "loss": 0.125, "images_per_second": 20.0, "data_wait": 0.0, "seconds": 6.0, "learning_rate": 0.5},
    ]
    losses = [(step, value) for step, tag, value in events(tmp_path / "run") if tag == "loss"]
    assert losses == [(10, 0.25), (20, 0.125)]


def test_held_out_numbers_are_in_tensorboard_alone(tmp_path):
    with logger(tmp_path) as log:
        log.add_held_out(10, {"loss": 0.5, "psnr": 2.0}, {})
    assert sorted(events(tmp_path)) == [(10, "held_out/loss", 0.5), (10, "held_out/psnr", 2.0)]
    assert records(tmp_path) == []


def test_pauses_do_not_slow_images_per_second(tmp_path, clock):
    with logger(tmp_path) as log:
        with log.pause(jnp.ones(3)):
            clock(60.0)  # compilation
        clock(1.0)
        log.log(5, {"loss": 1.0})
        clock(1.0)
        with log.pause():
            clock(5.0)
            with log.pause():
                clock(5.0)
            clock(5.0)
        clock(1.0)
        log.log(10, {"loss": 1.0})
    assert [r["images_per_second"] for r in records(tmp_path)] == [40.0, 20.0]
    assert [r["seconds"] for r in records(tmp_path)] == [61.0, 78.0]


def test_waiting_for_data_is_logged_and_said_once(tmp_path, clock, capsys):
    with logger(tmp_path) as log:
        for step, work, wait in ((5, 9.0, 3.0), (10, 1.0, 4.0), (15, 4.0, 12.0), (20, 1.0, 19.0)):
            with log.waiting():
                clock(wait)
            clock(work)
            log.log(step, {"loss": 1.0})
            said = capsys.readouterr().err
            assert ("waited for its data 75% of the time" in said) == (step == 15)  # step 10: for 5 seconds alone
            assert "warning" not in said or step == 15
    assert [r["data_wait"] for r in records(tmp_path)] == [0.25, 0.8, 0.75, 0.95]


def test_resumed_run_has_no_step_twice_and_its_clock_goes_on(tmp_path, clock):
    with logger(tmp_path) as log:
        for step in (10, 20, 30):
            clock(1.0)
            log.log(step, {"loss": float(step)})
    with logger(tmp_path, start_step=20) as log:
        clock(1.0)
        log.log(30, {"loss": -1.0})
    assert [(r["step"], r["loss"], r["seconds"]) for r in records(tmp_path)] == [
        (10, 10.0, 1.0), (20, 20.0, 2.0), (30, -1.0, 3.0),
    ]
    assert records(tmp_path)[-1]["images_per_second"] == 80.0  # ten steps, not thirty


def test_a_run_from_the_start_drops_the_log_of_an_earlier_one(tmp_path):
    with logger(tmp_path) as log:
        log.log(10, {"loss": 1.0})
    logger(tmp_path).close()
    assert records(tmp_path) == []


def test_line_cut_short_by_a_kill_is_dropped(tmp_path):
    with logger(tmp_path) as log:
        log.log(10, {"loss": 1.0})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 11, "lo')
    logger(tmp_path, start_step=20).close()
    assert [r["step"] for r in records(tmp_path)] == [10]


@pytest.mark.parametrize("damage", [b"\x00\xff{", b"[1, 2]", b'{"loss": 1.0}', b'{"step": null}', b"9"])
def test_damaged_log_is_read_up_to_where_it_is_good(tmp_path, damage, capsys):
    with logger(tmp_path) as log:
        for step in (10, 20, 30):
            log.log(step, {"loss": 1.0})
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    lines[1] = damage
    path.write_bytes(b"\n".join(lines) + b"\n")
    logger(tmp_path, start_step=30).close()
    assert [r["step"] for r in records(tmp_path)] == [10]
    assert "metrics.jsonl is damaged from line 2 on, which is dropped\n" in capsys.readouterr().err


def test_foreign_file_is_not_overwritten(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("step,loss\n")
    with pytest.raises(UserError, match=r"metrics.jsonl is not a log of metrics"):
        logger(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == "step,loss\n"


def test_nan_is_null_and_survives_a_resume(tmp_path):
    with logger(tmp_path) as log:
        log.log(10, {"loss": jnp.float32(jnp.nan), "grad_norm": float("inf")})
    logger(tmp_path, start_step=10).close()
    (record,) = records(tmp_path)
    assert record["loss"] is None and record["grad_norm"] is None
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_mean_over_no_rows_is_left_out_everywhere_and_a_true_nan_is_not(tmp_path, capsys):
    nan, zero, half = jnp.float32(jnp.nan), jnp.float32(0), jnp.float32(0.5)
    with logger(tmp_path) as log:
        values = log.log(10, {"loss": half, "empty": (zero, zero), "some": (half, half / 2), "wrong": (nan, half)})
    assert values["some"] == 2.0 and "empty" not in values
    (record,) = records(tmp_path)
    assert "empty" not in record and record["some"] == 2.0 and record["wrong"] is None
    tags = {tag: value for _, tag, value in events(tmp_path)}
    assert "empty" not in tags and tags["some"] == 2.0 and np.isnan(tags["wrong"])


def test_plain_lines_now_and_then_with_the_time_left(tmp_path, clock, capsys):
    with logger(tmp_path, start_step=10) as log:
        for step in range(11, 101):
            clock(2.0)
            log.log(step, {"loss": 0.5})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "toy: step 11/100, loss 0.5, 4 images/s, left 0:02:58"
    assert lines[1].startswith("toy: step 16/100") and lines[-1].endswith("left 0:00:00")
    assert len(lines) == 19  # every five steps, and the last


def test_bar_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with logger(tmp_path, start_step=50) as log:
        log.log(75, {"loss": 0.5})
    shown = capsys.readouterr().err
    assert "toy" in shown and "75%|" in shown and "75/100" in shown


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.jax, "process_index", lambda: 1)
    with logger(tmp_path) as log, log.pause():
        log.log(10, {"loss": 1.0})
        log.add_held_out(10, {"loss": 1.0}, {})
    assert list(tmp_path.iterdir()) == []


def test_bucket_is_written_whole_now_and_then_and_in_every_pause(bucket, clock):
    run = to_path(bucket) / "run"
    log = logger(run)
    log.log(1, {"loss": 1.0})
    assert len(records(run)) == 0
    clock(61.0)
    log.log(2, {"loss": 1.0})
    assert len(records(run)) == 2
    log.log(3, {"loss": 1.0})
    assert len(records(run)) == 2
    with log.pause():
        assert len(records(run)) == 3
    log.log(4, {"loss": 1.0})
    log.close()
    assert [r["step"] for r in records(run)] == [1, 2, 3, 4]
    assert [step for step, name, _ in events(run) if name == "loss"] == [1, 2, 3, 4]
    with logger(run, start_step=2) as log:
        log.log(3, {"loss": 2.0})
    assert [(r["step"], r["loss"]) for r in records(run)] == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_loss_outside_of_what_was_seen_is_said_once(capsys):
    expected = metrics.ExpectedLoss(((10, 1.0, 3.0), (20, 0.0, 2.0)))
    for step, loss in ((5, 9.0), (10, 3.0), (15, 1.5), (15, 2.6), (16, 9.0), (18, 1.0), (20, 2.1), (21, 9.0)):
        expected.look(step, loss)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "warning: step 15: the loss is 2.6, where runs of this config had 0.5 to 2.5",
        "step 18: the loss is 1, where runs of this config had 0.2 to 2.2 again",
        "warning: step 20: the loss is 2.1, where runs of this config had 0 to 2",
    ]
    metrics.ExpectedLoss(()).look(10, 99.0)
    assert capsys.readouterr().err == ""


def test_bucket_without_its_package_is_an_error(bucket, monkeypatch):
    from tensorboardX import record_writer

    monkeypatch.setattr(record_writer, "GCS_ENABLED", False)
    with pytest.raises(UserError, match="pip install google-cloud-storage"):
        logger(bucket)


def test_utilization_is_said_where_it_is_known(tmp_path, clock):
    with MetricLogger(str(tmp_path / "run"), 100, 8, 0, "toy", utilization=0.01) as log:
        clock(2.0)
        log.log(10, {"loss": 0.25})
    assert records(tmp_path / "run")[0]["mfu"] == 0.4  # 40 examples a second
    assert (10, "mfu", pytest.approx(0.4)) in events(tmp_path / "run")


def test_pictures_of_held_out_examples_are_in_tensorboard(tmp_path):
    with logger(tmp_path / "run") as log:
        log.add_held_out(7, {"loss": 0.5}, {"samples": np.zeros((6, 9, 3), np.uint8)})
    assert [tag for _, tag, _ in events(tmp_path / "run")] == ["held_out/loss", "held_out/samples"]
