//! A whole sandbox without a server: a template, a clone of it, a container in the clone. Needs
//! `make guest` and root.
#![allow(clippy::unwrap_used)]

mod common;

use a3s_box_api::shim::v1 as shim;
use a3s_box_sys::{namespace, tap};
use a3s_box_types::{
    ContainerId,
    shim::{Accel, BoundaryConfig, MicrovmConfig, Start, VmConfig, VmSize, fd},
};
use a3s_box_vmm::template::{Template, TemplateConfig};
use common::{SHIM, Sandbox, layer};
use std::{
    fs,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::Command,
};
use tonic::Code;

const QEMU: &str = "/usr/bin/qemu-system-x86_64";
const UID: u32 = 64_124;

fn guest(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/guest").join(name);
    path.canonicalize().expect("`make guest` has been run")
}

/// A tap in a network namespace that only its descriptor keeps alive.
fn tap() -> OwnedFd {
    let make = || {
        namespace::unshare_network().unwrap();
        tap::create("tap0").unwrap()
    };
    std::thread::spawn(make).join().unwrap()
}

fn template(dir: &Path) -> Template {
    let config = TemplateConfig {
        qemu: QEMU.into(),
        accel: Accel::Tcg,
        kernel: guest("vmlinuz"),
        initramfs: guest("initramfs"),
        size: VmSize { vcpus: 1, memory_mb: 512 },
        uid: UID,
        disk_bytes: 1 << 30,
        dir: dir.join("template"),
    };
    let file = dir.join("template.json");
    fs::write(&file, serde_json::to_vec(&config).unwrap()).unwrap();
    let output = Command::new(SHIM).arg("template").arg(&file).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Template::open(&config.dir).unwrap()
}

async fn start(dir: &Path, start: Start, ram: Option<OwnedFd>) -> Sandbox {
    let boundary = BoundaryConfig::Microvm(MicrovmConfig {
        disk: dir.join("disk.ext4"),
        disk_bytes: 1 << 30,
        vm: VmConfig {
            qemu: QEMU.into(),
            accel: Accel::Tcg,
            start,
            size: VmSize { vcpus: 1, memory_mb: 512 },
            uid: UID,
        },
    });
    Sandbox::start(dir, boundary, |spawn| {
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
