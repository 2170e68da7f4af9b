//! CRI's PodSandboxConfig to a [`SandboxSpec`]: pure but for the node's name, and the place where
//! everything is refused that a pod cannot have.

use crate::{
    config::Handler,
    sandbox::{
        SandboxError,
        spec::{Dns, HostLimits, NodeNamespaces, PortMapping, Protocol, SandboxName, SandboxSpec},
    },
    security,
    user_namespace::UserNamespace,
    vm_size::{SizeRules, vm_size},
};
use a3s_box_api::cri;
use std::collections::BTreeMap;

/// Annotation: the CNI network to join instead of the default one.
pub const NETWORK: &str = "a3s.box/network";

const HOSTNAME_MAX: usize = 64;
/// Kubernetes' own names have at most 253 bytes.
const NAME_MAX: usize = 1024;
/// The kernel takes no longer ones.
const SYSCTL_MAX: usize = 4095;

/// The spec of the sandbox that `config` asks for under the runtime handler.
///
/// `security_context`'s user, groups, read-only rootfs and seccomp profile describe the pod's pause
/// process, which a sandbox does not have here; they hold by there being nothing to apply them to.
pub fn sandbox_spec(
    config: &cri::PodSandboxConfig,
    handler: (&str, &Handler),
    rules: &SizeRules,
) -> Result<SandboxSpec, SandboxError> {
    if config.windows.is_some() {
        return Err(SandboxError::unsupported("windows", "this node runs Linux pods"));
    }
    let linux = config.linux.clone().unwrap_or_default();
    let security = linux.security_context.clone().unwrap_or_default();
    let node_namespaces = security::node_namespaces(security.namespace_options.as_ref(), handler)?;
    let user_namespace = UserNamespace::asked(security.namespace_options.as_ref())?;
    refuse_security(&security)?;
    if let Some(resources) = &linux.resources {
        refuse_resources("linux.resources", resources)?;
    }
    if let Some(overhead) = &linux.overhead {
        refuse_overhead("linux.overhead", overhead)?;
    }
    let annotations: BTreeMap<_, _> = config.annotations.clone().into_iter().collect();
    let size = vm_size(linux.resources.as_ref(), linux.overhead.as_ref(), &annotations, rules)?;
    Ok(SandboxSpec {
        name: name(config.metadata.as_ref())?,
        runtime_handler: handler.0.to_owned(),
        node_namespaces,
        hostname: hostname(&config.hostname, node_namespaces)?,
        log_directory: absolute_or_empty("log_directory", &config.log_directory)?,
        dns: config.dns_config.as_ref().map(dns).transpose()?,
        port_mappings: port_mappings(&config.port_mappings)?,
        labels: config.labels.clone().into_iter().collect(),
        network: network(&annotations, node_namespaces)?,
        annotations,
        cgroup_parent: cgroup_parent(&linux.cgroup_parent)?,
        sysctls: sysctls(&linux)?,
        shared_pid: shared_pid(&security)?,
        user_namespace,
        privileged: security.privileged,
        host_limits: host_limits(linux.resources.as_ref(), linux.overhead.as_ref()),
        size,
    })
}

fn refuse_security(security: &cri::LinuxSandboxSecurityContext) -> Result<(), SandboxError> {
    const AT: &str = "linux.security_context";
    security::no_selinux(&format!("{AT}.selinux_options"), security.selinux_options.as_ref())?;
    security::no_apparmor(&format!("{AT}.apparmor"), security.apparmor.as_ref(), "")?;
    let seccomp = format!("{AT}.seccomp");
    security::seccomp(&seccomp, security.seccomp.as_ref(), &security.seccomp_profile_path)?;
    if security.run_as_group.is_some() && security.run_as_user.is_none() {
        return Err(SandboxError::invalid(format!("{AT}.run_as_group"), "needs run_as_user"));
    }
    Ok(())
}

pub(crate) fn refuse_resources(
    field: &str,
    resources: &cri::LinuxContainerResources,
) -> Result<(), SandboxError> {
    security::no_huge_pages(field, resources)?;
    if let Some(key) = resources.unified.keys().next() {
        return Err(SandboxError::unsupported(
            format!("{field}.unified[{key}]"),
            "the pod's own cgroup is kubelet's to set",
        ));
    }
    if !(-1000..=1000).contains(&resources.oom_score_adj) {
        return Err(SandboxError::invalid(
            format!("{field}.oom_score_adj"),
            "is not from -1000 to 1000",
        ));
    }
    Ok(())
}

