//! A container's OCI runtime spec, from its [`ContainerSpec`], its sandbox and its image.
//!
//! Pure but for reading a Localhost seccomp profile and the node's devices. The agent fills in what only the guest knows:
//! the root's path, the user's ids, /dev/shm, and the pod's hosts, hostname and resolv.conf where
//! nothing is mounted over them.

use crate::{
    capabilities::capabilities,
    container::spec::{ContainerSpec, MountSpec, Pid, Propagation, Resources, Security},
    host_devices,
    sandbox::{
        SandboxError,
        spec::{Boundary, SandboxSpec},
    },
    seccomp,
    user_namespace::UserNamespace,
};
use oci_spec::{
    image::{Config, ImageConfiguration},
    runtime::{
        Linux, LinuxCpu, LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, LinuxHugepageLimit,
        LinuxIdMapping, LinuxIdMappingBuilder, LinuxMemory, LinuxNamespace, LinuxNamespaceType,
        LinuxResources, Mount, Process, Root, Spec,
    },
};

const OCI_VERSION: &str = "1.2.0";
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The spec that is sent to the shim; bind mounts have host paths in it.
pub fn oci_spec(
    container: &ContainerSpec,
    sandbox: &SandboxSpec,
    image: &ImageConfiguration,
) -> Result<Spec, SandboxError> {
    let config = image.config().clone().unwrap_or_default();
    let mut root = Root::default();
    root.set_readonly(Some(container.security.readonly_rootfs));
    let ids = container.security.user_namespace.map(id_mappings).transpose()?;
    let mut spec = Spec::default();
    spec.set_version(OCI_VERSION.to_owned())
        .set_root(Some(root))
        .set_process(Some(process(container, sandbox, &config)?))
        .set_hostname(None)
        .set_mounts(Some(mounts(container, ids.as_ref())))
        .set_linux(Some(linux(container, sandbox.boundary(), ids)?));
    Ok(spec)
}

fn process(
    container: &ContainerSpec,
    sandbox: &SandboxSpec,
    config: &Config,
) -> Result<Process, SandboxError> {
    let cwd = match (container.working_dir.as_str(), config.working_dir().as_deref()) {
        ("", None | Some("")) => "/",
        ("", Some(path)) => path,
        (path, _) => path,
    };
    let mut process = Process::default();
    process
        .set_terminal(Some(container.tty))
        .set_args(Some(args(container, config)?))
        .set_env(Some(env(container, sandbox, config)))
        .set_cwd(cwd.into())
        .set_capabilities(Some(capabilities(&container.security, sandbox.boundary())?))
        .set_rlimits(None)
        .set_no_new_privileges(Some(container.security.no_new_privileges))
        .set_oom_score_adj(Some(container.resources.oom_score_adj as i32));
    Ok(process)
}

/// The command line: CRI's command replaces the image's entry point *and* its arguments, CRI's args
/// alone replace only the arguments.
fn args(container: &ContainerSpec, config: &Config) -> Result<Vec<String>, SandboxError> {
    let mut line = container.command.clone();
    let mut args = container.args.clone();
    if line.is_empty() {
        line = config.entrypoint().clone().unwrap_or_default();
        if args.is_empty() {
            args = config.cmd().clone().unwrap_or_default();
        }
    }
    line.extend(args);
    if line.is_empty() {
        let why = "is empty, and so are args and the image's entry point and arguments";
        return Err(SandboxError::invalid("command", why));
    }
    Ok(line)
}

/// The image's variables, then the container's; the last word on a name wins and keeps its place.
fn env(container: &ContainerSpec, sandbox: &SandboxSpec, config: &Config) -> Vec<String> {
    let mut env = vec![PATH.to_owned(), format!("HOSTNAME={}", sandbox.effective_hostname())];
    if container.tty {
        set(&mut env, "TERM=xterm".to_owned());
    }
    for pair in config.env().iter().flatten() {
        set(&mut env, pair.clone());
    }
    for (name, value) in &container.env {
        set(&mut env, format!("{name}={value}"));
    }
    env
}

