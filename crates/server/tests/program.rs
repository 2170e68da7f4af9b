//! The server's program: its command line, its life, and what it answers on its socket. Needs root.

#![allow(clippy::unwrap_used)]

use a3s_box_api::cri::{
    self, image_service_client::ImageServiceClient, runtime_service_client::RuntimeServiceClient,
};
use hyper_util::rt::TokioIo;
use std::{
    fs,
    os::unix::{fs::PermissionsExt, net::UnixDatagram, process::ExitStatusExt},
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
    time::Duration,
};
use tonic::{
    Code,
    transport::{Channel, Endpoint},
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_a3s-box-cri");

fn run(args: &[&str]) -> Output {
    Command::new(PROGRAM).args(args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A node in a folder, without a guest and with a CNI network whose plugin does nothing.
struct Node(tempfile::TempDir);

impl Node {
    fn new() -> Self {
        let node = Self(tempfile::tempdir().unwrap());
        let folder = node.0.path().display();
        let config = format!(
            "socket = '{folder}/cri.sock'\nroot = '{folder}/root'\nstate = '{folder}/state'\n\
             [network]\nconf_dir = '{folder}/net.d'\nbin_dirs = ['{folder}/bin']\n\
             [vm]\naccel = 'tcg'\nspares = 0\nkernel = '{folder}/no-kernel'\n[handlers.gold]\n"
        );
        fs::write(node.path("config.toml"), config).unwrap();
        fs::create_dir(node.path("net.d")).unwrap();
        fs::create_dir(node.path("bin")).unwrap();
        fs::write(node.path("bin/nothing"), "#!/bin/sh\n").unwrap();
        fs::set_permissions(node.path("bin/nothing"), fs::Permissions::from_mode(0o755)).unwrap();
        node
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn network(&self, capabilities: &str) {
        let plugin = format!(r#"{{"type": "nothing", "capabilities": {{{capabilities}}}}}"#);
        let list = format!(r#"{{"cniVersion": "1.0.0", "name": "pods", "plugins": [{plugin}]}}"#);
        fs::write(self.path("net.d/10.conflist"), list).unwrap();
    }

    fn command(&self) -> Command {
        let mut command = Command::new(PROGRAM);
        command.arg("--config").arg(self.path("config.toml"));
        command
    }

    /// A server that has said that it is ready.
    fn serve(&self) -> Server {
        let socket = self.path("notify.sock");
        let notify = UnixDatagram::bind(&socket).unwrap();
        notify.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let child = self.command().env("NOTIFY_SOCKET", &socket).stderr(Stdio::null()).spawn();
        let server = Server(child.unwrap());
        let mut word = [0; 64];
        let length = notify.recv(&mut word).unwrap();
        assert_eq!(text(&word[..length]), "READY=1");
        fs::remove_file(socket).unwrap();
        server
    }

    /// Dials as Kubernetes' clients do since 1.31: with the authority `localhost`.
    async fn dial(&self) -> Channel {
        let socket = self.path("cri.sock");
        let connect = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        Endpoint::from_static("http://localhost").connect_with_connector(connect).await.unwrap()
    }

    async fn runtime(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(self.dial().await)
    }
}

struct Server(Child);

impl Server {
    fn signal(&self, signal: rustix::process::Signal) {
        let pid = i32::try_from(self.0.id()).unwrap();
        rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), signal)
            .unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn bad_usage_ends_with_64_and_help_does_not() {
    for args in [&["--what"][..], &["fly"], &["config"], &["config", "nothing"]] {
        assert_eq!(run(args).status.code(), Some(64), "{args:?}");
    }
    assert_eq!(run(&["--help"]).status.code(), Some(0));
    assert!(text(&run(&["version"]).stdout).starts_with("a3s-box-cri "));
}

#[test]
fn the_printed_defaults_are_a_good_configuration() {
    let node = Node::new();
    fs::write(node.path("config.toml"), run(&["config", "default"]).stdout).unwrap();
    let checked = node.command().args(["config", "check"]).output().unwrap();
    assert!(checked.status.success(), "{}", text(&checked.stderr));
}

#[test]
fn all_problems_of_a_configuration_are_told_and_nothing_is_served() {
    let node = Node::new();
    fs::write(node.path("config.toml"), "soket = '/x'\n[vm]\naccel = 'fast'\n").unwrap();
    for args in [&["config", "check"][..], &[]] {
        let output = node.command().args(args).output().unwrap();
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1));
        assert!(said.contains("line 1: soket: ") && said.contains("line 3: vm.accel: "), "{said}");
    }
    fs::remove_file(node.path("config.toml")).unwrap();
    let output = node.command().output().unwrap();
    assert!(text(&output.stderr).contains("No such file"), "{}", text(&output.stderr));
}

#[test]
fn check_tells_what_is_lacking_and_what_it_costs() {
    let node = Node::new();
    let output = node.command().arg("check").output().unwrap();
    let said = text(&output.stdout);
    assert_eq!(output.status.code(), Some(2), "{said}");
    let broken: Vec<_> = said.lines().filter(|line| line.starts_with("BROKEN")).collect();
    assert!(broken.iter().any(|line| line.contains("no-kernel: No such file")), "{said}");
    assert!(broken.iter().any(|line| line.contains("no CNI network configuration")), "{said}");
    assert_eq!(said.matches("-> no virtual machine can be started").count(), 1, "{said}");
}

#[tokio::test]
async fn a_server_without_a_guest_serves_and_says_what_is_missing() {
    let node = Node::new();
    let _server = node.serve();
    let mut runtime = node.runtime().await;
    let version = runtime.version(cri::VersionRequest::default()).await.unwrap().into_inner();
    assert_eq!((version.version.as_str(), version.runtime_api_version.as_str()), ("0.1.0", "v1"));
    assert_eq!(version.runtime_name, "a3s-box");

    let ask = cri::StatusRequest { verbose: true };
    let status = runtime.status(ask).await.unwrap().into_inner();
    let conditions = status.status.unwrap().conditions;
    assert_eq!((conditions[0].r#type.as_str(), conditions[0].status), ("RuntimeReady", false));
    assert!(conditions[0].message.contains("no-kernel"), "{:?}", conditions[0]);
    assert_eq!((conditions[1].r#type.as_str(), conditions[1].status), ("NetworkReady", false));
    assert!(conditions[1].message.contains("no CNI network configuration"), "{:?}", conditions[1]);
    let handlers: Vec<_> = status.runtime_handlers.iter().map(|handler| &handler.name).collect();
    assert_eq!(handlers, ["", "a3s-box", "gold"]);
    assert!(status.info["config"].contains("stateDir"));

    node.network("");
    let status = runtime.status(cri::StatusRequest::default()).await.unwrap().into_inner();
    assert!(status.status.unwrap().conditions[1].status);
    assert!(status.info.is_empty());
}

#[tokio::test]
async fn what_is_not_there_says_so_by_name_and_what_is_unknown_is_gone_already() {
    let node = Node::new();
    let _server = node.serve();
    let mut runtime = node.runtime().await;
    let request = cri::CheckpointContainerRequest::default();
    let refused = runtime.checkpoint_container(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unimplemented);
    assert!(refused.message().starts_with("CheckpointContainer "), "{refused}");
    let request = cri::CheckpointPodRequest::default();
    let refused = runtime.checkpoint_pod(request).await.unwrap_err();
    assert!(refused.message().starts_with("CheckpointPod "), "{refused}");

    let unknown = "0".repeat(64);
    let request = cri::StopPodSandboxRequest { pod_sandbox_id: unknown.clone() };
    runtime.stop_pod_sandbox(request).await.unwrap();
    let request = cri::RemoveContainerRequest { container_id: unknown.clone() };
    runtime.remove_container(request).await.unwrap();
    let request = cri::ContainerStatusRequest { container_id: unknown, verbose: false };
    assert_eq!(runtime.container_status(request).await.unwrap_err().code(), Code::NotFound);

    let mut images = ImageServiceClient::new(node.dial().await);
    let refused = images.image_status(cri::ImageStatusRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn pod_subnets_take_effect_or_are_refused() {
    let node = Node::new();
    let _server = node.serve();
    let mut runtime = node.runtime().await;
    let mut update = async |cidr: &str| {
        let network_config = Some(cri::NetworkConfig { pod_cidr: cidr.to_owned() });
        let runtime_config = Some(cri::RuntimeConfig { network_config });
        let request = cri::UpdateRuntimeConfigRequest { runtime_config };
        runtime.update_runtime_config(request).await.map_err(|refused| refused.code())
    };
    assert_eq!(update("10.0.0.0/24").await.unwrap_err(), Code::FailedPrecondition);
    node.network("");
    assert_eq!(update("10.0.0.0/24").await.unwrap_err(), Code::FailedPrecondition);
    update("").await.unwrap();
    node.network(r#""ipRanges": true"#);
    update("10.0.0.0/24,fd00::/64").await.unwrap();
    assert_eq!(update("10.0.0.0").await.unwrap_err(), Code::InvalidArgument);
    let kept = fs::read_to_string(node.path("root/cni/node/ip-ranges.json")).unwrap();
    assert!(kept.contains("fd00::/64"), "{kept}");
}

#[tokio::test]
async fn sigterm_ends_the_server_though_a_client_stays_connected() {
    let node = Node::new();
    let mut server = node.serve();
    let mut runtime = node.runtime().await;
    runtime.version(cri::VersionRequest::default()).await.unwrap();
    server.signal(rustix::process::Signal::TERM);
    let status =
        tokio::task::spawn_blocking(move || server.0.wait().map(|status| (status, server)));
    let (status, _server) = status.await.unwrap().unwrap();
    assert_eq!((status.code(), status.signal()), (Some(0), None));
    assert!(!node.path("cri.sock").exists());
}

#[test]
fn one_server_at_a_time_and_a_dead_ones_socket_is_replaced() {
    let node = Node::new();
    let first = node.serve();
    let second = node.command().output().unwrap();
    assert_eq!(second.status.code(), Some(1));
    assert!(text(&second.stderr).contains("another server runs"), "{}", text(&second.stderr));
    first.signal(rustix::process::Signal::KILL);
    drop(first);
    assert!(node.path("cri.sock").exists());
    node.serve();
}