/// An overhead is an amount, which is added to the resources'.
pub(crate) fn refuse_overhead(
    field: &str,
    overhead: &cri::LinuxContainerResources,
) -> Result<(), SandboxError> {
    refuse_resources(field, overhead)?;
    let places = [
        ("oom_score_adj", overhead.oom_score_adj == 0),
        ("cpuset_cpus", overhead.cpuset_cpus.is_empty()),
        ("cpuset_mems", overhead.cpuset_mems.is_empty()),
    ];
    match places.iter().find(|(_, unset)| !unset) {
        Some((name, _)) => {
            let why = "is no amount that an overhead could add: set it in resources";
            Err(SandboxError::unsupported(format!("{field}.{name}"), why))
        }
        None => Ok(()),
    }
}

fn name(metadata: Option<&cri::PodSandboxMetadata>) -> Result<SandboxName, SandboxError> {
    let Some(metadata) = metadata else {
        return Err(SandboxError::invalid("metadata", "is missing"));
    };
    let parts =
        [("name", &metadata.name), ("uid", &metadata.uid), ("namespace", &metadata.namespace)];
    for (field, value) in parts {
        let bad = |why: String| Err(SandboxError::invalid(format!("metadata.{field}"), why));
        if value.is_empty() {
            return bad("is empty".to_owned());
        }
        // CNI plugins are told it in an environment variable, and again when the pod ends.
        if value.len() > NAME_MAX {
            return bad(format!("has {} bytes, more than {NAME_MAX}", value.len()));
        }
        if value.contains([';', '=', '\0']) {
            return bad(format!("{value:?} has ; or =, which CNI plugins cannot be told"));
        }
    }
    Ok(SandboxName {
        namespace: metadata.namespace.clone(),
        name: metadata.name.clone(),
        uid: metadata.uid.clone(),
        attempt: metadata.attempt,
    })
}

/// In the node's network a pod is called as the node, whatever was asked for.
fn hostname(text: &str, nodes: NodeNamespaces) -> Result<String, SandboxError> {
    if nodes.network {
        return Ok(rustix::system::uname().nodename().to_string_lossy().into_owned());
    }
    let good = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'.' | b'_');
    if text.len() > HOSTNAME_MAX || !text.bytes().all(good) {
        let why = format!("is not a host name of at most {HOSTNAME_MAX} letters, digits, - . _");
        return Err(SandboxError::invalid("hostname", why));
    }
    Ok(text.to_owned())
}

/// A path without `..`, or nothing.
pub fn absolute_or_empty(field: &str, path: &str) -> Result<String, SandboxError> {
    let climbs = path.split('/').any(|part| part == "..");
    if let Some(why) = too_long(path) {
        return Err(SandboxError::invalid(field, why));
    }
    if path.is_empty() || (path.starts_with('/') && !climbs && !path.contains('\0')) {
        Ok(path.to_owned())
    } else {
        Err(SandboxError::invalid(field, format!("{path:?} is not an absolute path without ..")))
    }
}

/// Why the kernel knows no path like that; `None` when it may.
pub fn too_long(path: &str) -> Option<String> {
    const PATH_MAX: usize = 4095;
    const PART_MAX: usize = 255;
    let part = path.split('/').map(str::len).max().unwrap_or_default();
    match (path.len() > PATH_MAX, part > PART_MAX) {
        (true, _) => Some(format!("has {} bytes, more than {PATH_MAX}", path.len())),
        (false, true) => Some(format!("has a part of {part} bytes, more than {PART_MAX}")),
        (false, false) => None,
    }
}

/// `/kubepods/pod1` or, from the systemd driver, `kubepods-pod1.slice`.
fn cgroup_parent(path: &str) -> Result<String, SandboxError> {
    if path.starts_with('/') || path.is_empty() {
        return absolute_or_empty("linux.cgroup_parent", path);
    }
    if path.ends_with(".slice") && !path.contains(['/', '\0']) {
        return Ok(path.to_owned());
    }
    let why = format!("{path:?} is neither an absolute path nor the name of a slice");
    Err(SandboxError::invalid("linux.cgroup_parent", why))
}

fn dns(config: &cri::DnsConfig) -> Result<Dns, SandboxError> {
    let lists = [
        ("servers", &config.servers),
        ("searches", &config.searches),
        ("options", &config.options),
    ];
    for (field, list) in lists {
        if let Some(word) = list.iter().find(|word| word.chars().any(char::is_whitespace)) {
            let why = format!("{word:?} holds white space");
            return Err(SandboxError::invalid(format!("dns_config.{field}"), why));
        }
    }
    Ok(Dns {
        servers: config.servers.clone(),
        searches: config.searches.clone(),
        options: config.options.clone(),
    })
}

