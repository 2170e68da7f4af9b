//! `clone3`: the calls that make a container's first process, for a process with one thread.
//!
//! `clone3` without CLONE_VM copies the caller as `fork` does, but runs no atfork handlers and
//! leaves libc's idea of the thread's id behind. Both are harmless as long as no second thread
//! exists, which [`SingleThreaded`] stands for.

use rustix::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::{io, marker::PhantomData};

/// Proof that the process had one thread when it was made. It stays in the thread that made it.
#[derive(Debug)]
pub struct SingleThreaded(PhantomData<*mut ()>);

impl SingleThreaded {
    /// Reads `/proc/self/task`.
    pub fn check() -> io::Result<Self> {
        match std::fs::read_dir("/proc/self/task")?.count() {
            1 => Ok(Self(PhantomData)),
            count => {
                Err(io::Error::other(format!("the process has {count} threads, one is allowed")))
            }
        }
    }
}

/// New namespaces and other wishes for [`clone3`].
#[derive(Debug, Clone, Copy, Default)]
pub struct Clone3<'a> {
    /// CLONE_NEW*: see [`namespace`].
    pub namespaces: u64,
    /// Make the child a sibling of the caller: its parent is the caller's parent.
    pub sibling: bool,
    /// Start in this cgroup (a descriptor of its folder).
    pub cgroup: Option<BorrowedFd<'a>>,
}

/// The bits of [`Clone3::namespaces`] and of [`unshare`].
pub mod namespace {
    /// Mounts.
    pub const MOUNT: u64 = libc::CLONE_NEWNS as u64;
    /// Control groups.
    pub const CGROUP: u64 = libc::CLONE_NEWCGROUP as u64;
    /// Host and domain name.
    pub const UTS: u64 = libc::CLONE_NEWUTS as u64;
    /// System V IPC and POSIX message queues.
    pub const IPC: u64 = libc::CLONE_NEWIPC as u64;
    /// Process ids.
    pub const PID: u64 = libc::CLONE_NEWPID as u64;
    /// User and group ids, and what they own.
    pub const USER: u64 = libc::CLONE_NEWUSER as u64;
    /// Network.
    pub const NET: u64 = libc::CLONE_NEWNET as u64;
}

// libc has it in a type that cannot hold it.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Which side of the call this is.
#[derive(Debug)]
pub enum Cloned {
    /// The caller: the new process's id, and a descriptor that stays its own.
    Parent {
        /// In the caller's PID namespace.
        pid: u32,
        /// pidfd of the child.
        pidfd: OwnedFd,
    },
    /// The new process.
    Child,
}

/// Creates a process as `fork` does, with what `wish` asks for.
pub fn clone3(_proof: &SingleThreaded, wish: &Clone3<'_>) -> io::Result<Cloned> {
    let mut pidfd: libc::c_int = -1;
    let mut flags = wish.namespaces | libc::CLONE_PIDFD as u64;
    let mut exit_signal = libc::SIGCHLD as u64;
    if wish.sibling {
        // The kernel takes the exit signal from the caller then, and refuses another.
        flags |= libc::CLONE_PARENT as u64;
        exit_signal = 0;
    }
    // SAFETY: clone_args is a plain C struct for which all zeroes is valid.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    if let Some(cgroup) = wish.cgroup {
        flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    args.flags = flags;
    args.exit_signal = exit_signal;
    args.pidfd = std::ptr::from_mut(&mut pidfd) as u64;
    // SAFETY: args and pidfd outlive the call; neither CLONE_VM nor a stack is given, so the child
    // has a copy of this memory; the process has one thread, so no lock is held by another one.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of_val(&args)) };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Cloned::Child),
        pid => {
            // SAFETY: on success the kernel stored a new descriptor that nobody else owns.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            Ok(Cloned::Parent { pid: pid as u32, pidfd })
        }
    }
}

/// Moves the caller into new namespaces (PID: its future children). Never CLONE_FILES.
pub fn unshare(namespaces: u64) -> io::Result<()> {
    let all = namespace::MOUNT
        | namespace::CGROUP
        | namespace::UTS
        | namespace::IPC
        | namespace::PID
        | namespace::NET;
    if namespaces & !all != 0 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: only namespace bits are passed; they touch no memory and no descriptor table.
    match unsafe { libc::unshare(namespaces as libc::c_int) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Joins those namespaces of the process behind `pidfd` that `namespaces` names (PID: for the
/// caller's future children).
pub fn join(pidfd: BorrowedFd<'_>, namespaces: u64) -> io::Result<()> {
    // SAFETY: setns takes integers only.
    match unsafe { libc::setns(pidfd.as_raw_fd(), namespaces as libc::c_int) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
