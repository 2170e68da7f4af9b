#!/usr/bin/env python3
"""Builds the images that tests, benchmarks and the demo run, and pushes them to a registry.

    build.py CACHE                 fetches the packages
    build.py CACHE REGISTRY        builds and pushes, e.g. build.py target/images 127.0.0.1:5000

Every file comes from a Debian package or from here. The images are made to look like real ones: several
layers, gzip and zstd, OCI and Docker types, indexes of two platforms, whiteouts, an opaque folder, hard
links, file capabilities. They are the same bytes for the same packages; what the registry has is not pushed
again. Names are the upstream ones: critest has them built in.
"""

import gzip
import hashlib
import http.client
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import tarfile

TIME = 1_700_000_000
OCI = "application/vnd.oci.image."
DOCKER = "application/vnd.docker."
# cap_net_raw=ep, as setcap writes it (VFS_CAP_REVISION_2).
CAP_NET_RAW = bytes.fromhex("0100000200200000" + "00" * 12)

PACKAGES = {
    "base": ["libc6", "libcrypt1", "busybox", "base-files"],
    "tools": ["procps", "libproc2-0", "libncursesw6", "libtinfo6", "libsystemd0", "libcap2", "libgcrypt20",
              "libgpg-error0", "liblz4-1", "liblzma5", "libzstd1", "util-linux", "libsmartcols1"],
    "nginx": ["nginx", "nginx-common", "libpcre2-8-0", "libssl3|libssl3t64", "zlib1g"],
}
# Of the packages with much more in them than a container needs.
ONLY = {
    "base-files": r"\./(etc/(os-release|debian_version|host.conf)|usr/lib/os-release|usr/share/base-files)",
    "procps": r"\./(usr/)?bin/(pgrep|pidwait|ps|pkill)$",
    "util-linux": r"\./usr/bin/(ipcs|ipcmk|ipcrm)$",
}
NEVER = r"\./usr/share/(doc|man|locale|lintian|bug|zsh|bash-completion)"

PASSWD = """root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin
www-data:x:33:33:www-data:/var/www:/usr/sbin/nologin
default-user:x:1000:1000::/home/default-user:/bin/sh
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
"""
GROUP = """root:x:0:
tty:x:5:
www-data:x:33:
default-user:x:1000:
group-defined-in-image:x:50000:default-user
nogroup:x:65534:
"""
ENTRYPOINT = """#!/bin/sh
set -e
mkdir -p /var/run /var/log/nginx /var/lib/nginx
exec "$@"
"""
NGINX = """user www-data;
worker_processes 1;
pid /var/run/nginx.pid;
error_log /dev/stderr notice;
events { worker_connections 64; }
http {
  access_log /dev/stdout;
  server { listen %d; listen [::]:%d; root /usr/share/nginx/html; }
}
"""
NO_NEW_PRIVS = """#include <stdio.h>
#include <unistd.h>
int main(void) { printf("Effective uid: %d\\n", geteuid()); return 0; }
"""
PAUSE = """#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>
static void end(int signal) { (void)signal; _exit(0); }
static void reap(int signal) { (void)signal; while (waitpid(-1, NULL, WNOHANG) > 0) {} }
int main(void) {
	signal(SIGINT, end);
	signal(SIGTERM, end);
	signal(SIGCHLD, reap);
	for (;;) pause();
}
"""


def say(text):
    print(f"images: {text}", file=sys.stderr, flush=True)


