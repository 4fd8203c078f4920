"""The device that is planned for: found as `train` finds it, and what is free there."""

from types import SimpleNamespace

import pytest
import torch

from lorafit.errors import RequestError
from lorafit.estimate import device
from lorafit.model.quantised import Quantised

SHOWN = device.GPUS


@pytest.fixture
def gpu(monkeypatch):
    """A machine whose torch has GPUs, and shows none where one is looked for; which of them were asked."""
    asked = []
    pick = lambda name: torch.device("cuda" if name == "auto" else name)  # noqa: E731
    monkeypatch.setattr(device, "pick_device", pick)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (asked.append(gpu), (7, 8))[1])
    monkeypatch.setattr(device, "GPUS", ())
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return asked


def test_auto_asks_torch_wherever_a_gpu_may_be(gpu, monkeypatch, tmp_path):
    assert device.device_of("auto", False) == "cpu"
    monkeypatch.setattr(device, "GPUS", (str(tmp_path),))
    assert device.device_of("auto", False) == "cuda"
    monkeypatch.setattr(device, "GPUS", ())
    monkeypatch.setattr(device, "sys", SimpleNamespace(platform="win32"))
    assert device.device_of("auto", False) == "cuda"
    assert {"/dev/nvidia0", "/dev/dxg", "/dev/kfd"} <= {*SHOWN}


def test_a_gpu_by_its_number_or_its_process_is_the_one_that_is_asked(gpu, monkeypatch):
    def asks(name):
        return device.free_on("cuda", 1, device.gpu_of(name)) and gpu[-1]

    assert asks("cuda:1") == 1 and asks("cuda") is None and asks("auto") is None
    assert (
        device.torch_device("cuda", 1) == torch.device("cuda", 1)
        and device.torch_device("cuda").index is None
    )
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert asks("cuda:1") == 1, "one process, whatever was left in the environment"
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    assert asks("cuda") == asks("auto") == 3


def test_a_forecast_is_of_the_gpu_that_is_named(gpu, monkeypatch, run):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: f"card {gpu}")
    found = run("plan", "demo", "--device", "cuda:1", "--no-probe", "--json").document
    assert {*gpu} == {1} and found["fit"]["free"] == 7
    assert device.machine_of("cuda", 1)[-1] == "card 1"


def test_each_planned_process_has_its_share_of_the_memory(monkeypatch):
    monkeypatch.setattr(device, "free_memory", lambda: 4000)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert device.free_on("cpu") == 4000 and device.free_on("cpu", 4) == device.memory_of(4) == 1000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # then `free_memory` has divided
    assert device.free_on("cpu", 4) == 4000


def test_plan_gives_each_process_its_share(run, monkeypatch):
    monkeypatch.setattr("lorafit.estimate.device.free_memory", lambda: 400 * 10**6)
    plan = ("plan", "demo", "--no-probe", "--json", "--device", "cpu")
    assert run(*plan).document["fit"]["free"] == 400 * 10**6
    assert run(*plan, "--processes", 4).document["fit"]["free"] == 100 * 10**6


def test_a_timing_is_of_as_many_threads_as_it_had(monkeypatch):
    was = device.machine_of("cpu")
    assert device.machine_of("cpu") == was
    assert device.machine_of("cpu", threads=1) != was  # as candidates of `compare --workers` are timed
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert device.machine_of("cpu") != was


def test_a_quantised_base_is_refused_where_auto_is_an_apple_gpu(monkeypatch):
    held = Quantised("nf4")
    held.check("auto", "auto")
    monkeypatch.setattr("lorafit.model.quantised.on_apple_gpu", lambda: True)
    with pytest.raises(RequestError, match="does not run on mps"):
        held.check("auto", "auto")
    held.check("auto", "cpu")
