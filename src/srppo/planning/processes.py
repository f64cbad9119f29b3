"""Several processes: who holds which share of the weights, over which links, and what collectives take. Seconds and bytes."""

from __future__ import annotations

from dataclasses import dataclass

from srppo.errors import ConfigError


@dataclass(frozen=True)
class Links:
    """Attained rates, bytes a second in one direction while as much comes in the other. hop_*: seconds of one step of a ring."""

    inside: float  # of a GPU to the others of its machine
    between: float  # of a machine to the others, by all its network cards together
    hop_inside: float
    hop_between: float
    call: float  # seconds before a collective begins to move anything
    name: str = ""


# Peaks of one GPU in one direction, GB/s: to its machine's others, and its share of the machine's network (a 400 or 200 Gbit/s card for
# each GPU, as in NVIDIA's DGX machines; the others: 100 Gbit/s for a machine of eight).
# Sources: NVLink 3, 4, 5: 300, 450, 900; PCIe 3, 4, 5 x16: 15.8, 31, 63 (vendors' figures without their factor two for both directions,
# gathered in github.com/stas00/ml-engineering, network/README.md); DGX H100 / H200 / B200 and A100 user guides, docs.nvidia.com/dgx.
NVLINK = {"b200": 900e9, "h200": 450e9, "h100": 450e9, "a100": 300e9, "a100-40gb": 300e9}
PCIE = {"t4": 15.8e9, "rtx5090": 63e9}  # else generation 4
PCIE_4 = 31e9
NETWORK = {"b200": 50e9, "h200": 50e9, "h100": 50e9, "a100": 25e9, "a100-40gb": 25e9}
NETWORK_ELSE = 12.5e9 / 8
ATTAINED_LINK = 0.8  # of a peak: 235 of 300 and 376 of 450 GB/s were measured (the same page; github.com/NVIDIA/nccl/issues/1264)
# A step of a ring and a start, seconds: what NCCL's own tuning model takes (github.com/NVIDIA/nccl, src/graph/tuning.cc: ring, simple).
HOP_NVLINK, HOP_PCIE, HOP_NETWORK, CALL = 3.4e-6, 5.7e-6, 14.0e-6, 8.4e-6
GLOO = Links(0.36e9, 0.36e9, 1e-4, 1e-4, 4e-4, "gloo on one machine: .36 GB/s a process, as once measured")  # benchmarks/parallel.py


def links_of(card: str, gpus: int, network: float | None = None) -> Links:
    """Of a machine with so many of these cards (keys of machine.GPUS). network: Gbit/s of the machine, over the table's."""
    inside = NVLINK.get(card, PCIE.get(card, PCIE_4))
    between = gpus * NETWORK.get(card, NETWORK_ELSE) if network is None else network * 1e9 / 8
    kind = "NVLink" if card in NVLINK else "PCIe"
    name = f"{kind} {inside / 1e9:.0f} GB/s a GPU, network {8 * between / 1e9:.0f} Gbit/s a machine, {100 * ATTAINED_LINK:.0f} % attained"
    hop = HOP_NVLINK if card in NVLINK else HOP_PCIE
    return Links(ATTAINED_LINK * inside, ATTAINED_LINK * between, hop, HOP_NETWORK, CALL, name)


@dataclass(frozen=True)
class Processes:
    """size processes, `local` on each machine, in copies of the weights by `shards` of them (parallel.shard_size); ranks side by side."""

    size: int = 1
    local: int = 1
    shards: int = 1
    cpu_offload: bool = False

    @property
    def replicas(self) -> int:
        """Copies of the weights."""
        return self.size // self.shards

    @property
    def machines(self) -> int:
        return -(-self.size // self.local)

    def rows(self, rows: int) -> int:
        """The most that one process gets of so many."""
        return -(-rows // self.size)

    def share(self, rows: int) -> float:
        """The largest share of so many rows: 1 / size, more where they cannot be dealt evenly."""
        return self.rows(rows) / max(1, rows)

    def holds(self, size: int) -> int:
        """Of weights of this size what one process holds."""
        return size // self.shards


ALONE = Processes()


def processes_of(size: int, local: int, shard_size: int | None, cpu_offload: bool) -> Processes:
    """Raises ConfigError where shard_size does not divide the number of processes."""
    shards = shard_size or size
    if size % shards:
        raise ConfigError(f"parallel.shard_size is {shards}, which does not divide the number of processes, {size}")
    return Processes(size, local, shards, cpu_offload and shards > 1)


@dataclass(frozen=True)
class Ring:
    """Processes that exchange in a ring: `size` of them on so many machines. rate: bytes a second that each sends."""

    size: int
    machines: int
    rate: float
    links: Links

    def gather(self, whole: float) -> float:
        """Bytes that a process sends in an all-gather, and in a reduce-scatter, of tensors of this whole size: (g - 1) / g of them
        (github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md; the same for any algorithm without help of the network)."""
        return whole * (self.size - 1) / self.size

    def reduce(self, whole: float) -> float:
        """Of an all-reduce: a reduce-scatter and an all-gather."""
        return 2 * self.gather(whole)

    def seconds(self, sent: float, calls: float, rounds: int = 1) -> float:
        """Of so many collectives in which a process sends `sent` bytes in sum. rounds: 2 for an all-reduce, which goes round twice."""
        if self.size == 1:
            return 0.0
        between = self.machines - 1
        steps = rounds * ((self.size - 1 - between) * self.links.hop_inside + between * self.links.hop_between)
        return sent / self.rate + calls * (self.links.call + steps)


def shard_ring(processes: Processes, links: Links) -> Ring:
    """The processes that share one copy of the weights."""
    return _ring(processes.shards, min(processes.shards, processes.local), 1, processes, links)


def replica_ring(processes: Processes, links: Links) -> Ring:
    """Those that hold the same part in all copies; as many such rings lie side by side on a machine as it holds different parts."""
    parts = min(processes.shards, processes.local)
    return _ring(processes.replicas, max(1, processes.local // processes.shards), parts, processes, links)


def world_ring(processes: Processes, links: Links) -> Ring:
    """All processes."""
    return _ring(processes.size, min(processes.size, processes.local), 1, processes, links)


def _ring(size: int, here: int, side_by_side: int, processes: Processes, links: Links) -> Ring:
    """A ring crosses the border of a machine once in each direction and uses all its network cards, or its share of them where several
    rings lie side by side; the slowest link is its rate."""
    machines = -(-size // here)
    rate = links.inside if machines == 1 else min(links.inside, links.between / side_by_side)
    return Ring(size, machines, rate, links)
