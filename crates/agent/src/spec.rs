//! From the OCI runtime spec of a container to a plan, limits and rules. Pure. A field that cannot
//! be honoured is refused by its name; nothing is accepted and ignored.

use crate::{
    config::{Boundary, Config},
    error::Error,
    huge_pages,
    limits::{self, Limits},
    mounts,
    plan::{Capabilities, Device, DeviceKind, IdMap, Process, Rlimit},
};
use a3s_box_sys::{
    clone3::namespace,
    device_filter::{self, Kind, Rule, access},
    mount_attr::propagation,
};
use oci_spec::runtime::{self as oci, LinuxDeviceType, LinuxNamespaceType, Spec};
use std::path::PathBuf;

/// What a spec asks for, besides the rootfs and the user.
#[derive(Debug)]
pub struct Container {
    /// New namespaces of its own (`clone3::namespace` bits), PID left out.
    pub namespaces: u64,
    /// It is in the pod's user namespace, which has these ids.
    pub ids: Option<IdMap>,
    /// Limits.
    pub limits: Limits,
    /// Bytes of the guest's huge pages that it may use.
    pub huge_pages: Option<u64>,
    /// Device rules.
    pub rules: Vec<Rule>,
    /// Seccomp profile.
    pub seccomp: Option<oci::LinuxSeccomp>,
    /// Mounts in order.
    pub mounts: Vec<crate::plan::Mount>,
    /// /dev is the container's own.
    pub standard_devices: bool,
    /// Device nodes.
    pub devices: Vec<Device>,
    /// Read-only root.
    pub readonly_root: bool,
    /// Propagation of the root mount.
    pub root_propagation: u64,
    /// Hidden paths.
    pub masked: Vec<PathBuf>,
    /// Read-only paths.
    pub readonly: Vec<PathBuf>,
    /// Only with a UTS namespace of its own.
    pub hostname: Option<String>,
    /// Only with a UTS namespace of its own.
    pub domainname: Option<String>,
    /// In its own namespaces.
    pub sysctls: Vec<(String, String)>,
    /// What to run.
    pub process: Process,
}

/// Reads a spec.
pub fn read(json: &[u8], config: &Config) -> Result<Container, Error> {
    let spec: Spec = serde_json::from_slice(json)
        .map_err(|error| Error::invalid(format!("oci_spec: {error}")))?;
    let none = oci::Linux::default();
    let linux = spec.linux().as_ref().unwrap_or(&none);
    refuse(&spec, linux)?;

    let namespaces = namespaces(linux)?;
    let ids = ids(linux)?;
    let own_uts = namespaces & namespace::UTS != 0;
    if !own_uts && spec.domainname().is_some() {
        return Err(Error::invalid("domainname: the container shares the pod's UTS namespace"));
    }
    let process = spec.process().as_ref().ok_or_else(|| Error::invalid("process is missing"))?;
    let readonly_root = spec.root().as_ref().is_some_and(|root| root.readonly().unwrap_or(false));
    let none = Vec::new();
    let mounts = mounts::read(spec.mounts().as_ref().unwrap_or(&none), config, readonly_root, ids)?;
    let standard_devices = mounts
        .iter()
        .find(|mount| mount.destination == std::path::Path::new("/dev"))
        .is_some_and(|mount| matches!(mount.kind, crate::plan::MountKind::New { .. }));
    let resources = linux.resources().as_ref();
    let devices = devices(linux)?;
    if ids.is_some() {
        // A node can only be made in what the guest mounts for the container.
        let outside = |device: &&Device| !standard_devices || !device.path.starts_with("/dev");
        if let Some(device) = devices.iter().find(outside) {
            let path = device.path.display();
            return Err(Error::Unsupported(format!(
                "device {path}: a node outside a /dev of the container's own, in a user namespace,"
            )));
        }
    }
    Ok(Container {
        namespaces,
        ids,
        limits: limits::read(resources)?,
        huge_pages: huge_pages(resources, config)?,
        rules: rules(resources, &devices)?,
        seccomp: linux.seccomp().clone(),
        mounts,
        standard_devices,
        devices,
        readonly_root,
        root_propagation: root_propagation(linux)?,
        masked: paths(linux.masked_paths().as_deref()),
        readonly: paths(linux.readonly_paths().as_deref()),
        // The pod's containers share its hostname; a spec repeats it without harm.
        hostname: spec.hostname().clone().filter(|_| own_uts),
        domainname: spec.domainname().clone(),
        sysctls: linux.sysctl().clone().unwrap_or_default().into_iter().collect(),
        process: read_process(process)?,
    })
}

