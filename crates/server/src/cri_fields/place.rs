//! The node that requests are tried on: the server over a fake host, one image store, one pod.

use crate::{
    Server,
    config::{Config, Handler, HostNamespaces, beside::Beside},
    container_stats::Rates,
    images::{Auth, ForContainers, Image, ImageRpcError, ImageStore, Usage},
    node::Node,
    sandbox::{Sandboxes, fakes::FakeHost},
    serve::streaming_server,
    service::Service,
    vm_size::SizeRules,
};
use a3s_box_api::cri::{self, runtime_service_server::RuntimeService};
use a3s_box_types::shim::VmSize;
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    sync::{Arc, Mutex},
};
use tonic::Request;

/// In which kind of pod a request is tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base {
    /// A virtual machine.
    Microvm,
    /// The same, with a user namespace, and with what needs something else beside it.
    Rich,
    /// The node's own kernel.
    Host,
}

pub const BASES: [Base; 3] = [Base::Microvm, Base::Rich, Base::Host];

/// A node with one pod, in which one container runs and two are only made.
pub struct Place {
    pub base: Base,
    pub host: Arc<FakeHost>,
    pub service: Service,
    pub pod: String,
    pub running: String,
    pub made: [String; 2],
}

impl Place {
    pub async fn new(base: Base) -> Self {
        let host = FakeHost::new();
        let folder = host.folder.path();
        let mut config = Config::parse("", &Beside::folder(folder)).unwrap();
        config.root = folder.join("root");
        config.state = folder.join("state");
        config.network.conf_dir = folder.join("net.d");
        config.network.bin_dirs = vec![folder.join("bin")];
        for path in [&config.root, &config.state, &config.network.conf_dir, &folder.join("volume")]
        {
            fs::create_dir(path).unwrap();
        }
        network(folder);
        profiles(folder);
        let streaming = streaming_server(&config).await.unwrap();
        let opened = Server::open(config, streaming.urls()).unwrap();
        let node = node(&host).await;
        let images = Arc::new(OneStore::default());
        let server = Server { images, node: Arc::new(node), ..opened };
        let service = Service(Arc::new(server));
        let mut place = Self {
            base,
            host,
            service,
            pod: String::new(),
            running: String::new(),
            made: Default::default(),
        };
        place.fill().await;
        place
    }

    async fn fill(&mut self) {
        let request = Request::new(self.run_request());
        let answer = self.service.run_pod_sandbox(request).await.unwrap();
        self.pod = answer.into_inner().pod_sandbox_id;
        let mut made = Vec::new();
        for name in ["running", "first", "second"] {
            let mut request = self.create_request();
            request.config.as_mut().unwrap().metadata.as_mut().unwrap().name = name.to_owned();
            let answer = self.service.create_container(Request::new(request)).await.unwrap();
            made.push(answer.into_inner().container_id);
        }
        let [running, first, second] = made.try_into().unwrap();
        let start = cri::StartContainerRequest { container_id: running.clone() };
        self.service.start_container(Request::new(start)).await.unwrap();
        (self.running, self.made) = (running, [first, second]);
    }

    pub fn path(&self, name: &str) -> String {
        self.host.folder.path().join(name).display().to_string()
    }

    /// Takes away what the call has made; whether nothing else of it is left.
    pub async fn is_as_before(&self, rpc: &str) -> bool {
        let changes = [
            "StopPodSandbox",
            "RemovePodSandbox",
            "StartContainer",
            "StopContainer",
            "RemoveContainer",
            "UpdateContainerResources",
            "UpdatePodSandboxResources",
            "UpdateRuntimeConfig",
            "RemoveImage",
        ];
        if changes.contains(&rpc) {
            return false;
        }
        for (sandbox, view) in self.service.0.node.sandboxes.all() {
            if view.record.id.as_str() != self.pod {
                sandbox.remove().await.unwrap();
                continue;
            }
            let ours = |id: &str| id == self.running || self.made.iter().any(|made| made == id);
            for id in view.containers.keys().filter(|id| !ours(id.as_str())) {
                sandbox.remove_container(id).await.unwrap();
            }
        }
        true
    }
}