fn set(env: &mut Vec<String>, pair: String) {
    fn name(pair: &str) -> &str {
        pair.split_once('=').map_or(pair, |(name, _)| name)
    }
    match env.iter_mut().find(|other| name(other) == name(&pair)) {
        Some(other) => *other = pair,
        None => env.push(pair),
    }
}

/// The standard mounts that nothing replaces, then CRI's, parents before children.
fn mounts(container: &ContainerSpec, ids: Option<&Mappings>) -> Vec<Mount> {
    let replaced = |path: &std::path::Path| {
        container.mounts.iter().any(|mount| path == std::path::Path::new(&mount.container_path))
    };
    let mut mounts = standard_mounts(container.security.privileged);
    mounts.retain(|mount| !replaced(mount.destination()));
    let mut own_mounts: Vec<&MountSpec> = container.mounts.iter().collect();
    own_mounts
        .sort_by_key(|mount| std::path::Path::new(&mount.container_path).components().count());
    mounts.extend(own_mounts.into_iter().map(|mount| own(mount, ids)));
    mounts
}

/// A mount of the container's own.
fn own(spec: &MountSpec, ids: Option<&Mappings>) -> Mount {
    let mut mount = match &spec.image {
        // Its layers are the agent's to find.
        Some(image) => mount(&spec.container_path, "image", &image.name.image, &["ro"]),
        None if spec.huge_pages => {
            let access = if spec.readonly { "ro" } else { "rw" };
            mount(&spec.container_path, "hugetlbfs", &spec.host_path, &[access])
        }
        None => bind(spec),
    };
    if let Some(options) = mount.options_mut() {
        options.extend(spec.options.iter().cloned());
    }
    if let Some((uids, gids)) = ids.filter(|_| spec.id_mapped && !spec.huge_pages) {
        mount.set_uid_mappings(Some(uids.clone())).set_gid_mappings(Some(gids.clone()));
    }
    mount
}

fn bind(spec: &MountSpec) -> Mount {
    let access = match (spec.readonly, spec.recursive_readonly) {
        (_, true) => "rro",
        (true, false) => "ro",
        (false, false) => "rw",
    };
    let propagation = match spec.propagation {
        Propagation::Private => "rprivate",
        Propagation::HostToContainer => "rslave",
        Propagation::Bidirectional => "rshared",
    };
    mount(&spec.container_path, "bind", &spec.host_path, &["rbind", propagation, access])
}

/// The users' and the groups'.
type Mappings = (Vec<LinuxIdMapping>, Vec<LinuxIdMapping>);

fn id_mappings(ids: UserNamespace) -> Result<Mappings, SandboxError> {
    let mapping = |first| {
        LinuxIdMappingBuilder::default()
            .container_id(0u32)
            .host_id(first)
            .size(ids.length)
            .build()
            .map(|mapping| vec![mapping])
            .map_err(|error| SandboxError::step("write the OCI spec", error))
    };
    Ok((mapping(ids.uid)?, mapping(ids.gid)?))
}

fn standard_mounts(privileged: bool) -> Vec<Mount> {
    let access = if privileged { "rw" } else { "ro" };
    vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", access]),
        mount(
            "/sys/fs/cgroup",
            "cgroup",
            "cgroup",
            &["nosuid", "noexec", "nodev", "relatime", access],
        ),
    ]
}

fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> Mount {
    let mut mount = Mount::default();
    mount
        .set_destination(destination.into())
        .set_typ(Some(kind.to_owned()))
        .set_source(Some(source.into()))
        .set_options(Some(options.iter().map(|option| (*option).to_owned()).collect()));
    mount
}

