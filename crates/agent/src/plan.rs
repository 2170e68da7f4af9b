//! What a child of the launcher has to do, complete: written by the agent, read by the child from
//! a memfd, because a container's arguments and environment may be larger than any message.
//!
//! Pure data. Paths in it are the guest's unless they say otherwise.

use a3s_box_sys::mount_attr::Change;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The order for one child.
#[derive(Debug, Serialize, Deserialize)]
pub enum Plan {
    /// Become a container's init process.
    Container(Box<ContainerPlan>),
    /// Become one more process of a container.
    Exec(Box<ExecPlan>),
    /// Hold the pod's PID namespace as its process 1, and its user namespace if it has one.
    Pause(Option<PodPlan>),
    /// Serve a mount to the host, through the standard input.
    Serve(ServePlan),
}

/// A mount to be served.
#[derive(Debug, Serialize, Deserialize)]
pub struct ServePlan {
    /// Where it is.
    pub mount: PathBuf,
    /// Any folder to mount it on, alone.
    pub staging: PathBuf,
}

impl Plan {
    /// Whether the process that does it is a child of the one that is made first.
    pub fn goes_on_in_a_child(&self) -> bool {
        matches!(self, Self::Container(plan) if plan.inner.is_some())
    }
}

/// What the pod's user namespace is and what is set in the namespaces it owns.
#[derive(Debug, Serialize, Deserialize)]
pub struct PodPlan {
    /// Its ids.
    pub ids: IdMap,
    /// The pod's.
    pub hostname: String,
    /// Those of the network and IPC namespaces: name with dots, value.
    pub sysctls: Vec<(String, String)>,
}

/// Ids 0 to `length - 1` of the pod's user namespace are these and up of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMap {
    /// The pod's user 0.
    pub uid: u32,
    /// The pod's group 0.
    pub gid: u32,
    /// How many.
    pub length: u32,
}

/// How a container is made in the pod's user namespace.
#[derive(Debug, Serialize, Deserialize)]
pub struct Inner {
    /// The pod's ids.
    pub ids: IdMap,
    /// New namespaces besides the mount namespace (`clone3::namespace` bits).
    pub namespaces: u64,
}

/// A container's file system, identity and first process.
#[derive(Debug, Serialize, Deserialize)]
pub struct ContainerPlan {
    /// Files of cgroup v1 hierarchies to write `0` to, to enter.
    pub cgroup_doors: Vec<PathBuf>,
    /// In the pod's user namespace.
    pub inner: Option<Inner>,
    /// Where the container's root is mounted before it becomes the root.
    pub staging: PathBuf,
    /// Mounted layers, the highest first.
    pub layers: Vec<PathBuf>,
    /// Writable layer.
    pub upper: PathBuf,
    /// Scratch folder of overlay, beside `upper`.
    pub work: PathBuf,
    /// The root itself is mounted read-only once everything is in place.
    pub readonly_root: bool,
    /// Propagation of the root mount, one of `mount_attr::propagation`.
    pub root_propagation: u64,
    /// In order.
    pub mounts: Vec<Mount>,
    /// Make the standard device nodes and links; false when /dev is somebody else's.
    pub standard_devices: bool,
    /// Further device nodes.
    pub devices: Vec<Device>,
    /// Container paths hidden from it.
    pub masked: Vec<PathBuf>,
    /// Container paths made read-only.
    pub readonly: Vec<PathBuf>,
    /// In a UTS namespace of its own.
    pub hostname: Option<String>,
    /// In a UTS namespace of its own.
    pub domainname: Option<String>,
    /// Name with dots, value.
    pub sysctls: Vec<(String, String)>,
    /// It has a network namespace of its own, whose loopback is still down.
    pub loopback: bool,
    /// Who to become.
    pub user: WantedUser,
    /// What to run.
    pub process: Process,
}

/// One more process in a container.
#[derive(Debug, Serialize, Deserialize)]
pub struct ExecPlan {
    /// As the container's.
    pub cgroup_doors: Vec<PathBuf>,
    /// Which of init's namespaces to join besides its PID namespace (`clone3::namespace` bits).
    pub namespaces: u64,
    /// The ids of its user namespace, if that is not the guest's.
    pub ids: Option<IdMap>,
    /// As init's.
    pub user: User,
    /// What to run.
    pub process: Process,
}

/// A mount in the container.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Mount {
    /// Container path.
    pub destination: PathBuf,
    /// What is mounted.
    pub kind: MountKind,
    /// Flags, applied in order.
    pub changes: Vec<SerdeChange>,
    /// Its files' owners are ids of the pod's user namespace.
    pub mapped: bool,
}

