"""The doctor: this machine as it is, and bad machines in nvidia-smi's own words."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from llmtrain.compose import composed
from llmtrain.doctor import cuda, devices, disk, kernels, ops, packages, presets, speed, system
from llmtrain.doctor.command import main
from llmtrain.doctor.fix import by_hand, end_processes, write_settings
from llmtrain.doctor.holders import Holder, holders_of, memory_lines
from llmtrain.doctor.line import Line, State, look
from llmtrain.doctor.training import training, words
from llmtrain.hardware import Device, Gpu, Hardware, resolve
from tests.conftest import ROOT

A800 = Gpu("0", "GPU-a0", "NVIDIA A800-SXM4-80GB", 79.3, 8.0)
TWIN = Gpu("1", "GPU-a1", "NVIDIA A800-SXM4-80GB", 79.2, 8.0)
V100 = Gpu("2", "GPU-v2", "Tesla V100-PCIE-32GB", 31.7, 7.0)
TORCH = {
    "version": "2.13.0+cu130",
    "cuda": "13.0",
    "nccl": [2, 28, 9],
    "archs": ["sm_75", "sm_80", "sm_86", "sm_90", "compute_90"],
    "num_gpus": 2,
    "problem": None,
    "dtypes": ["fp32", "fp16", "bf16"],
}
NOBODY = 2**22  # above the largest process id of Linux

FAKE_SMI = """#!/bin/sh
case "$*" in
  *--query-gpu=index*) printf '0, GPU-a0, NVIDIA A800-SXM4-80GB, 81200, 8.0\\n'
                       printf '2, GPU-v2, Tesla V100-PCIE-32GB, 32460, 7.0\\n' ;;
  *--query-gpu=uuid*) printf 'GPU-a0, 61440\\nGPU-v2, 3\\n' ;;
  *--query-compute-apps*) printf 'GPU-a0, {pid}, 61000, python3\\n' ;;
  *) echo '| NVIDIA-SMI 470.57.02  Driver Version: 470.57.02  CUDA Version: 11.4  |' ;;