/// Bytes of a guest's huge pages; the node's are not the agent's to keep ready.
pub fn huge_pages(
    resources: Option<&oci::LinuxResources>,
    config: &Config,
) -> Result<Option<u64>, Error> {
    match resources.filter(|_| config.boundary == Boundary::Guest) {
        Some(resources) => huge_pages::limit(resources),
        None => Ok(None),
    }
}

fn refuse(spec: &Spec, linux: &oci::Linux) -> Result<(), Error> {
    let hooks = spec.hooks().as_ref().is_some_and(|hooks| *hooks != oci::Hooks::default());
    let process = spec.process().as_ref();
    let label = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
    let resources = linux.resources().as_ref();
    let memory = resources.and_then(|resources| resources.memory().as_ref());
    let cpu = resources.and_then(|resources| resources.cpu().as_ref());
    for (asked, name) in [
        (hooks, "hooks"),
        (
            spec.solaris().is_some() || spec.windows().is_some() || spec.vm().is_some(),
            "a spec for another system",
        ),
        (
            linux.time_offsets().as_ref().is_some_and(|offsets| !offsets.is_empty()),
            "linux.timeOffsets",
        ),
        (
            linux.net_devices().as_ref().is_some_and(|devices| !devices.is_empty()),
            "linux.netDevices",
        ),
        (linux.intel_rdt().is_some(), "linux.intelRdt"),
        (linux.memory_policy().is_some(), "linux.memoryPolicy"),
        (linux.personality().is_some(), "linux.personality"),
        (label(linux.mount_label()), "linux.mountLabel"),
        (process.is_some_and(|p| label(p.selinux_label())), "process.selinuxLabel"),
        (
            process.is_some_and(|p| {
                label(p.apparmor_profile()) && p.apparmor_profile().as_deref() != Some("unconfined")
            }),
            "process.apparmorProfile",
        ),
        (process.is_some_and(|p| p.io_priority().is_some()), "process.ioPriority"),
        (process.is_some_and(|p| p.scheduler().is_some()), "process.scheduler"),
        (process.is_some_and(|p| p.exec_cpu_affinity().is_some()), "process.execCPUAffinity"),
        (
            resources.is_some_and(|r| {
                r.block_io().as_ref().is_some_and(|io| *io != oci::LinuxBlockIo::default())
            }),
            "linux.resources.blockIO",
        ),
        (
            resources.is_some_and(|r| {
                r.network().as_ref().is_some_and(|net| *net != oci::LinuxNetwork::default())
            }),
            "linux.resources.network",
        ),
        (
            resources.is_some_and(|r| r.rdma().as_ref().is_some_and(|rdma| !rdma.is_empty())),
            "linux.resources.rdma",
        ),
        (
            memory.is_some_and(|m| m.disable_oom_killer() == Some(true)),
            "linux.resources.memory.disableOOMKiller",
        ),
        (memory.is_some_and(|m| m.swappiness().is_some()), "linux.resources.memory.swappiness"),
        (
            memory.is_some_and(|m| m.kernel_tcp().is_some_and(|k| k > 0)),
            "linux.resources.memory.kernelTCP",
        ),
        (
            cpu.is_some_and(|c| c.realtime_runtime().is_some_and(|r| r != 0)),
            "linux.resources.cpu.realtimeRuntime",
        ),
    ] {
        if asked {
            return Err(Error::Unsupported(name.to_owned()));
        }
    }
    Ok(())
}

