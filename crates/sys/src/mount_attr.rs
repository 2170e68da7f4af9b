//! `mount_setattr`: flags and propagation of a mount, also of one that is not attached anywhere.

use rustix::fd::{AsRawFd, BorrowedFd};
use std::io;

/// Flags as fsmount and mount_setattr take them.
pub mod flag {
    /// Read-only.
    pub const RDONLY: u64 = libc::MOUNT_ATTR_RDONLY;
    /// Set-user-id bits and file capabilities have no effect.
    pub const NOSUID: u64 = libc::MOUNT_ATTR_NOSUID;
    /// Device files cannot be opened.
    pub const NODEV: u64 = libc::MOUNT_ATTR_NODEV;
    /// Nothing can be executed.
    pub const NOEXEC: u64 = libc::MOUNT_ATTR_NOEXEC;
    /// Access times are not kept.
    pub const NOATIME: u64 = libc::MOUNT_ATTR_NOATIME;
    /// Access times are always kept.
    pub const STRICTATIME: u64 = libc::MOUNT_ATTR_STRICTATIME;
    /// Folders' access times are not kept.
    pub const NODIRATIME: u64 = libc::MOUNT_ATTR_NODIRATIME;
    /// Symbolic links are not followed.
    pub const NOSYMFOLLOW: u64 = 0x0020_0000;
    /// The field that holds relatime (0), noatime and strictatime.
    pub const ATIME: u64 = libc::MOUNT_ATTR__ATIME;
}

/// How mounts below a mount travel between namespaces.
pub mod propagation {
    /// Not at all.
    pub const PRIVATE: u64 = libc::MS_PRIVATE;
    /// Into it.
    pub const SLAVE: u64 = libc::MS_SLAVE;
    /// Both ways.
    pub const SHARED: u64 = libc::MS_SHARED;
    /// Not at all, nor can it be bound.
    pub const UNBINDABLE: u64 = libc::MS_UNBINDABLE;
}

/// A change to a mount; zeroes change nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Change {
    /// Flags to set.
    pub set: u64,
    /// Flags to clear.
    pub clear: u64,
    /// One of [`propagation`], or 0.
    pub propagation: u64,
    /// Apply it to all mounts below, too.
    pub recursive: bool,
}

/// Shows the files of the mount `mount`, which is not attached anywhere yet, with the owners that
/// `user_namespace` (a descriptor of its file in /proc) maps theirs to. Once for a mount.
pub fn map_ids(mount: BorrowedFd<'_>, user_namespace: BorrowedFd<'_>) -> io::Result<()> {
    set(
        mount,
        libc::AT_EMPTY_PATH,
        &libc::mount_attr {
            attr_set: libc::MOUNT_ATTR_IDMAP,
            attr_clr: 0,
            propagation: 0,
            userns_fd: user_namespace.as_raw_fd() as u64,
        },
    )
}

/// Changes the mount that `mount` (a descriptor from open_tree or fsmount, or of its root) is.
pub fn change(mount: BorrowedFd<'_>, change: Change) -> io::Result<()> {
    // An access time mode can only be set after the old one was cleared.
    let atime = if change.set & flag::ATIME != 0 { flag::ATIME } else { 0 };
    let attr = libc::mount_attr {
        attr_set: change.set,
        attr_clr: change.clear | atime,
        propagation: change.propagation,
        userns_fd: 0,
    };
    let flags = libc::AT_EMPTY_PATH | if change.recursive { libc::AT_RECURSIVE } else { 0 };
    set(mount, flags, &attr)
}

fn set(mount: BorrowedFd<'_>, flags: libc::c_int, attr: &libc::mount_attr) -> io::Result<()> {
    // SAFETY: the path is a constant C string and attr outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attr),
            size_of_val(attr),
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
