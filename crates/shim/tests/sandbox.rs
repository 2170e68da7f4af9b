//! A whole sandbox without a server: a template, a clone of it, a container in the clone. Needs
//! `make guest` and root.
#![allow(clippy::unwrap_used)]

mod common;
mod guest;

use a3s_box_api::{agent::v1 as agent, shim::v1 as shim};
use a3s_box_types::{
    ContainerId,
    shim::{Start, fd},
};
use common::{Sandbox, layer, request};
use guest::{boundary, guest, tap, template};
use serde_json::json;
use std::{fs, os::fd::OwnedFd, path::Path};
use tokio_stream::StreamExt;
use tonic::Code;

async fn start(dir: &Path, start: Start, ram: Option<OwnedFd>) -> Sandbox {
    let mut sandbox = unconfigured(dir, start, ram).await;
    let network = Some(agent::Network::default());
    sandbox.configure(agent::ConfigureSandboxRequest { network, ..request() }).await;
    sandbox
}

async fn unconfigured(dir: &Path, start: Start, ram: Option<OwnedFd>) -> Sandbox {
    Sandbox::unconfigured(dir, boundary(dir, start), |spawn| {
        spawn.fd(tap(), fd::TAP);
        if let Some(ram) = ram {
            spawn.fd(ram, fd::TEMPLATE_RAM);
        }
    })
    .await
}

async fn lives_a_whole_life(sandbox: &mut Sandbox, dir: &Path) {
    let blob = layer(dir);
    let volume = dir.join("volume");
    fs::create_dir(&volume).unwrap();
    fs::write(volume.join("from-host"), "written by the host").unwrap();
    let log = dir.join("0.log");
    let id = ContainerId::from_random([1; 32]);
    let script = "cat /data/from-host; echo; echo oops >&2; uname -r > /data/kernel; exit 7";
    sandbox.create(&id, &blob, script, &log, &volume).await;
    sandbox.run(&id).await;
    let exit = sandbox.exit_of(&id).await;
    assert_eq!((exit.code, exit.signal), (7, 0));
    let log = fs::read_to_string(log).unwrap();
    assert!(log.contains("stdout F written by the host\n"), "{log}");
    assert!(log.contains("stderr F oops\n"), "{log}");
    let kernel = fs::read_to_string(volume.join("kernel")).unwrap();
    let host = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_ne!(kernel, host, "the container ran on the host's kernel");
    let record = sandbox.folder.join(format!("containers/{id}.json"));
    assert!(fs::read_to_string(record).unwrap().contains("\"exited\""));

    let sleeper = ContainerId::from_random([2; 32]);
    sandbox.create(&sleeper, &blob, "sleep 1000", &dir.join("1.log"), &volume).await;
    sandbox.run(&sleeper).await;
    let answer = sandbox.exec(&sleeper, &["sh", "-c", "echo hi; id -u; exit 3"], 0).await.unwrap();
    assert_eq!((answer.stdout.as_ref(), answer.exit_code), (b"hi\n0\n".as_slice(), 3));
    let late = sandbox.exec(&sleeper, &["sleep", "1000"], 300).await.unwrap_err();
    assert_eq!(late.code(), Code::DeadlineExceeded);
    let signal =
        shim::SignalContainerRequest { container_id: sleeper.to_string(), signal: 9, all: false };
    sandbox.client.signal_container(signal).await.unwrap();
    assert_eq!(sandbox.exit_of(&sleeper).await.code, 137);
    for id in [&id, &sleeper, &sleeper] {
        let request = shim::RemoveContainerRequest { container_id: id.to_string() };
        sandbox.client.remove_container(request).await.unwrap();
    }
    let state = sandbox.client.state(shim::StateRequest {}).await.unwrap().into_inner();
    assert!(state.containers.is_empty());
    eprintln!("stages: {:?}", state.stages_ms);
}

#[tokio::test]
async fn a_clone_runs_containers_from_creation_to_removal() {
    let dir = tempfile::tempdir().unwrap();
    let template = template(dir.path());
    let start = Start::Clone { template: template.dir().to_owned() };
    let mut sandbox = self::start(dir.path(), start, Some(template.ram().unwrap())).await;
    lives_a_whole_life(&mut sandbox, dir.path()).await;
    sandbox.shutdown().await;
}

