//! CRI's ContainerConfig to a [`ContainerSpec`]: pure, and the place where everything is refused
//! that a container cannot have.

use crate::{
    container::spec::{
        ContainerSpec, DeviceSpec, ImageName, ImageVolume, MountSpec, Pid, Propagation, Resources,
        Security,
    },
    sandbox::{
        SandboxError,
        spec::{Boundary, NodeNamespaces, SandboxSpec},
    },
    sandbox_spec::too_long,
    security,
    user_namespace::UserNamespace,
};
use a3s_box_api::cri;

/// A smaller cgroup keeps the process that is to be born in it waiting for memory.
const MEMORY_MIN: i64 = 1 << 20;
/// What `mount_options` may ask for (KEP-5855).
const OPTIONS: [&str; 3] = ["noexec", "nodev", "nosuid"];

/// The spec of the container that `config` asks for.
pub fn container_spec(
    config: &cri::ContainerConfig,
    sandbox: &SandboxSpec,
) -> Result<ContainerSpec, SandboxError> {
    refuse_what_is_not_there(config)?;
    let Some(metadata) = &config.metadata else {
        return Err(SandboxError::invalid("metadata", "is missing"));
    };
    if metadata.name.is_empty() {
        return Err(SandboxError::invalid("metadata.name", "is empty"));
    }
    let linux = config.linux.clone().unwrap_or_default();
    let security = security(&linux.security_context.unwrap_or_default(), sandbox)?;
    let mounts = config.mounts.iter().map(|one| mount(one, security.user_namespace));
    Ok(ContainerSpec {
        name: metadata.name.clone(),
        attempt: metadata.attempt,
        image: image("image", config.image.as_ref())?,
        command: texts("command", &config.command)?,
        args: texts("args", &config.args)?,
        working_dir: working_dir(&config.working_dir)?,
        env: env(&config.envs)?,
        mounts: mounts.collect::<Result<_, _>>()?,
        devices: config.devices.iter().map(device).collect::<Result<_, _>>()?,
        labels: config.labels.clone().into_iter().collect(),
        annotations: config.annotations.clone().into_iter().collect(),
        log_path: log_path(&config.log_path)?,
        stdin: config.stdin,
        stdin_once: config.stdin_once,
        tty: config.tty,
        resources: resources(
            "linux.resources",
            &linux.resources.unwrap_or_default(),
            sandbox.boundary(),
        )?,
        security,
        stop_signal: config.stop_signal,
    })
}

fn refuse_what_is_not_there(config: &cri::ContainerConfig) -> Result<(), SandboxError> {
    if config.windows.is_some() {
        return Err(SandboxError::unsupported("windows", "this node runs Linux pods"));
    }
    if let Some(device) = config.cdi_devices.first() {
        let field = format!("CDI_devices[{}]", device.name);
        return Err(SandboxError::unsupported(field, "CDI devices are not there yet"));
    }
    Ok(())
}

fn image(field: &str, image: Option<&cri::ImageSpec>) -> Result<ImageName, SandboxError> {
    match image {
        Some(image) if !image.image.is_empty() => Ok(ImageName {
            image: image.image.clone(),
            user_specified: image.user_specified_image.clone(),
            annotations: image.annotations.clone().into_iter().collect(),
        }),
        _ => Err(SandboxError::invalid(format!("{field}.image"), "is empty")),
    }
}

fn texts(field: &str, list: &[String]) -> Result<Vec<String>, SandboxError> {
    match list.iter().find(|text| text.contains('\0')) {
        Some(text) => Err(SandboxError::invalid(field, format!("{text:?} holds a zero byte"))),
        None => Ok(list.to_vec()),
    }
}

fn working_dir(path: &str) -> Result<String, SandboxError> {
    if let Some(why) = too_long(path) {
        return Err(SandboxError::invalid("working_dir", why));
    }
    if path.is_empty() || (path.starts_with('/') && !path.contains('\0')) {
        Ok(path.to_owned())
    } else {
        Err(SandboxError::invalid("working_dir", format!("{path:?} is not an absolute path")))
    }
}