fn namespaces(linux: &oci::Linux) -> Result<u64, Error> {
    // Mounts are always the container's own, and the cgroup namespace is made by its first process.
    let mut bits = namespace::MOUNT;
    for wanted in linux.namespaces().iter().flatten() {
        if let Some(path) = wanted.path() {
            return Err(Error::Unsupported(format!("the namespace path {}", path.display())));
        }
        bits |= match wanted.typ() {
            // The PID namespace is chosen by pid_mode, the user namespace is the pod's.
            LinuxNamespaceType::Mount
            | LinuxNamespaceType::Cgroup
            | LinuxNamespaceType::Pid
            | LinuxNamespaceType::User => 0,
            LinuxNamespaceType::Uts => namespace::UTS,
            LinuxNamespaceType::Ipc => namespace::IPC,
            LinuxNamespaceType::Network => namespace::NET,
            other @ LinuxNamespaceType::Time => {
                return Err(Error::Unsupported(format!("a {other} namespace")));
            }
        };
    }
    Ok(bits)
}

/// The ids of the user namespace, if the spec lists one.
fn ids(linux: &oci::Linux) -> Result<Option<IdMap>, Error> {
    let user = |namespace: &oci::LinuxNamespace| namespace.typ() == LinuxNamespaceType::User;
    let listed = linux.namespaces().iter().flatten().any(user);
    let uids = linux.uid_mappings().as_deref().unwrap_or_default();
    let gids = linux.gid_mappings().as_deref().unwrap_or_default();
    if listed {
        IdMap::of_spec("linux.uidMappings, linux.gidMappings", uids, gids).map(Some)
    } else if uids.is_empty() && gids.is_empty() {
        Ok(None)
    } else {
        let why = "linux.uidMappings without a user namespace".to_owned();
        Err(Error::Unsupported(why))
    }
}

fn paths(list: Option<&[String]>) -> Vec<PathBuf> {
    list.unwrap_or_default().iter().map(PathBuf::from).collect()
}

fn root_propagation(linux: &oci::Linux) -> Result<u64, Error> {
    match linux.rootfs_propagation().as_deref() {
        // The root is a new mount without a peer, so a slave of nobody is private.
        None | Some("" | "private" | "rprivate" | "slave" | "rslave") => Ok(propagation::PRIVATE),
        Some("shared" | "rshared") => Ok(propagation::SHARED),
        Some("unbindable" | "runbindable") => Ok(propagation::UNBINDABLE),
        Some(other) => Err(Error::invalid(format!("linux.rootfsPropagation: {other:?}"))),
    }
}

fn number(value: i64, what: &str) -> Result<u32, Error> {
    u32::try_from(value).map_err(|_| Error::invalid(format!("{what}: {value} is out of range")))
}

fn devices(linux: &oci::Linux) -> Result<Vec<Device>, Error> {
    let mut devices = Vec::new();
    for wanted in linux.devices().iter().flatten() {
        let path = wanted.path().clone();
        let what = format!("device {}", path.display());
        if !path.is_absolute() {
            return Err(Error::invalid(format!("{what}: not an absolute path")));
        }
        devices.push(Device {
            kind: match wanted.typ() {
                LinuxDeviceType::B => DeviceKind::Block,
                LinuxDeviceType::C | LinuxDeviceType::U => DeviceKind::Char,
                LinuxDeviceType::P => DeviceKind::Fifo,
                LinuxDeviceType::A => {
                    return Err(Error::invalid(format!("{what}: a node needs a type")));
                }
            },
            major: number(wanted.major(), &what)?,
            minor: number(wanted.minor(), &what)?,
            mode: wanted.file_mode().unwrap_or(0o666) & 0o7777,
            uid: wanted.uid().unwrap_or(0),
            gid: wanted.gid().unwrap_or(0),
            path,
        });
    }
    Ok(devices)
}

