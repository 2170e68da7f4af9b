//! The server's order to a shim: one file in the sandbox's state folder, read once at its start.

use crate::SandboxId;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// File name of [`ShimConfig`] in the state folder.
pub const CONFIG_FILE: &str = "shim.json";
/// File name of the shim's gRPC socket in the state folder.
pub const SOCKET_FILE: &str = "shim.sock";
/// File name of the socket in the state folder at which the shim lends its machine's lanes.
pub const LANES_FILE: &str = "lanes.sock";
/// File name of the console's last 64 KiB, written when the boundary ends or a stage fails.
pub const CONSOLE_FILE: &str = "console.log";

/// What the sources of all mounts begin with that the shim shows on the host for its guest, so that they
/// are found without the shim.
pub fn guest_mounts(id: &SandboxId) -> String {
    format!("a3s-box:{id}/")
}

/// File descriptors the shim inherits; everything else is closed on exec.
pub mod fd {
    /// Pipe: one line, `ready` once the socket listens or `error: <why>`, then end of file.
    pub const READY: i32 = 3;
    /// The tap in the pod's network namespace, opened with IFF_TAP | IFF_NO_PI | IFF_VNET_HDR; only
    /// for [`super::BoundaryConfig::Microvm`].
    pub const TAP: i32 = 4;
    /// The pod's network namespace; only for [`super::BoundaryConfig::Host`] with a network of its own.
    pub const NETNS: i32 = 4;
    /// The template's sealed RAM memfd; only for [`super::Start::Clone`].
    pub const TEMPLATE_RAM: i32 = 5;
}

/// Everything a shim needs to start its boundary.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShimConfig {
    /// Format of this file; 1.
    pub version: u32,
    /// Whose boundary it is.
    pub sandbox_id: SandboxId,
    /// What the pod runs in.
    pub boundary: BoundaryConfig,
}

/// What separates a pod from the node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BoundaryConfig {
    /// A virtual machine of its own.
    Microvm(MicrovmConfig),
    /// The node's kernel: namespaces and cgroups.
    Host(HostConfig),
}

/// A pod in a virtual machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MicrovmConfig {
    /// The writable layers' disk, made by the shim, removed by the server's teardown.
    pub disk: PathBuf,
    /// Size in bytes of a disk that is not a template's.
    pub disk_bytes: u64,
    /// The most memory the machine may ever have, in MiB.
    pub most_memory_mb: u32,
    /// The virtual machine.
    pub vm: VmConfig,
}

/// A pod on the node's kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostConfig {
    /// The agent's program.
    pub agent: PathBuf,
    /// Folder of the writable layers, made by the shim, removed by the server's teardown.
    pub scratch: PathBuf,
    /// The pod's cgroup, in which the shim was started.
    pub cgroup: CgroupName,
    /// The pod has a network of its own: [`fd::NETNS`].
    pub own_network: bool,
    /// The pod has an IPC namespace of its own.
    pub own_ipc: bool,
}

/// Where a pod's cgroup is in every hierarchy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CgroupName {
    /// An absolute path below the mount points, or the name of a systemd slice.
    pub parent: String,
    /// The folder's name.
    pub name: String,
}

/// One virtual machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// QEMU's binary.
    pub qemu: PathBuf,
    /// What executes the guest.
    pub accel: Accel,
    /// How it comes to life.
    pub start: Start,
    /// Its size.
    pub size: VmSize,
    /// As many processors it may ever have; fewer than its size says means as many as that.
    #[serde(default)]
    pub most_vcpus: u32,
    /// User and group id QEMU runs as; 0 is refused.
    pub uid: u32,
}

impl VmConfig {
    /// The processors that the machine has no use for yet, by their numbers.
    pub fn further_vcpus(&self) -> std::ops::Range<u32> {
        self.size.vcpus..self.most_vcpus.max(self.size.vcpus)
    }
}

/// A virtual machine's size; also the key of its template.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct VmSize {
    /// Number of virtual CPUs.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub memory_mb: u32,
}

/// What executes the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Accel {
    /// The hardware, through /dev/kvm.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

/// How a virtual machine comes to life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Start {
    /// As a copy-on-write copy of a template, found in this folder; its RAM is [`fd::TEMPLATE_RAM`].
    Clone {
        /// Holds the device state, the disk and the captured FUSE_INIT.
        template: PathBuf,
    },
    /// From kernel and initramfs.
    Boot {
        /// bzImage.
        kernel: PathBuf,
        /// cpio with the agent and its modules.
        initramfs: PathBuf,
    },
}

/// File name of [`Processes`] in the state folder.
pub const PROCESSES_FILE: &str = "processes.json";
/// Folder of the [`ContainerRecord`]s in the state folder, one `ID.json` each.
pub const CONTAINERS_DIR: &str = "containers";

/// The processes of a boundary, so that exactly these can be ended when the shim cannot do it. Each
/// is written before the next one is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Processes {
    /// The shim itself; the others die with it.
    pub shim: Process,
    /// QEMU.
    pub vmm: Option<Process>,
    /// The share's server.
    pub volume_server: Option<Process>,
    /// The agent, where it is a process of the node.
    pub agent: Option<Process>,
}

impl Processes {
    /// The shim alone.
    pub fn new(shim: Process) -> Self {
        Self { shim, vmm: None, volume_server: None, agent: None }
    }

    /// All that were written so far.
    pub fn all(&self) -> impl Iterator<Item = Process> {
        [Some(self.shim), self.vmm, self.volume_server, self.agent].into_iter().flatten()
    }
}

/// One process, named so that a reused number is not mistaken for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// Clock ticks since boot (field 22 of /proc/PID/stat).
    pub start_time: u64,
}

/// What a shim knows of one container, as it stands on disk. Times are Unix nanoseconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerRecord {
    /// Format of this file; 1.
    pub version: u32,
    /// Whose record it is.
    pub container_id: crate::ContainerId,
    /// Where it stands.
    pub phase: ContainerPhase,
    /// When it was created.
    pub created_at: i64,
    /// When its command was started; 0 before.
    pub started_at: i64,
    /// How it ended.
    pub exit: Option<ContainerExit>,
    /// Process id of its first process in the guest.
    pub guest_pid: u32,
    /// User id its command runs as.
    pub uid: u32,
    /// Group id its command runs as.
    pub gid: u32,
    /// All further groups.
    pub groups: Vec<u32>,
    /// What ended the boundary, when the container ended with it.
    #[serde(default)]
    pub end_reason: String,
}

/// Where a container stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ContainerPhase {
    /// Made; its command has not run.
    Created,
    /// Its command runs.
    Running,
    /// Its command has ended.
    Exited,
}

/// How a container ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerExit {
    /// 0 to 255; 128 and the signal's number when a signal ended it.
    pub code: i32,
    /// 0 unless a signal ended it.
    pub signal: u32,
    /// When.
    pub exited_at: i64,
    /// The kernel killed it for lack of memory.
    pub oom_killed: bool,
    /// Why it ended, beyond what the code says: a number of agent.proto's ExitCause.
    #[serde(default)]
    pub cause: i32,
}
