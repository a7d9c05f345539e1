"""How far a command is: phases, lines with rates after a warm-up, the logger, --verbose and --quiet."""

import io
import logging

import click
import moec
import pytest
from click.testing import CliRunner
from moec.compiler.cli.commands import main
from moec.compiler.cli.progress import EVERY, Lines, Rate, duration_text, show_progress
from moec.compiler.errors.progress import Progress, begin_phase

MEGABYTE = 10**6


PROGRAM = """moec 1 stage graph
dim T in 1..64

func @main(%x: f32[T, 8]) -> (f32[T, 8]) {
  %y = core.neg(%x) : f32[T, 8]
  return %y
}
"""


@pytest.fixture
def program(tmp_path):
    """Return the file of a small program."""
    (tmp_path / "program.moir").write_text(PROGRAM)
    return str(tmp_path / "program.moir")


@pytest.fixture
def clock():
    """Return a clock that a test moves: clock.now."""

    class Clock:
        now = 0.0

        def __call__(self):
            return self.now

    return Clock()


def test_a_rate_leaves_the_warm_up_out():
    """A gigabyte that takes 100 s to begin and then goes by 10 MB a second."""
    rate = Rate()

    def figures(megabytes, now):
        return rate.figures(Progress("writing", megabytes * MEGABYTE, 1000 * MEGABYTE, "bytes"), now)

    assert figures(0, 0) == "0 %" and figures(1, 100) == "0 %" and figures(11, 101) == "1 %"
    assert figures(501, 150) == "50 %, 10.0 MB/s, 50 s left"


def test_a_phase_of_unknown_length_has_no_figures():
    assert Rate().figures(Progress("importing"), 5.0) == ""
    assert Rate().figures(Progress("pass", 3, 19, detail="cleanup"), 5.0) == ""


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (185, "3:05 min"), (7800, "2:10 h")])
def test_durations_are_for_people(seconds, text):
    assert duration_text(seconds) == text


def test_a_short_command_writes_no_line(clock):
    lines = []
    tell = Lines(lines.append, False, clock)
    for done in range(20):
        tell(Progress("writing", done, 20, "bytes"))
        clock.now += EVERY / 21
    assert not lines


def test_a_long_command_writes_a_line_now_and_then(clock):
    lines = []
    tell = Lines(lines.append, False, clock)
    for done in range(48):
        tell(Progress("calibrating", done, 48, "layer"))
        clock.now += 6
    assert lines == [
        "calibrating: layer 10 of 48, 21 %, 3:48 min left",
        "calibrating: layer 20 of 48, 42 %, 2:48 min left",
        "calibrating: layer 30 of 48, 62 %, 1:48 min left",
        "calibrating: layer 40 of 48, 83 %, 48 s left",
    ]


def test_verbose_lines_name_phases_and_passes(program):
    done = CliRunner().invoke(main, ["opt", program, "-p", "cleanup,lift-moe", "-v"])
    assert done.exit_code == 0, done.output
    first, *passes, last = done.stderr.splitlines()
    assert (first, passes) == ("pass", ["pass 1 of 2 (cleanup)", "pass 2 of 2 (lift-moe)"])
    assert last.startswith("pass: ") and last.endswith(" s")


def test_quiet_leaves_results_only(program):
    loud = CliRunner().invoke(main, ["opt", program, "-p", "cleanup", "--timings"])
    quiet = CliRunner().invoke(main, ["-q", "opt", program, "-p", "cleanup", "--timings"])
    assert (quiet.stdout, quiet.stderr) == (loud.stdout, "") and loud.stderr


def test_quiet_and_verbose_are_opposites(program):
    done = CliRunner().invoke(main, ["opt", program, "-q", "-v"])
    assert done.exit_code == 2 and "opposite things" in done.stderr


def test_a_terminal_gets_a_bar(monkeypatch):
    """What a terminal is sent names the phase and how far it is."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("sys.stderr", screen := Terminal())
    with click.Context(main), show_progress(), begin_phase("calibrating", 4, "layer") as phase:
        for _ in range(3):
            phase.step()
    assert "calibrating: layer 3 of 4" in screen.getvalue() and "75 %" in screen.getvalue()


def test_the_logger_has_phases_and_the_watcher_every_step(caplog, program):
    seen = []
    with caplog.at_level(logging.INFO, "moec"), moec.watch_progress(seen.append):
        moec.opt(program, "cleanup,lift-moe")
    assert [record.name for record in caplog.records] == ["moec"]
    assert caplog.records[0].getMessage().startswith("pass: ")
    assert [(p.phase, p.done, p.total, p.detail) for p in seen[:-1]] == [
        ("pass", 0, 2, ""),
        ("pass", 1, 2, "cleanup"),
        ("pass", 2, 2, "lift-moe"),
    ]
    assert seen[-1].seconds is not None