class Layer:
    """A layer's archive in the making."""

    def __init__(self):
        self.bytes = io.BytesIO()
        self.tar = tarfile.open(fileobj=self.bytes, mode="w", format=tarfile.PAX_FORMAT)
        self.names = set()

    def add(self, name, kind=tarfile.REGTYPE, data=b"", mode=0o644, link="", uid=0, gid=0, xattrs=None):
        info = tarfile.TarInfo(name)
        info.type, info.mode, info.linkname, info.mtime = kind, mode, link, TIME
        info.uid, info.gid, info.size = uid, gid, len(data)
        info.pax_headers = {f"SCHILY.xattr.{key}": value.decode("latin-1") for key, value in (xattrs or {}).items()}
        self.tar.addfile(info, io.BytesIO(data))
        self.names.add(name)
        return self

    def folder(self, name, mode=0o755):
        return self.add(name, tarfile.DIRTYPE, mode=mode)

    def file(self, name, text, mode=0o644, **more):
        return self.add(name, data=text.encode() if isinstance(text, str) else text, mode=mode, **more)

    def package(self, deb, only=None):
        """Unpacks a Debian package into the layer."""
        data = subprocess.run(["dpkg-deb", "--fsys-tarfile", deb], check=True, capture_output=True).stdout
        with tarfile.open(fileobj=io.BytesIO(data)) as package:
            for info in package:
                wanted = only is None or re.match(only, info.name) or info.isdir()
                name = info.name.removeprefix("./").rstrip("/")
                if not name or not wanted or re.match(NEVER, info.name) or name in self.names:
                    continue
                info.name, info.mtime, info.uname, info.gname = name, TIME, "", ""
                if info.islnk():
                    info.linkname = info.linkname.removeprefix("./")
                self.tar.addfile(info, package.extractfile(info) if info.isreg() else None)
                self.names.add(name)
        return self

    def done(self, packing):
        """The packed bytes, the digest of the unpacked ones, the packing."""
        self.tar.close()
        raw = self.bytes.getvalue()
        if packing == "zstd":
            packed = subprocess.run(["zstd", "-q", "-3", "-c"], input=raw, check=True, capture_output=True).stdout
        elif packing == "gzip":
            packed = gzip.compress(raw, 6, mtime=0)
        else:
            packed = raw
        return packed, digest(raw), packing


def digest(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


class Registry:
    """The push side of the OCI distribution API."""

    def __init__(self, address):
        self.connection = http.client.HTTPConnection(address, timeout=60)

    def ask(self, method, path, body=None, kind=None):
        headers = {"Content-Type": kind} if kind else {}
        self.connection.request(method, path, body, headers)
        answer = self.connection.getresponse()
        text = answer.read()
        return answer, text

    def blob(self, repository, data):
        name = digest(data)
        answer, _ = self.ask("HEAD", f"/v2/{repository}/blobs/{name}")
        if answer.status == 200:
            return name
        answer, text = self.ask("POST", f"/v2/{repository}/blobs/uploads/")
        if answer.status != 202:
            sys.exit(f"images: the registry refuses an upload: {answer.status} {text[:200]!r}")
        place = re.sub(r"^https?://[^/]+", "", answer.headers["Location"])
        joint = "&" if "?" in place else "?"
        answer, text = self.ask("PUT", f"{place}{joint}digest={name}", data, "application/octet-stream")
        if answer.status != 201:
            sys.exit(f"images: the registry refuses a blob: {answer.status} {text[:200]!r}")
        return name

    def manifest(self, repository, reference, document, kind):
        body = json.dumps(document, separators=(",", ":")).encode()
        name = digest(body)
        answer, text = self.ask("PUT", f"/v2/{repository}/manifests/{reference or name}", body, kind)
        if answer.status != 201:
            sys.exit(f"images: the registry refuses a manifest: {answer.status} {text[:200]!r}")
        return {"mediaType": kind, "digest": name, "size": len(body)}


def layer_type(style, packing):
    if style == "docker":
        return DOCKER + "image.rootfs.diff.tar" + (f".{packing}" if packing else "")
    return OCI + "layer.v1.tar" + (f"+{packing}" if packing else "")


def push_one(registry, repository, reference, layers, config, style, architecture="amd64"):
    """One platform's image; its descriptor."""
    document = {
        "created": "2023-11-14T22:13:20Z",
        "architecture": architecture,
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [diff for _, diff, _ in layers]},
        "history": [{"created_by": f"layer {number}"} for number in range(len(layers))],
    }
    body = json.dumps(document, separators=(",", ":")).encode()
    kinds = {
        "docker": (DOCKER + "container.image.v1+json", DOCKER + "distribution.manifest.v2+json"),
        "oci": (OCI + "config.v1+json", OCI + "manifest.v1+json"),
    }[style]
    manifest = {
        "schemaVersion": 2,
        "mediaType": kinds[1],
        "config": {"mediaType": kinds[0], "digest": registry.blob(repository, body), "size": len(body)},
        "layers": [
            {"mediaType": layer_type(style, packing), "digest": registry.blob(repository, data), "size": len(data)}
            for data, _, packing in layers
        ],
    }
    return registry.manifest(repository, reference, manifest, kinds[1])


