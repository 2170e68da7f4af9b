//! A whole sandbox without a server: a template, a clone of it, a container in the clone. Needs
//! `make guest` and root.
#![allow(clippy::unwrap_used)]

use a3s_box_api::{
    agent::v1 as agent,
    shim::v1::{self as shim, event, shim_client::ShimClient},
};
use a3s_box_sys::{namespace, spawn::Spawn, tap};
use a3s_box_types::{
    ContainerId, SandboxId,
    shim::{Accel, CONFIG_FILE, SOCKET_FILE, ShimConfig, Start, VmConfig, VmSize, fd},
};
use a3s_box_vmm::template::{Template, TemplateConfig};
use hyper_util::rt::TokioIo;
use serde_json::json;
use std::{
    fs,
    io::Read,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{Child, Command},
};
use tokio::net::UnixStream;
use tokio_stream::StreamExt;
use tonic::{
    Code,
    transport::{Channel, Endpoint},
};

const SHIM: &str = env!("CARGO_BIN_EXE_a3s-box-shim");
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

/// A layer with nothing but busybox and what it needs.
fn layer(dir: &Path) -> PathBuf {
    let root = dir.join("rootfs");
    for folder in ["bin", "etc", "tmp", "proc", "sys", "dev"] {
        fs::create_dir_all(root.join(folder)).unwrap();
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    for applet in ["sh", "echo", "cat", "sleep", "uname", "id"] {
        fs::hard_link(root.join("bin/busybox"), root.join("bin").join(applet)).unwrap();
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0::/:/bin/sh\n").unwrap();
    let blob = dir.join("layer.erofs");
    let made = Command::new("mkfs.erofs")
        .args(["--quiet", "-E", "noinline_data"])
        .arg(&blob)
        .arg(&root)
        .output();
    assert!(made.unwrap().status.success());
    blob
}

struct Sandbox {
    child: Child,
    folder: PathBuf,
    client: ShimClient<Channel>,
}

impl Sandbox {
    async fn start(dir: &Path, start: Start, ram: Option<OwnedFd>) -> Self {
        let id = SandboxId::from_random([7; 32]);
        let folder = dir.join("state");
        fs::create_dir_all(&folder).unwrap();
        let config = ShimConfig {
            version: 1,
            sandbox_id: id,
            disk: dir.join("disk.ext4"),
            disk_bytes: 1 << 30,
            vm: VmConfig {
                qemu: QEMU.into(),
                accel: Accel::Tcg,
                start,
                size: VmSize { vcpus: 1, memory_mb: 512 },
                uid: UID,
            },
        };
        fs::write(folder.join(CONFIG_FILE), serde_json::to_vec(&config).unwrap()).unwrap();
        let (mut ready, far) = std::io::pipe().unwrap();
        let mut spawn = Spawn::new(SHIM);
        spawn.arg(&folder).fd(far, fd::READY).fd(tap(), fd::TAP);
        if let Some(ram) = ram {
            spawn.fd(ram, fd::TEMPLATE_RAM);
        }
        let log = fs::File::create(folder.join("shim.log")).unwrap();
        spawn.output = Some(log.into());
        let child = spawn.start().unwrap();
        let mut said = String::new();
        ready.read_to_string(&mut said).unwrap();
        assert_eq!(said, "ready\n");
        let socket = folder.join(SOCKET_FILE);
        let connect = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let channel =
            Endpoint::from_static("http://localhost").connect_with_connector(connect).await;
        let mut sandbox = Self { child, folder, client: ShimClient::new(channel.unwrap()) };
        let request = agent::ConfigureSandboxRequest {
            sandbox_id: "07".repeat(32),
            hostname: "pod-1".to_owned(),
            network: Some(agent::Network::default()),
            dns: Some(agent::Dns::default()),
            ..Default::default()
        };
        let request = shim::ConfigureSandboxRequest { sandbox: Some(request) };
        if let Err(err) = sandbox.client.configure_sandbox(request).await {
            panic!("{err}; {}", sandbox.log());
        }
        sandbox
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.join("shim.log")).unwrap()
    }

    async fn create(
        &mut self,
        id: &ContainerId,
        blob: &Path,
        script: &str,
        log: &Path,
        volume: &Path,
    ) {
        let spec = json!({
            "ociVersion": "1.1.0",
            "root": { "path": "rootfs" },
            "process": { "args": ["/bin/sh", "-c", script], "cwd": "/", "env": ["PATH=/bin"],
                         "user": { "uid": 0, "gid": 0 } },
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc" },
                { "destination": "/data", "type": "bind", "source": volume, "options": ["rbind", "rw"] },
            ],
            "linux": { "namespaces": [{ "type": "pid" }, { "type": "mount" }, { "type": "cgroup" }] },
        });
        let container = agent::CreateContainerRequest {
            container_id: id.to_string(),
            oci_spec: serde_json::to_vec(&spec).unwrap().into(),
            layers: vec![blob.to_str().unwrap().to_owned()],
            user: Some(agent::User::default()),
            ..Default::default()
        };
        let request = shim::CreateContainerRequest {
            container: Some(container),
            log_path: log.to_str().unwrap().to_owned(),
            ..Default::default()
        };
        if let Err(err) = self.client.create_container(request).await {
            panic!("{err}; {}", self.log());
        }
    }

    async fn run(&mut self, id: &ContainerId) {
        let request = shim::StartContainerRequest { container_id: id.to_string() };
        self.client.start_container(request).await.unwrap();
    }

    async fn exit_of(&mut self, id: &ContainerId) -> agent::Exit {
        let mut events = self.client.events(shim::EventsRequest {}).await.unwrap().into_inner();
        while let Some(event) = events.next().await {
            if let Some(event::Kind::ContainerExited(state)) = event.unwrap().kind
                && state.container_id == id.as_str()
            {
                return state.exit.unwrap();
            }
        }
        panic!("no exit came");
    }

    async fn exec(
        &mut self,
        id: &ContainerId,
        args: &[&str],
        timeout_ms: u64,
    ) -> Result<shim::ExecSyncResponse, tonic::Status> {
        let request = shim::ExecSyncRequest {
            container_id: id.to_string(),
            args: args.iter().map(|&arg| arg.to_owned()).collect(),
            timeout_ms,
        };
        Ok(self.client.exec_sync(request).await?.into_inner())
    }

    async fn shutdown(mut self) {
        self.client.shutdown(shim::ShutdownRequest {}).await.unwrap();
        drop(self.client);
        // The client's connection lives on this thread, which must not block.
        let ended = tokio::task::spawn_blocking(move || self.child.wait()).await.unwrap();
        assert!(ended.unwrap().success());
    }
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
    let mut sandbox = Sandbox::start(dir.path(), start, Some(template.ram().unwrap())).await;
    lives_a_whole_life(&mut sandbox, dir.path()).await;
    sandbox.shutdown().await;
}

