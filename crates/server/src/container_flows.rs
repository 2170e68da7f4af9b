//! The container RPCs as a client sees them, against a fake host and a shim that answers on a socket.

use crate::{
    container_create::create_container,
    container_list::list_containers,
    container_log::reopen_container_log,
    container_start::{remove_container, start_container},
    container_stats::Rates,
    container_status::container_status,
    container_stop::stop_container,
    exec_sync::exec_sync,
    node::{ContainerImage, Images, Node},
    sandbox::{SandboxError, Sandboxes, fakes::FakeHost},
    sandbox_list::list_pod_sandbox,
    sandbox_run::run_pod_sandbox,
    sandbox_status::pod_sandbox_status,
    sandbox_stop::{remove_pod_sandbox, stop_pod_sandbox},
    status::{Failure, chain},
    vm_size::SizeRules,
};
use a3s_box_api::{agent::v1 as agent, cri};
use a3s_box_types::{SandboxId, shim::VmSize};
use std::{path::Path, sync::Arc, time::Duration};
use tonic::Code;

struct OneImage;

impl Images for OneImage {
    fn resolve(&self, name: &str) -> Option<ContainerImage> {
        let config = serde_json::json!({
            "architecture": "amd64", "os": "linux",
            "config": {"Entrypoint": ["/bin/top"], "User": "daemon", "StopSignal": "SIGINT"},
            "rootfs": {"type": "layers", "diff_ids": []},
        });
        (name == "busybox").then(|| ContainerImage {
            id: "sha256:1".into(),
            tags: vec!["docker.io/library/busybox:latest".into()],
            digests: vec!["docker.io/library/busybox@sha256:2".into()],
            config: serde_json::from_value(config).unwrap(),
            layers: vec!["/var/lib/a3s-box/image/layer".into()],
        })
    }
}

pub(crate) fn node(host: &Arc<FakeHost>) -> Arc<Node> {
    let size = VmSize { vcpus: 1, memory_mb: 512 };
    Arc::new(Node {
        sandboxes: Sandboxes::new(host.deps()),
        images: Box::new(OneImage),
        sizes: SizeRules { default: size, min_memory_mb: 128, max: size, guest_overhead_mb: 64 },
        handlers: ["", "a3s-box"]
            .map(|name| {
                let host_namespaces = crate::config::HostNamespaces::Refuse;
                (name.to_owned(), crate::config::Handler { host_namespaces })
            })
            .into(),
        root: "/root".into(),
        rates: Rates::default(),
    })
}

pub(crate) fn pod(folder: &Path) -> cri::PodSandboxConfig {
    cri::PodSandboxConfig {
        metadata: Some(cri::PodSandboxMetadata {
            name: "web".into(),
            uid: "u".into(),
            namespace: "default".into(),
            attempt: 0,
        }),
        log_directory: folder.join("logs").display().to_string(),
        labels: [("app".to_owned(), "web".to_owned())].into(),
        ..Default::default()
    }
}

pub(crate) async fn run(
    node: &Arc<Node>,
    config: cri::PodSandboxConfig,
) -> Result<String, SandboxError> {
    let request = cri::RunPodSandboxRequest { config: Some(config), ..Default::default() };
    Ok(run_pod_sandbox(node.clone(), request).await?.pod_sandbox_id)
}

pub(crate) fn container(name: &str) -> cri::ContainerConfig {
    cri::ContainerConfig {
        metadata: Some(cri::ContainerMetadata { name: name.into(), attempt: 0 }),
        image: Some(cri::ImageSpec { image: "busybox".into(), ..Default::default() }),
        log_path: format!("{name}/0.log"),
        ..Default::default()
    }
}

pub(crate) async fn create(
    node: &Arc<Node>,
    sandbox: &str,
    config: cri::ContainerConfig,
) -> Result<String, SandboxError> {
    let request = cri::CreateContainerRequest {
        pod_sandbox_id: sandbox.to_owned(),
        config: Some(config),
        sandbox_config: None,
    };
    Ok(create_container(node.clone(), request).await?.container_id)
}

pub(crate) async fn start(node: &Arc<Node>, id: &str) -> Result<(), SandboxError> {
    let request = cri::StartContainerRequest { container_id: id.to_owned() };
    start_container(node.clone(), request).await.map(drop)
}

