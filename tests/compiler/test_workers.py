"""A compile whose weights workers compute: the bytes of one alone, also where a worker is killed, and what is refused."""

import os
import pickle
import signal
from pathlib import Path

import moec
import pytest
import torch
from moec.compiler import driver
from moec.compiler.artifact.ahead import check_workers
from moec.compiler.artifact.manifest import read_manifest
from moec.compiler.errors import MoecError
from moec.compiler.ir.recipes import Step
from moec.compiler.text.printer import print_module
from moec.compiler.weights.sources.checkpoint import open_checkpoint
from moec.compiler.weights.sources.source import ModuleSource
from moec.compiler.weights.workers import Place, _open_place, divided_source
from places import ROOT, TINY

distributed = pytest.importorskip("distributed")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "tiny.moir"
    path.write_text(print_module(driver.compile(TINY, stop_after="moe")))
    return path


@pytest.fixture(scope="module")
def threads():
    """Workers that are threads of this process."""
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=False, protocol="tcp", dashboard_address=None
    ) as made:
        yield made.scheduler_address


@pytest.fixture(scope="module")
def processes():
    with distributed.LocalCluster(n_workers=4, threads_per_worker=1, dashboard_address=None, memory_limit=0) as made:
        yield made.scheduler_address


def compiled(program, out, **options):
    return driver.compile(program, "cpu", out, weights=TINY, **{"quantize": "experts=int8", **options})


def same_bytes(one, other):
    names = read_manifest(one.folder)["files"]
    assert names == read_manifest(other.folder)["files"]
    return all((one.folder / name).read_bytes() == (other.folder / name).read_bytes() for name in names)


def test_workers_give_the_bytes_of_a_compile_alone(program, threads, tmp_path):
    told = []
    alone = compiled(program, tmp_path / "alone", memory_limit=20_000_000)
    with moec.watch_progress(lambda at: told.append(at.done) if at.phase == "writing" and at.seconds is None else None):
        divided = compiled(program, tmp_path / "divided", memory_limit=20_000_000, workers=threads)
    assert same_bytes(alone, divided)
    assert len(told) > 10
    assert told == sorted(told)


@pytest.mark.long
@pytest.mark.parametrize("quantize", ["int4,method=gptq", "int4,method=awq"])
def test_calibrated_weights_are_the_same(program, threads, tmp_path, quantize):
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "compiler/driver.py").read_text()[:6000])
    alone = compiled(program, tmp_path / "alone", quantize=quantize, calibration=text)
    divided = compiled(program, tmp_path / "divided", quantize=quantize, calibration=text, workers=threads)
    assert same_bytes(alone, divided)


@pytest.mark.long
def test_a_killed_worker_changes_nothing(program, processes, tmp_path):
    killed = []

    def kill_one(at):
        if not killed and at.phase == "writing" and at.done:
            with distributed.Client(processes) as client:
                killed.append(min(client.run(os.getpid).values()))
            os.kill(killed[0], signal.SIGKILL)

    alone = compiled(program, tmp_path / "alone")
    with moec.watch_progress(kill_one):
        divided = compiled(program, tmp_path / "divided", workers=processes)
    assert killed
    assert same_bytes(alone, divided)


@pytest.mark.long
def test_a_task_whose_worker_dies_is_done_by_another_one(processes, tmp_path):
    def dying(marker):
        if not Path(marker).exists():
            Path(marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return os.getpid()

    def always_dying():
        os.kill(os.getpid(), signal.SIGKILL)

    with open_checkpoint(TINY) as checkpoint, divided_source(checkpoint, processes) as divided:
        assert divided.compute(dying, str(tmp_path / "died")) != os.getpid()
        assert (tmp_path / "died").exists()
        with pytest.raises(MoecError, match="one worker after the other died"):
            divided.compute(always_dying)


def test_what_a_worker_raises_arrives(threads):
    def failing():
        raise MoecError("bad", "there", todo="do that")

    with open_checkpoint(TINY) as checkpoint, divided_source(checkpoint, threads) as divided:
        with pytest.raises(MoecError) as error:
            divided.compute(failing)
        assert (error.value.what, error.value.where, error.value.todo) == ("bad", "there", "do that")


def test_workers_that_see_other_weights_are_refused(tmp_path):
    with open_checkpoint(TINY) as checkpoint:
        place = Place(checkpoint.folder.resolve(), checkpoint.fingerprint)
        assert _open_place(place).fingerprint == checkpoint.fingerprint
        for other, said in (
            (Place(place.path, "0"), "sees other weights"),
            (Place(tmp_path / "none", place.fingerprint), "does not see the weights"),
            (Place(place.path, place.fingerprint, "0.0.0"), "a worker has moec"),
        ):
            with pytest.raises(MoecError, match=said):
                _open_place(other)


def test_weights_in_memory_are_refused(threads):
    with (
        pytest.raises(MoecError, match="these are of a model in memory"),
        divided_source(ModuleSource({"w": torch.ones(2)}), threads),
    ):
        pass


@pytest.mark.parametrize("given", ["0", "-1", "many", "http://host", "9999"])
def test_what_names_no_workers(given):
    with pytest.raises(MoecError, match="names no workers"):
        check_workers(given)


def test_a_recipe_travels_without_its_hash(program):
    module = driver.compile(program, stop_after="moe")
    recipes = [const.recipe for function in module.functions for const in function.consts]
    steps = [recipe for recipe in recipes if isinstance(recipe, Step)]
    assert steps
    assert all(hash(step) and "_hash" in vars(step.key) for step in steps)
    for step in steps:
        copy = pickle.loads(pickle.dumps(step))
        assert vars(copy.key) == {}
        assert copy == step