#[tokio::test]
async fn a_booted_guest_runs_containers_as_well() {
    let dir = tempfile::tempdir().unwrap();
    let start = Start::Boot { kernel: guest("vmlinuz"), initramfs: guest("initramfs") };
    let mut sandbox = Sandbox::start(dir.path(), start, None).await;
    lives_a_whole_life(&mut sandbox, dir.path()).await;
    sandbox.shutdown().await;
}

#[tokio::test]
async fn a_dead_machine_is_an_exit_of_its_containers() {
    let dir = tempfile::tempdir().unwrap();
    let template = template(dir.path());
    let start = Start::Clone { template: template.dir().to_owned() };
    let mut sandbox = Sandbox::start(dir.path(), start, Some(template.ram().unwrap())).await;
    let blob = layer(dir.path());
    let id = ContainerId::from_random([1; 32]);
    sandbox.create(&id, &blob, "sleep 1000", &dir.path().join("0.log"), dir.path()).await;
    sandbox.run(&id).await;
    let state = sandbox.client.state(shim::StateRequest {}).await.unwrap().into_inner();
    a3s_box_sys::pidfd::Identity::of(state.vmm_pid).unwrap().kill().unwrap();
    assert_eq!(sandbox.exit_of(&id).await.code, 137);
    let state = sandbox.client.state(shim::StateRequest {}).await.unwrap().into_inner();
    assert!(state.end_reason.contains("signal 9"), "{}", state.end_reason);
    let refused = sandbox.exec(&id, &["true"], 0).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    sandbox.shutdown().await;
}
