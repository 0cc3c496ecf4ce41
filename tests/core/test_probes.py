"""Counters: present, wrapped, refused, absent; and what the machine says of itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from shoestring.core import probes


def domain(root, folder, name, microjoules, span=1_000_000):
    place = root / folder
    place.mkdir(parents=True)
    (place / "name").write_text(name + "\n")
    (place / "energy_uj").write_text(f"{microjoules}\n")
    (place / "max_energy_range_uj").write_text(f"{span}\n")
    return place / "energy_uj"


def test_rapl_adds_packages_and_dram_but_not_what_lies_inside_a_package(tmp_path):
    package = domain(tmp_path, "intel-rapl:0", "package-0", 100)
    core = domain(tmp_path, "intel-rapl:0:0", "core", 100)
    dram = domain(tmp_path, "intel-rapl:0:1", "dram", 100)
    rapl = probes.Rapl.find(tmp_path)
    assert rapl.joules() == 0
    for file, value in ((package, 400_100), (core, 300_100), (dram, 50_100)):
        file.write_text(str(value))
    assert rapl.joules() == pytest.approx(0.45)


def test_a_wrapped_counter_goes_on(tmp_path):
    package = domain(tmp_path, "intel-rapl:0", "package-0", 900_000, span=1_000_000)
    rapl = probes.Rapl.find(tmp_path)
    rapl.joules()
    package.write_text("100000")
    assert rapl.joules() == pytest.approx(0.2)
    package.write_text("50000")
    assert rapl.joules() == pytest.approx(0.2 + 0.95)


@pytest.mark.parametrize("broken", ["energy_uj", "name"])
def test_a_refused_counter_is_no_counter(tmp_path, monkeypatch, broken):
    domain(tmp_path, "intel-rapl:0", "package-0", 100)
    read = type(tmp_path).read_text

    def denied(self, *args, **kwargs):
        if self.name == broken:
            raise PermissionError(13, "Permission denied")
        return read(self, *args, **kwargs)

    monkeypatch.setattr(type(tmp_path), "read_text", denied)
    assert probes.Rapl.find(tmp_path) is None


def test_no_counter(tmp_path):
    assert probes.Rapl.find(tmp_path) is None
    assert probes.Rapl.find(tmp_path / "absent") is None
    domain(tmp_path, "intel-rapl:0:0", "core", 1)
    assert probes.Rapl.find(tmp_path) is None


def test_a_counter_that_goes_away_reads_as_none(tmp_path):
    package = domain(tmp_path, "intel-rapl:0", "package-0", 100)
    rapl = probes.Rapl.find(tmp_path)
    rapl.joules()
    package.unlink()
    assert rapl.joules() is None


def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_tree_cpu_counts_this_process_and_its_children_living_and_waited():
    start = probes.tree_cpu()
    burn(0.05)
    assert 0.05 <= probes.tree_cpu() - start < 0.15
    code = "import time, sys\nwhile time.process_time() < 0.4: pass\nprint(flush=True); sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.readline()
    assert child.pid in probes.descendants()
    living = probes.tree_cpu() - start
    assert 0.4 <= living < 0.8
    child.communicate()
    assert probes.tree_cpu() - start == pytest.approx(living, abs=0.2)
    assert child.pid not in probes.descendants()


def test_machine_cpu_is_at_least_what_this_process_used():
    busy, possible = probes.machine_cpu()
    burn(0.2)
    busy, possible = probes.machine_cpu()[0] - busy, probes.machine_cpu()[1] - possible
    assert 0.15 <= busy <= possible + 0.05


def test_resident_and_high_water():
    assert probes.reset_high_water()
    block = bytearray(os.urandom(1)) * 50_000_000
    assert probes.resident() <= probes.high_water() + 2_000_000
    assert probes.high_water() > 50_000_000
    del block


def test_missing_counters_read_as_none(monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError

    monkeypatch.setattr("builtins.open", refuse)
    assert probes.machine_cpu() is None
    assert probes.storage_io() is None
    assert probes.high_water() is None
    assert probes.memory_of(1) is None
    assert probes.reset_high_water() is False


@pytest.mark.parametrize("version", [1, 2])
def test_the_smallest_container_limit_on_the_way_up_binds(tmp_path, version):
    own = tmp_path / "cgroup"
    outer, inner = ("1000000000", "max")
    if version == 2:
        own.write_text("0::/pod/box\n")
        box = tmp_path / "pod" / "box"
        box.mkdir(parents=True)
        (box.parent / "memory.max").write_text(outer)
        (box / "memory.max").write_text(inner)
        (box / "memory.peak").write_text("123456")
        (box / "cpu.max").write_text("150000 100000")
    else:
        own.write_text("4:memory:/pod/box\n2:cpu,cpuacct:/pod/box\n")
        box = tmp_path / "memory" / "pod" / "box"
        box.mkdir(parents=True)
        (box.parent / "memory.limit_in_bytes").write_text(outer)
        (box / "memory.limit_in_bytes").write_text(str(2**63 - 4096))
        (box / "memory.max_usage_in_bytes").write_text("123456")
        quota = tmp_path / "cpu,cpuacct" / "pod" / "box"
        quota.mkdir(parents=True)
        (quota / "cpu.cfs_quota_us").write_text("150000")
        (quota / "cpu.cfs_period_us").write_text("100000")
    assert probes.cgroup(tmp_path, own) == {"memory_limit": 1e9, "memory_peak": 123456, "cpu_limit": 1.5}


def test_fingerprint_is_plain_data_and_names_what_ran():
    print_ = json.loads(json.dumps(probes.fingerprint()))
    assert print_["machine"]["cores"] >= 1
    assert print_["machine"]["ram"] > 2**28
    assert print_["software"]["python"].startswith("3.")
    assert print_["software"]["numpy"]


def test_gpu_energy_is_none_without_a_counter(monkeypatch):
    probes._gpus.cache_clear()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert probes.gpu_joules() is None
    probes._gpus.cache_clear()


def test_gpu_energy_adds_every_device(monkeypatch):
    class Fake:
        NVMLError = RuntimeError
        nvmlInit = staticmethod(lambda: None)
        nvmlDeviceGetCount = staticmethod(lambda: 2)
        nvmlDeviceGetHandleByIndex = staticmethod(lambda i: i)
        nvmlDeviceGetTotalEnergyConsumption = staticmethod(lambda handle: 1000 * (handle + 1))

    probes._gpus.cache_clear()
    monkeypatch.setitem(sys.modules, "pynvml", Fake)
    assert probes.gpu_joules() == 3.0
    probes._gpus.cache_clear()