#[tokio::test]
async fn a_booted_guest_runs_containers_as_well() {
    let dir = tempfile::tempdir().unwrap();
    let start = Start::Boot { kernel: guest("vmlinuz"), initramfs: guest("initramfs") };
    let mut sandbox = self::start(dir.path(), start, None).await;
    lives_a_whole_life(&mut sandbox, dir.path()).await;
    sandbox.shutdown().await;
}

#[tokio::test]
async fn a_dead_machine_is_an_exit_of_its_containers() {
    let dir = tempfile::tempdir().unwrap();
    let template = template(dir.path());
    let start = Start::Clone { template: template.dir().to_owned() };
    let mut sandbox = self::start(dir.path(), start, Some(template.ram().unwrap())).await;
    let blob = layer(dir.path());
    let id = ContainerId::from_random([1; 32]);
    sandbox.create(&id, &blob, "sleep 1000", &dir.path().join("0.log"), dir.path()).await;
    sandbox.run(&id).await;
    let state = sandbox.client.state(shim::StateRequest {}).await.unwrap().into_inner();
    a3s_box_sys::pidfd::Identity::of(state.pid).unwrap().kill().unwrap();
    assert_eq!(sandbox.exit_of(&id).await.code, 137);
    let state = sandbox.client.state(shim::StateRequest {}).await.unwrap().into_inner();
    assert!(state.end_reason.contains("signal 9"), "{}", state.end_reason);
    let refused = sandbox.exec(&id, &["true"], 0).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    sandbox.shutdown().await;
}

/// A pod whose root is user 1000 of its guest.
const IDS: agent::UserNamespace = agent::UserNamespace { uid: 1000, gid: 2000, length: 100_000 };

fn in_user_namespace(
    id: &ContainerId,
    blob: &Path,
    capabilities: &[&str],
    mounts: &[serde_json::Value],
) -> agent::CreateContainerRequest {
    let mapping = |first: u32| json!([{ "containerID": 0, "hostID": first, "size": IDS.length }]);
    let mut all = mounts.to_vec();
    for mount in &mut all {
        if mount["mapped"] == true {
            mount["uidMappings"] = mapping(IDS.uid);
            mount["gidMappings"] = mapping(IDS.gid);
        }
        mount.as_object_mut().unwrap().remove("mapped");
    }
    let spec = json!({
        "ociVersion": "1.1.0",
        "root": { "path": "rootfs" },
        "process": {
            "args": ["sleep", "1000"], "cwd": "/", "env": ["PATH=/bin"],
            "user": { "uid": 0, "gid": 0 }, "noNewPrivileges": false,
            "capabilities": { "bounding": capabilities, "permitted": capabilities,
                              "effective": capabilities },
        },
        "mounts": all,
        "linux": {
            "namespaces": [{ "type": "pid" }, { "type": "mount" }, { "type": "cgroup" },
                           { "type": "user" }],
            "uidMappings": mapping(IDS.uid),
            "gidMappings": mapping(IDS.gid),
            "maskedPaths": ["/proc/kcore", "/proc/acpi", "/sys/firmware"],
            "readonlyPaths": ["/proc/sys"],
        },
    });
    agent::CreateContainerRequest {
        container_id: id.to_string(),
        oci_spec: serde_json::to_vec(&spec).unwrap().into(),
        layers: vec![blob.to_str().unwrap().to_owned()],
        user: Some(agent::User::default()),
        ..Default::default()
    }
}

const CAPABILITIES: [&str; 9] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_SETUID",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_KILL",
];

async fn says(sandbox: &mut Sandbox, id: &ContainerId, script: &str) -> String {
    let answer = sandbox.exec(id, &["sh", "-c", script], 0).await.unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    format!("{}{}", text(&answer.stdout), text(&answer.stderr)).trim_end().to_owned()
}