fn linux(
    container: &ContainerSpec,
    boundary: Boundary,
    ids: Option<Mappings>,
) -> Result<Linux, SandboxError> {
    let security = &container.security;
    let paths = |list: &[String]| (!security.privileged).then(|| list.to_vec());
    let seccomp = if security.privileged {
        None
    } else {
        let effective = capabilities(security, boundary)?.effective().clone().unwrap_or_default();
        seccomp::profile(&security.seccomp, &effective)?
    };
    let (devices, rules) = devices(container, boundary)?;
    let slave = container.mounts.iter().any(|m| m.propagation == Propagation::HostToContainer);
    let mut linux = Linux::default();
    linux
        .set_namespaces(Some(namespaces(security)))
        .set_devices(Some(devices))
        .set_resources(Some(resources(&container.resources, rules, boundary)))
        .set_rootfs_propagation(slave.then(|| "rslave".to_owned()))
        .set_masked_paths(paths(&security.masked_paths))
        .set_readonly_paths(paths(&security.readonly_paths))
        .set_seccomp(seccomp);
    if let Some((uids, gids)) = ids {
        linux.set_uid_mappings(Some(uids)).set_gid_mappings(Some(gids));
    }
    Ok(linux)
}

/// Network, IPC and UTS are the pod's own: the guest's (docs/decisions/0004), or those the agent was
/// started in.
fn namespaces(security: &Security) -> Vec<LinuxNamespace> {
    let mut kinds = vec![LinuxNamespaceType::Mount, LinuxNamespaceType::Cgroup];
    if security.pid == Pid::Container {
        kinds.push(LinuxNamespaceType::Pid);
    }
    if security.user_namespace.is_some() {
        kinds.push(LinuxNamespaceType::User);
    }
    let namespace = |kind| {
        let mut namespace = LinuxNamespace::default();
        namespace.set_typ(kind);
        namespace
    };
    kinds.into_iter().map(namespace).collect()
}

/// Device nodes and who may use which. A guest has the node's block devices as disks. A privileged container on the node's own kernel has all of the
/// node's.
fn devices(
    container: &ContainerSpec,
    boundary: Boundary,
) -> Result<(Vec<LinuxDevice>, Vec<LinuxDeviceCgroup>), SandboxError> {
    let privileged = container.security.privileged;
    let mut rules = device_rules(privileged);
    let mut devices = Vec::new();
    for asked in &container.devices {
        let found = match boundary {
            Boundary::Host => host_devices::asked_for(asked)?,
            Boundary::Microvm => vec![host_devices::for_a_guest(asked)?],
        };
        // The numbers of a disk are the guest's to give, and its rule with them.
        let is_disk = |device: &LinuxDevice| {
            boundary == Boundary::Microvm && device.typ() == LinuxDeviceType::B
        };
        let rule = |device: &LinuxDevice| {
            let (kind, major, minor) = (device.typ(), device.major(), device.minor());
            device_rule(true, Some(kind), Some(major), Some(minor), &asked.permissions)
        };
        rules.extend(found.iter().filter(|device| !is_disk(device)).map(rule));
        devices.extend(found);
    }
    if privileged && boundary == Boundary::Host {
        devices.extend(host_devices::all()?);
    }
    Ok((devices, rules))
}

/// The limits as OCI has them.
pub fn resources(
    given: &Resources,
    devices: Vec<LinuxDeviceCgroup>,
    boundary: Boundary,
) -> LinuxResources {
    let positive = |value: i64| u64::try_from(value).ok().filter(|value| *value > 0);
    let mut cpu = LinuxCpu::default();
    cpu.set_shares(positive(given.cpu_shares))
        .set_period(positive(given.cpu_period))
        .set_quota((given.cpu_quota != 0).then_some(given.cpu_quota))
        .set_cpus(some_text(&given.cpuset_cpus))
        .set_mems(some_text(&given.cpuset_mems));
    let mut memory = LinuxMemory::default();
    memory.set_limit((given.memory_limit > 0).then_some(given.memory_limit));
    // A guest has no swap, so any limit of it holds.
    if boundary == Boundary::Host && given.memory_swap_limit != 0 {
        memory.set_swap(Some(given.memory_swap_limit));
    }
    let mut resources = LinuxResources::default();
    resources.set_cpu(Some(cpu)).set_memory(Some(memory)).set_devices(Some(devices));
    let huge = |(size, bytes): (&String, &u64)| {
        let mut limit = LinuxHugepageLimit::default();
        limit.set_page_size(size.clone()).set_limit(i64::try_from(*bytes).unwrap_or(i64::MAX));
        limit
    };
    if !given.huge_pages.is_empty() {
        resources.set_hugepage_limits(Some(given.huge_pages.iter().map(huge).collect()));
    }
    if !given.unified.is_empty() {
        resources.set_unified(Some(given.unified.clone().into_iter().collect()));
    }
    resources
}

