"""Guests: how their machines come to life, what QEMU may do, and what is said when one cannot be had."""

import json
import pathlib
import re

from e2e import crictl, test


def status(pid):
    text = pathlib.Path(f"/proc/{pid}/status").read_text()
    return dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)


@test
def qemu_has_nothing_but_what_it_inherited(node):
    pod, _ = node.run_pod()
    [pid] = node.processes("qemu-system")
    found = status(pid)
    assert all(int(uid) >= 1 << 20 for uid in found["Uid"].split() + found["Gid"].split()), found
    assert all(int(found[name], 16) == 0 for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")), found
    assert (found["Seccomp"], found["NoNewPrivs"]) == ("2", "1"), found
    words = pathlib.Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    assert "-sandbox" in words, words
    # What it opens is its own descriptors: no other file of the node is named to it.
    paths = [path for word in words[1:] for path in re.findall(r"(?<![\w.])/[^,=]+", word)]
    assert all(path.startswith(("/proc/self/fd/", "/dev/fdset/")) for path in paths), paths
    node.remove(pod)


@test
def a_template_that_cannot_be_loaded_is_replaced_by_a_boot(node):
    pod, _ = node.run_pod()
    node.remove(pod)
    [template] = [path for path in (node.dir / "root/templates").iterdir() if path.is_dir()]
    state = template / "state"
    state.write_bytes(state.read_bytes()[:5000])
    pod, config = node.run_pod()
    assert crictl("exec", "--sync", node.container(pod, config, ["sleep", "1000"]), "echo", "alive") == "alive"
    assert "a clone of the template did not start" in (node.dir / "e2e-server.log").read_text()
    # The next server makes a new template.
    node.stop()
    node.start()
    other, _ = node.run_pod()
    assert template.is_dir() and json.loads(crictl("inspectp", other))["status"]["state"] == "SANDBOX_READY"
    node.remove(pod)
    node.remove(other)


@test
def what_a_guest_that_cannot_start_said_stands_in_the_error(node):
    text = (node.dir / "config.toml").read_text()
    broken = node.dir / "initramfs"
    broken.write_bytes(b"no archive")
    for key, value, words in (
        ("initramfs", str(broken), ("Kernel panic", "wait for the guest's agent")),
        ("kernel", "/no/such/kernel", ("guest kernel", "/no/such/kernel", "No such file")),
        ("qemu", "/bin/false", ("QEMU",)),
    ):
        node.stop()
        (node.dir / "config.toml").write_text(text.replace("[vm]", f'[vm]\n{key} = "{value}"'))
        try:
            node.start()
            said = crictl("runp", node.pod_config(), fails=True)
            assert all(word in said for word in words), f"{key}: {said}"
            node.is_clean()
        finally:
            (node.dir / "config.toml").write_text(text)
            if node.server.poll() is None:
                node.stop()
            node.start()