#[tokio::test]
async fn a_user_namespace_owns_what_its_pod_has() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let template = template(dir);
    let start = Start::Clone { template: template.dir().to_owned() };
    let interface = agent::Interface {
        name: "eth0".into(),
        addresses: vec!["10.1.2.3/24".into()],
        ..Default::default()
    };
    let configured = agent::ConfigureSandboxRequest {
        user_namespace: Some(IDS),
        shared_pid_namespace: true,
        sysctls: [("kernel.shm_rmid_forced", "1"), ("net.ipv4.ip_unprivileged_port_start", "1000")]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into(),
        network: Some(agent::Network { interfaces: vec![interface], ..Default::default() }),
        ..request()
    };
    let ram = template.ram().unwrap();
    let mut sandbox = unconfigured(dir, start, Some(ram)).await;
    sandbox.configure(configured).await;
    let blob = layer(dir);
    let volume = dir.join("volume");
    fs::create_dir(&volume).unwrap();
    fs::write(volume.join("roots"), "").unwrap();
    std::os::unix::fs::chown(volume.join("roots"), Some(33), Some(34)).unwrap();
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    fs::set_permissions(&volume, open).unwrap();

    let id = ContainerId::from_random([1; 32]);
    let bind = |destination: &str, mapped: bool| {
        json!({ "destination": destination, "type": "bind", "source": volume, "mapped": mapped,
                "options": ["rbind", "rw"] })
    };
    let mounts = [bind("/mapped", true), bind("/plain", false)];
    let mut container = in_user_namespace(&id, &blob, &CAPABILITIES, &mounts);
    container.user =
        Some(agent::User { supplemental_groups: vec![77, 88], ..agent::User::default() });
    sandbox.create_as(container, &dir.join("0.log")).await;
    sandbox.run(&id).await;
    let mut failures = Vec::new();
    for (script, expected) in [
        (
            "cat /proc/self/uid_map /proc/1/gid_map",
            "         0       1000     100000\n         0       2000     100000",
        ),
        ("id -u; id -G; hostname", "0\n0 77 88\npod-1"),
        (
            "stat -c '%u %g' / /bin/sh /dev /dev/null /dev/shm /etc/hosts /proc/1 /sys",
            "0 0\n0 0\n0 0\n0 0\n0 0\n0 0\n0 0\n65534 65534",
        ),
        // Its own layer, and volumes with and without a mapping.
        ("touch /f && chown 5:6 /f && stat -c '%u %g' /f", "5 6"),
        ("stat -c '%u %g' /mapped/roots /plain/roots", "33 34\n65534 65534"),
        ("touch /mapped/m /plain/p && chown 7:8 /mapped/m && stat -c '%u %g' /mapped/m", "7 8"),
        // Devices.
        (
            "echo x > /dev/null; ls /dev/pts; echo to >> /dev/stdout; cat /dev/full 2>&1 | test -z ''",
            "ptmx\nto",
        ),
        ("touch /dev/shm/x && stat -c '%u' /dev/shm/x", "0"),
        // Its network, with the powers it has there.
        (
            "ip -o -4 addr show eth0 | grep -o '10.1.2.3/24'; ls /sys/class/net",
            "10.1.2.3/24\neth0\nlo",
        ),
        ("ping -c 1 127.0.0.1 | grep -o '1 packets received'", "1 packets received"),
        ("(echo low | nc -l -p 80 &); sleep 1; nc 127.0.0.1 80 </dev/null", "low"),
        (
            "cat /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/ip_unprivileged_port_start",
            "1\n1000",
        ),
        // What it may not.
        ("mount -t tmpfs x /tmp 2>&1 | grep -o denied", "denied"),
        (
            "echo 0 > /proc/sys/kernel/shm_rmid_forced",
            "sh: can't create /proc/sys/kernel/shm_rmid_forced: Read-only file system",
        ),
        ("cat /proc/kcore; ls /sys/firmware", ""),
        ("cat /proc/self/cgroup", "0::/exec-"),
    ] {
        let said = says(&mut sandbox, &id, script).await;
        let said =
            if expected.ends_with('-') { said.trim_end_matches(char::is_numeric) } else { &said };
        if said != expected {
            failures.push(format!("{script}\n    said {said:?}\n  wanted {expected:?}"));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    let owner = |file: &str| {
        let data = fs::metadata(volume.join(file)).unwrap();
        (std::os::unix::fs::MetadataExt::uid(&data), std::os::unix::fs::MetadataExt::gid(&data))
    };
    assert_eq!(owner("m"), (7, 8), "mapped: the ids of the container");
    assert_eq!(owner("p"), (1000, 2000), "not mapped: the ids of the guest");

    // What reaches into the pod's network namespace, and a terminal.
    let serve = "(echo forwarded | nc -l -p 81 &) </dev/null >/dev/null 2>&1; sleep 1";
    says(&mut sandbox, &id, serve).await;
    let input = agent::PortInput { port: 81, ..Default::default() };
    let mut outputs =
        sandbox.client.port_forward(tokio_stream::iter([input])).await.unwrap().into_inner();
    assert_eq!(outputs.next().await.unwrap().unwrap().data.as_ref(), b"forwarded\n");
    let stats = sandbox.client.stats(shim::StatsRequest::default()).await.unwrap().into_inner();
    assert_eq!(stats.guest.unwrap().interfaces[0].name, "eth0");
    let args = ["sh", "-c", "tty; stat -c '%u %g' $(tty)"].map(str::to_owned).to_vec();
    let start = agent::ExecStart {
        container_id: id.to_string(),
        args,
        tty: true,
        ..agent::ExecStart::default()
    };
    let input = agent::ExecInput { kind: Some(agent::exec_input::Kind::Start(start)) };
    // The call ends with its input.
    let inputs = tokio_stream::iter([input]).chain(tokio_stream::pending());
    let mut outputs = sandbox.client.exec(inputs).await.unwrap().into_inner();
    let mut text = Vec::new();
    while let Some(output) = outputs.next().await {
        if let Some(agent::exec_output::Kind::Stdout(bytes)) = output.unwrap().kind {
            text.extend_from_slice(&bytes);
        }
    }
    assert_eq!(String::from_utf8_lossy(&text), "/dev/pts/0\r\n0 5\r\n");

    // What is not the sandbox's, or not there.
    let refused = ContainerId::from_random([4; 32]);
    let mut container = in_user_namespace(&refused, &blob, &CAPABILITIES, &[]);
    container.user = Some(agent::User { uid: Some(IDS.length), ..agent::User::default() });
    let why = sandbox.refusal(container).await;
    assert!(why.contains("100000 is outside the pod's user namespace"), "{why}");
    let mut container = in_user_namespace(&refused, &blob, &CAPABILITIES, &[]);
    let spec = String::from_utf8(container.oci_spec.to_vec()).unwrap();
    container.oci_spec = spec.replace("\"hostID\":1000", "\"hostID\":1001").into_bytes().into();
    let why = sandbox.refusal(container).await;
    assert!(why.contains("its user namespace is not the sandbox's"), "{why}");

    // Another user, whose only power is that of a file; in the first container's PID namespace.
    let other = ContainerId::from_random([2; 32]);
    let mut container = in_user_namespace(&other, &blob, &CAPABILITIES, &[]);
    container.user = Some(agent::User { uid: Some(33), gid: Some(33), ..agent::User::default() });
    (container.pid_mode, container.pid_target) =
        (agent::PidMode::Target.into(), id.as_str().to_owned());
    sandbox.create_as(container, &dir.join("1.log")).await;
    sandbox.run(&other).await;
    let powers = "grep CapEff /proc/self/status; /capable/cat /proc/self/status | grep CapEff";
    assert_eq!(
        says(&mut sandbox, &other, powers).await,
        "CapEff:\t0000000000000000\nCapEff:\t0000000000002000"
    );
    let script = "id -u; cat /proc/1/comm; echo x >> /dev/stdout; kill -9 1";
    assert_eq!(
        says(&mut sandbox, &other, script).await,
        "33\nsleep\nx\nsh: can't kill pid 1: Operation not permitted"
    );

    // An administrator of the namespace, in the pod's PID namespace.
    let admin = ContainerId::from_random([3; 32]);
    let mut capabilities = CAPABILITIES.to_vec();
    capabilities.extend(["CAP_SYS_ADMIN", "CAP_NET_ADMIN", "CAP_MKNOD"]);
    let sys = json!({ "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
                      "options": ["rw"] });
    let mut container = in_user_namespace(&admin, &blob, &capabilities, &[sys]);
    container.pid_mode = agent::PidMode::Pod.into();
    sandbox.create_as(container, &dir.join("2.log")).await;
    sandbox.run(&admin).await;
    for (script, expected) in [
        ("mount -t tmpfs x /tmp && touch /tmp/y && umount /tmp", ""),
        ("hostname changed && hostname", "changed"),
        ("ip link add dummy0 type bridge && ls /sys/class/net", "dummy0\neth0\nlo"),
        ("mkdir /sys/fs/cgroup/below && stat -c %u /sys/fs/cgroup/below/cgroup.procs", "0"),
        ("mknod /tmp/disk b 254 0", "mknod: /tmp/disk: Operation not permitted"),
        ("cat /proc/1/comm", "pause"),
        // Another user namespace's.
        (
            "echo 1 > /proc/sys/kernel/printk",
            "sh: can't create /proc/sys/kernel/printk: Read-only file system",
        ),
    ] {
        assert_eq!(says(&mut sandbox, &admin, script).await, expected, "{script}");
    }
    sandbox.shutdown().await;
}