fn some_text(text: &str) -> Option<String> {
    Some(text.to_owned()).filter(|text| !text.is_empty())
}

/// Making nodes is allowed, using them only for the harmless ones; a privileged container may use
/// every device of its guest, or of the node where it runs on its kernel.
fn device_rules(privileged: bool) -> Vec<LinuxDeviceCgroup> {
    use LinuxDeviceType::{B, C};
    if privileged {
        return vec![device_rule(true, None, None, None, "rwm")];
    }
    let mut rules = vec![
        device_rule(false, None, None, None, "rwm"),
        device_rule(true, Some(C), None, None, "m"),
        device_rule(true, Some(B), None, None, "m"),
    ];
    for (major, minor) in host_devices::EVERYWHERE {
        rules.push(device_rule(true, Some(C), Some(major), Some(minor), "rwm"));
    }
    // pts/N
    rules.push(device_rule(true, Some(C), Some(136), None, "rwm"));
    rules
}

fn device_rule(
    allow: bool,
    kind: Option<LinuxDeviceType>,
    major: Option<i64>,
    minor: Option<i64>,
    access: &str,
) -> LinuxDeviceCgroup {
    let mut rule = LinuxDeviceCgroup::default();
    rule.set_allow(allow)
        .set_typ(kind)
        .set_major(major)
        .set_minor(minor)
        .set_access(Some(access.to_owned()));
    rule
}

#[cfg(test)]
mod tests {
    #![allow(clippy::needless_pass_by_value, reason = "literals read better by value")]

    use super::*;
    use crate::{container::spec::DeviceSpec, sandbox::tests::spec as sandbox, security::Seccomp};

    fn image(json: &serde_json::Value) -> ImageConfiguration {
        let whole = serde_json::json!({
            "architecture": "amd64", "os": "linux", "config": json,
            "rootfs": {"type": "layers", "diff_ids": []},
        });
        serde_json::from_value(whole).unwrap()
    }

    fn words(list: &[&str]) -> Vec<String> {
        list.iter().map(|word| (*word).to_owned()).collect()
    }

    fn command(words_: &[&str]) -> ContainerSpec {
        ContainerSpec { command: words(words_), ..ContainerSpec::default() }
    }

    fn built(container: &ContainerSpec) -> Spec {
        oci_spec(container, &sandbox("a"), &image(&serde_json::json!({}))).unwrap()
    }

    #[test]
    fn command_and_args_follow_the_rules_of_kubernetes() {
        let image = image(&serde_json::json!({"Entrypoint": ["e"], "Cmd": ["c"]}));
        for (command, args, expected) in [
            (&[][..], &[][..], &["e", "c"][..]),
            (&["x"], &[], &["x"]),
            (&[], &["y"], &["e", "y"]),
            (&["x"], &["y"], &["x", "y"]),
        ] {
            let container = ContainerSpec {
                command: words(command),
                args: words(args),
                ..ContainerSpec::default()
            };
            let spec = oci_spec(&container, &sandbox("a"), &image).unwrap();
            let line = spec.process().as_ref().unwrap().args().clone().unwrap();
            assert_eq!(line, words(expected), "{command:?} {args:?}");
        }
    }

    #[test]
    fn nothing_to_run_is_refused() {
        let empty = image(&serde_json::json!({}));
        let error = oci_spec(&command(&[]), &sandbox("a"), &empty).unwrap_err();
        assert!(error.to_string().starts_with("command"), "{error}");
    }

    #[test]
    fn the_last_word_on_a_variable_wins() {
        let image = image(&serde_json::json!({"Env": ["A=1", "PATH=/x", "B=1"]}));
        let mut container = command(&["sh"]);
        container.env = vec![("B".into(), "2=3".into()), ("C".into(), String::new())];
        container.tty = true;
        let spec = oci_spec(&container, &sandbox("a"), &image).unwrap();
        let env = spec.process().as_ref().unwrap().env().clone().unwrap();
        assert_eq!(env, words(&["PATH=/x", "HOSTNAME=a", "TERM=xterm", "A=1", "B=2=3", "C="]));
    }