fn env(pairs: &[cri::KeyValue]) -> Result<Vec<(String, String)>, SandboxError> {
    let mut env = Vec::new();
    for pair in pairs {
        let bad = |why: &str| SandboxError::invalid(format!("envs[{}]", pair.key), why);
        if pair.key.is_empty() || pair.key.contains(['=', '\0']) {
            return Err(bad("is no name of a variable"));
        }
        let value = std::str::from_utf8(&pair.value).map_err(|_| bad("is not UTF-8"))?;
        if value.contains('\0') {
            return Err(bad("holds a zero byte"));
        }
        env.push((pair.key.clone(), value.to_owned()));
    }
    Ok(env)
}

fn log_path(path: &str) -> Result<String, SandboxError> {
    if let Some(why) = too_long(path) {
        return Err(SandboxError::invalid("log_path", why));
    }
    if path.starts_with('/') || path.contains('\0') || path.split('/').any(|part| part == "..") {
        let why = format!("{path:?} is not a path below the sandbox's log_directory");
        return Err(SandboxError::invalid("log_path", why));
    }
    Ok(path.to_owned())
}

fn device(device: &cri::Device) -> Result<DeviceSpec, SandboxError> {
    let field = format!("devices[{}]", device.container_path);
    let (host_path, container_path) = (&device.host_path, &device.container_path);
    for (name, path) in [("host_path", host_path), ("container_path", container_path)] {
        if !path.starts_with('/') || path.contains('\0') {
            let field = format!("{field}.{name}");
            return Err(SandboxError::invalid(field, format!("{path:?} is not an absolute path")));
        }
    }
    let permissions = &device.permissions;
    if permissions.is_empty() || permissions.contains(|letter| !"rwm".contains(letter)) {
        let why = format!("{permissions:?} is not made of r, w and m");
        return Err(SandboxError::invalid(format!("{field}.permissions"), why));
    }
    Ok(DeviceSpec {
        host_path: host_path.clone(),
        container_path: container_path.clone(),
        permissions: permissions.clone(),
    })
}

fn mount(mount: &cri::Mount, pod: Option<UserNamespace>) -> Result<MountSpec, SandboxError> {
    let at = |field: &str| format!("mounts[{}].{field}", mount.container_path);
    if !mount.container_path.starts_with('/') || mount.container_path.contains('\0') {
        return Err(SandboxError::invalid(at("container_path"), "is not an absolute path"));
    }
    for (field, path) in
        [("container_path", &mount.container_path), ("host_path", &mount.host_path)]
    {
        if let Some(why) = too_long(path) {
            return Err(SandboxError::invalid(format!("mounts[].{field}"), why));
        }
    }
    let image = mount.image.as_ref().map(|_| image_volume(mount, &at)).transpose()?;
    if image.is_none() && !mount.image_sub_path.is_empty() {
        return Err(SandboxError::invalid(at("image_sub_path"), "needs image"));
    }
    if image.is_none() && (!mount.host_path.starts_with('/') || mount.host_path.contains('\0')) {
        return Err(SandboxError::invalid(at("host_path"), "is not an absolute path"));
    }
    if let Some(option) = mount.mount_options.iter().find(|one| !OPTIONS.contains(&one.as_str())) {
        let why = format!("only {} are honoured", OPTIONS.join(", "));
        return Err(SandboxError::unsupported(at(&format!("mount_options[{option}]")), why));
    }
    let (uids, gids) = (&mount.uid_mappings, &mount.gid_mappings);
    let id_mapped = UserNamespace::of_mount(&at("uidMappings, gidMappings"), uids, gids, pod)?;
    let propagation = propagation(mount, pod, &at("propagation"))?;
    if mount.recursive_read_only {
        let bad = |why| Err(SandboxError::invalid(at("recursive_read_only"), why));
        if !mount.readonly {
            return bad("needs readonly");
        }
        // What the host mounts below it later would not be read-only.
        if propagation != Propagation::Private {
            return bad("needs propagation = PROPAGATION_PRIVATE");
        }
    }
    Ok(MountSpec {
        container_path: mount.container_path.clone(),
        host_path: mount.host_path.clone(),
        image,
        readonly: mount.readonly,
        recursive_readonly: mount.recursive_read_only,
        selinux_relabel: mount.selinux_relabel,
        id_mapped,
        // Its file system tells, once the path is looked at.
        huge_pages: false,
        propagation,
        options: mount.mount_options.clone(),
    })
}