async fn node(host: &Arc<FakeHost>) -> Node {
    let size = VmSize { vcpus: 1, memory_mb: 512 };
    let max = VmSize { vcpus: 16, memory_mb: 65_536 };
    let handler = |host_namespaces| Handler { host_namespaces };
    let node = Node {
        sandboxes: Sandboxes::new(host.deps()),
        images: Box::new(ForContainers(Arc::new(OneStore::default()))),
        sizes: SizeRules { default: size, min_memory_mb: 128, max, guest_overhead_mb: 64 },
        handlers: [
            (String::new(), handler(HostNamespaces::Allow)),
            ("gold".to_owned(), handler(HostNamespaces::Refuse)),
        ]
        .into(),
        root: host.folder.path().to_owned(),
        rates: Rates::default(),
    };
    node.sandboxes.recover().await.unwrap();
    node
}

/// A CNI network that takes its subnets from its caller.
fn network(folder: &Path) {
    let plugin = folder.join("bin/plugin");
    fs::create_dir(folder.join("bin")).unwrap();
    fs::write(&plugin, "#!/bin/sh\n").unwrap();
    fs::set_permissions(&plugin, fs::Permissions::from_mode(0o755)).unwrap();
    let plugin = serde_json::json!({"type": "plugin", "capabilities": {"ipRanges": true}});
    let list = serde_json::json!({"cniVersion": "1.0.0", "name": "pods", "plugins": [plugin]});
    fs::write(folder.join("net.d/10-pods.conflist"), list.to_string()).unwrap();
}

/// Two seccomp profiles that differ.
fn profiles(folder: &Path) {
    for (number, profile) in [(1, "profile.json"), (2, "other.json")] {
        let text =
            serde_json::json!({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": number});
        fs::write(folder.join(profile), text.to_string()).unwrap();
    }
}

/// Holds two images until they are removed.
#[derive(Default)]
struct OneStore {
    removed: Mutex<Vec<String>>,
}

fn image(name: &str) -> Image {
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux",
        "config": {"Entrypoint": [format!("/bin/{name}")], "User": "daemon", "StopSignal": "SIGINT"},
        "rootfs": {"type": "layers", "diff_ids": []},
    });
    Image {
        id: format!("sha256:{name}"),
        repo_tags: vec![name.to_owned()],
        repo_digests: Vec::new(),
        size: 7,
        config: serde_json::from_value(config).unwrap(),
        layers: vec![format!("/layers/{name}").into()],
        pinned: false,
    }
}

#[tonic::async_trait]
impl ImageStore for OneStore {
    fn list(&self) -> Vec<Image> {
        let removed = self.removed.lock().unwrap();
        let there =
            ["busybox", "other"].into_iter().filter(|name| !removed.iter().any(|it| it == name));
        there.map(image).collect()
    }

    fn resolve(&self, name: &str) -> Option<Image> {
        self.list().into_iter().find(|image| image.repo_tags[0] == name)
    }

    async fn pull(&self, name: &str, auth: Option<Auth>) -> Result<Image, ImageRpcError> {
        let auth = auth.unwrap_or_default();
        let who = [
            auth.username,
            auth.password,
            auth.auth,
            auth.server_address,
            auth.identity_token,
            auth.registry_token,
        ];
        // Shows who asked for what, each word in its place.
        Ok(Image { id: format!("{name} {}", who.join("-")), ..image(name) })
    }

    async fn remove(&self, name: &str) -> Result<(), ImageRpcError> {
        self.removed.lock().unwrap().push(name.to_owned());
        Ok(())
    }

    fn fetched_bytes(&self) -> u64 {
        0
    }

    async fn usage(&self) -> Result<Usage, ImageRpcError> {
        Ok(Usage { bytes: 0, inodes: 0 })
    }
}
