//! What a container is to be, free of CRI types: the part of its record that never changes.

use crate::{security::Seccomp, user_namespace::UserNamespace};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Everything CreateContainer asked for and this server honours. Two requests mean the same
/// container exactly when their specs are equal.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerSpec {
    /// Unique in the sandbox together with `attempt`.
    pub name: String,
    /// Counts the containers of one name.
    pub attempt: u32,
    /// The image as the caller names it.
    pub image: ImageName,
    /// Replaces the image's entry point.
    pub command: Vec<String>,
    /// Replaces the image's arguments.
    pub args: Vec<String>,
    /// Empty: the image's.
    pub working_dir: String,
    /// After the image's, stronger than them.
    pub env: Vec<(String, String)>,
    /// In the caller's order.
    pub mounts: Vec<MountSpec>,
    /// Of the node; a guest has its block devices as disks.
    #[serde(default)]
    pub devices: Vec<DeviceSpec>,
    /// Selected on by lists.
    pub labels: BTreeMap<String, String>,
    /// Echoed.
    pub annotations: BTreeMap<String, String>,
    /// Relative to the sandbox's log folder; empty: no log file.
    pub log_path: String,
    /// Keep stdin open for attach.
    pub stdin: bool,
    /// Close stdin after the first attach.
    pub stdin_once: bool,
    /// Run on a terminal.
    pub tty: bool,
    /// Limits.
    pub resources: Resources,
    /// Identity and privileges.
    pub security: Security,
    /// The CRI's number of the signal; 0: the image's.
    pub stop_signal: i32,
}

/// An image as the caller names it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageName {
    /// What is resolved: usually an image id.
    pub image: String,
    /// What the pod's author wrote.
    pub user_specified: String,
    /// Echoed.
    pub annotations: BTreeMap<String, String>,
}

/// A folder or file of the host, or an image, in the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountSpec {
    /// Absolute, inside.
    pub container_path: String,
    /// Absolute, on the host; made as a folder when missing. Empty: it is an image.
    pub host_path: String,
    /// What it shows instead of a path of the host.
    #[serde(default)]
    pub image: Option<ImageVolume>,
    /// No writes, but to what is mounted below on the host.
    pub readonly: bool,
    /// No writes to what is mounted below either.
    #[serde(default)]
    pub recursive_readonly: bool,
    /// Kubelet's wish that the files get the container's SELinux label, which it utters for nearly every
    /// volume. No container here has a label (`selinux_options` are refused), so nothing is to be done.
    pub selinux_relabel: bool,
    /// Its files' owners are the pod's ids, not the guest's.
    #[serde(default)]
    pub id_mapped: bool,
    /// It is a volume of huge pages, which a guest has of its own.
    #[serde(default)]
    pub huge_pages: bool,
    /// Which later mounts are seen.
    pub propagation: Propagation,
    /// Further flags of the mount, each of which takes something away.
    #[serde(default)]
    pub options: Vec<String>,
}

/// An image that is mounted (KEP-4639).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageVolume {
    /// As the caller names it.
    pub name: ImageName,
    /// Folder of the image; empty: all of it.
    pub sub_path: String,
    /// Digest of its config, once it is found.
    pub id: String,
}

/// Which mounts made later are seen on the other side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Propagation {
    /// None.
    Private,
    /// The host's in the container.
    HostToContainer,
    /// The host's in the container, and the container's on the host.
    Bidirectional,
}

/// A device node of the node, or a folder of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceSpec {
    /// Absolute, on the host.
    pub host_path: String,
    /// Absolute, inside.
    pub container_path: String,
    /// Of `r`, `w` and `m`.
    pub permissions: String,
}

/// Limits, as the CRI counts them; 0 and empty: not given.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    /// Microseconds.
    pub cpu_period: i64,
    /// Microseconds per period.
    pub cpu_quota: i64,
    /// As cgroup v1 counts them.
    pub cpu_shares: i64,
    /// CPU list; only on the node's own kernel.
    #[serde(default)]
    pub cpuset_cpus: String,
    /// Memory node list; only on the node's own kernel.
    #[serde(default)]
    pub cpuset_mems: String,
    /// Bytes.
    pub memory_limit: i64,
    /// Bytes of memory and swap together; the guest has no swap, so any limit holds.
    pub memory_swap_limit: i64,
    /// -1000 to 1000.
    pub oom_score_adj: i64,
    /// Bytes of huge pages, by their size as cgroups write it (`2MB`).
    #[serde(default)]
    pub huge_pages: BTreeMap<String, u64>,
    /// cgroup v2 files, written as they are.
    pub unified: BTreeMap<String, String>,
}

/// Identity and privileges.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Security {
    /// Every capability and device of the guest, or of the node where the pod runs on its kernel.
    pub privileged: bool,
    /// CRI's names.
    pub add_capabilities: Vec<String>,
    /// CRI's names.
    pub drop_capabilities: Vec<String>,
    /// CRI's names.
    pub add_ambient_capabilities: Vec<String>,
    /// Stronger than the image's user.
    pub run_as_user: Option<u32>,
    /// Looked up in the image; empty: not given.
    pub run_as_username: String,
    /// Needs one of the two above.
    pub run_as_group: Option<u32>,
    /// Besides the user's own.
    pub supplemental_groups: Vec<u32>,
    /// Not the image's memberships.
    pub strict_groups: bool,
    /// Root file system without writes.
    pub readonly_rootfs: bool,
    /// No setuid gains.
    pub no_new_privileges: bool,
    /// Hidden.
    pub masked_paths: Vec<String>,
    /// Without writes.
    pub readonly_paths: Vec<String>,
    /// System calls.
    pub seccomp: Seccomp,
    /// PID namespace.
    pub pid: Pid,
    /// User namespace, which is the sandbox's; `None`: the guest's own.
    #[serde(default)]
    pub user_namespace: Option<UserNamespace>,
}

impl Default for Security {
    fn default() -> Self {
        Self {
            privileged: false,
            add_capabilities: Vec::new(),
            drop_capabilities: Vec::new(),
            add_ambient_capabilities: Vec::new(),
            run_as_user: None,
            run_as_username: String::new(),
            run_as_group: None,
            supplemental_groups: Vec::new(),
            strict_groups: false,
            readonly_rootfs: false,
            no_new_privileges: false,
            masked_paths: Vec::new(),
            readonly_paths: Vec::new(),
            seccomp: Seccomp::Unconfined,
            pid: Pid::Pod,
            user_namespace: None,
        }
    }
}

/// Whose processes the container sees.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pid {
    /// The pod's.
    Pod,
    /// Its own.
    Container,
    /// Another container's.
    Target(String),
    /// The node's.
    Node,
}
