//! CreateContainer: spec, image and sandbox become one order to the shim.

use crate::{
    container::{
        ContainerRecord, ContainerSpec, Phase,
        spec::{Pid, Propagation},
    },
    container_spec::container_spec,
    host_devices,
    node::{ContainerImage, Node},
    oci_spec::oci_spec,
    sandbox::{
        NewContainer, SandboxError, Sandboxes, View, blocking, now,
        spec::{Boundary, SandboxSpec},
    },
    stop_signal::stop_signal,
};
use a3s_box_api::{agent::v1 as agent, cri, shim::v1 as shim};
use a3s_box_sys::mount_table;
use a3s_box_types::{ContainerId, SandboxId};
use std::{collections::BTreeMap, fs, io, path::Path, sync::Arc};

/// Of `statfs`.
const HUGETLBFS_MAGIC: rustix::fs::FsWord = 0x9584_58f6;

/// Makes the container, or joins the making of the same one.
///
/// `sandbox_config` repeats what the sandbox was made with; the sandbox's own is used.
pub async fn create_container(
    node: Arc<Node>,
    request: cri::CreateContainerRequest,
) -> Result<cri::CreateContainerResponse, SandboxError> {
    let Some(config) = &request.config else {
        return Err(SandboxError::invalid("config", "is missing"));
    };
    let sandbox = node.sandboxes.get(&request.pod_sandbox_id)?;
    let view = sandbox.view();
    let mut spec = container_spec(config, &view.record.spec)?;
    fit_to_sandbox(&mut spec, config, &view, &node.sandboxes)?;
    let image = resolve(&node, &spec.image.image)?;
    let mut volumes = ImageVolumes::new();
    for mount in &mut spec.mounts {
        if let Some(volume) = &mut mount.image {
            let found = resolve(&node, &volume.name.image)?;
            volume.id.clone_from(&found.id);
            volumes.insert(mount.container_path.clone(), found);
        }
    }
    let (id, in_sandbox) = (view.record.id.clone(), view.record.spec.clone());
    let prepare = move || prepare(&id, spec, &in_sandbox, &image, &volumes);
    let new = blocking("prepare the container", prepare).await?;
    let id = sandbox.create_container(new).await?;
    Ok(cri::CreateContainerResponse { container_id: id.to_string() })
}

/// Images that are mounted, by container path.
pub(crate) type ImageVolumes = BTreeMap<String, ContainerImage>;

/// The image by that name, which kubelet has pulled.
fn resolve(node: &Node, name: &str) -> Result<ContainerImage, SandboxError> {
    let found = node.images.resolve(name);
    found.ok_or_else(|| SandboxError::NotFound { kind: "image", id: name.to_owned() })
}

/// What a container may have depends on its sandbox: privileges, PID and user
/// namespaces.
fn fit_to_sandbox(
    spec: &mut ContainerSpec,
    config: &cri::ContainerConfig,
    view: &View,
    sandboxes: &Sandboxes,
) -> Result<(), SandboxError> {
    const AT: &str = "linux.security_context";
    let sandbox = &view.record.spec;
    if spec.security.privileged && !sandbox.privileged {
        let why = "the sandbox is not privileged";
        return Err(SandboxError::invalid(format!("{AT}.privileged"), why));
    }
    if spec.security.user_namespace != sandbox.user_namespace {
        let why = "is not the sandbox's";
        let field = format!("{AT}.namespace_options.userns_options");
        return Err(SandboxError::invalid(field, why));
    }
    let context = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    let said = context.is_some_and(|context| context.namespace_options.is_some());
    match spec.security.pid.clone() {
        Pid::Pod if !sandbox.shared_pid && said => {
            let why = "the sandbox was made without a shared PID namespace";
            return Err(SandboxError::invalid(format!("{AT}.namespace_options.pid"), why));
        }
        Pid::Pod if !sandbox.shared_pid => spec.security.pid = Pid::Container,
        Pid::Target(id) => {
            let target = sandboxes.container(&id)?.1;
            if target.sandbox_id != view.record.id {
                let why = "is a container of another sandbox";
                return Err(SandboxError::invalid(
                    format!("{AT}.namespace_options.target_id"),
                    why,
                ));
            }
            spec.security.pid = Pid::Target(target.id.to_string());
        }
        Pid::Pod | Pid::Container | Pid::Node => {}
    }
    Ok(())
}

/// The container's record and the order for it.
pub(crate) fn prepare(
    sandbox_id: &SandboxId,
    spec: ContainerSpec,
    sandbox: &SandboxSpec,
    image: &ContainerImage,
    volumes: &ImageVolumes,
) -> Result<NewContainer, SandboxError> {
    let config = image.config.config().clone().unwrap_or_default();
    let stop_signal = stop_signal(spec.stop_signal, config.stop_signal().as_deref())?;
    let oci = oci_spec(&with_real_sources(&spec, sandbox.boundary())?, sandbox, &image.config)?;
    let oci_json = serde_json::to_vec(&oci)
        .map_err(|error| SandboxError::step("write the OCI spec", error))?;
    let log_path = log_path(sandbox, &spec)?;
    let image_name =
        image.tags.first().or_else(|| image.digests.first()).unwrap_or(&spec.image.image);
    let record = ContainerRecord {
        id: ContainerId::from_random(rand::random()),
        sandbox_id: sandbox_id.clone(),
        image_name: image_name.clone(),
        image_id: image.id.clone(),
        image_ref: image.digests.first().unwrap_or(&image.id).clone(),
        log_path,
        stop_signal,
        created_at: now(),
        phase: Phase::Creating,
        user: None,
        guest_pid: 0,
        oci_spec: serde_json::to_value(&oci)
            .map_err(|error| SandboxError::step("write the OCI spec", error))?,
        spec,
    };
    let user = config.user().clone().unwrap_or_default();
    let mut order = order(&record, oci_json, &user, image, volumes);
    if sandbox.boundary() == Boundary::Microvm {
        order.disks = host_devices::disks(&record.spec.devices, &oci);
    }
    Ok(NewContainer { record, order })
}