    #[test]
    fn working_directory_is_the_containers_then_the_images_then_the_root() {
        for (own, images, expected) in [("/w", "/i", "/w"), ("", "/i", "/i"), ("", "", "/")] {
            let image = image(&serde_json::json!({"WorkingDir": images}));
            let mut container = command(&["sh"]);
            container.working_dir = own.into();
            let spec = oci_spec(&container, &sandbox("a"), &image).unwrap();
            assert_eq!(spec.process().as_ref().unwrap().cwd().to_str(), Some(expected));
        }
    }

    fn bind_at(path: &str, readonly: bool, propagation: Propagation) -> MountSpec {
        MountSpec {
            container_path: path.into(),
            host_path: "/h".into(),
            image: None,
            readonly,
            recursive_readonly: false,
            selinux_relabel: false,
            id_mapped: false,
            huge_pages: false,
            propagation,
            options: Vec::new(),
        }
    }

    #[test]
    fn mounts_go_parents_first_and_replace_the_standard_ones() {
        let mut container = command(&["sh"]);
        container.mounts = vec![
            bind_at("/a/b/c", true, Propagation::Private),
            bind_at("/a", false, Propagation::HostToContainer),
            bind_at("/sys/", false, Propagation::Private),
            MountSpec {
                recursive_readonly: true,
                options: words(&["noexec"]),
                ..bind_at("/z", true, Propagation::Private)
            },
        ];
        let spec = built(&container);
        let mounts = spec.mounts().clone().unwrap();
        let paths: Vec<_> =
            mounts.iter().map(|mount| mount.destination().to_str().unwrap()).collect();
        assert_eq!(
            paths,
            [
                "/proc",
                "/dev",
                "/dev/pts",
                "/dev/mqueue",
                "/sys/fs/cgroup",
                "/a",
                "/sys/",
                "/z",
                "/a/b/c"
            ]
        );
        assert_eq!(mounts[5].options().clone().unwrap(), words(&["rbind", "rslave", "rw"]));
        assert_eq!(
            mounts[7].options().clone().unwrap(),
            words(&["rbind", "rprivate", "rro", "noexec"])
        );
        assert_eq!(mounts[8].options().clone().unwrap(), words(&["rbind", "rprivate", "ro"]));
        let linux = spec.linux().clone().unwrap();
        assert_eq!(linux.rootfs_propagation().as_deref(), Some("rslave"));
    }

    #[test]
    fn a_user_namespace_maps_the_ids_of_the_container_and_of_the_mounts_that_want_it() {
        let mut container = command(&["sh"]);
        let ids = UserNamespace { uid: 1000, gid: 2000, length: 65536 };
        container.security.user_namespace = Some(ids);
        container.mounts = vec![
            MountSpec { id_mapped: true, ..bind_at("/a", false, Propagation::Private) },
            bind_at("/b", false, Propagation::Private),
        ];
        let spec = built(&container);
        let linux = spec.linux().clone().unwrap();
        let namespaces = linux.namespaces().clone().unwrap();
        assert!(namespaces.iter().any(|n| n.typ() == LinuxNamespaceType::User));
        let gids = linux.gid_mappings().clone().unwrap();
        assert_eq!((gids[0].container_id(), gids[0].host_id(), gids[0].size()), (0, 2000, 65536));
        let mounts = spec.mounts().clone().unwrap();
        let [.., a, b] = &mounts[..] else { panic!("{mounts:?}") };
        assert_eq!(a.uid_mappings().as_ref().unwrap()[0].host_id(), 1000);
        assert_eq!(b.uid_mappings(), &None);
    }