esac
"""


def doctor(*options: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "llmtrain.doctor", *options],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )


@pytest.fixture
def left_behind() -> Iterator["subprocess.Popen[bytes]"]:
    """A process of this user that nobody waits for."""
    with subprocess.Popen(["sleep", "300"]) as process:
        yield process
        process.kill()


def held(process: "subprocess.Popen[bytes]") -> list[Holder]:
    return holders_of([["GPU-a0", str(process.pid), "61000", "sleep"]])


def only(lines: list[Line], name: str) -> Line:
    (line,) = (line for line in lines if line.name == name)
    return line


def test_this_machine_is_examined_without_a_red_line_and_each_yellow_one_has_a_remedy() -> None:
    ended = doctor("--quick", "--json")
    lines = [Line(**line) for line in json.loads(ended.stdout)]
    assert ended.returncode == 0, lines
    assert {line.state for line in lines} <= {"green", "yellow"}
    assert all(line.remedy for line in lines if line.state == "yellow")
    assert not [line for line in lines if "could not be looked at" in line.found]
    assert {"devices", "packages", "bitsandbytes", "open files"} <= {line.name for line in lines}


def test_a_bad_machine_is_red_and_ends_with_1(
    tmp_path: Path, left_behind: "subprocess.Popen[bytes]"
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(FAKE_SMI.format(pid=left_behind.pid))
    smi.chmod(0o755)
    ended = doctor("--quick", PATH=f"{tmp_path}:{os.environ['PATH']}", CUDA_VISIBLE_DEVICES="0,2")
    assert ended.returncode == 1
    assert "Traceback" not in ended.stdout + ended.stderr
    assert "1 x NVIDIA A800-SXM4-80GB, 79.3 GiB, compute 8.0" in ended.stdout
    assert "-> together they are as slow as the slowest" in ended.stdout
    assert f"kill {left_behind.pid} (--fix asks for each)" in ended.stdout
    assert "red     driver" in ended.stdout


def test_unlike_gpus_are_named_and_the_largest_group_can_be_chosen() -> None:
    line = devices.alike([A800, V100, TWIN])
    assert line.state is State.yellow
    assert "2: Tesla V100" in line.found
    assert line.setting == "export CUDA_VISIBLE_DEVICES=0,1"
    assert devices.alike([A800, TWIN]).state is State.green


def test_a_card_that_its_driver_does_not_show_is_no_machine_without_gpu() -> None:
    assert devices.cpu_line("NVIDIA-SMI has failed", is_on_bus=True).state is State.red
    assert "--gpus all" in devices.cpu_line("", is_on_bus=True).remedy
    assert devices.cpu_line("", is_on_bus=False).state is State.green


def test_a_process_left_on_a_gpu_is_listed_and_ended_only_on_a_yes(
    left_behind: "subprocess.Popen[bytes]",
) -> None:
    (holder,) = held(left_behind)
    line = only(memory_lines([A800, TWIN], {"GPU-a0": 60.0}, [holder]), "GPU 0")
    assert line.state is State.yellow
    assert f"pid {left_behind.pid} sleep 300 (yours, 59.6 GiB)" in line.found
    assert "left alone" in end_processes([holder], None)[0]
    assert "left alone" in end_processes([holder], lambda question: "")[0]
    assert left_behind.poll() is None
    assert end_processes([holder], lambda question: "y") == [f"pid {holder.pid} has ended"]
    assert not psutil.pid_exists(holder.pid)


def test_a_process_of_others_is_never_asked_about() -> None:
    holders = holders_of([["GPU-a0", str(NOBODY), "[N/A]", "python, train.py"]])
    line = only(memory_lines([A800], {"GPU-a0": 70.0}, holders), "GPU 0")
    assert "another container or user" in line.found
    assert "kill" not in line.remedy
    assert end_processes(holders, lambda question: pytest.fail(question)) == []


def test_memory_that_no_process_owns_up_to_is_told() -> None:
    lines = memory_lines([A800, TWIN], {"GPU-a0": 40.0, "GPU-a1": 0.4}, [])
    assert "something that cannot be seen" in only(lines, "GPU 0").found
    assert "GPU 1: 78.8 GiB free" in only(lines, "GPU memory").found


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        (cuda.driver("470.57", (11, 4), TORCH), "install a newer driver"),
        (cuda.driver("580.65", (13, 0), TORCH | {"cuda": None}), "pip install"),
        (cuda.driver("580.65", (13, 0), TORCH | {"problem": "unknown error"}), "reboot"),
        (cuda.code([V100], TORCH), "--index-url"),
        (cuda.nccl(TORCH, {"nvidia-nccl-cu12": "2.27.3"}), "pip uninstall nvidia-nccl-cu12"),
        (cuda.nccl(TORCH, {"nvidia-nccl-cu13": "2.21.5"}), "nvidia-nccl-cu13==2.28.9"),
        (system.shared_memory(0.06, num_gpus=2), "--shm-size"),
        (system.open_files(128, 128), "--ulimit nofile"),
        (disk.room(disk.Disk("outputs", Path("/x"), 0.2, True), "go"), "make room, or go"),
        (disk.room(disk.Disk("outputs", Path("/x"), 500, False), "go"), "go"),
        (kernels.kernel_line(kernels.KERNELS[0], "cuda", "undefined symbol"), "--force-reinstall"),
        (packages.versions({"torch": "2.13.0"}, {"torch": "2.13.0"}), "constraints.txt"),
        (training([{"loss": 8.3}, {"loss": float("nan")}], 1), "CUDA_VISIBLE_DEVICES="),
        (speed.reduction_line([{"is_right": False, "gbps": 1.0}], "cuda"), "NCCL_P2P_DISABLE"),
    ],
)
def test_what_breaks_training_is_red_with_its_remedy(line: Line, remedy: str) -> None:
    assert line.state is State.red
    assert remedy in line.remedy


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        (system.open_files(512, 65536), "ulimit -n 65536"),
        (system.host_memory(64, 503, 3, 0), "top"),
        (system.hub("https://huggingface.co", False, True), "HF_ENDPOINT=https://hf-mirror.com"),
        (disk.room(disk.Disk("outputs", Path("/x"), 8, True), "go"), "1B parameters"),
        (disk.writing(20.0), "another disk"),
        (kernels.kernel_line(kernels.KERNELS[2], "cuda", ""), "pip install --no-build-isolation"),
        (ops.compiler(None, True), "apt-get install g++"),
        (ops.ninja(None, Path(sys.executable)), "export PATH="),
        (ops.ops({"Adam": 1, "Lion": 1, "NVMe": 0, "cuda_home": None}, "cpu"), "libaio-dev"),
        (
            speed.matmul([{"tflops": {"fp16": f}} for f in (230.0, 120.0)], [A800, TWIN]),
            "TEMPERATURE",
        ),
    ],
)
def test_what_slows_training_or_takes_a_part_of_it_is_yellow(line: Line, remedy: str) -> None:
    assert line.state is State.yellow
    assert remedy in line.remedy


def test_what_is_well_is_green_and_says_so() -> None:
    driver = cuda.driver("580.65", (13, 0), TORCH)
    assert (driver.state, driver.remedy) == (State.green, "")
    assert cuda.code([A800, TWIN], TORCH).state is State.green
    assert cuda.code([A800._replace(compute_capability=12.0)], TORCH).state is State.green
    assert cuda.nccl(TORCH, {"nvidia-nccl-cu13": "2.28.9"}).state is State.green
    assert "not used on a CPU" in kernels.kernel_line(kernels.KERNELS[0], "cpu", "").found
    assert system.shared_memory(0.06, num_gpus=1).state is State.green


def test_an_extension_that_is_there_and_does_not_load_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "selective_scan_cuda.py").write_text("raise ImportError('undefined symbol: _ZN')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert kernels.problem(kernels.KERNELS[0]) == "ImportError: undefined symbol: _ZN"


def test_what_reaches_the_disk_is_measured_and_nothing_is_left(tmp_path: Path) -> None:
    assert "MB/s" in disk.writing_here(tmp_path / "not made yet").found
    assert not list(tmp_path.iterdir())


def test_two_processes_reduce_and_their_sums_are_right() -> None:
    found = speed.on_ranks("reduce", "cpu", 2)
    assert [one["is_right"] for one in found] == [True, True]
    assert speed.reduction_line(found, "cpu").state is State.green


def test_the_training_divides_its_batch_among_any_number_of_ranks() -> None:
    config = composed(words(6, "outputs"))
    assert config.train.global_batch == 18
    assert composed(words(1, "outputs")).train.global_batch == 16


def test_the_largest_preset_that_fits_is_given_as_a_command() -> None:
    known = [
        presets.Preset("llama_7b", 6_738_415_616, False),
        presets.Preset("llama_tiny", 5_868_800, False),
    ]
    machine = resolve(Hardware(device=Device.cpu, host_memory_gib=8))
    line = presets.largest(presets.AIMS[0], machine, known)
    assert line.remedy == "python -m llmtrain.run model=llama_tiny mode=pretrain"
    assert presets.largest(presets.AIMS[1], machine, known).state is State.yellow


def test_settings_that_repair_can_be_sourced_and_the_rest_is_named(tmp_path: Path) -> None:
    soft = int(subprocess.check_output(["bash", "-c", "ulimit -n"]))
    lines = [system.open_files(200, soft), devices.alike([A800, V100]), ops.compiler(None, True)]
    lines[0] = Line("open files", State.red, "few", f"ulimit -n {soft}", f"ulimit -n {soft}")
    path = tmp_path / "llmtrain.env"
    assert "wrote open files, alike" in write_settings(lines, path)
    script = f"ulimit -Sn 200; source {path}; echo $(ulimit -Sn) $CUDA_VISIBLE_DEVICES"
    said = subprocess.check_output(["bash", "-c", script], text=True)
    assert said.split() == [str(soft), "0"]
    assert by_hand(lines) == ["compiler: apt-get install g++"]


def test_a_check_that_fails_is_a_yellow_line() -> None:
    def fail() -> list[Line]:
        raise OSError("the driver\nis gone")

    (line,) = look("driver", fail)
    assert line.state is State.yellow
    assert line.found == "could not be looked at: the driver is gone"


@pytest.mark.parametrize("options", [["--hasty"], ["--json", "--fix"]])
def test_a_wrong_option_is_one_line(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(options)
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