def push(registry, name, layers, config=None, style="docker", index=False):
    repository, tag = name.rsplit(":", 1)
    full = {"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"], "Cmd": ["sh"]}
    full.update(config or {})
    if not index:
        push_one(registry, repository, tag, layers, full, style)
        return
    other = [Layer().file("arm64", "not for this machine\n").done("gzip")]
    entries = []
    for architecture, content in [("arm64", other), ("amd64", layers)]:
        entry = push_one(registry, repository, None, content, full, style, architecture)
        entry["platform"] = {"os": "linux", "architecture": architecture}
        entries.append(entry)
    kind = OCI + "index.v1+json" if style == "oci" else DOCKER + "distribution.manifest.list.v2+json"
    registry.manifest(repository, tag, {"schemaVersion": 2, "mediaType": kind, "manifests": entries}, kind)


def download(cache):
    """The packages' files, by package."""
    folder = cache / "packages"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [package for group in PACKAGES.values() for package in group]
    missing = [package for package in wanted if not found(folder, package)]
    if missing:
        say(f"fetching {len(missing)} Debian packages")
        fetch = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download"]
        known = [next((name for name in package.split("|") if is_known(name)), None) for package in missing]
        if None in known or subprocess.run([*fetch, *known], cwd=folder, check=False).returncode != 0:
            subprocess.run(["apt-get", "-qq", "update"], check=True)
            known = [next(filter(is_known, package.split("|")), package) for package in missing]
            subprocess.run([*fetch, *known], cwd=folder, check=True)
    return {package: found(folder, package) for package in wanted}


def found(folder, package):
    files = [file for name in package.split("|") for file in sorted(folder.glob(f"{name}_*.deb"))]
    return files[-1] if files else None


def is_known(package):
    shown = subprocess.run(["apt-cache", "show", package], capture_output=True, check=False)
    return shown.returncode == 0 and bool(shown.stdout)


def applets(deb, cache):
    """What the package's busybox can do; it is asked itself."""
    subprocess.run(["dpkg-deb", "-x", deb, cache / "busybox"], check=True)
    program = next((cache / "busybox").glob("**/bin/busybox"))
    listed = subprocess.run([program, "--list"], check=True, capture_output=True, text=True).stdout.split()
    return [applet for applet in listed if applet not in ("busybox", "linuxrc")]


def base_layer(debs, cache):
    layer = Layer()
    for name in ["bin", "etc", "home", "lib", "lib64", "mnt", "proc", "sys", "dev", "usr", "usr/bin", "usr/sbin",
                 "var", "var/log", "var/run", "sbin", "run"]:
        layer.folder(name)
    layer.folder("tmp", 0o1777).folder("var/tmp", 0o1777).folder("root", 0o700)
    layer.file("etc/passwd", PASSWD).file("etc/group", GROUP)
    for package in PACKAGES["base"]:
        layer.package(debs[package], ONLY.get(package))
    for applet in applets(debs["busybox"], cache):
        # Hard links, as in upstream's image: a path can be hidden without hiding the others.
        if f"bin/{applet}" not in layer.names:
            layer.add(f"bin/{applet}", tarfile.LNKTYPE, link="bin/busybox", mode=0o755)
    return layer.done("gzip")


def tools_layer(debs, packing):
    layer = Layer()
    for package in PACKAGES["tools"]:
        layer.package(debs[package], ONLY.get(package))
    layer.file("etc/removed-later", "by the next layer\n").folder("opt").folder("opt/emptied-later")
    layer.file("opt/emptied-later/old", "old\n")
    layer.file("usr/bin/with-capability", "#!/bin/sh\n", 0o755, xattrs={"security.capability": CAP_NET_RAW})
    return layer.done(packing)


def last_layer(name):
    layer = Layer().file("etc/.wh.removed-later", "").file("opt/emptied-later/.wh..wh..opq", "")
    return layer.file("opt/emptied-later/new", "new\n").file("etc/image-name", name + "\n").done("gzip")