/// The image that a mount shows.
fn image_volume(
    mount: &cri::Mount,
    at: &impl Fn(&str) -> String,
) -> Result<ImageVolume, SandboxError> {
    let bad = |field: &str, why: &str| Err(SandboxError::invalid(at(field), why));
    let name = image(&at("image"), mount.image.as_ref())?;
    if !mount.host_path.is_empty() {
        return bad("host_path", "excludes image");
    }
    if !mount.readonly {
        return bad("readonly", "is needed with image: an image is never written to");
    }
    if mount.propagation() != cri::MountPropagation::PropagationPrivate {
        return bad("propagation", "means nothing with image: nothing is mounted in an image");
    }
    let path = &mount.image_sub_path;
    if path.starts_with('/') || path.contains('\0') || path.split('/').any(|part| part == "..") {
        return bad("image_sub_path", "is not a path below the image's root");
    }
    Ok(ImageVolume { name, sub_path: path.clone(), id: String::new() })
}

fn propagation(
    mount: &cri::Mount,
    pod: Option<UserNamespace>,
    field: &str,
) -> Result<Propagation, SandboxError> {
    match mount.propagation() {
        cri::MountPropagation::PropagationPrivate => Ok(Propagation::Private),
        cri::MountPropagation::PropagationHostToContainer => Ok(Propagation::HostToContainer),
        // The kernel lets nothing out of the mount namespaces that a user namespace owns.
        cri::MountPropagation::PropagationBidirectional if pod.is_some() => {
            let field = format!("{field} = PROPAGATION_BIDIRECTIONAL");
            Err(SandboxError::unsupported(field, "needs a pod without a user namespace"))
        }
        cri::MountPropagation::PropagationBidirectional => Ok(Propagation::Bidirectional),
    }
}

/// CRI's limits, checked; they are the field `at`.
pub fn resources(
    at: &str,
    resources: &cri::LinuxContainerResources,
    boundary: Boundary,
) -> Result<Resources, SandboxError> {
    let huge_pages = security::huge_pages(at, resources, boundary)?;
    for (field, value) in [
        ("cpu_period", resources.cpu_period),
        ("cpu_shares", resources.cpu_shares),
        ("memory_limit_in_bytes", resources.memory_limit_in_bytes),
    ] {
        if value < 0 {
            return Err(SandboxError::invalid(format!("{at}.{field}"), "is negative"));
        }
    }
    if (1..MEMORY_MIN).contains(&resources.memory_limit_in_bytes) {
        let why = format!("is less than {MEMORY_MIN}, in which no process starts");
        return Err(SandboxError::invalid(format!("{at}.memory_limit_in_bytes"), why));
    }
    for (field, value) in
        [("cpuset_cpus", &resources.cpuset_cpus), ("cpuset_mems", &resources.cpuset_mems)]
    {
        if !value.is_empty() && boundary == Boundary::Microvm {
            let why = "numbers of the host's CPUs and nodes mean nothing in a guest";
            return Err(SandboxError::unsupported(format!("{at}.{field}"), why));
        }
    }
    if !(-1000..=1000).contains(&resources.oom_score_adj) {
        let field = format!("{at}.oom_score_adj");
        return Err(SandboxError::invalid(field, "is not from -1000 to 1000"));
    }
    Ok(Resources {
        cpu_period: resources.cpu_period,
        cpu_quota: resources.cpu_quota,
        cpu_shares: resources.cpu_shares,
        cpuset_cpus: resources.cpuset_cpus.clone(),
        cpuset_mems: resources.cpuset_mems.clone(),
        memory_limit: resources.memory_limit_in_bytes,
        memory_swap_limit: resources.memory_swap_limit_in_bytes,
        oom_score_adj: resources.oom_score_adj,
        huge_pages,
        unified: resources.unified.clone().into_iter().collect(),
    })
}

