"""How many floating-point operations per second a device can do at most.

Owns: the table. Leaves to others: how many a model needs (`speed`). Numbers are dense (without structured sparsity), of
the tensor or matrix units, with fp32 accumulation, at boost clock, from the vendors' data sheets: NVIDIA H100, H200,
A100, A30, L4, L40S, T4, V100, HGX B200 (half of the figures "with sparsity"); NVIDIA's whitepapers for Ada (RTX 4080,
4090), Ampere GA102 (RTX 3090, A6000, A40), RTX Blackwell (RTX 5090); AMD Instinct MI210, MI250X, MI300X, MI325X (a
MI250X is two devices to torch, and each has half).
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Peak(NamedTuple):
    """TFLOP/s by the type that matrix products are computed in; None: the device has no units for it."""

    half: float  # fp16
    bf16: float | None
    tf32: float | None
    fp32: float


# The first row whose words are in the device's name applies, so longer names come first.
PEAKS: tuple[tuple[str, Peak], ...] = (
    ("B200", Peak(2250, 2250, 1125, 75)),
    ("GH200", Peak(989.4, 989.4, 494.7, 66.9)),
    ("H200 NVL", Peak(835.5, 835.5, 417.5, 60)),
    ("H200", Peak(989.4, 989.4, 494.7, 66.9)),
    ("H100 PCIe", Peak(756, 756, 378, 51.2)),
    ("H100 NVL", Peak(835.5, 835.5, 417.5, 60)),
    ("H100", Peak(989.4, 989.4, 494.7, 66.9)),
    ("H800", Peak(989.4, 989.4, 494.7, 66.9)),
    ("A100", Peak(312, 312, 156, 19.5)),
    ("A800", Peak(312, 312, 156, 19.5)),
    ("A30", Peak(165, 165, 82, 10.3)),
    ("A40", Peak(149.7, 149.7, 74.8, 37.4)),
    ("RTX A6000", Peak(154.8, 154.8, 77.4, 38.7)),
    ("L40S", Peak(362.05, 362.05, 183, 91.6)),
    ("L4", Peak(121, 121, 60, 30.3)),
    ("T4", Peak(65, None, None, 8.1)),
    ("V100 SXM2", Peak(125, None, None, 15.7)),
    ("V100 PCIE", Peak(112, None, None, 14)),
    ("RTX 5090", Peak(209.5, 209.5, 104.8, 104.8)),
    ("RTX 4090", Peak(165.2, 165.2, 82.6, 82.6)),
    ("RTX 4080", Peak(97.5, 97.5, 48.7, 48.7)),
    ("RTX 3090", Peak(71, 71, 35.6, 35.6)),
    ("MI325X", Peak(1307.4, 1307.4, 653.7, 163.4)),
    ("MI300X", Peak(1307.4, 1307.4, 653.7, 163.4)),
    ("MI250X", Peak(191.5, 191.5, None, 47.9)),
    ("MI210", Peak(181, 181, None, 45.3)),
)
# Words that denote another device, whose peak is not known here; MIG: a slice of one.
VARIANTS = frozenset({"D", "Laptop", "SUPER", "Ti", "Max", "MIG"})


def peak_tflops_per_s(device_name: str, dtype: torch.dtype, tf32: bool = False) -> float | None:
    """TFLOP/s of a device, by the name that `torch.cuda.get_device_name` gives; None where it is not known.

    `dtype`: of the matrix products; `tf32`: whether fp32 products may be rounded to TF32.

    >>> peak_tflops_per_s("NVIDIA H100 80GB HBM3", torch.bfloat16)
    989.4
    """
    words = device_name.replace("-", " ").split()
    peak = next((peak for name, peak in PEAKS if _holds(words, name.split())), None)
    if peak is None or VARIANTS & set(words):
        return None
    if dtype == torch.float32:
        return (peak.tf32 if tf32 else None) or peak.fp32
    return {torch.float16: peak.half, torch.bfloat16: peak.bf16}.get(dtype)


def _holds(words: list[str], wanted: list[str]) -> bool:
    return any(words[start : start + len(wanted)] == wanted for start in range(len(words)))
