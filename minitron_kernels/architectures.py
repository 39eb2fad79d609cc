"""What an SM and the memory of each GPU do per clock: the constants of every modelled time.

Published: SMs, boost clock, dense bf16 peak (so FLOP per clock and SM), DRAM bandwidth, register
file, shared memory, threads and blocks per SM, 16 exp2 per clock and SM (CUDA C++ Programming
Guide, arithmetic throughput and compute capabilities). `l2_tb_s` is published for the A100 only
(5120 bytes per clock). Measured by others: github.com/te42kyfo/gpu-benches (gpu-l2-cache, reads of
10 to 36 MB) has 6.9 TB/s for the PCIe card of the H100, whose L2 is that of the H100 here but which
has 114 SMs and a lower clock, so that this one gives at least as much; 9.6 TB/s for the H200. (The
5.5 to 6 TB/s that are often quoted are of the PCIe card, too, at its power limit. The A100 reaches
5.4 there.) For the rest it is believed, from microbenchmarks that people report.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

WARP_SCHEDULERS = 4  # each issues one warp-instruction per clock
EXP2_PER_CLOCK = 16  # MUFU operations per clock and SM
L2_BYTES_PER_CLOCK = 64  # that an SM takes from L2
SMEM_RESERVED = 1024  # bytes of shared memory per block that the system takes
REGISTERS = 64 << 10  # 32-bit registers per SM
REGISTER_UNIT = 8  # registers per thread are allocated in steps of this


@dataclass(frozen=True)
class Architecture:
    """A GPU. `tensor_flop`: dense bf16 with fp32 sums, FLOP per clock and SM, by the instruction
    that reaches the published peak: mma.sync on sm_80 and sm_89, wgmma on sm_90, tcgen05 on
    sm_100 (mma.sync is slower there, by a factor that is not published)."""

    name: str
    arch: str  # as kernel files are named
    sms: int
    clock_ghz: float
    tensor_flop: int
    dram_tb_s: float
    l2_tb_s: float
    l2_source: str  # "published", "measured" (by others), "believed"
    smem_per_sm: int  # bytes
    smem_per_block: int  # bytes, opt-in
    threads_per_sm: int
    blocks_per_sm: int

    @property
    def tensor_tflop_s(self) -> float:
        return self.sms * self.clock_ghz * self.tensor_flop / 1e3

    def occupancy(self, threads: int, registers: int, smem_bytes: int) -> int:
        """Blocks that an SM holds at once."""
        warps = -(-threads // 32)
        allocated = -(-registers // REGISTER_UNIT) * REGISTER_UNIT * 32
        # Each of the 4 schedulers has a quarter of the register file.
        warps_per_sm = REGISTERS // WARP_SCHEDULERS // allocated * WARP_SCHEDULERS
        return min(
            self.blocks_per_sm,
            self.threads_per_sm // (32 * warps),
            warps_per_sm // warps,
            self.smem_per_sm // (smem_bytes + SMEM_RESERVED),
        )


ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture("A100", "80", 108, 1.41, 2048, 2.04, 7.2, "published",
                     164 << 10, 163 << 10, 2048, 32),
        Architecture("L40S", "89", 142, 2.49, 1024, 0.864, 5.0, "believed",
                     100 << 10, 99 << 10, 1536, 24),
        Architecture("RTX 4090", "89", 128, 2.52, 512, 1.008, 5.0, "believed",
                     100 << 10, 99 << 10, 1536, 24),
        Architecture("H100", "90a", 132, 1.83, 4096, 3.35, 6.9, "measured",
                     228 << 10, 227 << 10, 2048, 32),
        Architecture("H200", "90a", 132, 1.83, 4096, 4.8, 9.6, "measured",
                     228 << 10, 227 << 10, 2048, 32),
        Architecture("B200", "100a", 148, 1.855, 8192, 8.0, 10.0, "believed",
                     228 << 10, 227 << 10, 2048, 32),
    )
}  # fmt: skip


def find(device_name: str) -> Architecture | None:
    """The row of a device by the name that its driver gives, such as "NVIDIA H100 80GB HBM3"."""
    for name, gpu in ARCHITECTURES.items():
        if re.search(rf"\b{name}\b", device_name):
            return gpu
    return None