fn security(
    context: &cri::LinuxContainerSecurityContext,
    sandbox: &SandboxSpec,
) -> Result<Security, SandboxError> {
    const AT: &str = "linux.security_context";
    let user_namespace = UserNamespace::asked(context.namespace_options.as_ref())?;
    security::sandbox_namespaces(context.namespace_options.as_ref(), sandbox.node_namespaces)?;
    security::no_selinux(&format!("{AT}.selinux_options"), context.selinux_options.as_ref())?;
    let apparmor = format!("{AT}.apparmor");
    security::no_apparmor(&apparmor, context.apparmor.as_ref(), &context.apparmor_profile)?;
    let capabilities = context.capabilities.clone().unwrap_or_default();
    let run_as_user = id(&format!("{AT}.run_as_user"), context.run_as_user.as_ref())?;
    let run_as_group = id(&format!("{AT}.run_as_group"), context.run_as_group.as_ref())?;
    if run_as_user.is_some() && !context.run_as_username.is_empty() {
        let why = "excludes run_as_user";
        return Err(SandboxError::invalid(format!("{AT}.run_as_username"), why));
    }
    if run_as_group.is_some() && run_as_user.is_none() && context.run_as_username.is_empty() {
        let why = "needs run_as_user or run_as_username";
        return Err(SandboxError::invalid(format!("{AT}.run_as_group"), why));
    }
    let strict = context.supplemental_groups_policy() == cri::SupplementalGroupsPolicy::Strict;
    Ok(Security {
        privileged: context.privileged,
        add_capabilities: capabilities.add_capabilities,
        drop_capabilities: capabilities.drop_capabilities,
        add_ambient_capabilities: capabilities.add_ambient_capabilities,
        run_as_user,
        run_as_username: context.run_as_username.clone(),
        run_as_group,
        supplemental_groups: groups(&context.supplemental_groups)?,
        strict_groups: strict,
        readonly_rootfs: context.readonly_rootfs,
        no_new_privileges: context.no_new_privs,
        masked_paths: texts(&format!("{AT}.masked_paths"), &context.masked_paths)?,
        readonly_paths: texts(&format!("{AT}.readonly_paths"), &context.readonly_paths)?,
        seccomp: security::seccomp(
            &format!("{AT}.seccomp"),
            context.seccomp.as_ref(),
            &context.seccomp_profile_path,
        )?,
        pid: pid(context.namespace_options.as_ref(), sandbox.node_namespaces)?,
        user_namespace,
    })
}

fn id(field: &str, value: Option<&cri::Int64Value>) -> Result<Option<u32>, SandboxError> {
    value
        .map(|value| {
            // The last one means "unchanged" to the kernel.
            u32::try_from(value.value).ok().filter(|id| *id != u32::MAX).ok_or_else(|| {
                SandboxError::invalid(field, format!("{} is not an id", value.value))
            })
        })
        .transpose()
}

fn groups(list: &[i64]) -> Result<Vec<u32>, SandboxError> {
    let field = "linux.security_context.supplemental_groups";
    let group = |value: &i64| {
        u32::try_from(*value)
            .map_err(|_| SandboxError::invalid(field, format!("{value} is not an id")))
    };
    list.iter().map(group).collect()
}

