//! Good requests, which single fields are then changed of.

use super::place::{Base, Place};
use a3s_box_api::cri;
use prost::Message;

impl Place {
    fn namespaces(&self) -> cri::NamespaceOption {
        let mut options = cri::NamespaceOption::default();
        match self.base {
            Base::Host => options.pid = cri::NamespaceMode::Node.into(),
            Base::Rich => {
                let ids = vec![cri::IdMapping { host_id: 1000, container_id: 0, length: 65536 }];
                let mode = cri::NamespaceMode::Pod.into();
                let (uids, gids) = (ids.clone(), ids);
                options.userns_options = Some(cri::UserNamespace { mode, uids, gids });
            }
            Base::Microvm => {}
        }
        options
    }

    fn resources() -> cri::LinuxContainerResources {
        cri::LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 100_000,
            cpu_shares: 512,
            memory_limit_in_bytes: 256 << 20,
            ..Default::default()
        }
    }

    pub fn run_request(&self) -> cri::RunPodSandboxRequest {
        let linux = cri::LinuxPodSandboxConfig {
            cgroup_parent: "/pods".to_owned(),
            security_context: Some(cri::LinuxSandboxSecurityContext {
                namespace_options: Some(self.namespaces()),
                privileged: true,
                run_as_user: (self.base == Base::Rich).then_some(cri::Int64Value { value: 1 }),
                ..Default::default()
            }),
            resources: Some(Self::resources()),
            overhead: Some(Self::resources()),
            ..Default::default()
        };
        let config = cri::PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata {
                name: "web".to_owned(),
                uid: "u".to_owned(),
                namespace: "default".to_owned(),
                attempt: 0,
            }),
            hostname: "web".to_owned(),
            log_directory: self.path("logs"),
            port_mappings: vec![cri::PortMapping {
                container_port: 80,
                host_port: 8080,
                ..Default::default()
            }],
            linux: Some(linux),
            ..Default::default()
        };
        cri::RunPodSandboxRequest { config: Some(config), runtime_handler: String::new() }
    }

    pub fn create_request(&self) -> cri::CreateContainerRequest {
        let rich = self.base == Base::Rich;
        let namespaces = self.namespaces();
        let ids = namespaces.userns_options.clone().map(|namespace| namespace.uids);
        let ids = ids.unwrap_or_default();
        let localhost = cri::SecurityProfile {
            profile_type: cri::security_profile::ProfileType::Localhost.into(),
            localhost_ref: self.path("profile.json"),
        };
        let security = cri::LinuxContainerSecurityContext {
            namespace_options: Some(namespaces),
            run_as_user: rich.then_some(cri::Int64Value { value: 1 }),
            seccomp: rich.then_some(localhost),
            ..Default::default()
        };
        let config = cri::ContainerConfig {
            metadata: Some(cri::ContainerMetadata { name: "c".to_owned(), attempt: 0 }),
            image: Some(cri::ImageSpec { image: "busybox".to_owned(), ..Default::default() }),
            envs: vec![cri::KeyValue { key: "K".to_owned(), value: "v".into() }],
            mounts: vec![cri::Mount {
                container_path: "/volume".to_owned(),
                host_path: self.path("volume"),
                readonly: rich,
                uid_mappings: ids.clone(),
                gid_mappings: ids,
                ..Default::default()
            }],
            devices: vec![cri::Device {
                container_path: "/dev/x".to_owned(),
                host_path: "/dev/null".to_owned(),
                permissions: "r".to_owned(),
            }],
            log_path: "c/0.log".to_owned(),
            linux: Some(cri::LinuxContainerConfig {
                resources: Some(Self::resources()),
                security_context: Some(security),
            }),
            ..Default::default()
        };
        cri::CreateContainerRequest {
            pod_sandbox_id: self.pod.clone(),
            config: Some(config),
            sandbox_config: None,
        }
    }

    /// A good request of this kind, as bytes.
    pub fn request(&self, rpc: &str) -> Vec<u8> {
        let (pod, container) = (self.pod.clone(), self.running.clone());
        let image = Some(cri::ImageSpec { image: "busybox".to_owned(), ..Default::default() });
        match rpc {
            "RunPodSandbox" => {
                let mut request = self.run_request();
                request.config.as_mut().unwrap().metadata.as_mut().unwrap().name = "new".to_owned();
                request.encode_to_vec()
            }
            "StopPodSandbox" | "RemovePodSandbox" | "PodSandboxStatus" | "PodSandboxStats" => {
                cri::StopPodSandboxRequest { pod_sandbox_id: pod }.encode_to_vec()
            }
            "UpdatePodSandboxResources" => cri::UpdatePodSandboxResourcesRequest {
                pod_sandbox_id: pod,
                resources: Some(Self::resources()),
                overhead: Some(Self::resources()),
            }
            .encode_to_vec(),
            "PortForward" => {
                cri::PortForwardRequest { pod_sandbox_id: pod, port: vec![80] }.encode_to_vec()
            }
            "CreateContainer" => self.create_request().encode_to_vec(),
            "StartContainer" => {
                let container_id = self.made[0].clone();
                cri::StartContainerRequest { container_id }.encode_to_vec()
            }
            "StopContainer" | "RemoveContainer" | "ContainerStatus" | "ReopenContainerLog"
            | "ContainerStats" => {
                cri::StopContainerRequest { container_id: container, timeout: 0 }.encode_to_vec()
            }
            "UpdateContainerResources" => cri::UpdateContainerResourcesRequest {
                container_id: container,
                linux: Some(Self::resources()),
                ..Default::default()
            }
            .encode_to_vec(),
            "ExecSync" => cri::ExecSyncRequest {
                container_id: container,
                cmd: vec!["true".to_owned()],
                timeout: 0,
            }
            .encode_to_vec(),
            "Exec" => cri::ExecRequest {
                container_id: container,
                cmd: vec!["true".to_owned()],
                stdin: true,
                stdout: true,
                ..Default::default()
            }
            .encode_to_vec(),
            "Attach" => cri::AttachRequest {
                container_id: container,
                stdin: true,
                stdout: true,
                ..Default::default()
            }
            .encode_to_vec(),
            "ImageStatus" | "RemoveImage" => {
                cri::ImageStatusRequest { image, verbose: false }.encode_to_vec()
            }
            // An auth says nothing without a secret.
            "PullImage" => cri::PullImageRequest {
                image,
                auth: Some(cri::AuthConfig { username: "u".to_owned(), ..Default::default() }),
                ..Default::default()
            }
            .encode_to_vec(),
            _ => Vec::new(),
        }
    }

    /// The request with what the field at this path needs beside it, whether it is changed or not.
    pub fn fit(&self, rpc: &str, path: &str, bytes: Vec<u8>) -> Vec<u8> {
        match rpc {
            "RunPodSandbox" => {
                let mut request = cri::RunPodSandboxRequest::decode(&*bytes).unwrap();
                let linux = request.config.as_mut().and_then(|config| config.linux.as_mut());
                let security = linux.and_then(|linux| linux.security_context.as_mut());
                let options = security.and_then(|context| context.namespace_options.as_mut());
                if let Some(asked) = options.and_then(|options| options.userns_options.as_mut()) {
                    fit_mappings(path, asked.mode(), &mut asked.uids, &mut asked.gids);
                }
                request.encode_to_vec()
            }
            "CreateContainer" => {
                let mut request = cri::CreateContainerRequest::decode(&*bytes).unwrap();
                let config = request.config.as_mut().unwrap();
                fit_mount(path, &mut config.mounts[0]);
                let linux = config.linux.as_mut().unwrap();
                self.fit_security(path, linux.security_context.as_mut().unwrap());
                request.encode_to_vec()
            }
            _ => bytes,
        }
    }

    fn fit_security(&self, path: &str, security: &mut cri::LinuxContainerSecurityContext) {
        if path.ends_with(".run_as_username") {
            security.run_as_user = None;
        }
        if path.contains(".run_as_group") {
            security.run_as_user = Some(cri::Int64Value { value: 1 });
        }
        if let Some(seccomp) = &mut security.seccomp {
            if path.ends_with(".seccomp.localhost_ref") {
                seccomp.set_profile_type(cri::security_profile::ProfileType::Localhost);
            }
            if seccomp.localhost_ref.is_empty() {
                seccomp.localhost_ref = self.path("profile.json");
            }
        }
        let options = security.namespace_options.as_mut().unwrap();
        if path.ends_with(".target_id") {
            options.pid = cri::NamespaceMode::Target.into();
        }
        if options.pid() == cri::NamespaceMode::Target && options.target_id.is_empty() {
            options.target_id.clone_from(&self.made[0]);
        }
        if let Some(asked) = options.userns_options.as_mut() {
            fit_mappings(path, asked.mode(), &mut asked.uids, &mut asked.gids);
        }
    }
}

