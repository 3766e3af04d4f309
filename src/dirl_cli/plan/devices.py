"""What GPUs do in a second, and how much of that this code gets out of them.

One of them is measured: an H100, on 2026-11-27, with the published shape of 1.7B in random weights. Of the others
there are data sheets; they are taken to give the same part of it that the H100 gave, and nobody has tried.
"""

from dataclasses import dataclass

import torch

from dirl_cli.errors import DirlError, did_you_mean

# What the H100 was measured to do, over its data sheet: a large matrix product, and a copy inside its memory.
PRODUCTS = 798 / 989
COPIES = 3.0 / 3.35
# Of what a link to the other GPUs may carry, the part that gathering gets. Not measured: two GPUs have not been tried.
GATHERING = 2 / 3


@dataclass(frozen=True)
class Device:
    """A GPU. memory_gb, and what it does in a second: bf16 operations of matrix products, bytes of its memory, bytes
    to the other GPUs of its machine, one way.
    """

    name: str
    memory_gb: float
    operations: float
    bandwidth: float
    link: float
    is_measured: bool = False


def by_data_sheet(name: str, memory_gb: float, teraflops: float, terabytes: float, link_gigabytes: float) -> Device:
    """A device as its maker describes it: dense bf16 products, memory, link one way."""
    return Device(
        name,
        memory_gb,
        operations=PRODUCTS * teraflops * 1e12,
        bandwidth=COPIES * terabytes * 1e12,
        link=GATHERING * link_gigabytes * 1e9,
        is_measured=name == "h100",
    )


# By what torch calls them. An H100 for PCIe or in pairs (NVL) is another device, and not here.
DEVICES = {
    "NVIDIA H100 80GB HBM3": by_data_sheet("h100", 80, 989, 3.35, 450),
    "NVIDIA H200": by_data_sheet("h200", 141, 989, 4.8, 450),
    "NVIDIA B200": by_data_sheet("b200", 180, 2250, 8.0, 900),
    "NVIDIA A100-SXM4-80GB": by_data_sheet("a100", 80, 312, 2.04, 300),
    "NVIDIA L40S": by_data_sheet("l40s", 48, 362, 0.864, 32),
    "NVIDIA GeForce RTX 4090": by_data_sheet("4090", 24, 165, 1.008, 32),
}
NAMES = tuple(device.name for device in DEVICES.values())


def find_device(name: str) -> Device:
    """The device that `plan.device` names. Raises DirlError where there is none."""
    for device in DEVICES.values():
        if device.name == name:
            return device
    raise DirlError(f"plan.device={name}: nothing is known of such a GPU: {did_you_mean(name, NAMES)}")


def device_here() -> Device | None:
    """The GPU of this machine, where there is one and it is in the table."""
    if not torch.cuda.is_available():
        return None
    return DEVICES.get(torch.cuda.get_device_name())


# Training: the share of a device's operations that a forward and its backward get, what attention and all else between
# the products takes included.
TRAINING = 0.32
COMPILED = 0.53


@dataclass(frozen=True)
class EngineSpeed:
    """What a sampler's forward costs beside the roofline.

    seconds_a_layer: whatever the forward's size. share: of the device's operations that its products get.
    fuses_commits: whether a finished block is cached by the next one's first forward, or takes one of its own.
    """

    seconds_a_layer: float
    share: float
    fuses_commits: bool


# Measured when a layer of the native engine was some sixty kernels. It has been about nine since, which no GPU has run.
NATIVE = EngineSpeed(0.19e-3, 0.44, fuses_commits=True)
LMDEPLOY = EngineSpeed(0.12e-3, 0.30, fuses_commits=False)

# Giving the sampler the policy's weights: of each layer's tensors, whatever their size.
PUSH_A_LAYER = 0.1e-3
# LMDeploy's bf16 weights to the CPU, back, and renewed; and renewed where it stays awake: bytes a second.
LMDEPLOY_ASLEEP = 4.06e9 / (2.4 + 1.1 + 0.305)
LMDEPLOY_AWAKE = 4.06e9 / 0.219

# Tokens that a CPU lays out in rows in a second; every process lays out those of all. Measured on a CPU.
ROW_TOKENS = 1.5e6