def nginx_layers(debs, port, packing):
    layer = Layer()
    for package in PACKAGES["nginx"]:
        layer.package(debs[package])
    config = Layer().file("etc/nginx/nginx.conf", NGINX % (port, port)).file("entrypoint.sh", ENTRYPOINT, 0o755)
    config.file("etc/nginx/sites-enabled/.wh.default", "").file("etc/nginx/snippets/.wh..wh..opq", "")
    config.file("usr/share/nginx/html/index.html", "served by nginx in a pod\n")
    return [layer.done(packing), config.done("gzip")]


def static_program(cache, name, source):
    file = cache / f"{name}.c"
    file.write_text(source)
    subprocess.run(["gcc", "-static", "-O1", "-s", "-o", cache / name, file], check=True)
    return (cache / name).read_bytes()


def main():
    cache = pathlib.Path(sys.argv[1]).resolve()
    debs = download(cache)
    if len(sys.argv) < 3:
        return
    registry = Registry(sys.argv[2])
    stamp_text = digest(pathlib.Path(__file__).read_bytes() + "".join(sorted(map(str, debs.values()))).encode())
    stamp = cache / "pushed"
    if stamp.is_file() and stamp.read_text() == stamp_text and registry.ask("GET", "/v2/library/demo/tags/list")[0].status == 200:
        return
    say("building layers")
    base = base_layer(debs, cache)
    # Docker's types have no zstd.
    tools = {"docker": tools_layer(debs, "gzip"), "oci": tools_layer(debs, "zstd")}

    def busybox(name, config=None, content=None, style="docker", index=False):
        push(registry, name, [base, tools[style], last_layer(content or name)], config, style, index)

    say("pushing")
    e2e, staging = "e2e-test-images/", "k8s-staging-cri-tools/"
    busybox(e2e + "busybox:1.29-2", index=True)
    busybox("library/demo:latest", style="oci", index=True)
    web = {"Entrypoint": ["/entrypoint.sh"], "Cmd": ["nginx", "-g", "daemon off;"],
           "ExposedPorts": {"80/tcp": {}}, "StopSignal": "SIGQUIT"}
    served = [base, tools["oci"], *nginx_layers(debs, 80, "zstd")]
    push(registry, e2e + "nginx:1.14-2", served, web, style="oci", index=True)
    push(registry, "library/nginx:latest", [*served, last_layer("nginx")], web, style="oci", index=True)
    push(registry, staging + "hostnet-nginx-amd64:latest", [base, *nginx_layers(debs, 12003, "gzip")], web)
    httpd = "mkdir -p /www; echo It works > /www/index.html; echo httpd is listening; exec httpd -f -p 80 -h /www"
    busybox(e2e + "httpd:2.4.39-4", {"Cmd": ["sh", "-c", httpd]})
    nnp = Layer().file("nnp", static_program(cache, "nnp", NO_NEW_PRIVS), 0o4755).done("gzip")
    push(registry, e2e + "nonewprivs:1.3", [base, nnp], {"Cmd": ["/nnp"]})
    busybox(staging + "test-image-latest:latest")
    busybox(staging + "test-image-tag:test", {"Cmd": ["sleep", "1000"]})
    busybox(staging + "test-image-tag:all", style="oci")
    for number in "123":
        busybox(f"{staging}test-image-{number}:latest", index=number == "2")
        busybox(f"{staging}test-image-tags:{number}", content="tags")
    for name, user in [("uid", "1002"), ("username", "www-data"), ("uid-group", "1003:1004"),
                       ("username-group", "www-data:1004")]:
        busybox(f"{staging}test-image-user-{name}:latest", {"User": user})
    busybox(staging + "test-image-predefined-group:latest", {"User": "1000", "Cmd": ["sleep", "infinity"]})
    # Pulled by critest under two names, and another one for runtimes that need a sandbox image.
    for version in ["3.9", "3.6"]:
        pause = Layer().file("pause", static_program(cache, "pause", PAUSE), 0o755).file("version", version + "\n")
        push(registry, f"pause:{version}", [pause.done("gzip")], {"Entrypoint": ["/pause"], "Cmd": None})
    for tag in ["1.35.0-glibc", "1-uclibc", "1", "1-glibc", "1-musl"]:
        busybox(f"docker/library/busybox:{tag}")
    stamp.write_text(stamp_text)
    say("done")


if __name__ == "__main__":
    main()
