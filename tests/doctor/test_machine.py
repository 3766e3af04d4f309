"""What is read of a machine, from files and answers that are made up."""

import httpx

from dirl_cli.doctor import machine
from dirl_cli.doctor.machine import Gpu


def pci_device(directory, name, vendor, kind):
    (directory / name).mkdir()
    (directory / name / "vendor").write_text(f"{vendor}\n")
    (directory / name / "class").write_text(f"{kind}\n")


def test_gpus_are_counted_on_the_bus_and_not_their_audio(tmp_path):
    pci_device(tmp_path, "01:00.0", "0x10de", "0x030200")
    pci_device(tmp_path, "01:00.1", "0x10de", "0x040300")  # sound over HDMI
    pci_device(tmp_path, "02:00.0", "0x8086", "0x030000")  # Intel's
    (tmp_path / "03:00.0").mkdir()  # one that vanishes
    assert machine.gpus_on_bus(tmp_path) == 1
    assert machine.gpus_on_bus(tmp_path / "no bus") == 0


def test_what_the_driver_lists_is_read_also_where_memory_is_shared():
    driver = machine.parse_driver("NVIDIA H200, 143771, 143000, 580.65.06\nNVIDIA GB10, [N/A], [N/A], 580.65.06\n")
    assert driver.version == "580.65.06"
    assert driver.gpus == (Gpu("NVIDIA H200", 143771, 143000), Gpu("NVIDIA GB10", 0, 0))


def test_a_containers_share_of_the_cores_is_read(tmp_path):
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    assert machine.core_quota(tmp_path / "cpu.max") == 2.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine.core_quota(tmp_path / "cpu.max") is None
    assert machine.core_quota(tmp_path / "none") is None


def test_the_disk_of_what_is_still_to_be_made_is_that_of_where_it_will_be(tmp_path):
    disk = machine.disk_of(tmp_path / "not" / "there")
    assert disk.is_writable and disk.total >= disk.free > 0 and disk.inodes > 0


def test_a_path_that_may_not_be_looked_at_is_on_the_disk_above_it(tmp_path):
    too_long = tmp_path / ("x" * 300)  # as for one in another's directory, Path.exists raises
    assert machine.disk_of(too_long / "hub").total == machine.disk_of(tmp_path).total


def test_a_hub_that_cannot_be_reached_or_has_trouble_is_told(monkeypatch):
    def unreachable(address, timeout):
        raise httpx.ConnectError("[Errno -2] Name or service not known")

    monkeypatch.setattr(httpx, "head", unreachable)
    assert machine.hub_problem(1.0) == "[Errno -2] Name or service not known"
    monkeypatch.setattr(httpx, "head", lambda address, timeout: httpx.Response(503))
    assert machine.hub_problem(1.0) == "it answers with 503"
    monkeypatch.setattr(httpx, "head", lambda address, timeout: httpx.Response(200))
    assert machine.hub_problem(1.0) == ""
