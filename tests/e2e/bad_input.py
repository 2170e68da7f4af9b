"""Input that is wrong, huge, or too much at once: a clear answer, and nothing is left."""

import json
import subprocess

from e2e import BUSYBOX, crictl, test

LONG = "x" * (1 << 20)


@test
def fields_of_any_size_are_honoured_or_refused_by_name(node):
    pod, config = node.run_pod(annotations={"long": LONG}, labels={"empty": ""})
    told = json.loads(crictl("inspectp", pod))["status"]
    assert told["annotations"]["long"] == LONG and told["labels"]["empty"] == ""
    name = {"name": "long", "namespace": "e2e", "uid": "long"}
    for field, more in (
        ("metadata.name", {"metadata": {**name, "name": LONG}}),
        ("metadata.uid", {"metadata": {**name, "uid": "a;b=c"}}),
        ("hostname", {"hostname": LONG}),
        ("log_directory", {"log_directory": f"/{LONG}"}),
        ("log_directory", {"log_directory": "relative"}),
        ("linux.sysctls[net.core.somaxconn]", {"linux": {"sysctls": {"net.core.somaxconn": LONG}}}),
        ("linux.cgroup_parent", {"linux": {"cgroup_parent": LONG}}),
        ("annotations[a3s.box/network]", {"annotations": {"a3s.box/network": ""}}),
        ("annotations[a3s.box/vcpus]", {"annotations": {"a3s.box/vcpus": LONG}}),
        ("annotations[a3s.box/memory-mb]", {"annotations": {"a3s.box/memory-mb": "0"}}),
    ):
        said = crictl("runp", node.pod_config(**more), fails=True)
        assert field in said and "code = InvalidArgument" in said, f"{field}: {said[:2000]}"
    said = crictl("runp", node.pod_config(annotations={"a3s.box/network": LONG}), fails=True)
    assert "no CNI network" in said and str(node.dir / "cni") in said, said[:2000]

    def create(**more):
        spec = {"metadata": {"name": "long"}, "image": {"image": BUSYBOX}, "linux": {}, **more}
        return "create", pod, node.file("long.json", spec), config
    for field, more in (
        ("working_dir", {"working_dir": LONG}),
        ("log_path", {"log_path": LONG}),
        ("mounts[].container_path", {"mounts": [{"host_path": "/tmp", "container_path": f"/{LONG}"}]}),
        ("mounts[].container_path", {"mounts": [{"host_path": "/tmp", "container_path": ""}]}),
        ("envs[]", {"envs": [{"key": "", "value": "x"}]}),
        ("linux.resources.memory_limit_in_bytes", {"linux": {"resources": {"memory_limit_in_bytes": 1}}}),
        ("add_capabilities", {"linux": {"security_context": {"capabilities": {"add_capabilities": [LONG]}}}}),
    ):
        said = crictl(*create(**more), fails=True)
        assert field in said and "code = InvalidArgument" in said, f"{field}: {said[:2000]}"
    said = crictl(*create(image={"image": LONG}), fails=True)
    assert "code = NotFound" in said or "code = InvalidArgument" in said, said[:2000]
    # What only the kernel can tell is told when it is tried.
    for words, more in (("argument list too long", {"envs": [{"key": "LONG", "value": LONG}], "command": ["true"]}),
                        ("executable file not found", {"command": [""]}), ("is a directory", {"command": ["/tmp"]})):
        made = crictl(*create(**more))
        said = crictl("start", made, fails=True)
        assert words in said, said[:2000]
        crictl("rm", made)
    assert crictl("pods", "-q") == pod and crictl("ps", "-a", "-q") == ""
    node.remove(pod)


@test
def a_hundred_calls_of_all_kinds_at_once_are_all_answered(node):
    pod, config = node.run_pod()
    container = node.container(pod, config, ["sh", "-c", "echo begun; sleep 1000"], log_path="c.log")
    calls = [["crictl", "--timeout", "120s", *map(str, call)] for call in [
        *[["runp", node.pod_config()] for _ in range(4)],
        *[["pull", BUSYBOX]] * 10, *[["images"]] * 10, *[["inspecti", BUSYBOX]] * 6, *[["imagefsinfo"]] * 5,
        *[["pods"]] * 10, *[["ps", "-a"]] * 10, *[["inspectp", pod]] * 10, *[["inspect", container]] * 10,
        *[["exec", "--sync", container, "true"]] * 10, *[["stats", container]] * 5, *[["statsp", pod]] * 5, *[["info"]] * 5,
    ]]
    assert len(calls) == 100
    running = [subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for call in calls]
    for call, process in zip(calls, running):
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, f"{call}: {said}"
    pods = crictl("pods", "-q").split()
    assert len(pods) == 5, pods
    removals = [subprocess.Popen(["crictl", "rmp", "-f", one], stdout=subprocess.DEVNULL) for one in pods]
    assert all(removal.wait(120) == 0 for removal in removals)
