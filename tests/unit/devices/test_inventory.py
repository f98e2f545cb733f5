"""GPUs of a machine by NVML: none, for each reason; several; divided ones; those that a process sees."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pipeline.devices.inventory import (
    NOT_INSTALLED,
    Gpu,
    Inventory,
    hidden_reason,
    read_inventory,
    select_gpus,
    visible_gpus,
)
from pipeline.devices.report import DeviceProblem, own_gpu
from pipeline.errors import NoDevice
from pipeline.testing.fake_nvml import (
    GIB,
    NO_LIBRARY,
    NO_PERMISSION,
    NOT_LOADED,
    Card,
    FakeNvml,
    NVMLError,
    nvml,
)

FIRST, SECOND = Card("GPU-aaaa-1"), Card("GPU-bbbb-2", name="NVIDIA L4", memory=24 * GIB)
DIVIDED = Card("GPU-cccc-3", instances=(Card("MIG-1", name="H200 MIG 1g.18gb"), None, Card("MIG-2")))
TWO = (Gpu("GPU-aaaa-1", "NVIDIA H200", 141 * GIB, 0), Gpu("GPU-bbbb-2", "NVIDIA L4", 24 * GIB, 1))
MIG = (Gpu("MIG-1", "H200 MIG 1g.18gb", 141 * GIB, 0, True), Gpu("MIG-2", "NVIDIA H200", 141 * GIB, 0, True))


class TestReadInventory:
    def test_two_cards(self) -> None:
        with nvml(FakeNvml([FIRST, SECOND])) as fake:
            inventory = read_inventory()
        assert inventory == Inventory(TWO, "580.95.05")
        assert fake is not None
        assert fake.open == 0

    def test_texts_of_older_versions_are_bytes(self) -> None:
        card = Card(b"GPU-1", name=b"L4")  # type: ignore[arg-type]
        with nvml(FakeNvml([card], driver=b"535.1")):
            inventory = read_inventory()
        assert (inventory.driver, inventory.gpus[0].uuid, inventory.gpus[0].name) == ("535.1", "GPU-1", "L4")

    @pytest.mark.parametrize("error", [NO_LIBRARY, NOT_LOADED, NO_PERMISSION], ids=str)
    def test_reason_is_that_of_nvml(self, error: NVMLError) -> None:
        with nvml(FakeNvml(error=error)):
            assert read_inventory() == Inventory(reason=str(error))

    def test_no_package(self) -> None:
        with nvml(None):
            assert read_inventory() == Inventory(reason=NOT_INSTALLED)

    def test_no_card(self) -> None:
        with nvml(FakeNvml([])):
            assert read_inventory().reason == "the driver shows no GPU"

    def test_card_without_permission_does_not_hide_others(self) -> None:
        with nvml(FakeNvml([Card(error=NO_PERMISSION), SECOND])):
            assert read_inventory().gpus == TWO[1:]
        with nvml(FakeNvml([Card(error=NO_PERMISSION)])) as fake:
            assert read_inventory() == Inventory((), "580.95.05", "Insufficient Permissions")
        assert fake is not None
        assert fake.open == 0

    def test_divided_card_counts_as_its_instances(self) -> None:
        with nvml(FakeNvml([DIVIDED])):
            assert read_inventory().gpus == MIG

    def test_card_that_could_be_divided_is_one(self) -> None:
        with nvml(FakeNvml([Card("GPU-1", can_divide=True)])):
            assert [gpu.is_mig for gpu in read_inventory().gpus] == [False]


class TestVisible:
    @pytest.mark.parametrize(
        ("shown", "seen"),
        [
            (None, [0, 1]),
            ("1,0", [1, 0]),
            ("1", [1]),
            ("GPU-bbbb-2", [1]),
            ("GPU-b", [1]),
            ("GPU-", []),
            ("", []),
            ("-1", []),
            ("0,7,1", [0]),
            (" 1 , 0 ", [1, 0]),
        ],
    )
    def test_variable_selects_as_cuda_does(self, shown: str | None, seen: list[int]) -> None:
        assert [gpu.index for gpu in visible_gpus(TWO, shown)] == seen

    def test_instance_by_uuid_only(self) -> None:
        assert visible_gpus(MIG, "MIG-2") == MIG[1:]
        assert visible_gpus(MIG, "0") == ()


class TestSelect:
    INVENTORY = Inventory(TWO, "580")

    def test_auto_takes_what_is_visible(self) -> None:
        assert select_gpus(self.INVENTORY) == TWO
        assert select_gpus(self.INVENTORY, shown="1") == TWO[1:]

    def test_named_ones_are_taken_in_their_order(self) -> None:
        assert select_gpus(self.INVENTORY, ["GPU-bbbb-2", 0], shown="0") == (TWO[1], TWO[0])

    def test_no_gpu_is_an_error_with_the_reason(self) -> None:
        with pytest.raises(NoDevice, match="a GPU was requested, and this machine shows none") as error:
            select_gpus(Inventory(reason="NVML Shared Library Not Found"))
        assert error.value.to_dict() == {
            "kind": "NoDevice",
            "message": "a GPU was requested, and this machine shows none",
            "where": "device: cuda",
            "found": "NVML Shared Library Not Found",
            "expected": "an NVIDIA driver and at least one GPU",
            "next": "run it where there is one, or say device: auto",
            "exit_code": 2,
        }

    def test_hidden_gpus_are_none(self) -> None:
        with pytest.raises(NoDevice) as error:
            select_gpus(self.INVENTORY, shown="")
        assert error.value.found == "CUDA_VISIBLE_DEVICES="

    @pytest.mark.parametrize("name", [2, "2", "GPU-x", "GPU-", "H200"])
    def test_unknown_name_lists_those_there_are(self, name: int | str) -> None:
        with pytest.raises(NoDevice, match="unknown GPU") as error:
            select_gpus(self.INVENTORY, [0, name])
        assert error.value.found == str(name)
        assert error.value.expected == "0, 1 (NVIDIA H200, NVIDIA L4)"

    def test_instances_are_named_by_uuid(self) -> None:
        with pytest.raises(NoDevice) as error:
            select_gpus(Inventory(MIG), [0])
        assert error.value.expected == "MIG-1, MIG-2 (H200 MIG 1g.18gb, NVIDIA H200)"


class TestOwnGpu:
    def test_first_visible_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
        with nvml(FakeNvml([FIRST, SECOND])):
            report = own_gpu()
        assert report.is_usable
        assert report.to_dict() == {
            "uuid": "GPU-bbbb-2",
            "name": "NVIDIA L4",
            "memory": 24 * GIB,
            "driver": "580.95.05",
        }

    @pytest.mark.parametrize(
        ("shown", "cupy", "found"),
        [
            ("", True, "CUDA_VISIBLE_DEVICES hides all GPUs"),
            ("-1", True, "CUDA_VISIBLE_DEVICES hides all GPUs"),
            ("0", False, NOT_INSTALLED),
        ],
    )
    def test_nvml_is_not_asked_where_a_gpu_is_ruled_out(
        self, shown: str, cupy: bool, found: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
        with nvml(FakeNvml([FIRST]), cupy=cupy) as fake:
            report = own_gpu()
        assert (report.problem, report.found) == (DeviceProblem.NO_GPU, found)
        assert fake is not None
        assert fake.calls == []

    def test_reason_of_nvml(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        with nvml(FakeNvml(error=NO_LIBRARY)):
            report = own_gpu()
        assert report.to_dict() == {"driver": "", "problem": "no gpu", "found": "NVML Shared Library Not Found"}

    def test_unknown_entry_of_the_variable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
        with nvml(FakeNvml([FIRST])):
            assert own_gpu().found == "CUDA_VISIBLE_DEVICES=7"


def test_reason_is_empty_where_nothing_rules_a_gpu_out() -> None:
    with nvml(FakeNvml()):
        assert hidden_reason({}) == ""
        assert hidden_reason({"CUDA_VISIBLE_DEVICES": "0"}) == ""


def test_no_package_for_gpus_is_imported_by_these_modules() -> None:
    code = (
        "import sys, pipeline.devices.report, pipeline.devices.memory, pipeline.devices.failures;"
        "print(sorted({'pynvml', 'cupy', 'rmm', 'cudf', 'numba', 'dask_cuda', 'xgboost'} & sys.modules.keys()))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