fn order(
    record: &ContainerRecord,
    oci_spec: Vec<u8>,
    image_user: &str,
    image: &ContainerImage,
    volumes: &ImageVolumes,
) -> shim::CreateContainerRequest {
    let spec = &record.spec;
    let (pid_mode, pid_target) = match &spec.security.pid {
        Pid::Container => (agent::PidMode::Container, String::new()),
        Pid::Pod => (agent::PidMode::Pod, String::new()),
        Pid::Target(id) => (agent::PidMode::Target, id.clone()),
        Pid::Node => (agent::PidMode::Node, String::new()),
    };
    let image_mounts = spec.mounts.iter().filter_map(|mount| {
        let volume = mount.image.as_ref()?;
        Some(agent::ImageMount {
            destination: mount.container_path.clone(),
            layers: layers(volumes.get(&mount.container_path)?),
            sub_path: volume.sub_path.clone(),
        })
    });
    shim::CreateContainerRequest {
        container: Some(agent::CreateContainerRequest {
            container_id: record.id.to_string(),
            oci_spec: oci_spec.into(),
            layers: layers(image),
            image_mounts: image_mounts.collect(),
            user: Some(user(spec, image_user)),
            pid_mode: pid_mode.into(),
            pid_target,
        }),
        log_path: record.log_path.clone(),
        tty: spec.tty,
        stdin: spec.stdin,
        stdin_once: spec.stdin_once,
        disks: Vec::new(),
    }
}

/// Paths on the host.
fn layers(image: &ContainerImage) -> Vec<String> {
    image.layers.iter().map(|layer| layer.display().to_string()).collect()
}

/// CRI's user replaces the image's together with its group.
fn user(spec: &ContainerSpec, image_user: &str) -> agent::User {
    let security = &spec.security;
    let user = match security.run_as_user {
        Some(uid) => uid.to_string(),
        None if !security.run_as_username.is_empty() => security.run_as_username.clone(),
        None => image_user.to_owned(),
    };
    agent::User {
        user,
        uid: security.run_as_user,
        gid: security.run_as_group,
        supplemental_groups: security.supplemental_groups.clone(),
        strict_groups: security.strict_groups,
    }
}

/// The spec with every mount's source made if it is missing, and without symbolic links. What lies in huge
/// pages of the node is a volume of a guest's own.
fn with_real_sources(
    spec: &ContainerSpec,
    boundary: Boundary,
) -> Result<ContainerSpec, SandboxError> {
    let mut spec = spec.clone();
    for mount in spec.mounts.iter_mut().filter(|mount| mount.image.is_none()) {
        let failed = |error: io::Error| {
            let field = format!("mounts[{}].host_path", mount.container_path);
            SandboxError::invalid(field, format!("{}: {error}", mount.host_path))
        };
        let path = Path::new(&mount.host_path);
        // A folder, as other runtimes make it: a pod spec's missing hostPath is one.
        if !path.try_exists().map_err(failed)? {
            fs::create_dir_all(path).map_err(failed)?;
        }
        let real = fs::canonicalize(path).map_err(failed)?;
        mount.huge_pages = boundary == Boundary::Microvm && in_huge_pages(&real).map_err(failed)?;
        if mount.propagation == Propagation::Bidirectional {
            shared_mount(&real).map_err(failed)?;
        }
        mount.host_path = real
            .into_os_string()
            .into_string()
            .map_err(|path| failed(io::Error::other(format!("{} is not UTF-8", path.display()))))?;
    }
    Ok(spec)
}

fn in_huge_pages(path: &Path) -> io::Result<bool> {
    Ok(rustix::fs::statfs(path)?.f_type == HUGETLBFS_MAGIC)
}

/// Refuses a path on a mount without peers: what is mounted below it in a container stays there.
fn shared_mount(path: &Path) -> io::Result<()> {
    let mounts = mount_table::read()?;
    let on = mounts.iter().filter(|mount| path.starts_with(&mount.point));
    // Of several at one place the last one is on top.
    match on.max_by_key(|mount| mount.point.components().count()) {
        Some(mount) if mount.shared => Ok(()),
        Some(mount) => {
            let point = mount.point.display();
            Err(io::Error::other(format!(
                "its mount {point} is not shared, so mounts made in the container would not reach \
                 the host: mount --make-rshared {point}"
            )))
        }
        None => Err(io::ErrorKind::NotFound.into()),
    }
}

/// The absolute log path; its folder is made, because only kubelet makes it otherwise.
fn log_path(sandbox: &SandboxSpec, spec: &ContainerSpec) -> Result<String, SandboxError> {
    if sandbox.log_directory.is_empty() || spec.log_path.is_empty() {
        return Ok(String::new());
    }
    let path = Path::new(&sandbox.log_directory).join(&spec.log_path);
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(|error| {
            SandboxError::invalid("log_path", format!("{}: {error}", folder.display()))
        })?;
    }
    Ok(path.display().to_string())
}
