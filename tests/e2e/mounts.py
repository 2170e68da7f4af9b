"""End-to-end tests of mounts: both ways, images, kubelet's updates, and what else a path of the host may be."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess

from e2e import BUSYBOX, crictl, eventually, test

PRIVILEGED = {"security_context": {"privileged": True}}
PRIVATE, FROM_HOST, BOTH_WAYS = 0, 1, 2


def sh(container, script, fails=False):
    return crictl("exec", "--sync", container, "sh", "-c", script, fails=fails)


def folder(node, name):
    path = node.dir / "volumes" / name
    path.mkdir(parents=True)
    return path


def inside(node):
    """The program that containers have for what busybox lacks."""
    program = node.dir / "inside"
    source = pathlib.Path(__file__).parent / "inside.c"
    subprocess.run(["gcc", "-static", "-O1", "-o", program, source], check=True)
    return bind(program, at="/inside", readonly=True)


def bind(path, at="/v", **more):
    return {"host_path": str(path), "container_path": at, **more}


def shown(path):
    """Mounts at or below a path of the host."""
    return [line.split(" ")[4] for line in pathlib.Path("/proc/self/mountinfo").read_text().splitlines()
            if line.split(" ")[4].startswith(str(path))]


@contextlib.contextmanager
def both_ways(node, name, **more):
    """A pod that shares its mounts with the host, which has none of them afterwards."""
    host = folder(node, name)
    pod, config = node.run_pod(linux=PRIVILEGED)
    container = node.container(pod, config, ["sleep", "1000"], linux=PRIVILEGED, mounts=[bind(host, propagation=BOTH_WAYS)], **more)
    try:
        yield host, pod, config, container
    finally:
        node.remove(pod)
    assert not shown(host), shown(host)
    node.is_clean()


@test
def what_a_container_mounts_is_the_hosts_until_it_is_unmounted(node):
    with both_ways(node, "both") as (host, pod, config, container):
        seen = node.container(pod, config, ["sleep", "1000"], mounts=[bind(host, propagation=FROM_HOST)])
        sh(container, "mkdir /v/a && mount -t tmpfs x /v/a && echo guest > /v/a/f && mkdir /v/a/sub && mount --bind /etc /v/a/sub")
        assert (host / "a/f").read_text() == "guest\n"
        assert (host / "a/sub/passwd").exists()
        (host / "a/g").write_text("host")
        assert sh(container, "cat /v/a/g; mount | grep -c ' /v/a'") == "host2"
        # The host has it, so others have it from there; and it is a file system, not a copy.
        assert sh(seen, "cat /v/a/f; echo more >> /v/a/f") == "guest"
        assert sh(container, "tail -n 1 /v/a/f") == "more"
        options = subprocess.run(["findmnt", "-no", "OPTIONS", host / "a"], capture_output=True, text=True, check=True).stdout
        assert "nosuid" in options and "nodev" in options, options
        node.kill()
        node.start()
        assert (host / "a/g").read_text() == "host"
        sh(container, "umount /v/a/sub && umount /v/a")
        assert shown(host) == [] and os.listdir(host / "a") == [], shown(host)
        # Who unmounts it may remove its place at once, as a CSI driver does; and that again and again.
        for _ in range(10):
            sh(container, "mkdir -p /v/b && mount -t tmpfs x /v/b && mkdir /v/b/sub && mount --bind /etc /v/b/sub")
            assert (host / "b/sub/passwd").exists()
            sh(container, "umount /v/b/sub && umount /v/b && rmdir /v/b")
            assert not (host / "b").exists()
        # By itself.
        sh(container, "(sleep 1; mount -t tmpfs y /v/a; touch /v/a/later) >/dev/null 2>&1 &")
        eventually("a mount that nobody waited for", lambda: (host / "a/later").exists())
        sh(container, "umount /v/a")
        # Read-only stays read-only, whatever the host's caller may.
        sh(container, "mount -t tmpfs -o ro z /v/a")
        assert subprocess.run(["touch", host / "a/x"], capture_output=True, check=False).returncode != 0
        # The end of the container is theirs.
        crictl("stop", "-t", "0", container)
        assert shown(host) == [], shown(host)


@test
def mounts_of_a_guest_go_with_it_however_it_ends(node):
    def ends(how):
        with both_ways(node, how.__name__) as (host, pod, _, container):
            sh(container, "mkdir /v/a && mount -t tmpfs x /v/a && echo guest > /v/a/f")
            assert (host / "a/f").read_text() == "guest\n"
            how()
            eventually("the host has it no more", lambda: not shown(host))
            assert os.listdir(host / "a") == []

    def the_machine():
        for pid in node.processes("qemu-system"):
            os.kill(pid, signal.SIGKILL)

    def the_shim():
        for pid in node.processes("a3s-box-shim", "volume-server"):
            os.kill(pid, signal.SIGKILL)

    def the_shim_while_no_server_runs():
        node.kill()
        the_shim()
        node.start()

    def the_machine_freezes():
        host = node.dir / "volumes/the_machine_freezes"
        for pid in node.processes("qemu-system"):
            os.kill(pid, signal.SIGSTOP)
        # It is not for ever that somebody who looks has to wait.
        assert subprocess.run(["cat", host / "a/f"], capture_output=True, check=False).returncode != 0

    for how in (the_machine, the_shim, the_shim_while_no_server_runs, the_machine_freezes):
        ends(how)


@test
def an_image_is_a_volume_that_cannot_be_written_to(node):
    digest = crictl("pull", "nginx").split()[-1]
    for linux in ({}, {"security_context": {"namespace_options": {"pid": 2}}}):
        pod, config = node.run_pod(linux=linux)
        def image(name="nginx", at="/image", **more):
            return {"container_path": at, "readonly": True, "image": {"image": name, "user_specified_image": "nginx"}, **more}
        container = node.container(pod, config, ["sleep", "1000"], linux=linux,
                                   mounts=[image(), image(at="/etc-of-it", image_sub_path="etc/nginx")])
        assert sh(container, "cat /image/etc/nginx/nginx.conf | wc -l") == sh(container, "cat /etc-of-it/nginx.conf | wc -l") != "0"
        assert "Read-only file system" in sh(container, "touch /image/x", fails=True)
        assert sh(container, "test -x /image/usr/sbin/nginx && mount | grep ' /image ' | grep -c noexec || true") == "0"
        mounts = {one["containerPath"]: one for one in node.state(container)["mounts"]}
        assert mounts["/image"]["image"]["imageRef"] == digest, mounts
        assert mounts["/etc-of-it"]["imageSubPath"] == "etc/nginx", mounts
        for wrong, words in [(image(image_sub_path="no/such"), "no/such"), (image(image_sub_path="etc/passwd"), "etc/passwd"),
                             (image(image_sub_path="../etc"), "image_sub_path"), ({**image(), "readonly": False}, "readonly"),
                             (image("no-such-image"), "no-such-image"), ({**image(), "host_path": "/tmp"}, "host_path")]:
            spec = {"metadata": {"name": "wrong"}, "image": {"image": BUSYBOX}, "command": ["true"], "linux": linux, "mounts": [wrong]}
            said = crictl("create", pod, node.file("wrong.json", spec), config, fails=True)
            assert words in said, said
        # Whoever has it mounted keeps it.
        crictl("rmi", "nginx")
        assert sh(container, "ls /etc-of-it/nginx.conf /image/etc/passwd") == "/etc-of-it/nginx.conf\n/image/etc/passwd"
        crictl("pull", "nginx")
        node.remove(pod)


@test
def kubelets_updates_are_read_whole_and_wake_who_waits(node):
    volume = folder(node, "config-map")

    def write(version):
        name = f"..2026_{version}"
        (volume / name).mkdir()
        for key in ("one", "two"):
            (volume / name / key).write_text(f"{version:09}\n" * 5000)
        os.symlink(name, volume / "..data_tmp")
        os.rename(volume / "..data_tmp", volume / "..data")
        if version:
            subprocess.run(["rm", "-r", volume / f"..2026_{version - 1}"], check=True)

    write(0)
    for key in ("one", "two"):
        os.symlink(f"..data/{key}", volume / key)
    reader = """while [ ! -e /tmp/over ]; do
        cd -P /config/..data 2>/dev/null || continue
        one=$(uniq -c one 2>/dev/null) && two=$(uniq -c two 2>/dev/null) || continue
        case $one in "") continue ;; *"