fn pid(options: Option<&cri::NamespaceOption>, nodes: NodeNamespaces) -> Result<Pid, SandboxError> {
    let field = "linux.security_context.namespace_options";
    security::no_target(options)?;
    match options.map_or(cri::NamespaceMode::Pod, cri::NamespaceOption::pid) {
        // The pod's is the node's.
        cri::NamespaceMode::Pod | cri::NamespaceMode::Node if nodes.pid => Ok(Pid::Node),
        cri::NamespaceMode::Pod => Ok(Pid::Pod),
        cri::NamespaceMode::Container => Ok(Pid::Container),
        cri::NamespaceMode::Target => {
            let target = options.map(|options| options.target_id.clone()).unwrap_or_default();
            if target.is_empty() {
                return Err(SandboxError::invalid(format!("{field}.target_id"), "is empty"));
            }
            Ok(Pid::Target(target))
        }
        cri::NamespaceMode::Node => {
            let why = "the sandbox was made without it";
            Err(SandboxError::unsupported(format!("{field}.pid = NODE"), why))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::tests::spec as sandbox;

    #[test]
    fn a_pod_on_the_nodes_kernel_may_have_more() {
        let mut sandbox = sandbox("a");
        sandbox.node_namespaces.pid = true;
        for (mode, expected) in [(0, Pid::Node), (1, Pid::Container), (2, Pid::Node)] {
            let mut config = config();
            security(&mut config).namespace_options.as_mut().unwrap().pid = mode;
            resources(&mut config).cpuset_cpus = "0-1".into();
            config.mounts[0].propagation = 2;
            config.devices = vec![cri::Device {
                container_path: "/dev/x".into(),
                host_path: "/dev/null".into(),
                permissions: "r".into(),
            }];
            let spec = container_spec(&config, &sandbox).unwrap();
            assert_eq!(spec.mounts[0].propagation, Propagation::Bidirectional);
            assert_eq!(spec.devices[0].permissions, "r");
            config.devices[0].permissions = "x".into();
            let error = container_spec(&config, &sandbox).unwrap_err().to_string();
            assert!(error.contains("devices[/dev/x].permissions"), "{error}");
            assert_eq!(spec.security.pid, expected);
            assert_eq!(spec.resources.cpuset_cpus, "0-1");
        }
    }

    fn config() -> cri::ContainerConfig {
        cri::ContainerConfig {
            metadata: Some(cri::ContainerMetadata { name: "c".into(), attempt: 1 }),
            image: Some(cri::ImageSpec { image: "busybox".into(), ..Default::default() }),
            mounts: vec![cri::Mount {
                container_path: "/data".into(),
                host_path: "/tmp".into(),
                selinux_relabel: true,
                ..Default::default()
            }],
            linux: Some(cri::LinuxContainerConfig {
                resources: Some(Default::default()),
                security_context: Some(cri::LinuxContainerSecurityContext {
                    namespace_options: Some(Default::default()),
                    ..Default::default()
                }),
            }),
            ..Default::default()
        }
    }

    fn security(config: &mut cri::ContainerConfig) -> &mut cri::LinuxContainerSecurityContext {
        config.linux.as_mut().unwrap().security_context.as_mut().unwrap()
    }

    fn resources(config: &mut cri::ContainerConfig) -> &mut cri::LinuxContainerResources {
        config.linux.as_mut().unwrap().resources.as_mut().unwrap()
    }

    fn image_mount(config: &mut cri::ContainerConfig) -> &mut cri::Mount {
        config.mounts[0] = cri::Mount {
            container_path: "/data".into(),
            readonly: true,
            image: Some(cri::ImageSpec { image: "busybox".into(), ..Default::default() }),
            ..Default::default()
        };
        &mut config.mounts[0]
    }

    type Case = (&'static str, fn(&mut cri::ContainerConfig));

    fn refused(cases: &[Case]) -> Vec<SandboxError> {
        let refused = |(name, change): &Case| {
            let mut config = config();
            change(&mut config);
            let error = container_spec(&config, &sandbox("a")).expect_err(name);
            assert!(error.to_string().contains(name), "{name}: {error}");
            error
        };
        cases.iter().map(refused).collect()
    }

    #[test]
    fn what_a_guest_cannot_do_is_refused_by_name() {
        let errors = refused(&[
            ("windows", |c| c.windows = Some(Default::default())),
            ("CDI_devices[a/b=c]", |c| {
                c.cdi_devices = vec![cri::CdiDevice { name: "a/b=c".into() }];
            }),
            ("mounts[/data].mount_options[dev]", |c| {
                c.mounts[0].mount_options = vec!["noexec".into(), "dev".into()];
            }),
            ("cpuset_cpus", |c| resources(c).cpuset_cpus = "0-1".into()),
            ("apparmor", |c| security(c).apparmor_profile = "localhost/x".into()),
            ("apparmor", |c| security(c).apparmor = Some(Default::default())),
            ("selinux_options", |c| {
                let user = "u".to_owned();
                let options = cri::SeLinuxOption { user, ..Default::default() };
                security(c).selinux_options = Some(options);
            }),
            ("namespace_options.network = NODE", |c| {
                security(c).namespace_options.as_mut().unwrap().network = 2;
            }),
            ("namespace_options.pid = NODE", |c| {
                security(c).namespace_options.as_mut().unwrap().pid = 2;
            }),
        ]);
        for error in errors {
            assert!(matches!(error, SandboxError::Unsupported { .. }), "{error}");
        }
    }

    #[test]
    fn values_that_mean_nothing_are_refused_by_name() {
        let errors = refused(&[
            ("metadata", |c| c.metadata = None),
            ("metadata.name", |c| c.metadata = Some(Default::default())),
            ("image.image", |c| c.image = None),
            ("working_dir", |c| c.working_dir = "tmp".into()),
            ("envs[A=]", |c| {
                c.envs = vec![cri::KeyValue { key: "A=".into(), value: "x".into() }];
            }),
            ("envs[A]", |c| {
                let value = vec![0xff].into();
                c.envs = vec![cri::KeyValue { key: "A".into(), value }];
            }),
            ("log_path", |c| c.log_path = "../x.log".into()),
            ("log_path", |c| c.log_path = "/x.log".into()),
            ("log_path", |c| c.log_path = "x".repeat(256)),
            ("working_dir", |c| c.working_dir = "/x".repeat(2048)),
            ("mounts[].container_path", |c| c.mounts[0].container_path = "/x".repeat(2048)),
            ("memory_limit_in_bytes", |c| resources(c).memory_limit_in_bytes = 1),
            ("mounts[data].container_path", |c| c.mounts[0].container_path = "data".into()),
            ("mounts[/data].host_path", |c| c.mounts[0].host_path.clear()),
            ("mounts[/data].image.image", |c| c.mounts[0].image = Some(Default::default())),
            ("mounts[/data].host_path: excludes image", |c| {
                image_mount(c).host_path = "/tmp".into();
            }),
            ("mounts[/data].readonly", |c| image_mount(c).readonly = false),
            ("mounts[/data].propagation", |c| image_mount(c).propagation = 1),
            ("mounts[/data].image_sub_path", |c| image_mount(c).image_sub_path = "/etc".into()),
            ("mounts[/data].image_sub_path", |c| image_mount(c).image_sub_path = "a/../b".into()),
            ("mounts[/data].image_sub_path: needs image", |c| {
                c.mounts[0].image_sub_path = "etc".into();
            }),
            ("mounts[/data].recursive_read_only: needs readonly", |c| {
                c.mounts[0].recursive_read_only = true;
            }),
            ("mounts[/data].recursive_read_only: needs propagation", |c| {
                let mount = &mut c.mounts[0];
                (mount.readonly, mount.recursive_read_only, mount.propagation) = (true, true, 1);
            }),
            ("mounts[/data].uidMappings", |c| {
                c.mounts[0].uid_mappings = vec![Default::default()];
            }),
            ("memory_limit_in_bytes", |c| resources(c).memory_limit_in_bytes = -1),
            ("oom_score_adj", |c| resources(c).oom_score_adj = 1001),
            ("run_as_user", |c| security(c).run_as_user = Some(cri::Int64Value { value: -1 })),
            ("run_as_user", |c| security(c).run_as_user = Some(cri::Int64Value { value: 1 << 32 })),
            ("run_as_group", |c| security(c).run_as_group = Some(cri::Int64Value { value: 5 })),
            ("supplemental_groups", |c| security(c).supplemental_groups = vec![-2]),
            ("target_id", |c| security(c).namespace_options.as_mut().unwrap().pid = 3),
            ("seccomp.localhost_ref", |c| {
                let localhost_ref = "profiles/x".to_owned();
                let profile = cri::SecurityProfile { profile_type: 2, localhost_ref };
                security(c).seccomp = Some(profile);
            }),
        ]);
        for error in errors {
            assert!(matches!(error, SandboxError::Invalid { .. }), "{error}");
        }
    }

    #[test]
    fn a_seccomp_profile_may_come_in_the_old_field() {
        use crate::security::Seccomp;
        for (path, expected) in [
            ("", Seccomp::Unconfined),
            ("unconfined", Seccomp::Unconfined),
            ("runtime/default", Seccomp::RuntimeDefault),
            ("localhost//p.json", Seccomp::Localhost("/p.json".into())),
        ] {
            let mut config = config();
            security(&mut config).seccomp_profile_path = path.into();
            let spec = container_spec(&config, &sandbox("a")).unwrap();
            assert_eq!(spec.security.seccomp, expected);
        }
    }
}