/// Mappings without a host port map nothing: kubelet sends every container port.
fn port_mappings(mappings: &[cri::PortMapping]) -> Result<Vec<PortMapping>, SandboxError> {
    let port = |field: &str, value: i32| {
        u16::try_from(value).map_err(|_| {
            let why = format!("{value} is not a port");
            SandboxError::invalid(format!("port_mappings.{field}"), why)
        })
    };
    let mut mapped = Vec::new();
    for mapping in mappings {
        let (container_port, host_port) = (
            port("container_port", mapping.container_port)?,
            port("host_port", mapping.host_port)?,
        );
        let host_ip = match mapping.host_ip.as_str() {
            "" => None,
            text => Some(text.parse().map_err(|_| {
                SandboxError::invalid("port_mappings.host_ip", format!("{text:?} is no address"))
            })?),
        };
        let protocol = match mapping.protocol() {
            cri::Protocol::Tcp => Protocol::Tcp,
            cri::Protocol::Udp => Protocol::Udp,
            cri::Protocol::Sctp => Protocol::Sctp,
        };
        if host_port != 0 {
            mapped.push(PortMapping { protocol, container_port, host_port, host_ip });
        }
    }
    Ok(mapped)
}

fn network(
    annotations: &BTreeMap<String, String>,
    nodes: NodeNamespaces,
) -> Result<Option<String>, SandboxError> {
    match annotations.get(NETWORK) {
        Some(_) if nodes.network => {
            let why = "a pod in the node's network joins no other";
            Err(SandboxError::invalid(format!("annotations[{NETWORK}]"), why))
        }
        Some(name) if name.is_empty() => {
            Err(SandboxError::invalid(format!("annotations[{NETWORK}]"), "is empty"))
        }
        other => Ok(other.cloned()),
    }
}

fn sysctls(linux: &cri::LinuxPodSandboxConfig) -> Result<BTreeMap<String, String>, SandboxError> {
    for (key, value) in &linux.sysctls {
        let good = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'-' | b'_' | b'/');
        if key.is_empty() || key.contains("..") || key.starts_with('/') || !key.bytes().all(good) {
            return Err(SandboxError::invalid(format!("linux.sysctls[{key}]"), "is no sysctl"));
        }
        if value.len() > SYSCTL_MAX {
            let why = format!("has {} bytes, more than {SYSCTL_MAX}", value.len());
            return Err(SandboxError::invalid(format!("linux.sysctls[{key}]"), why));
        }
    }
    Ok(linux.sysctls.clone().into_iter().collect())
}

fn shared_pid(security: &cri::LinuxSandboxSecurityContext) -> Result<bool, SandboxError> {
    let mode = security.namespace_options.as_ref().map_or(cri::NamespaceMode::Pod, |o| o.pid());
    security::no_target(security.namespace_options.as_ref())?;
    match mode {
        cri::NamespaceMode::Pod => Ok(true),
        cri::NamespaceMode::Container | cri::NamespaceMode::Node => Ok(false),
        cri::NamespaceMode::Target => Err(SandboxError::invalid(
            "linux.security_context.namespace_options.pid",
            format!("{} is not a sandbox's", mode.as_str_name()),
        )),
    }
}

