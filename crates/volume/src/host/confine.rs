//! Shuts the volume server in.
//!
//! A mount namespace of its own whose root is the share, no capability beyond acting on files, no
//! new privileges, and a filter that knows only the system calls of the operations. What was open
//! before is what the server keeps: the stream, and `/proc/self/fd` as a mount of its own, above
//! which there is nothing.

use super::worker::CAPABILITIES;
use super::{Error, Result};
use a3s_box_sys::clone3::{namespace, unshare};
use a3s_box_sys::mount_attr::{self, Change, flag};
use libseccomp::{ScmpAction, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::inotify::CreateFlags;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, OpenTreeFlags, UnmountFlags};
use rustix::process::{Resource, Rlimit};
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets};
use std::path::Path;

/// Descriptors that are enough for any guest; each costs kernel memory of the pod.
const MAX_DESCRIPTORS: u64 = 1 << 20;

fn failed<E: Into<std::io::Error>>(step: &'static str) -> impl FnOnce(E) -> Error {
    move |error| Error::Confine { step, source: error.into() }
}

/// Raises the limit of open files as far as allowed, and says how far that is.
pub fn descriptors() -> Result<usize> {
    let hard = rustix::process::getrlimit(Resource::Nofile).maximum;
    let limit = hard.unwrap_or(MAX_DESCRIPTORS).min(MAX_DESCRIPTORS);
    let raised = Rlimit { current: Some(limit), maximum: hard };
    rustix::process::setrlimit(Resource::Nofile, raised).map_err(failed("raise RLIMIT_NOFILE"))?;
    Ok(limit as usize)
}

/// An inotify instance that is charged to the user `uid`: root's are few, and all of the node's.
pub fn inotify(uid: u32) -> Result<OwnedFd> {
    let create = || -> rustix::io::Result<OwnedFd> {
        let keep = None;
        let charged = Some(rustix::process::Uid::from_raw(uid));
        rustix::thread::set_thread_res_uid(keep, charged, keep)?;
        rustix::fs::inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)
    };
    // In a thread of its own, which takes the change of user with it.
    let made = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().spawn_scoped(scope, create)?;
        thread.join().unwrap_or(Err(Errno::IO)).map_err(std::io::Error::from)
    });
    made.map_err(failed("make an inotify instance"))
}

/// Descriptors of what is left of the file system.
pub struct Inside {
    /// The share (O_PATH).
    pub root: OwnedFd,
    /// `/proc/self/fd`.
    pub descriptors: OwnedFd,
}

/// Makes the mount at `root` all there is. `frozen`: nothing changes in the mount itself.
pub fn enter(root: &Path, frozen: bool) -> Result<Inside> {
    unshare(namespace::MOUNT).map_err(failed("unshare the mount namespace"))?;
    let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", slave).map_err(failed("make all mounts slaves"))?;
    let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let descriptors = rustix::mount::open_tree(CWD, "/proc/self/fd", clone)
        .map_err(failed("keep /proc/self/fd"))?;

    rustix::process::chdir(root).map_err(failed("enter the share"))?;
    rustix::process::pivot_root(".", ".").map_err(failed("pivot_root"))?;
    // The old root lies on the new one now.
    rustix::mount::unmount(".", UnmountFlags::DETACH).map_err(failed("detach the old root"))?;
    rustix::process::chdir("/").map_err(failed("enter the new root"))?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root =
        rustix::fs::openat(CWD, "/", flags, Mode::empty()).map_err(failed("open the share"))?;
    if frozen {
        let read_only = Change { set: flag::RDONLY, ..Change::default() };
        mount_attr::change(root.as_fd(), read_only).map_err(failed("make the root read-only"))?;
    }
    rustix::process::fchdir(&descriptors).map_err(failed("enter /proc/self/fd"))?;
    rustix::process::umask(Mode::empty()); // the guest has applied its own
    Ok(Inside { root, descriptors })
}

/// Gives up every capability but [`CAPABILITIES`], for good. For the calling thread and those it
/// makes.
pub fn drop_privileges() -> Result<()> {
    rustix::thread::set_thread_groups(&[]).map_err(failed("drop the groups"))?;
    // Capabilities do not depend on the user id any more, which changes with each request.
    let bits = CapabilitiesSecureBits::NO_ROOT
        | CapabilitiesSecureBits::NO_ROOT_LOCKED
        | CapabilitiesSecureBits::NO_SETUID_FIXUP
        | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
        | CapabilitiesSecureBits::KEEP_CAPS_LOCKED
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED;
    rustix::thread::set_capabilities_secure_bits(bits).map_err(failed("lock the secure bits"))?;
    rustix::thread::clear_ambient_capability_set().map_err(failed("clear ambient capabilities"))?;
    for number in 0..64 {
        match rustix::thread::remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(
            1 << number,
        )) {
            Ok(()) => {}
            Err(Errno::INVAL) => break, // beyond the last the kernel knows
            Err(error) => return Err(failed("empty the bounding set")(error)),
        }
    }
    let sets = CapabilitySets {
        effective: CAPABILITIES,
        permitted: CAPABILITIES,
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, sets).map_err(failed("drop capabilities"))?;
    rustix::thread::set_no_new_privs(true).map_err(failed("set no_new_privs"))
}

/// System calls of the operations, of the exchange of messages, and of the allocator, the locks and
/// the end of threads.
const ALLOWED: &[&str] = &[
    "brk",
    "capset",
    "chmod",
    "clock_gettime",
    "close",
    "copy_file_range",
    "exit",
    "exit_group",
    "fallocate",
    "fchmodat",
    "fchownat",
    "fcntl",
    "fdatasync",
    "fstat",
    "fstatfs",
    "fsync",
    "ftruncate",
    "futex",
    "getdents64",
    "getpid",
    "getrandom",
    "gettid",
    "getxattr",
    "inotify_add_watch",
    "inotify_rm_watch",
    "linkat",
    "listxattr",
    "lseek",
    "madvise",
    "mkdirat",
    "mknodat",
    "mremap",
    "munmap",
    "newfstatat",
    "openat",
    "openat2",
    "poll",
    "ppoll",
    "pread64",
    "pwrite64",
    "pwritev2",
    "read",
    "readlinkat",
    "recvfrom",
    "removexattr",
    "renameat2",
    "restart_syscall",
    "rt_sigaction",
    "rt_sigprocmask",
    "rt_sigreturn",
    "sched_yield",
    "sendto",
    "setfsgid",
    "setfsuid",
    "setxattr",
    "shutdown",
    "sigaltstack",
    "statx",
    "symlinkat",
    "tgkill",
    "unlinkat",
    "utimensat",
    "write",
    "writev",
];

/// Filters the system calls of all threads from now on. A call that is not allowed fails with
/// ENOSYS.
pub fn filter() -> Result<()> {
    let mut filter = ScmpFilterContext::new(ScmpAction::Errno(Errno::NOSYS.raw_os_error()))?;
    filter.set_ctl_tsync(true)?;
    for name in ALLOWED {
        // Some do not exist on every architecture.
        if let Ok(call) = ScmpSyscall::from_name(name) {
            filter.add_rule(ScmpAction::Allow, call)?;
        }
    }
    // Memory, but none that can be executed.
    const PROT_EXEC: u64 = 4;
    for name in ["mmap", "mprotect"] {
        let not_executable = ScmpArgCompare::new(2, ScmpCompareOp::MaskedEqual(PROT_EXEC), 0);
        let call = ScmpSyscall::from_name(name)?;
        filter.add_rule_conditional(ScmpAction::Allow, call, &[not_executable])?;
    }
    filter.load()?;
    Ok(())
}