/// Nothing but what is asked for and what every container has. The guest's own disk and ports are
/// device nodes too, so there is no "no rules".
fn rules(resources: Option<&oci::LinuxResources>, devices: &[Device]) -> Result<Vec<Rule>, Error> {
    let mut rules = Vec::new();
    let asked = resources.and_then(|resources| resources.devices().as_deref()).unwrap_or_default();
    for rule in asked {
        let mut bits = 0;
        for letter in rule.access().as_deref().unwrap_or("rwm").chars() {
            bits |= match letter {
                'r' => access::READ,
                'w' => access::WRITE,
                'm' => access::MKNOD,
                _ => return Err(Error::invalid(format!("device rule: access {letter:?}"))),
            };
        }
        let part = |value: Option<i64>| match value {
            None | Some(-1) => Ok(None),
            Some(value) => number(value, "device rule").map(Some),
        };
        rules.push(Rule {
            allow: rule.allow(),
            kind: match rule.typ() {
                None | Some(LinuxDeviceType::A) => Kind::Any,
                Some(LinuxDeviceType::B) => Kind::Block,
                Some(LinuxDeviceType::C | LinuxDeviceType::U) => Kind::Char,
                Some(LinuxDeviceType::P) => continue,
            },
            major: part(rule.major())?,
            minor: part(rule.minor())?,
            access: bits,
        });
    }
    if asked.is_empty() {
        rules.extend(devices.iter().filter_map(|device| {
            let kind = match device.kind {
                DeviceKind::Block => Kind::Block,
                DeviceKind::Char => Kind::Char,
                DeviceKind::Fifo => return None,
            };
            let (major, minor) = (Some(device.major), Some(device.minor));
            Some(Rule { allow: true, kind, major, minor, access: access::ALL })
        }));
    }
    let allow = |kind, major, minor, access| Rule { allow: true, kind, major, minor, access };
    rules.push(allow(Kind::Any, None, None, access::MKNOD));
    for (major, minor) in [
        (1, Some(3)),
        (1, Some(5)),
        (1, Some(7)),
        (1, Some(8)),
        (1, Some(9)),
        (5, Some(0)),
        (5, Some(1)),
        (5, Some(2)),
        (136, None),
    ] {
        rules.push(allow(Kind::Char, Some(major), minor, device_filter::access::ALL));
    }
    Ok(rules)
}

fn read_process(process: &oci::Process) -> Result<Process, Error> {
    let args = process.args().clone().unwrap_or_default();
    if args.is_empty() {
        return Err(Error::invalid("process.args is empty"));
    }
    let window = match process.console_size() {
        None => None,
        Some(size) => {
            let part = |value: u64| {
                u16::try_from(value).map_err(|_| Error::invalid("process.consoleSize"))
            };
            Some((part(size.width())?, part(size.height())?))
        }
    };
    let mut rlimits = Vec::new();
    for limit in process.rlimits().iter().flatten() {
        // The kernel's name is the type's name in JSON.
        let name = serde_json::to_value(limit.typ());
        let name = name.ok().and_then(|name| Some(name.as_str()?.to_owned()));
        let name = name.ok_or_else(|| Error::invalid("process.rlimits: type"))?;
        rlimits.push(Rlimit { name, soft: limit.soft(), hard: limit.hard() });
    }
    Ok(Process {
        args,
        env: process.env().clone().unwrap_or_default(),
        cwd: process.cwd().clone(),
        terminal: process.terminal().unwrap_or(false),
        window,
        capabilities: capabilities(process.capabilities().as_ref())?,
        no_new_privileges: process.no_new_privileges().unwrap_or(false),
        seccomp_flags: 0,
        rlimits,
        oom_score_adj: process.oom_score_adj().unwrap_or(0),
        umask: process.user().umask().unwrap_or(0o022),
    })
}

/// The kernel's order of the capabilities; the index is the number.
const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