pub(crate) fn host_limits(
    resources: Option<&cri::LinuxContainerResources>,
    overhead: Option<&cri::LinuxContainerResources>,
) -> HostLimits {
    let Some(resources) = resources else { return HostLimits::default() };
    let overhead = overhead.cloned().unwrap_or_default();
    let period = if resources.cpu_period > 0 { resources.cpu_period } else { 100_000 };
    let overhead_period = if overhead.cpu_period > 0 { overhead.cpu_period } else { 100_000 };
    let extra = overhead.cpu_quota.max(0).saturating_mul(period) / overhead_period;
    let quota = resources.cpu_quota;
    let shares = resources.cpu_shares.saturating_add(overhead.cpu_shares.max(0));
    HostLimits {
        cpu_shares: if resources.cpu_shares > 0 { shares.clamp(2, 262_144) as u64 } else { 0 },
        cpu_quota: if quota > 0 { quota.saturating_add(extra) } else { 0 },
        cpu_period: period as u64,
        cpuset_cpus: resources.cpuset_cpus.clone(),
        cpuset_mems: resources.cpuset_mems.clone(),
        oom_score_adj: resources.oom_score_adj as i32,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::type_complexity, reason = "tables of a name and a change")]

    use super::*;
    use crate::{config::HostNamespaces, sandbox::spec::Boundary};
    use a3s_box_types::shim::VmSize;

    const SIZES: SizeRules = SizeRules {
        default: VmSize { vcpus: 1, memory_mb: 512 },
        min_memory_mb: 128,
        max: VmSize { vcpus: 4, memory_mb: 4096 },
        guest_overhead_mb: 64,
    };

    fn config() -> cri::PodSandboxConfig {
        cri::PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata {
                name: "web".into(),
                uid: "u".into(),
                namespace: "default".into(),
                attempt: 2,
            }),
            linux: Some(cri::LinuxPodSandboxConfig {
                security_context: Some(cri::LinuxSandboxSecurityContext {
                    namespace_options: Some(cri::NamespaceOption::default()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn linux(config: &mut cri::PodSandboxConfig) -> &mut cri::LinuxPodSandboxConfig {
        config.linux.as_mut().unwrap()
    }

    fn security(config: &mut cri::PodSandboxConfig) -> &mut cri::LinuxSandboxSecurityContext {
        linux(config).security_context.as_mut().unwrap()
    }

    fn namespaces(config: &mut cri::PodSandboxConfig) -> &mut cri::NamespaceOption {
        security(config).namespace_options.as_mut().unwrap()
    }

    const REFUSE: Handler = Handler { host_namespaces: HostNamespaces::Refuse };
    const ALLOW: Handler = Handler { host_namespaces: HostNamespaces::Allow };

    type Case = (&'static str, fn(&mut cri::PodSandboxConfig));

    fn error(change: impl FnOnce(&mut cri::PodSandboxConfig)) -> SandboxError {
        let mut config = config();
        change(&mut config);
        sandbox_spec(&config, ("a3s-box", &REFUSE), &SIZES).unwrap_err()
    }

    #[test]
    fn what_a_virtual_machine_cannot_share_is_refused_by_name() {
        const NODE: i32 = cri::NamespaceMode::Node as i32;
        let cases: [Case; 9] = [
            ("overhead.oom_score_adj", |c| {
                linux(c).overhead =
                    Some(cri::LinuxContainerResources { oom_score_adj: 1, ..Default::default() });
            }),
            ("handlers.a3s-box.host_namespaces", |c| namespaces(c).network = NODE),
            ("namespace_options.pid = NODE", |c| namespaces(c).pid = NODE),
            ("namespace_options.ipc = NODE", |c| namespaces(c).ipc = NODE),
            ("selinux_options", |c| {
                let level = "s0".to_owned();
                security(c).selinux_options =
                    Some(cri::SeLinuxOption { level, ..Default::default() });
            }),
            ("apparmor", |c| security(c).apparmor = Some(cri::SecurityProfile::default())),
            ("windows", |c| c.windows = Some(Default::default())),
            ("hugepage_limits[2MB]", |c| {
                let page_size = "2MB".to_owned();
                linux(c).resources = Some(cri::LinuxContainerResources {
                    hugepage_limits: vec![cri::HugepageLimit { page_size, limit: 1 }],
                    ..Default::default()
                });
            }),
            ("unified[memory.min]", |c| {
                linux(c).overhead = Some(cri::LinuxContainerResources {
                    unified: [("memory.min".to_owned(), "1".to_owned())].into(),
                    ..Default::default()
                });
            }),
        ];
        for (name, change) in cases {
            let error = error(change);
            assert!(matches!(error, SandboxError::Unsupported { .. }), "{error}");
            assert!(error.to_string().contains(name), "{name}: {error}");
        }
    }

    #[test]
    fn values_that_mean_nothing_are_refused_by_name() {
        let cases: [Case; 19] = [
            ("namespace_options.target_id", |c| namespaces(c).target_id = "t".into()),
            ("metadata", |c| c.metadata = None),
            ("metadata.name", |c| c.metadata.as_mut().unwrap().name.clear()),
            ("metadata.uid", |c| c.metadata.as_mut().unwrap().uid.clear()),
            ("metadata.uid", |c| c.metadata.as_mut().unwrap().uid = "a;b=c".into()),
            ("metadata.name", |c| c.metadata.as_mut().unwrap().name = "x".repeat(1 << 20)),
            ("log_directory", |c| c.log_directory = format!("/{}", "x".repeat(256))),
            ("linux.sysctls[kernel.x]", |c| {
                linux(c).sysctls = [("kernel.x".to_owned(), "x".repeat(4096))].into();
            }),
            ("metadata.namespace", |c| c.metadata.as_mut().unwrap().namespace.clear()),
            ("hostname", |c| c.hostname = "a b".into()),
            ("hostname", |c| c.hostname = "x".repeat(65)),
            ("log_directory", |c| c.log_directory = "var/log".into()),
            ("log_directory", |c| c.log_directory = "/var/../etc".into()),
            ("port_mappings.host_port", |c| {
                c.port_mappings =
                    vec![cri::PortMapping { host_port: 70_000, ..Default::default() }];
            }),
            ("dns_config.servers", |c| {
                let servers = vec!["1.1.1.1\nnameserver 2.2.2.2".to_owned()];
                c.dns_config = Some(cri::DnsConfig { servers, ..Default::default() });
            }),
            ("linux.cgroup_parent", |c| linux(c).cgroup_parent = "kubepods".into()),
            ("linux.sysctls[../../x]", |c| {
                linux(c).sysctls = [("../../x".to_owned(), "1".to_owned())].into();
            }),
            ("userns_options", |c| namespaces(c).userns_options = Some(Default::default())),
            ("run_as_group", |c| security(c).run_as_group = Some(cri::Int64Value { value: 1 })),
        ];
        for (name, change) in cases {
            let error = error(change);
            assert!(matches!(error, SandboxError::Invalid { .. }), "{error}");
            assert!(error.to_string().contains(name), "{name}: {error}");
        }
    }

    #[test]
    fn everything_kubelet_sends_for_an_ordinary_pod_is_taken_over() {
        let mut config = config();
        config.hostname = "web".into();
        config.log_directory = "/var/log/pods/x".into();
        config.port_mappings = vec![
            cri::PortMapping { container_port: 80, host_port: 8080, ..Default::default() },
            cri::PortMapping { container_port: 81, ..Default::default() },
        ];
        config.annotations = [(NETWORK.to_owned(), "blue".to_owned())].into();
        security(&mut config).seccomp = Some(cri::SecurityProfile::default());
        namespaces(&mut config).pid = cri::NamespaceMode::Container.into();
        namespaces(&mut config).userns_options = Some(cri::UserNamespace {
            mode: cri::NamespaceMode::Node.into(),
            ..Default::default()
        });
        linux(&mut config).cgroup_parent = "/kubepods/burstable/pod1".into();
        linux(&mut config).resources = Some(cri::LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 150_000,
            cpu_shares: 512,
            memory_limit_in_bytes: 200 << 20,
            hugepage_limits: vec![cri::HugepageLimit { page_size: "2MB".into(), limit: 0 }],
            ..Default::default()
        });
        let spec = sandbox_spec(&config, ("a3s-box", &REFUSE), &SIZES).unwrap();
        assert_eq!(spec.name.attempt, 2);
        assert_eq!(spec.network.as_deref(), Some("blue"));
        assert_eq!(spec.port_mappings.len(), 1, "a mapping without a host port maps nothing");
        assert!(!spec.shared_pid);
        assert_eq!(spec.size, VmSize { vcpus: 2, memory_mb: 384 });
        assert_eq!((spec.host_limits.cpu_quota, spec.host_limits.cpu_shares), (150_000, 512));
    }

    #[test]
    fn a_pod_that_shares_a_namespace_of_the_node_runs_on_its_kernel() {
        let node = cri::NamespaceMode::Node.into();
        let mut config = config();
        config.hostname = "web".into();
        let spec = sandbox_spec(&config, ("", &ALLOW), &SIZES).unwrap();
        assert_eq!(spec.boundary(), Boundary::Microvm);
        namespaces(&mut config).pid = node;
        let spec = sandbox_spec(&config, ("", &ALLOW), &SIZES).unwrap();
        assert_eq!((spec.boundary(), spec.shared_pid), (Boundary::Host, false));
        assert_eq!(spec.hostname, "web");
        namespaces(&mut config).network = node;
        let spec = sandbox_spec(&config, ("", &ALLOW), &SIZES).unwrap();
        let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
        assert_eq!(spec.hostname, name.trim());
        config.annotations = [(NETWORK.to_owned(), "blue".to_owned())].into();
        let error = sandbox_spec(&config, ("", &ALLOW), &SIZES).unwrap_err().to_string();
        assert!(error.contains(NETWORK), "{error}");
    }

    #[test]
    fn a_slice_of_the_systemd_driver_is_a_cgroup_parent() {
        let mut config = config();
        linux(&mut config).cgroup_parent = "kubepods-pod1.slice".into();
        let spec = sandbox_spec(&config, ("", &ALLOW), &SIZES).unwrap();
        assert_eq!(spec.cgroup_parent, "kubepods-pod1.slice");
        assert!(spec.shared_pid);
    }
}
