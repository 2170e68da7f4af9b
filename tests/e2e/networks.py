"""Networks that a pod may choose, and what is said when there is none."""

import json
import subprocess

from e2e import crictl, test


@test
def a_pod_joins_the_network_that_it_names(node):
    other = json.loads((node.dir / "cni/10-pods.conflist").read_text())
    other["name"] = "other"
    other["plugins"][0].update(bridge="a3s-other0", ipam={
        "type": "host-local", "dataDir": str(node.dir / "ipam"), "ranges": [[{"subnet": "10.99.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}]})
    file = node.dir / "cni/20-other.conflist"
    file.write_text(json.dumps(other))
    try:
        first, _ = node.run_pod()
        pod, config = node.run_pod(annotations={"a3s.box/network": "other"})
        ip = lambda pod: json.loads(crictl("inspectp", pod))["status"]["network"]["ip"]
        assert ip(first).startswith("10.88.") and ip(pod).startswith("10.99."), (ip(first), ip(pod))
        container = node.container(pod, config, ["sleep", "1000"])
        assert f"inet {ip(pod)}/16" in crictl("exec", "--sync", container, "ip", "addr", "show", "eth0")
        # From the node, and from a pod of the other network.
        subprocess.run(["busybox", "ping", "-c", "1", "-W", "10", ip(pod)], check=True, capture_output=True)
        crictl("exec", "--sync", container, "ping", "-c", "1", "-W", "10", ip(first))
        # What DEL is told is what ADD was, whatever became of the configuration.
        file.unlink()
        node.remove(pod)
        node.remove(first)
    finally:
        file.unlink(missing_ok=True)
        subprocess.run(["ip", "link", "delete", "a3s-other0"], check=False, capture_output=True)


@test
def without_a_network_the_node_says_so_and_pods_are_refused(node):
    folder, away = node.dir / "cni", node.dir / "cni-away"
    folder.rename(away)
    try:
        conditions = json.loads(crictl("info"))["status"]["conditions"]
        network = next(one for one in conditions if one["type"] == "NetworkReady")
        assert not network["status"] and network["reason"] and str(folder) in network["message"], network
        said = crictl("runp", node.pod_config(), fails=True)
        assert str(folder) in said, said
    finally:
        away.rename(folder)
    node.is_clean()
    pod, _ = node.run_pod()
    node.remove(pod)