fn capabilities(sets: Option<&oci::LinuxCapabilities>) -> Result<Capabilities, Error> {
    let Some(sets) = sets else {
        return Ok(Capabilities::default());
    };
    let bits = |set: &Option<oci::Capabilities>| -> Result<u64, Error> {
        let mut bits = 0;
        for capability in set.iter().flatten() {
            let name = capability.to_string();
            let number = CAPABILITIES
                .iter()
                .position(|known| *known == name)
                .ok_or_else(|| Error::invalid(format!("capability {name} is not known")))?;
            bits |= 1 << number;
        }
        Ok(bits)
    };
    Ok(Capabilities {
        bounding: bits(sets.bounding())?,
        effective: bits(sets.effective())?,
        inheritable: bits(sets.inheritable())?,
        permitted: bits(sets.permitted())?,
        ambient: bits(sets.ambient())?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn read_spec(change: impl FnOnce(&mut Value)) -> Result<Container, Error> {
        let mut spec = json!({
            "ociVersion": "1.2.0",
            "process": { "user": { "uid": 0, "gid": 0 }, "cwd": "/", "args": ["true"] },
            "linux": {},
        });
        change(&mut spec);
        read(spec.to_string().as_bytes(), &Config::guest())
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_by_name() {
        for (path, value, name) in [
            ("/process/selinuxLabel", json!("a:b:c"), "process.selinuxLabel"),
            ("/process/apparmorProfile", json!("mine"), "process.apparmorProfile"),
            ("/hooks", json!({ "poststart": [{ "path": "/x" }] }), "hooks"),
            ("/linux/resources", json!({ "memory": { "swappiness": 3 } }), "swappiness"),
            ("/linux/namespaces", json!([{ "type": "user" }]), "linux.uidMappings"),
            (
                "/linux/uidMappings",
                json!([{ "containerID": 0, "hostID": 1, "size": 1 }]),
                "without a user namespace",
            ),
            ("/linux/namespaces", json!([{ "type": "time" }]), "time namespace"),
            ("/linux/namespaces", json!([{ "type": "network", "path": "/x" }]), "/x"),
            ("/linux/personality", json!({ "domain": "LINUX32" }), "linux.personality"),
        ] {
            let (parent, field) = path.rsplit_once('/').unwrap();
            let result = read_spec(|spec| spec.pointer_mut(parent).unwrap()[field] = value.clone());
            let error = result.unwrap_err();
            assert!(matches!(error, Error::Unsupported(_)), "{path}: {error}");
            assert!(error.to_string().contains(name), "{path}: {error}");
        }
    }

    #[test]
    fn a_user_namespace_comes_with_its_ids() {
        let read = |devices: serde_json::Value| {
            read_spec(|spec| {
                let linux = &mut spec["linux"];
                linux["namespaces"] = json!([{ "type": "user" }]);
                linux["uidMappings"] = json!([{ "containerID": 0, "hostID": 1000, "size": 65536 }]);
                linux["gidMappings"] = json!([{ "containerID": 0, "hostID": 2000, "size": 65536 }]);
                linux["devices"] = devices;
            })
        };
        let spec = read(json!([])).unwrap();
        assert_eq!(spec.ids, Some(IdMap { uid: 1000, gid: 2000, length: 65536 }));
        let error = read(json!([{ "path": "/x", "type": "c", "major": 1, "minor": 3 }]));
        assert!(error.unwrap_err().to_string().contains("device /x: a node outside"));
    }

    #[test]
    fn capability_numbers_are_the_kernels() {
        let sets = json!({ "bounding": ["CAP_CHOWN", "CAP_SYS_ADMIN"], "ambient": ["CAP_CHECKPOINT_RESTORE"] });
        let spec = read_spec(|spec| spec["process"]["capabilities"] = sets).unwrap();
        assert_eq!(spec.process.capabilities.bounding, 1 | 1 << 21);
        assert_eq!(spec.process.capabilities.ambient, 1 << 40);
        assert_eq!(spec.process.capabilities.effective, 0);
    }

    #[test]
    fn without_rules_a_container_gets_its_own_and_the_standard_devices_only() {
        let device = json!([{ "path": "/dev/fuse", "type": "c", "major": 10, "minor": 229 }]);
        let spec = read_spec(|spec| spec["linux"]["devices"] = device).unwrap();
        let may = |major, minor| {
            spec.rules.iter().any(|rule| {
                rule.allow
                    && rule.access & access::READ != 0
                    && rule.major == Some(major)
                    && rule.minor.is_none_or(|m| m == minor)
            })
        };
        assert!(may(10, 229) && may(1, 3) && may(136, 7));
        assert!(!may(254, 0), "the guest's disk");
        assert!(
            spec.rules.iter().all(|rule| rule.access & access::READ == 0 || rule.major.is_some())
        );
    }

    #[test]
    fn only_listed_namespaces_are_the_containers_own() {
        let spec = read_spec(|_| {}).unwrap();
        assert_eq!(spec.namespaces, namespace::MOUNT);
        let spec = read_spec(|spec| {
            spec["linux"]["namespaces"] = json!([{ "type": "uts" }, { "type": "ipc" }])
        })
        .unwrap();
        assert_eq!(spec.namespaces, namespace::MOUNT | namespace::UTS | namespace::IPC);
    }
}
