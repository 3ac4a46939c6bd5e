"""What the benchmark promises about caches: scripts/benchmark/cachework, cacherun, cacheplaces."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmark import cachework, fio, host, report, verdicts
from benchmark.cacheplaces import OriginPlace, pool_bytes_for
from benchmark.cacheshapes import MISS_ORIGINS, READS_64, WRITES_32
from benchmark.cells import MIB
from benchmark.errors import SubjectFailed
from benchmark.goals import CACHE, GOALS, LimitGoal
from benchmark.pmemfsmount import PmemfsMount
from benchmark.report import Reading
from pmemfs.media.cache import REGION_SHIFT, WAYS, Ground, TagState, set_count_of

FLOOR = LimitGoal("hits", "hits", "seqread", "ratio", 0.9, is_least=True, subject=CACHE)
GROUND = Ground(2 * MIB, 2048, 12, 0x1234_5678_9ABC_DEF1)


def test_exact_lru_forgets_what_was_used_longest_ago() -> None:
    trace = [1, 2, 1, 3, 2, 1]
    assert cachework.lru_hits(trace, 2, 0) == 1 / 6
    assert cachework.lru_hits(trace, 3, 0) == 3 / 6
    assert cachework.lru_hits(trace, 3, 4) == 1


def test_a_zipf_trace_wants_few_blocks_most_and_is_the_same_again() -> None:
    trace = cachework.zipf_trace(10_000, 100_000, seed=1)
    assert (trace == cachework.zipf_trace(10_000, 100_000, seed=1)).all()
    assert trace.min() >= 0
    assert trace.max() < 10_000
    counts = np.sort(np.bincount(trace, minlength=10_000))[::-1]
    shares = np.arange(1, 10_001, dtype=float) ** -1.1
    assert abs(counts[0] / len(trace) - shares[0] / shares.sum()) < 0.01
    assert abs(counts[:100].sum() / len(trace) - shares[:100].sum() / shares.sum()) < 0.01


def test_a_log_for_fio_reads_the_blocks_in_their_order(tmp_path: Path) -> None:
    log = tmp_path / "log"
    cachework.write_iolog(log, Path("/x"), np.array([3, 0], np.int64))
    assert log.read_text().splitlines() == [
        *("fio version 2 iolog", "/x add", "/x open"),
        *("/x read 12288 4096", "/x read 0 4096", "/x close"),
    ]


def test_planted_tags_are_those_of_clean_blocks_in_half_of_the_sets(tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    with pool.open("wb") as file:
        file.truncate(GROUND.blocks_offset)
    regions = 100
    planted = cachework.plant_tags(pool, GROUND, regions)
    shape = (GROUND.set_count, WAYS)
    tags = np.memmap(pool, np.uint64, "r", GROUND.tags_offset, shape).tolist()
    found = set()
    for number, words in enumerate(tags):
        for way, word in enumerate(words):
            tag = GROUND.read_tag(word, number, way)
            if tag:
                assert number < GROUND.set_count // 2
                assert tag.state is TagState.CLEAN
                assert tag.block >> REGION_SHIFT < regions
                found.add(tag.block)
    assert 0 < len(found) <= planted


def test_a_pool_has_room_for_what_it_shall_cache() -> None:
    for mib in (2, 6, 32, 128, 1024, 4096):
        pool_bytes = pool_bytes_for(mib * MIB)
        data_bytes = pool_bytes - pool_bytes // 64 - 4 * MIB
        assert set_count_of(data_bytes, 12) * WAYS * 4096 >= mib * MIB


def test_an_origin_is_read_by_an_engine_of_its_own() -> None:
    words = ("--ioengine=nbd", "--uri=nbd://localhost")
    target = OriginPlace("nbd://localhost", MIB, words).target()
    command = fio.measure_command(READS_64, target, fio.Timing(0, 1000), "libaio", None, 1)
    assert [word for word in command if word.startswith(("--ioengine", "--uri"))] == [*words]
    assert "--iodepth=64" in command
    assert not any(word.startswith("--filename") for word in command)


@pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed")
def test_one_seed_is_one_sequence_of_offsets_and_another_is_another(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    target = fio.Target(tmp_path / "file", 1024 * MIB, False)
    with target.path.open("wb") as file:
        file.truncate(target.size_bytes)

    def offsets(seed: int) -> list[str]:
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        command = fio.measure_command(READS_64, target, fio.Timing(0, 100), "null", None, seed)
        host.run([*command, f"--write_iolog={log}"], 30)
        lines = [line for line in log.read_text().splitlines() if " read " in line]
        return [line.split()[-2] for line in lines[:100]]

    first = offsets(1)
    # with this engine the log has requests twice
    assert len(set(first)) > 40
    assert offsets(1) == first
    assert len(set(offsets(2)) & set(first)) < 10


def test_writes_that_are_counted_are_the_same_ones_each_time() -> None:
    command = fio.counted_command(WRITES_32, fio.Target(Path("/x"), MIB, True), "libaio", 8, 4096)
    assert {"--io_size=32768", "--offset=4096", "--randseed=1", "--norandommap=1"} <= {*command}
    assert not any(word.startswith("--time_based") for word in command)


def test_a_goal_may_say_how_much_at_least() -> None:
    for value, outcome in ((0.91, "met"), (0.9, "met"), (0.89, "missed")):
        reading = Reading("hits", "seqread", "hits", "ratio", [value])
        (verdict,) = verdicts.judge([FLOOR], [], [], [reading])
        assert verdict.outcome == outcome
    assert verdicts.terms(FLOOR) == (CACHE, "-", ">= 0.90", "ratio")


def test_what_a_machine_lacks_is_named_and_not_called_missed() -> None:
    lacking = Reading("hits", "hits", "hits", "ratio", lacking="no nbdkit")
    (verdict,) = verdicts.judge([FLOOR], [], [], [lacking])
    assert (verdict.outcome, verdict.remark) == ("not measured", "no nbdkit")
    (cell, *_) = report.readings_table([lacking]).columns[0].cells
    assert str(cell) == "hits: not measured: no nbdkit"


class Outlived(PmemfsMount):
    """A mount whose daemon had to be killed."""

    def unmount(self) -> None:
        raise SubjectFailed("its daemon outlived the mount and was killed")


def test_nothing_stays_of_a_mount_whose_daemon_had_to_be_killed() -> None:
    made = Outlived("outlived")
    made.create(64 * MIB)
    folder = made.pool.parent
    with pytest.raises(SubjectFailed, match="outlived"):
        made.remove()
    assert not folder.exists()
    made.remove()


def test_misses_of_every_origin_have_a_goal() -> None:
    wanted = {goal.reading: goal.bound for goal in GOALS["cache"] if isinstance(goal, LimitGoal)}
    for name, (_, is_slow) in MISS_ORIGINS.items():
        assert wanted[f"misses-{name}"] == (0.8 if is_slow else 0.5)
