//! The server's order to a shim: one file in the sandbox's state folder, read once at its start.

use crate::SandboxId;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// File name of [`ShimConfig`] in the state folder.
pub const CONFIG_FILE: &str = "shim.json";
/// File name of the shim's gRPC socket in the state folder.
pub const SOCKET_FILE: &str = "shim.sock";
/// File name of the console's last 64 KiB, written when the boundary ends or a stage fails.
pub const CONSOLE_FILE: &str = "console.log";

/// File descriptors the shim inherits; everything else is closed on exec.
pub mod fd {
    /// Pipe: one line, `ready` once the socket listens or `error: <why>`, then end of file.
    pub const READY: i32 = 3;
    /// The tap in the pod's network namespace, opened with IFF_TAP | IFF_NO_PI | IFF_VNET_HDR.
    pub const TAP: i32 = 4;
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
    /// The writable layer's disk, made by the shim, removed by the server's teardown.
    pub disk: PathBuf,
    /// The virtual machine.
    pub vm: VmConfig,
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
    /// User and group id QEMU runs as; 0 is refused.
    pub uid: u32,
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