    #[test]
    fn privileged_lifts_what_hides_and_forbids() {
        let mut container = command(&["sh"]);
        container.security = Security {
            masked_paths: words(&["/proc/kcore"]),
            readonly_paths: words(&["/proc/sys"]),
            seccomp: Seccomp::RuntimeDefault,
            ..Security::default()
        };
        let plain = built(&container).linux().clone().unwrap();
        assert_eq!(plain.masked_paths().clone().unwrap(), words(&["/proc/kcore"]));
        assert_eq!(plain.readonly_paths().clone().unwrap(), words(&["/proc/sys"]));
        assert!(plain.seccomp().is_some());
        assert!(!plain.resources().as_ref().unwrap().devices().as_ref().unwrap()[0].allow());
        container.security.privileged = true;
        let spec = built(&container);
        let linux = spec.linux().clone().unwrap();
        assert_eq!((linux.masked_paths(), linux.readonly_paths()), (&None, &None));
        assert!(linux.seccomp().is_none());
        assert!(linux.resources().as_ref().unwrap().devices().as_ref().unwrap()[0].allow());
        let sys = &spec.mounts().as_ref().unwrap()[4];
        assert!(sys.options().as_ref().unwrap().contains(&"rw".to_owned()));
    }

    #[test]
    fn devices_of_the_node_are_nodes_with_rules_and_all_of_them_when_privileged() {
        let mut container = command(&["sh"]);
        container.devices = vec![DeviceSpec {
            host_path: "/dev/null".into(),
            container_path: "/dev/nothing".into(),
            permissions: "r".into(),
        }];
        let mut sandbox = sandbox("a");
        sandbox.node_namespaces.ipc = true;
        let linux = |container: &ContainerSpec| {
            let spec = oci_spec(container, &sandbox, &image(&serde_json::json!({})));
            spec.unwrap().linux().clone().unwrap()
        };
        let plain = linux(&container);
        assert_eq!(plain.devices().as_ref().unwrap().len(), 1);
        let rules = plain.resources().as_ref().unwrap().devices().clone().unwrap();
        assert_eq!(rules.last().unwrap().access().as_deref(), Some("r"));
        container.security.privileged = true;
        assert!(linux(&container).devices().as_ref().unwrap().len() > 2);
    }

    #[test]
    fn limits_reach_the_guests_cgroup() {
        let mut container = command(&["sh"]);
        container.resources = Resources {
            cpu_period: 100_000,
            cpu_quota: 20_000,
            cpu_shares: 512,
            memory_limit: 15 << 20,
            oom_score_adj: 1000,
            unified: [("pids.max".to_owned(), "10".to_owned())].into(),
            ..Resources::default()
        };
        let spec = built(&container);
        assert_eq!(spec.process().as_ref().unwrap().oom_score_adj(), Some(1000));
        let resources = spec.linux().as_ref().unwrap().resources().clone().unwrap();
        let cpu = resources.cpu().clone().unwrap();
        assert_eq!(
            (cpu.shares(), cpu.quota(), cpu.period()),
            (Some(512), Some(20_000), Some(100_000))
        );
        assert_eq!(resources.memory().as_ref().unwrap().limit(), Some(15 << 20));
        assert_eq!(resources.unified().as_ref().unwrap()["pids.max"], "10");
    }

    #[test]
    fn swap_is_limited_where_there_may_be_some() {
        let given = Resources { memory_limit: 5, memory_swap_limit: 7, ..Resources::default() };
        for (boundary, swap) in [(Boundary::Microvm, None), (Boundary::Host, Some(7))] {
            let memory = resources(&given, Vec::new(), boundary).memory().unwrap();
            assert_eq!((memory.limit(), memory.swap()), (Some(5), swap), "{boundary}");
        }
    }

    #[test]
    fn only_a_container_pid_namespace_is_a_new_one() {
        for (pid, own) in
            [(Pid::Pod, false), (Pid::Container, true), (Pid::Target("x".into()), false)]
        {
            let mut container = command(&["sh"]);
            container.security.pid = pid;
            let linux = built(&container).linux().clone().unwrap();
            let namespaces = linux.namespaces().clone().unwrap();
            assert_eq!(namespaces.iter().any(|n| n.typ() == LinuxNamespaceType::Pid), own);
            assert!(!namespaces.iter().any(|n| n.typ() == LinuxNamespaceType::Network));
        }
    }
}
