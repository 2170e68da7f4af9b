//! A shim without a server, and a client of it. Needs root.
#![allow(dead_code, clippy::unwrap_used, missing_docs, unreachable_pub)]

use a3s_box_api::{
    agent::v1 as agent,
    shim::v1::{self as shim, event, shim_client::ShimClient},
};
use a3s_box_sys::spawn::Spawn;
use a3s_box_types::{
    ContainerId, SandboxId,
    shim::{BoundaryConfig, CONFIG_FILE, SOCKET_FILE, ShimConfig, fd},
};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
    process::{Child, Command},
};
use tokio::net::UnixStream;
use tokio_stream::StreamExt;
use tonic::transport::{Channel, Endpoint};

pub const SHIM: &str = env!("CARGO_BIN_EXE_a3s-box-shim");

/// A layer with nothing but busybox and what it needs.
pub fn layer(dir: &Path) -> PathBuf {
    let root = dir.join("rootfs");
    for folder in ["bin", "etc", "tmp", "proc", "sys", "dev"] {
        fs::create_dir_all(root.join(folder)).unwrap();
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    for applet in [
        "sh", "echo", "cat", "sleep", "uname", "id", "stat", "touch", "mount", "umount", "ip",
        "nc", "ping", "grep", "ls", "mkdir", "hostname", "tty", "chown", "test", "kill", "mknod",
        "dd", "cmp",
    ] {
        fs::hard_link(root.join("bin/busybox"), root.join("bin").join(applet)).unwrap();
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0::/:/bin/sh\n").unwrap();
    // A program with CAP_NET_RAW: version 2, in force at once.
    fs::create_dir(root.join("capable")).unwrap();
    fs::copy("/bin/busybox", root.join("capable/cat")).unwrap();
    let mut capability = [0; 20];
    capability[..8].copy_from_slice(&[1, 0, 0, 2, 0, 0x20, 0, 0]);
    let none = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(root.join("capable/cat"), "security.capability", &capability, none)
        .unwrap();
    let blob = dir.join("layer.erofs");
    let made = Command::new("mkfs.erofs")
        .args(["--quiet", "-E", "noinline_data"])
        .arg(&blob)
        .arg(&root)
        .output();
    assert!(made.unwrap().status.success());
    blob
}

/// A request without a network.
pub fn request() -> agent::ConfigureSandboxRequest {
    agent::ConfigureSandboxRequest {
        sandbox_id: "07".repeat(32),
        hostname: "pod-1".to_owned(),
        dns: Some(agent::Dns::default()),
        ..Default::default()
    }
}

/// A container's spec: it runs `script` and has `volume` at /data.
pub fn spec(script: &str, volume: &Path) -> Value {
    json!({
        "ociVersion": "1.1.0",
        "root": { "path": "rootfs" },
        "process": { "args": ["/bin/sh", "-c", script], "cwd": "/", "env": ["PATH=/bin"],
                     "user": { "uid": 0, "gid": 0 } },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/data", "type": "bind", "source": volume, "options": ["rbind", "rw"] },
        ],
        "linux": { "namespaces": [{ "type": "pid" }, { "type": "mount" }, { "type": "cgroup" }] },
    })
}

/// The order to make it from one layer.
pub fn order(id: &ContainerId, layer: &Path, spec: &Value) -> agent::CreateContainerRequest {
    agent::CreateContainerRequest {
        container_id: id.to_string(),
        oci_spec: serde_json::to_vec(spec).unwrap().into(),
        layers: vec![layer.to_str().unwrap().to_owned()],
        user: Some(agent::User::default()),
        ..Default::default()
    }
}

pub struct Sandbox {
    pub child: Child,
    pub folder: PathBuf,
    pub client: ShimClient<Channel>,
}

impl Sandbox {
    /// A configured one.
    pub async fn start(
        dir: &Path,
        boundary: BoundaryConfig,
        change: impl FnOnce(&mut Spawn),
    ) -> Self {
        let mut sandbox = Self::unconfigured(dir, boundary, change).await;
        let request = agent::ConfigureSandboxRequest {
            network: Some(agent::Network::default()),
            ..request()
        };
        sandbox.configure(request).await;
        sandbox
    }

    /// `change` adds what the shim inherits besides its ready pipe.
    pub async fn unconfigured(
        dir: &Path,
        boundary: BoundaryConfig,
        change: impl FnOnce(&mut Spawn),
    ) -> Self {
        let folder = dir.join("state");
        fs::create_dir_all(&folder).unwrap();
        let config =
            ShimConfig { version: 1, sandbox_id: SandboxId::from_random([7; 32]), boundary };
        fs::write(folder.join(CONFIG_FILE), serde_json::to_vec(&config).unwrap()).unwrap();
        let (mut ready, far) = std::io::pipe().unwrap();
        let mut spawn = Spawn::new(SHIM);
        spawn.arg(&folder).fd(far, fd::READY);
        change(&mut spawn);
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
        Self { child, folder, client: ShimClient::new(channel.unwrap()) }
    }

    pub async fn configure(&mut self, sandbox: agent::ConfigureSandboxRequest) {
        let request = shim::ConfigureSandboxRequest { sandbox: Some(sandbox) };
        if let Err(err) = self.client.configure_sandbox(request).await {
            panic!("{err}; {}", self.log());
        }
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.join("shim.log")).unwrap()
    }

    pub async fn create(
        &mut self,
        id: &ContainerId,
        blob: &Path,
        script: &str,
        log: &Path,
        volume: &Path,
    ) {
        self.create_with(id, blob, script, log, volume, agent::PidMode::Container).await;
    }

    pub async fn create_with(
        &mut self,
        id: &ContainerId,
        blob: &Path,
        script: &str,
        log: &Path,
        volume: &Path,
        pid_mode: agent::PidMode,
    ) {
        let container = order(id, blob, &spec(script, volume));
        self.create_as(
            agent::CreateContainerRequest { pid_mode: pid_mode.into(), ..container },
            log,
        )
        .await;
    }

    pub async fn create_as(&mut self, container: agent::CreateContainerRequest, log: &Path) {
        let request = shim::CreateContainerRequest {
            container: Some(container),
            log_path: log.to_str().unwrap().to_owned(),
            ..Default::default()
        };
        if let Err(err) = self.client.create_container(request).await {
            panic!("{err}; {}", self.log());
        }
    }

    pub async fn refusal(&mut self, container: agent::CreateContainerRequest) -> String {
        let request =
            shim::CreateContainerRequest { container: Some(container), ..Default::default() };
        self.client.create_container(request).await.unwrap_err().message().to_owned()
    }

    pub async fn run(&mut self, id: &ContainerId) {
        let request = shim::StartContainerRequest { container_id: id.to_string() };
        self.client.start_container(request).await.unwrap();
    }

    pub async fn exit_of(&mut self, id: &ContainerId) -> agent::Exit {
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

    pub async fn exec(
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

    pub async fn shutdown(mut self) {
        self.client.shutdown(shim::ShutdownRequest {}).await.unwrap();
        drop(self.client);
        // The client's connection lives on this thread, which must not block.
        let ended = tokio::task::spawn_blocking(move || self.child.wait()).await.unwrap();
        assert!(ended.unwrap().success());
    }
}
