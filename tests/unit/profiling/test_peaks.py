"""The table of peaks, by the names that devices give themselves."""

import pytest
import torch

from trainwright.profiling.peaks import PEAKS, peak_tflops_per_s


@pytest.mark.parametrize(
    ("device", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD Instinct MI300X", 1307.4),
        ("NVIDIA GeForce RTX 4090 D", None),  # other devices, whose names begin alike
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA L40", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("Tesla T4", None),  # no units for bf16
        ("Some Device", None),
    ],
)
def test_devices_are_known_by_the_words_of_their_names(device, bf16):
    assert peak_tflops_per_s(device, torch.bfloat16) == bf16


def test_the_peak_depends_on_the_type_of_the_products():
    name = "NVIDIA A100-SXM4-80GB"
    assert peak_tflops_per_s(name, torch.float16) == 312
    assert peak_tflops_per_s(name, torch.float32) == 19.5
    assert peak_tflops_per_s(name, torch.float32, tf32=True) == 156
    assert peak_tflops_per_s(name, torch.float64) is None
    assert peak_tflops_per_s("Tesla V100-SXM2-16GB", torch.float16) == 125
    assert peak_tflops_per_s("Tesla V100-SXM2-16GB", torch.float32, tf32=True) == 15.7  # has no TF32


@pytest.mark.parametrize(("name", "peak"), PEAKS, ids=[name for name, _ in PEAKS])
def test_every_row_can_be_reached_and_narrower_types_are_not_slower(name, peak):
    assert peak_tflops_per_s(f"Vendor {name}", torch.float16) == peak.half
    speeds = [value for value in (peak.half, peak.bf16, peak.tf32, peak.fp32) if value is not None]
    assert speeds == sorted(speeds, reverse=True)