"*) echo "torn: $one" ;; esac
        [ -z "$two" ] || [ "$one" = "$two" ] || echo "mixed: $one / $two"
        echo "read $one"
    done"""
    pod, config = node.run_pod()
    mounts = [bind(volume, at="/config", readonly=True)]
    reading = node.container(pod, config, ["sh", "-c", reader], mounts=mounts)
    waiting = node.container(pod, config, ["/inside", "watch", "/config", "/config/one"], mounts=[*mounts, inside(node)])
    eventually("both are at it", lambda: "read" in crictl("logs", reading) and "watching" in crictl("logs", waiting))
    last = 40
    for version in range(1, last + 1):
        before = crictl("logs", waiting).count("/config moved-to ..data")
        write(version)
        eventually(f"version {version} wakes who waits",
                   lambda before=before: crictl("logs", waiting).count("/config moved-to ..data") > before)
    eventually("the last version is read", lambda: f"{last:09}" in crictl("logs", reading))
    assert sh(reading, "head -n 1 /config/two") == f"{last:09}"
    # A file's watcher is told once: the file it watched is no more.
    assert crictl("logs", waiting).count("/config/one deleted") == 1, crictl("logs", waiting)
    sh(reading, "touch /tmp/over")
    log = crictl("logs", reading)
    assert "torn" not in log and "mixed" not in log, log[-2000:]
    assert all(int(line.split()[1]) == 5000 for line in log.splitlines() if line.startswith("read ")), log[-2000:]
    node.remove(pod)


@test
def files_sockets_and_pipes_are_the_same_in_all_containers_of_a_pod(node):
    shared = folder(node, "shared")
    (shared / "file").write_text("of the host")
    os.mkfifo(shared / "made-by-the-host")
    pod, config = node.run_pod()
    mounts = [bind(shared), bind(shared / "file", at="/one-file"), inside(node)]
    first = node.container(pod, config, ["sleep", "1000"], mounts=mounts)
    second = node.container(pod, config, ["sleep", "1000"], mounts=mounts)
    assert sh(second, "cat /one-file") == "of the host"
    sh(first, "echo changed > /one-file")
    assert (shared / "file").read_text() == "changed\n"
    for pipe in ("made-by-the-host", "made-by-the-guest"):
        sh(first, f"[ -p /v/{pipe} ] || mkfifo /v/{pipe}; (cat /v/{pipe} > /v/from-{pipe}) >/dev/null 2>&1 &")
        sh(second, f"echo through > /v/{pipe}")
        eventually(f"what went through {pipe}", lambda pipe=pipe: (shared / f"from-{pipe}").read_text() == "through\n")
    for command in ("lock /v/file > /v/lock", "listen /v/socket"):
        sh(first, f"(/inside {command}) </dev/null 2>/dev/null &")
    eventually("the lock is held", lambda: (shared / "lock").read_text() == "locked\n")
    assert sh(second, "/inside lock /v/file; echo $?") == "7"
    assert eventually("the socket answers", lambda: sh(second, "/inside call /v/socket || true")) == "answered"
    # The first one's end takes nothing from the second.
    crictl("rm", "-f", first)
    left = sh(second, "cat /v/file; timeout 2 /inside lock /v/file || true")
    assert left.split()[:2] == ["changed", "locked"], left
    node.remove(pod)


@test
def a_path_of_the_host_may_be_anything_that_kubelet_prepares(node):
    base = folder(node, "paths")
    (base / "real").mkdir()
    (base / "real/f").write_text("real")
    os.symlink("real", base / "link")
    # As kubelet does it for a subPath: what a descriptor stands for, bound where nobody can change the way to it.
    sub = folder(node, "volume-subpaths")
    (sub / "0").mkdir()
    (sub / "1").touch()
    descriptors = [os.open(base / "real", os.O_PATH | os.O_NOFOLLOW), os.open(base / "real/f", os.O_PATH | os.O_NOFOLLOW)]
    for number, fd in enumerate(descriptors):
        subprocess.run(["mount", "--no-canonicalize", "--bind", f"/proc/{os.getpid()}/fd/{fd}", sub / str(number)], check=True)
        os.close(fd)
    below = base / "real/below"
    below.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "x", below], check=True)
    try:
        pod, config = node.run_pod()
        container = node.container(pod, config, ["sleep", "1000"], mounts=[
            bind(base / "link", at="/link"), bind(sub / "0", at="/sub"), bind(sub / "1", at="/sub-file"), bind(base / "new", at="/new"),
            bind(base / "real", at="/ro", readonly=True), bind(base / "real", at="/rro", readonly=True, recursive_read_only=True)])
        assert sh(container, "cat /link/f /sub/f /sub-file") == "realrealreal"
        assert "Read-only" in sh(container, "touch /ro/x", fails=True)
        sh(container, "touch /ro/below/x /new/x")
        assert "Read-only" in sh(container, "touch /rro/below/x", fails=True)
        assert sh(container, "df -k /dev/shm | tail -n 1").split()[1] == str(64 << 10)
        # Kubelet unmounts what it prepared once the pod is stopped.
        crictl("stopp", pod)
        for number in range(2):
            subprocess.run(["umount", "-R", sub / str(number)], check=True)
        crictl("rmp", pod)
    finally:
        subprocess.run(["umount", below], check=False)


@test
def huge_pages_are_as_many_as_the_limit_says_and_shared_by_the_pod(node):
    volume = folder(node, "huge")
    subprocess.run(["mount", "-t", "hugetlbfs", "-o", "pagesize=2M", "x", volume], check=True)
    try:
        pod, config = node.run_pod()
        limits = lambda bytes, size="2MB": {"resources": {"hugepage_limits": [{"page_size": size, "limit": bytes}]}}
        pool = lambda container: int(sh(container, "cat /proc/sys/vm/nr_hugepages"))
        mounts = [bind(volume, at="/huge"), inside(node)]
        first = node.container(pod, config, ["sleep", "1000"], mounts=mounts, linux=limits(16 << 20))
        second = node.container(pod, config, ["sleep", "1000"], mounts=mounts, linux=limits(8 << 20))
        assert pool(first) == 12
        assert sh(first, "/inside huge /huge/a 8") == "first had 0"
        assert sh(second, "/inside huge /huge/a 1") == "first had 7"
        # One page more than its limit: the kernel says so to the process alone.
        said = sh(second, "rm /huge/a; /inside huge /huge/b 5; echo ended with $?")
        assert "ended with 135" in said, said
        assert node.state(second)["resources"]["linux"]["hugepageLimits"] == [{"pageSize": "2MB", "limit": str(8 << 20)}]
        for what, word in ((limits(100 << 30), "its machine needs more memory"), (limits(1 << 30, "1GB"), "hugepage_limits[1GB]"),
                           (limits(1, "2MB"), "no whole number of pages")):
            spec = {"metadata": {"name": "no"}, "image": {"image": BUSYBOX}, "command": ["true"], "linux": what}
            said = crictl("create", pod, node.file("no.json", spec), config, fails=True)
            assert word in said, said
        assert pool(first) == 12
        crictl("rm", "-f", second)
        assert pool(first) == 8
        none = node.container(pod, config, ["sleep", "1000"], mounts=mounts, linux=limits(0))
        assert sh(none, "/inside huge /huge/c 1 || echo ended with $?").startswith("ended with 135")
        node.remove(pod)
    finally:
        subprocess.run(["umount", volume], check=True)