pub(crate) async fn stop(node: &Arc<Node>, id: &str, timeout: i64) -> Result<(), SandboxError> {
    let request = cri::StopContainerRequest { container_id: id.to_owned(), timeout };
    stop_container(node.clone(), request).await.map(drop)
}

async fn status(node: &Arc<Node>, id: &str) -> Result<cri::ContainerStatus, SandboxError> {
    let request = cri::ContainerStatusRequest { container_id: id.to_owned(), verbose: true };
    let answer = container_status(node.clone(), request).await?;
    assert!(answer.info["info"].contains("ociVersion"));
    Ok(answer.status.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_lives_from_create_to_remove() {
    let host = FakeHost::new();
    let node = node(&host);
    let folder = host.folder.path();
    let sandbox = run(&node, pod(folder)).await.unwrap();
    let mut config = container("c");
    let missing = folder.join("made/by/us");
    config.mounts = vec![cri::Mount {
        container_path: "/data".into(),
        host_path: missing.display().to_string(),
        readonly: true,
        ..Default::default()
    }];
    let id = create(&node, &sandbox, config).await.unwrap();
    assert!(missing.is_dir(), "a missing source is made");
    assert!(folder.join("logs/c").is_dir());

    let shim = host.shim(&sandbox.parse::<SandboxId>().unwrap());
    let order = shim.orders.lock().unwrap()[0].clone();
    assert_eq!(order.log_path, folder.join("logs/c/0.log").display().to_string());
    let container = order.container.unwrap();
    assert_eq!(container.layers, ["/var/lib/a3s-box/image/layer"]);
    assert_eq!(container.user.as_ref().unwrap().user, "daemon");
    assert_eq!(container.pid_mode(), agent::PidMode::Pod);

    let told = status(&node, &id).await.unwrap();
    assert_eq!(told.state(), cri::ContainerState::ContainerCreated);
    assert_eq!(told.image_ref, "docker.io/library/busybox@sha256:2");
    assert_eq!(told.image.as_ref().unwrap().image, "docker.io/library/busybox:latest");
    assert_eq!(told.image_id, "sha256:1");
    assert_eq!(told.stop_signal(), cri::Signal::Sigint);
    assert!(told.mounts[0].readonly);

    start(&node, &id).await.unwrap();
    let told = status(&node, &id).await.unwrap();
    assert_eq!((told.state(), told.started_at), (cri::ContainerState::ContainerRunning, 50));
    assert_eq!(start(&node, &id).await.unwrap_err().code(), Code::FailedPrecondition);

    stop(&node, &id, 10).await.unwrap();
    let told = status(&node, &id).await.unwrap();
    assert_eq!(told.state(), cri::ContainerState::ContainerExited);
    assert_eq!((told.exit_code, told.reason.as_str()), (130, "Error"), "SIGINT from the image");
    stop(&node, &id, 10).await.unwrap();

    let remove = cri::RemoveContainerRequest { container_id: id.clone() };
    remove_container(node.clone(), remove.clone()).await.unwrap();
    remove_container(node.clone(), remove).await.unwrap();
    assert_eq!(status(&node, &id).await.unwrap_err().code(), Code::NotFound);
    stop(&node, &id, 10).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_volume_is_its_layers_for_the_shim_and_its_digest_in_the_status() {
    let host = FakeHost::new();
    let node = node(&host);
    let sandbox = run(&node, pod(host.folder.path())).await.unwrap();
    let image = |name: &str| cri::Mount {
        container_path: "/image/".into(),
        readonly: true,
        image: Some(cri::ImageSpec { image: name.into(), ..Default::default() }),
        image_sub_path: "etc".into(),
        ..Default::default()
    };
    let mut config = container("c");
    config.mounts = vec![image("absent")];
    let error = create(&node, &sandbox, config.clone()).await.unwrap_err();
    assert_eq!(error.code(), Code::NotFound, "{error}");
    config.mounts = vec![image("busybox")];
    let id = create(&node, &sandbox, config).await.unwrap();

    let shim = host.shim(&sandbox.parse::<SandboxId>().unwrap());
    let order = shim.orders.lock().unwrap()[0].clone().container.unwrap();
    let shown = &order.image_mounts[0];
    assert_eq!((shown.destination.as_str(), shown.sub_path.as_str()), ("/image/", "etc"));
    assert_eq!(shown.layers, ["/var/lib/a3s-box/image/layer"]);
    let told = &status(&node, &id).await.unwrap().mounts[0];
    let image = told.image.as_ref().unwrap();
    assert_eq!((image.image.as_str(), image.image_ref.as_str()), ("busybox", "sha256:1"));
    assert_eq!((told.image_sub_path.as_str(), told.host_path.as_str()), ("etc", ""));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_ignores_its_signal_is_killed_after_the_grace_period() {
    let host = FakeHost::new();
    let node = node(&host);
    let sandbox = run(&node, pod(host.folder.path())).await.unwrap();
    let mut config = container("c");
    config.stop_signal = cri::Signal::Sigterm.into();
    let id = create(&node, &sandbox, config).await.unwrap();
    start(&node, &id).await.unwrap();
    let waited = tokio::time::timeout(Duration::from_millis(200), stop(&node, &id, 100)).await;
    assert!(waited.is_err(), "it waits for the grace period");
    stop(&node, &id, 0).await.unwrap();
    assert_eq!(status(&node, &id).await.unwrap().exit_code, 137);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_container_executes_and_others_do_not() {
    let host = FakeHost::new();
    let node = node(&host);
    let sandbox = run(&node, pod(host.folder.path())).await.unwrap();
    let id = create(&node, &sandbox, container("c")).await.unwrap();
    let request = |cmd: &[&str], timeout| cri::ExecSyncRequest {
        container_id: id.clone(),
        cmd: cmd.iter().map(|word| (*word).to_owned()).collect(),
        timeout,
    };
    let code = |error: SandboxError| error.code();
    let created = exec_sync(node.clone(), request(&["true"], 0)).await;
    assert_eq!(created.map_err(code).unwrap_err(), Code::FailedPrecondition);
    start(&node, &id).await.unwrap();
    let done = exec_sync(node.clone(), request(&["echo", "x"], 3)).await.unwrap();
    assert_eq!(done.stdout, "echo x 3000");
    let empty = exec_sync(node.clone(), request(&[], 0)).await;
    assert_eq!(empty.map_err(code).unwrap_err(), Code::InvalidArgument);
    let shim = host.shim(&sandbox.parse::<SandboxId>().unwrap());
    let late = tonic::Status::deadline_exceeded("killed after 1 s");
    shim.refusals.lock().unwrap().insert("exec", late);
    let late = exec_sync(node.clone(), request(&["sleep"], 1)).await;
    assert_eq!(late.map_err(code).unwrap_err(), Code::DeadlineExceeded);
    let reopen = cri::ReopenContainerLogRequest { container_id: id.clone() };
    reopen_container_log(node.clone(), reopen).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_exist_is_stopped_and_removed_and_otherwise_not_found() {
    let host = FakeHost::new();
    let node = node(&host);
    for id in ["0".repeat(64), String::new()] {
        let pod_sandbox_id = id.clone();
        let request = cri::StopPodSandboxRequest { pod_sandbox_id: id.clone() };
        stop_pod_sandbox(node.clone(), request).await.unwrap();
        let request = cri::RemovePodSandboxRequest { pod_sandbox_id: id.clone() };
        remove_pod_sandbox(node.clone(), request).await.unwrap();
        stop(&node, &id, 1).await.unwrap();
        let request = cri::RemoveContainerRequest { container_id: id.clone() };
        remove_container(node.clone(), request).await.unwrap();
        assert_eq!(start(&node, &id).await.unwrap_err().code(), Code::NotFound);
        let request = cri::PodSandboxStatusRequest { pod_sandbox_id, verbose: false };
        let error = pod_sandbox_status(node.clone(), request).await.unwrap_err();
        assert_eq!(error.code(), Code::NotFound);
        let error = create(&node, &id, container("c")).await.unwrap_err();
        assert_eq!(error.code(), Code::NotFound);
    }
    let sandbox = run(&node, pod(host.folder.path())).await.unwrap();
    let mut config = container("c");
    config.image.as_mut().unwrap().image = "never-pulled".into();
    let error = create(&node, &sandbox, config).await.unwrap_err();
    assert_eq!(error.code(), Code::NotFound);
    assert!(chain(&error).contains("never-pulled"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn ids_may_be_shortened() {
    let host = FakeHost::new();
    let node = node(&host);
    let sandbox = run(&node, pod(host.folder.path())).await.unwrap();
    let id = create(&node, &sandbox[..12], container("c")).await.unwrap();
    start(&node, &id[..12]).await.unwrap();
    assert_eq!(status(&node, &id[..12]).await.unwrap().id, id);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shortened_id_that_fits_several_is_refused() {
    let host = FakeHost::new();
    let node = node(&host);
    let sandbox = run(&node, pod(host.folder.path())).await.unwrap();
    // Of 17 ids two begin with the same of 16 digits.
    let mut ids = Vec::new();
    for n in 0..17 {
        ids.push(create(&node, &sandbox, container(&n.to_string())).await.unwrap());
    }
    let shared = ids
        .iter()
        .map(|id| &id[..1])
        .find(|first| ids.iter().filter(|id| id.starts_with(*first)).count() > 1);
    let error = start(&node, shared.unwrap()).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread")]
async fn privileges_and_pid_namespaces_need_a_sandbox_that_has_them() {
    let host = FakeHost::new();
    let node = node(&host);
    let mut config = pod(host.folder.path());
    let options = |pid| cri::NamespaceOption { pid, ..Default::default() };
    config.linux = Some(cri::LinuxPodSandboxConfig {
        security_context: Some(cri::LinuxSandboxSecurityContext {
            namespace_options: Some(options(1)),
            ..Default::default()
        }),
        ..Default::default()
    });
    let sandbox = run(&node, config).await.unwrap();
    let with = |context| {
        let mut config = container("c");
        config.linux = Some(cri::LinuxContainerConfig {
            security_context: Some(context),
            ..Default::default()
        });
        config
    };
    let privileged = cri::LinuxContainerSecurityContext { privileged: true, ..Default::default() };
    let shared = cri::LinuxContainerSecurityContext {
        namespace_options: Some(options(0)),
        ..Default::default()
    };
    for (context, field) in [(privileged, "privileged"), (shared, "namespace_options.pid")] {
        let error = create(&node, &sandbox, with(context)).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument);
        assert!(error.to_string().contains(field), "{error}");
    }
    create(&node, &sandbox, container("c")).await.unwrap();
    let shim = host.shim(&sandbox.parse::<SandboxId>().unwrap());
    let order = shim.orders.lock().unwrap()[0].clone().container.unwrap();
    assert_eq!(order.pid_mode(), agent::PidMode::Container);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_is_listed_and_described_until_it_is_removed() {
    let host = FakeHost::new();
    let node = node(&host);
    let sandbox = run(&node, pod(host.folder.path())).await.unwrap();
    create(&node, &sandbox, container("c")).await.unwrap();
    let request = cri::PodSandboxStatusRequest { pod_sandbox_id: sandbox.clone(), verbose: true };
    let answer = pod_sandbox_status(node.clone(), request.clone()).await.unwrap();
    assert_eq!(answer.status.as_ref().unwrap().network.as_ref().unwrap().ip, "10.0.0.2");
    assert_eq!(answer.containers_statuses.len(), 1);
    let info: serde_json::Value = serde_json::from_str(&answer.info["info"]).unwrap();
    assert_eq!(info["boundary"], "microvm");
    assert_eq!(info["vm"]["memoryMb"], 512);
    assert_eq!(info["vm"]["kernelRelease"], "6.12");

    let stop = cri::StopPodSandboxRequest { pod_sandbox_id: sandbox.clone() };
    stop_pod_sandbox(node.clone(), stop).await.unwrap();
    let listed = list_pod_sandbox(node.clone(), cri::ListPodSandboxRequest::default()).await;
    assert_eq!(listed.unwrap().items[0].state(), cri::PodSandboxState::SandboxNotready);
    let containers = list_containers(node.clone(), cri::ListContainersRequest::default()).await;
    let containers = containers.unwrap().containers;
    assert_eq!(containers[0].state(), cri::ContainerState::ContainerExited);
    let error = create(&node, &sandbox, container("d")).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition);

    let remove = cri::RemovePodSandboxRequest { pod_sandbox_id: sandbox.clone() };
    remove_pod_sandbox(node.clone(), remove).await.unwrap();
    let error = pod_sandbox_status(node.clone(), request).await.unwrap_err();
    assert_eq!(error.code(), Code::NotFound);
    assert_eq!(host.census(), (0, 0, 0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_handler_is_refused_with_those_there_are() {
    let host = FakeHost::new();
    let node = node(&host);
    let request = cri::RunPodSandboxRequest {
        config: Some(pod(host.folder.path())),
        runtime_handler: "kata".into(),
    };
    let error = run_pod_sandbox(node, request).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(error.to_string().contains("\"a3s-box\""), "{error}");
}
