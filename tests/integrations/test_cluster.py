"""Three nodes on 127.0.0.1, killed and started again: every acknowledged write is there afterwards."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from .cluster import Cluster, Node, cluster_of
from .test_pysyncobj import free_ports

WRITES = 5000
SMALL = {"slots": 16384, "segment_bytes": 1 << 20}


def write(cluster: Cluster, address: str, first: int, count: int) -> dict[int, str]:
    """Through a node of a cluster that has agreed; all of them are acknowledged."""
    node = cluster.nodes[address]
    wanted = set(range(first, first + count))
    node.put(first, first + count)
    cluster.until(lambda: wanted <= set(node.acknowledged))
    return dict(node.acknowledged)


def write_and_kill(cluster: Cluster, writer: str, victims: list[str], first: int) -> dict[int, str]:
    """Kills while writes are under way, and goes on as soon as the others agree; what was acknowledged."""
    node = cluster.nodes[writer]
    before = len(node.acknowledged)
    node.put(first, first + WRITES)
    cluster.until(lambda: len(node.acknowledged) > before + WRITES // 10)
    cluster.kill(*victims)
    return dict(node.acknowledged)


def test_killed_one_by_one_and_all_at_once_every_acknowledged_write_is_there(tmp_path: Path) -> None:
    with cluster_of(tmp_path, free_ports(3), SMALL, {"logCompactionMinEntries": 3000}) as cluster:
        cluster.start()
        leader = cluster.leader()
        expected = write(cluster, leader, 0, WRITES)
        assert len(expected) == WRITES
        cluster.until_all_have(expected)

        follower = next(address for address in cluster.addresses if address != leader)
        other = next(address for address in cluster.addresses if address not in (leader, follower))
        expected |= write_and_kill(cluster, leader, [follower], WRITES)
        expected |= write(cluster, cluster.leader(), 100_000, 100)
        cluster.start(follower)
        cluster.until_all_have(expected)

        leader = cluster.leader()
        writer = follower if leader != follower else other
        expected |= write_and_kill(cluster, writer, [leader], 2 * WRITES)
        expected |= write(cluster, cluster.leader(), 200_000, 100)
        cluster.start(leader)
        cluster.until_all_have(expected)

        writer = cluster.leader()
        expected |= write_and_kill(cluster, writer, list(cluster.addresses), 3 * WRITES)
        assert len(expected) > 2 * WRITES
        cluster.start()
        cluster.leader()
        cluster.until_all_have(expected)
        assert not any("failed _onTick" in line for n in cluster.nodes.values() for line in n.complaints)


def test_a_node_that_lost_its_directory_comes_back_by_a_dump_of_the_others(tmp_path: Path) -> None:
    with cluster_of(tmp_path, free_ports(3), SMALL, {"logCompactionMinEntries": 500}) as cluster:
        cluster.start()
        leader = cluster.leader()
        expected = write(cluster, leader, 0, 2000)
        lost = next(address for address in cluster.addresses if address != leader)
        cluster.until(lambda: all(n.ask(state=True)["gone"] > 500 for n in cluster.nodes.values()))
        cluster.kill(lost)
        shutil.rmtree(tmp_path / lost.rpartition(":")[2])
        (node,) = cluster.start(lost)
        cluster.until_all_have(expected)
        cluster.until(lambda: node.ask(state=True)["last"] >= len(expected))  # of a dump the state is first
        assert node.ask(state=True)["gone"] > 500  # these entries never came one by one
        cluster.kill(lost)
        cluster.start(lost)
        cluster.until_all_have(expected)


def fill(place: Path) -> Path:
    """Takes all the space there is; the file that does."""
    ballast = place / "ballast"
    with pytest.raises(OSError, match="No space"), ballast.open("wb") as f:
        while True:
            f.write(bytes(4096))
    return ballast


def leader_of(cluster: Cluster, nodes: dict[str, Node]) -> str:
    """The one of these that all of these follow."""
    found: set[str] = set()

    def agreed() -> bool:
        found.clear()
        found.update(node.ask(state=True)["leader"] for node in nodes.values())
        return len(found) == 1 and found <= set(nodes)

    cluster.until(agreed)
    return found.pop()


def assert_said_once(node: Node, what: str) -> None:
    """And no traceback beside."""
    assert sum(what in line for line in node.complaints) == 1, node.complaints
    assert not any("failed _onTick" in line for line in node.complaints)


@pytest.mark.root
@pytest.mark.parametrize("whose", ["a follower", "the leader"])
def test_a_node_with_a_full_disk_says_so_and_the_cluster_goes_on_and_it_comes_back_with_space(
    tmp_path: Path, mount_tmpfs: Callable[[Path, str], None], whose: str
) -> None:
    addresses = free_ports(3)
    places = {address: tmp_path / address.rpartition(":")[2] for address in addresses}
    for place in places.values():
        place.mkdir()
        mount_tmpfs(place, "9m")
    options = {"slots": 65536, "segment_bytes": 1 << 18}
    with cluster_of(tmp_path, addresses, options, {"logCompactionMinEntries": 10**6}) as cluster:
        cluster.start()
        leader = cluster.leader()
        full = leader if whose == "the leader" else next(a for a in addresses if a != leader)
        node = cluster.nodes[full]
        others = {address: other for address, other in cluster.nodes.items() if address != full}
        ballast = fill(places[full])
        cluster.nodes[leader].put(0, WRITES)
        cluster.until(lambda: "No space" in node.ask(state=True)["failure"])
        writer = leader_of(cluster, others)
        expected = write(cluster, writer, 100_000, WRITES)
        cluster.until(lambda: all(expected.items() <= n.values().items() for n in others.values()))
        assert_said_once(node, "this node stops: [Errno 28] No space")
        ballast.unlink()
        writers = [cluster.nodes[address] for address in {leader, writer}]
        cluster.until(lambda: sum(len(n.acknowledged) + len(n.errors) for n in writers) == 2 * WRITES)
        for each in cluster.nodes.values():  # also what the full one had acknowledged
            expected |= each.acknowledged
        cluster.until_all_have(expected)
        assert not node.ask(state=True)["failure"]
        assert_said_once(node, "this node stops")
        assert_said_once(node, "this node goes on")