/// What is mounted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum MountKind {
    /// A file or folder of the guest.
    Bind {
        /// Guest path.
        source: PathBuf,
        /// With the mounts below it.
        recursive: bool,
        /// Taken from the node's own mount namespace, so that it can be its source's peer.
        from_node: bool,
    },
    /// An image, read-only.
    Image {
        /// Mounted layers, the highest first; filled in when they are there.
        layers: Vec<PathBuf>,
        /// Folder of the image; empty: all of it.
        sub_path: PathBuf,
    },
    /// A new file system.
    New {
        /// Type.
        kind: String,
        /// Source string for /proc/mounts.
        source: String,
        /// Its own options.
        options: Vec<(String, Option<String>)>,
    },
}

/// [`Change`] for serde.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct SerdeChange {
    /// See [`Change::set`].
    pub set: u64,
    /// See [`Change::clear`].
    pub clear: u64,
    /// See [`Change::propagation`].
    pub propagation: u64,
    /// See [`Change::recursive`].
    pub recursive: bool,
}

impl From<SerdeChange> for Change {
    fn from(change: SerdeChange) -> Self {
        let SerdeChange { set, clear, propagation, recursive } = change;
        Self { set, clear, propagation, recursive }
    }
}

/// A device node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Container path.
    pub path: PathBuf,
    /// Type of node.
    pub kind: DeviceKind,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// Type of a device node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceKind {
    /// Block.
    Block,
    /// Character.
    Char,
    /// Named pipe.
    Fifo,
}

/// Who a container's process is to run as, before its user database was read.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WantedUser {
    /// As in an image's USER.
    pub user: String,
    /// Stronger than `user`.
    pub uid: Option<u32>,
    /// Stronger than the group of `user`.
    pub gid: Option<u32>,
    /// Further groups.
    pub supplemental_groups: Vec<u32>,
    /// Leave out the groups that /etc/group lists the user in.
    pub strict_groups: bool,
}

/// Who a container's process runs as.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Supplementary groups, the primary one first.
    pub groups: Vec<u32>,
}

/// A program and all that stands around it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Process {
    /// The command as given.
    pub args: Vec<String>,
    /// `NAME=value`.
    pub env: Vec<String>,
    /// Working directory, made when missing.
    pub cwd: PathBuf,
    /// Give it a terminal of the container.
    pub terminal: bool,
    /// First size of the terminal: width, height.
    pub window: Option<(u16, u16)>,
    /// What is left of root's powers.
    pub capabilities: Capabilities,
    /// Set-user-id programs gain nothing.
    pub no_new_privileges: bool,
    /// Flags for the seccomp filter, if a filter comes with the plan.
    pub seccomp_flags: u64,
    /// Resource number, soft, hard.
    pub rlimits: Vec<Rlimit>,
    /// `/proc/self/oom_score_adj`.
    pub oom_score_adj: i32,
    /// File mode mask.
    pub umask: u32,
}

/// One resource limit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rlimit {
    /// `RLIMIT_NOFILE` and the like.
    pub name: String,
    /// Soft limit; all ones is no limit.
    pub soft: u64,
    /// Hard limit.
    pub hard: u64,
}

/// The five capability sets, one bit per capability.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// Ceiling for exec.
    pub bounding: u64,
    /// In force.
    pub effective: u64,
    /// Kept across exec for files that have them.
    pub inheritable: u64,
    /// May be put in force.
    pub permitted: u64,
    /// Kept across exec of an ordinary file.
    pub ambient: u64,
}

/// What a child reports; one message each.
#[derive(Debug, Serialize, Deserialize)]
pub enum Report {
    /// Everything is in place; waiting for the word to exec. With a terminal, its master comes along.
    Ready(User),
    /// It goes on in a child, whose pidfd comes along, and is about to exit.
    Child(i32),
    /// It failed and is about to exit.
    Failed(Failure),
}

/// Why a child failed.
#[derive(Debug, Clone, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// For the status code.
    pub kind: FailureKind,
    /// Names the step and on what it failed.
    pub message: String,
}

/// The kinds of failure a caller tells apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureKind {
    /// The request cannot be met in this container: unknown user, bad path.
    Invalid,
    /// The command is not there.
    NotFound,
    /// The command may not be executed.
    PermissionDenied,
    /// Anything else.
    Internal,
}
