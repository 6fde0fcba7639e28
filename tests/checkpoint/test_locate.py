"""Finding the checkpoint to go on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.locate import find_checkpoint
from pipeline.checkpoint.manifest import BEST, point
from pipeline.config import replace
from pipeline.errors import UserError
from pipeline.parallel.topology import Topology
from pipeline.run import Run
from tests.checkpoint.small_runs import save


class TestFindCheckpoint:
    def config(self, run: Run, resume: str) -> Any:
        return replace(run.config, resume=resume)

    def test_auto_starts_afresh_where_there_is_none(self, make_run) -> None:
        assert find_checkpoint(self.config(make_run(), "auto"), Topology()) is None

    def test_auto_and_must_take_the_newest(self, make_run) -> None:
        run = make_run()
        save(run, 5)
        folder = save(run, 10)
        for resume in ("auto", "must"):
            assert find_checkpoint(self.config(run, resume), Topology()) == folder

    def test_must_fails_where_there_is_none(self, make_run) -> None:
        with pytest.raises(UserError, match="--resume must: no complete checkpoint"):
            find_checkpoint(self.config(make_run(), "must"), Topology())

    def test_never_refuses_to_bury_a_run(self, make_run) -> None:
        run = make_run()
        assert find_checkpoint(self.config(run, "never"), Topology()) is None
        save(run, 5)
        with pytest.raises(UserError, match="name another --output-dir"):
            find_checkpoint(self.config(run, "never"), Topology())

    def test_a_path_is_taken_as_it_is(self, make_run) -> None:
        run = make_run()
        older = save(run, 5)
        save(run, 10)
        assert find_checkpoint(self.config(run, str(older)), Topology()) == older

    def test_a_file_that_names_a_checkpoint_means_it(self, make_run) -> None:
        run = make_run()
        older = save(run, 5)
        save(run, 10)
        point(older.with_name(BEST), older.name)
        assert find_checkpoint(self.config(run, str(older.with_name(BEST))), Topology()) == older

    def test_never_does_not_bury_a_damaged_run_either(self, make_run) -> None:
        run = make_run()
        (save(run, 5) / "manifest.json").unlink()
        with pytest.raises(UserError, match="name another --output-dir"):
            find_checkpoint(self.config(run, "never"), Topology())

    def test_a_path_elsewhere_says_where_a_run_began_and_not_where_it_is(self, make_run, tmp_path: Path) -> None:
        run = make_run()
        origin = save(run, 5)
        config = replace(self.config(run, str(origin)), output_dir=tmp_path / "other")
        assert find_checkpoint(config, Topology()) == origin
        other = make_run()
        other.config = replace(other.config, output_dir=tmp_path / "other")
        own = save(other, 8)
        assert find_checkpoint(config, Topology()) == own, "the same command goes on"

    def test_a_run_directory_means_its_newest(self, make_run, tmp_path: Path) -> None:
        run = make_run()
        save(run, 5)
        folder = save(run, 10)
        config = replace(self.config(run, str(tmp_path)), output_dir=tmp_path / "other")
        assert find_checkpoint(config, Topology()) == folder

    def test_a_damaged_path_is_refused_by_its_damage(self, make_run) -> None:
        run = make_run()
        folder = save(run, 5)
        (folder / "shard.pt").unlink()
        with pytest.raises(UserError, match=r"--resume .*shard\.pt: missing"):
            find_checkpoint(self.config(run, str(folder)), Topology())

    def test_a_path_that_is_not_there_is_said_to_be_absent(self, make_run, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"--resume .*absent: no such"):
            find_checkpoint(self.config(make_run(), str(tmp_path / "absent")), Topology())

    def test_damage_everywhere_stops_the_run(self, make_run) -> None:
        run = make_run()
        (save(run, 5) / "shard.pt").unlink()
        with pytest.raises(UserError, match="missing: restore the file, or use another --output-dir"):
            find_checkpoint(self.config(run, "auto"), Topology())