/// Users and groups come together, and as many of both.
fn fit_mappings(
    path: &str,
    mode: cri::NamespaceMode,
    uids: &mut Vec<cri::IdMapping>,
    gids: &mut Vec<cri::IdMapping>,
) {
    if mode == cri::NamespaceMode::Node {
        uids.clear();
        gids.clear();
        return;
    }
    let whole = cri::IdMapping { host_id: 1000, container_id: 0, length: 65536 };
    for ids in [&mut *uids, &mut *gids] {
        if ids.is_empty() {
            ids.push(whole);
        }
        if ids[0].length == 0 {
            ids[0].length = whole.length;
        }
    }
    if path.ends_with(".uids.length") || path.ends_with(".uidMappings.length") {
        gids[0].length = uids[0].length;
    } else if path.ends_with(".gids.length") || path.ends_with(".gidMappings.length") {
        uids[0].length = gids[0].length;
    }
}

fn fit_mount(path: &str, mount: &mut cri::Mount) {
    if path.contains(".mounts.image") {
        mount.host_path.clear();
        mount.readonly = true;
        let image = mount.image.get_or_insert_default();
        if image.image.is_empty() {
            image.image = "busybox".to_owned();
        }
    }
    if path.ends_with(".recursive_read_only") {
        mount.readonly = true;
    }
    if path.contains(".mounts.uidMappings") || path.contains(".mounts.gidMappings") {
        let mode = cri::NamespaceMode::Pod;
        fit_mappings(path, mode, &mut mount.uid_mappings, &mut mount.gid_mappings);
    }
}
