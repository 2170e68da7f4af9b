"""End-to-end tests of stats, metrics, events and ends: what a pod is said to use and to have done, against
what it did."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import threading
import urllib.request

from e2e import BUSYBOX, crictl, eventually, test

MIB = 1 << 20
# A pod in a virtual machine, and one on the node's kernel.
PODS = {"microvm": {}, "host": {"security_context": {"namespace_options": {"pid": 2}}}}


def near(what, found, expected):
    assert expected * 0.95 <= found <= expected * 1.05, f"{what}: {found} is not {expected} within 5 %"


def value(stats, *path):
    for key in path:
        stats = stats[key]
    return int(stats["value"])


def stats_of(container):
    return json.loads(crictl("stats", "-o", "json", container))["stats"][0]


def pod_stats_of(pod):
    return json.loads(crictl("statsp", "-o", "json", pod))["stats"][0]["linux"]


def seconds(times):
    """What the shell's `times` says: m and s, for itself and for its children."""
    return sum(int(m) * 60 + float(s) for m, s in re.findall(r"(\d+)m([\d.]+)s", times))


def host_seconds(pid):
    """CPU time of a process of the node."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def cpu_time(container, script):
    """Seconds that the container is said to have used for a script, and that the script has used."""
    cpu = ("cpu", "usageCoreNanoSeconds")
    before = value(stats_of(container), *cpu)
    used = seconds(crictl("exec", "--sync", container, "sh", "-c", f"{script} times"))
    return (value(stats_of(container), *cpu) - before) / 1e9, used


def sent_by(devices):
    """Bytes that went out by eth0, as /proc/net/dev counts them."""
    return int(re.search(r"eth0:(.*)", devices)[1].split()[8])


class Sink:
    """A listener on the node that takes what one client sends."""

    def __init__(self):
        self.socket = socket.create_server(("0.0.0.0", 0))
        self.port = self.socket.getsockname()[1]
        self.bytes = 0
        self.thread = threading.Thread(target=self.take)
        self.thread.start()

    def take(self):
        connection, _ = self.socket.accept()
        while data := connection.recv(65536):
            self.bytes += len(data)
        connection.close()
        self.socket.close()


@test
def stats_are_what_a_known_load_used(node):
    for boundary, linux in PODS.items():
        pod, config = node.run_pod(linux=linux)
        container = node.container(pod, config, ["sleep", "1000"], linux={**linux, "resources": {"memory_limit_in_bytes": 256 * MIB}})
        run = lambda script: crictl("exec", "--sync", container, "sh", "-c", script)
        # What it takes to start a command is in nobody's own times; the first start takes longest.
        run("true")
        counted, used = cpu_time(container, "")
        start, pod_before = counted - used, pod_stats_of(pod)
        machine = node.processes("qemu-system", "template")
        machine_before = sum(map(host_seconds, machine))
        # As long as it takes to have used 1.5 s, on any machine.
        counted, used = cpu_time(container, "until set -- $(cat /proc/$$/stat); [ $((${14}+${15})) -ge 150 ]; do i=0; while [ $i -lt 9999 ]; do i=$((i+1)); done; done;")
        assert used >= 1.5, used
        assert used * 0.95 <= counted <= (used + start) * 1.05, (boundary, counted, used, start)
        pod_after, after = pod_stats_of(pod), stats_of(container)
        # A machine's pod has what the host gave the machine, which its guest does not know.
        of_pod = (value(pod_after, "cpu", "usageCoreNanoSeconds") - value(pod_before, "cpu", "usageCoreNanoSeconds")) / 1e9
        if boundary == "host":
            assert of_pod >= counted * 0.95, (of_pod, counted)
        else:
            near("CPU time of the machine's pod", of_pod, sum(map(host_seconds, machine)) - machine_before)
        assert after["cpu"]["usageNanoCores"], after
        before = after
        run(f"dd if=/dev/zero of=/dev/shm/load bs=1M count=48 2>/dev/null")
        after = stats_of(container)
        near(f"working set, {boundary}", value(after, "memory", "workingSetBytes") - value(before, "memory", "workingSetBytes"), 48 * MIB)
        near(f"available, {boundary}", value(before, "memory", "availableBytes") - value(after, "memory", "availableBytes"), 48 * MIB)
        assert value(after, "memory", "availableBytes") + value(after, "memory", "workingSetBytes") == 256 * MIB, after
        assert value(after, "memory", "pageFaults") > value(before, "memory", "pageFaults"), after
        before = after
        run(f"dd if=/dev/urandom of=/load bs=1M count=32 conv=fsync 2>/dev/null; mkdir /many; cd /many; touch $(seq 40)")
        after = stats_of(container)
        near(f"writable layer, {boundary}", value(after, "writableLayer", "usedBytes") - value(before, "writableLayer", "usedBytes"), 32 * MIB)
        assert value(after, "writableLayer", "inodesUsed") - value(before, "writableLayer", "inodesUsed") == 42, after
        sink, before, own_before = Sink(), pod_stats_of(pod), sent_by(run("cat /proc/net/dev"))
        run(f"head -c {20 * MIB} /dev/zero | nc 10.88.0.1 {sink.port}")
        sink.thread.join()
        assert sink.bytes == 20 * MIB, sink.bytes
        after, own = pod_stats_of(pod), sent_by(run("cat /proc/net/dev")) - own_before
        assert after["network"]["defaultInterface"]["name"] == "eth0", after["network"]
        sent = ("network", "defaultInterface", "txBytes")
        counted = value(after, *sent) - value(before, *sent)
        # Headers come on top, once a packet.
        near(f"bytes sent, {boundary}", counted, own)
        assert 20 * MIB <= counted <= 22 * MIB, counted
        assert value(after, "process", "processCount") == 1, after["process"]
        assert after["cpu"]["psi"] and after["memory"]["psi"] and after["io"]["psi"], after
        assert [one["attributes"]["id"] for one in after["containers"]] == [container], after
        node.remove(pod)


@test
def every_metric_that_is_announced_is_told_of_a_pod(node):
    # What critest's development head asks for; pods have no huge pages.
    wanted = """blkio_device_usage_total cpu_cfs_periods_total cpu_cfs_throttled_periods_total
        cpu_cfs_throttled_seconds_total cpu_system_seconds_total cpu_usage_seconds_total cpu_user_seconds_total
        file_descriptors fs_inodes_free fs_inodes_total fs_limit_bytes fs_reads_bytes_total fs_reads_total
        fs_usage_bytes fs_writes_bytes_total fs_writes_total last_seen memory_cache memory_failcnt
        memory_failures_total memory_kernel_usage memory_mapped_file memory_max_usage_bytes memory_rss memory_swap
        memory_usage_bytes memory_working_set_bytes network_receive_bytes_total network_receive_errors_total
        network_receive_packets_dropped_total network_receive_packets_total network_transmit_bytes_total
        network_transmit_errors_total network_transmit_packets_dropped_total network_transmit_packets_total
        oom_events_total pressure_cpu_stalled_seconds_total pressure_cpu_waiting_seconds_total
        pressure_io_stalled_seconds_total pressure_io_waiting_seconds_total pressure_memory_stalled_seconds_total
        pressure_memory_waiting_seconds_total processes sockets spec_cpu_period spec_cpu_quota spec_cpu_shares
        spec_memory_limit_bytes spec_memory_reservation_limit_bytes spec_memory_swap_limit_bytes start_time_seconds
        threads threads_max ulimits_soft""".split()
    announced = {one["name"]: one for one in json.loads(crictl("metricdescs"))["descriptors"]}
    missing = [name for name in wanted if f"container_{name}" not in announced]
    assert not missing, missing
    assert all(one["help"] and one["labelKeys"] for one in announced.values()), announced
    for boundary, linux in PODS.items():
        pod, config = node.run_pod(linux=linux)
        resources = {"cpu_period": 100000, "cpu_quota": 20000, "cpu_shares": 1024,
                     "memory_limit_in_bytes": 64 * MIB, "memory_swap_limit_in_bytes": 64 * MIB}
        container = node.container(pod, config, ["sleep", "1000"], linux={**linux, "resources": resources})
        crictl("exec", "--sync", container, "sh", "-c", "dd if=/dev/zero of=/f bs=1M count=4 2>/dev/null; sync")
        told = next(one for one in json.loads(crictl("metricsp"))["podMetrics"] if one["podSandboxId"] == pod)
        series = told["metrics"] + told["containerMetrics"][0]["metrics"]
        names = {one["name"] for one in series}
        # cgroup v1 on the node does not count a pod's block I/O.
        uncounted = {name for name in announced if boundary == "host" and re.match("container_(fs_(reads|writes)|blkio)_", name)}
        assert not set(announced) - names - uncounted, (boundary, set(announced) - names)
        for one in series:
            assert len(one["labelValues"]) == len(announced[one["name"]]["labelKeys"]), one
        read = {one["name"]: int(one["value"]["value"]) for one in told["containerMetrics"][0]["metrics"]}
        assert read["container_spec_cpu_quota"] == 20000 and read["container_spec_memory_limit_bytes"] == 64 * MIB, read
        assert read["container_processes"] == 1 and read["container_file_descriptors"] >= 3, read
        assert boundary == "host" or read["container_fs_writes_bytes_total"] >= 4 * MIB, read
        whole = {one["name"]: int(one["value"]["value"]) for one in told["metrics"]}
        assert whole["container_memory_usage_bytes"] > 0, whole
        assert boundary == "host" or whole["a3s_box_overhead_memory_bytes"] > 5 * MIB, whole
        node.remove(pod)


@test
def the_server_counts_what_it_does(node):
    before = own_metrics()
    pod, config = node.run_pod()
    container = node.container(pod, config, ["sleep", "1000"])
    crictl("exec", "--sync", "0" * 64, "true", fails=True)
    counted = own_metrics()
    more = lambda name: counted.get(name, 0) - before.get(name, 0)
    assert more('a3s_box_sandbox_starts_total{outcome="ok"}') == 1, counted
    assert more('a3s_box_rpc_seconds_count{rpc="RunPodSandbox",code="Ok"}') == 1, counted
    assert more('a3s_box_rpc_seconds_count{rpc="ExecSync",code="NotFound"}') == 1, counted
    assert more('a3s_box_sandbox_start_stage_seconds_count{stage="server_total"}') == 1, counted
    assert counted['a3s_box_sandboxes{state="ready"}'] == 1 and counted["a3s_box_containers_running"] == 1, counted
    for pid in node.processes("qemu-system", "template"):
        os.kill(pid, signal.SIGKILL)
    eventually("the machine's death is counted", lambda: own_metrics().get('a3s_box_boundary_deaths_total{boundary="microvm"}', 0) == 1)
    eventually("the container has ended", lambda: node.state(container)["state"] == "CONTAINER_EXITED")
    node.remove(pod)
    assert own_metrics()["a3s_box_teardowns_retried"] == 0


class Listener:
    """A client of GetContainerEvents, of which what happens to these ids counts: the first is also told what
    happened while nobody listened."""

    def __init__(self, node, ids):
        self.ids = ids
        node.count += 1
        self.path = node.dir / f"events-{node.count}.json"
        self.process = subprocess.Popen(["crictl", "events", "-o", "json"], stdout=open(self.path, "wb"), stderr=subprocess.DEVNULL)

    def told(self):
        """What it has heard: id, kind and time of each event."""
        text, at, events = self.path.read_text(), 0, []
        while brace := text.find("{", at) + 1:
            try:
                event, at = json.JSONDecoder().raw_decode(text, brace - 1)
            except ValueError:
                break
            kind = event["containerEventType"].removeprefix("CONTAINER_").removesuffix("_EVENT").lower()
            events.append((event["containerId"], kind, int(event["createdAt"])))
        return events

    def hears(self, *wanted):
        """Waits for these, which are all that it hears, in this order."""
        pairs = lambda: [event[:2] for event in self.told() if event[0] in self.ids]
        eventually(f"{wanted} are told, not {pairs()}", lambda: len(pairs()) >= len(wanted))
        assert pairs() == list(wanted), (pairs(), wanted)

    def end(self):
        self.process.kill()
        self.process.wait()


def own_metrics():
    """What the server counts of itself, by name and labels."""
    text = urllib.request.urlopen("http://127.0.0.1:9100/metrics", timeout=10).read().decode()
    return {name: float(number) for name, number in re.findall(r"^([^#\s]\S*(?:\{.*\})?) (\S+)$", text, re.M)}


def listening(count):
    eventually(f"{count} listen", lambda: own_metrics()["a3s_box_event_listeners"] == count)


@test
def events_across_a_restart_are_told_once_and_none_is_lost(node):
    ids = set()
    first, second = Listener(node, ids), Listener(node, ids)
    listening(2)
    door = node.dir / "door"
    door.mkdir(exist_ok=True)
    pod, config = node.run_pod()
    mount = [{"host_path": str(door), "container_path": "/door"}]
    ending = node.container(pod, config, ["sh", "-c", "until [ -e /door/open ]; do usleep 50000; done; exit 5"], mounts=mount)
    staying = node.container(pod, config, ["sleep", "1000"])
    ids |= {pod, ending, staying}
    life = [(pod, "created"), (pod, "started"), (ending, "created"), (ending, "started"), (staying, "created"), (staying, "started")]
    first.hears(*life)
    second.hears(*life)
    node.kill()
    (door / "open").touch()
    record = node.dir / "state/sandboxes" / pod / "containers" / f"{ending}.json"
    eventually("it ends while no server runs", lambda: json.loads(record.read_text())["phase"] == "exited")
    finished = json.loads(record.read_text())["exit"]["exited_at"]
    node.start()
    third = Listener(node, ids)
    third.hears((ending, "stopped"))
    assert third.told()[0][2] == finished, (third.told(), finished)
    fourth = Listener(node, ids)
    listening(2)
    crictl("rm", ending)
    third.hears((ending, "stopped"), (ending, "deleted"))
    fourth.hears((ending, "deleted"))
    # A server that stops ends the streams at once.
    node.stop()
    assert third.process.wait(30) is not None and fourth.process.wait(30) is not None
    node.start()
    fifth = Listener(node, ids)
    listening(1)
    crictl("stop", "--timeout", "0", staying)
    crictl("stopp", pod)
    crictl("stopp", pod)
    crictl("rmp", pod)
    fifth.hears((staying, "stopped"), (pod, "stopped"), (staying, "deleted"), (pod, "deleted"))
    for listener in (first, second, third, fourth, fifth):
        listener.end()


@test
def containers_end_with_the_code_the_reason_and_the_times_of_their_end(node):
    for linux in PODS.values():
        pod, config = node.run_pod(linux=linux)
        def ended(command, **more):
            container = node.container(pod, config, command, linux={**linux, **more.pop("linux", {})}, **more)
            return eventually("it ends", lambda: (lambda s: s if s["state"] == "CONTAINER_EXITED" else None)(node.state(container)))
        for command, code, reason in [("exit 0", 0, "Completed"), ("exit 7", 7, "Error"), ("kill -9 $$", 137, "Error"), ("kill -TERM $$; sleep 9", 143, "Error")]:
            # As init of a namespace it would be deaf to its own signals.
            status = ended(["sh", "-c", f"sh -c '{command}'; exit $?"])
            assert (status["exitCode"], status["reason"]) == (code, reason), (command, status)
            assert status["createdAt"] <= status["startedAt"] <= status["finishedAt"], status
        status = ended(["sh", "-c", "x=$(head -c 60000000 /dev/zero | tr '\\0' x); echo ${#x}"], linux={"resources": {"memory_limit_in_bytes": 15 * MIB}})
        assert status["reason"] == "OOMKilled" and status["exitCode"] != 0, status
        refused = node.container(pod, config, ["/no/such/command"], start=False, linux=linux)
        assert "/no/such/command" in crictl("start", refused, fails=True)
        status = node.state(refused)
        assert (status["state"], status["reason"], status["exitCode"]) == ("CONTAINER_EXITED", "StartError", 128), status
        assert status["startedAt"].startswith(("0001", "1970")) and "/no/such/command" in status["message"], status
        # SIGUSR1, by the CRI's number.
        script = "trap 'exit 33' USR1; trap 'exit 44' TERM; touch /set; while :; do usleep 20000; done"
        asked = node.container(pod, config, ["sh", "-c", script], stop_signal=29, linux=linux)
        crictl("exec", "--sync", asked, "sh", "-c", "until [ -e /set ]; do usleep 20000; done")
        crictl("stop", "--timeout", "60", asked)
        assert node.state(asked)["exitCode"] == 33, node.state(asked)
        node.remove(pod)


@test
def a_name_runs_again_under_a_higher_attempt(node):
    pod, config = node.run_pod()
    spec = {"metadata": {"name": "again", "attempt": 0}, "image": {"image": BUSYBOX}, "linux": {}, "command": ["sh", "-c", "exit 3"], "log_path": "again.log"}
    make = lambda attempt: crictl("create", pod, node.file("again.json", {**spec, "metadata": {"name": "again", "attempt": attempt}}), config)
    first = make(0)
    crictl("start", first)
    eventually("it ends", lambda: node.state(first)["state"] == "CONTAINER_EXITED")
    said = crictl("create", pod, node.file("again.json", spec), config, fails=True)
    assert "again" in said and first in said, said
    second = make(1)
    crictl("start", second)
    assert second != first and node.state(second)["metadata"]["attempt"] == 1
    eventually("it ends", lambda: node.state(second)["state"] == "CONTAINER_EXITED")
    assert len(crictl("ps", "-a", "-q", "--name", "again").split()) == 2
    node.remove(pod)
