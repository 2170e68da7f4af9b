//! Leaving the namespaces one was born into.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

/// Gives the calling thread a network namespace of its own, with nothing in it but a loopback
/// interface that is down.
///
/// # Errors
/// What unshare said.
pub fn unshare_network() -> io::Result<()> {
    unshare(libc::CLONE_NEWNET)
}

/// Gives the calling thread a copy of the mount namespace. Fails in a process with other threads
/// that share its root and working directory.
///
/// # Errors
/// What unshare said.
pub fn unshare_mount() -> io::Result<()> {
    unshare(libc::CLONE_NEWNS)
}

/// Does `work` in another mount namespace, in a thread of its own: this process's others share a root
/// and a working directory, which nobody may take along.
///
/// # Errors
/// What unshare or setns said; that `work` panicked.
pub fn in_mount_namespace<T: Send>(
    namespace: BorrowedFd<'_>,
    work: impl FnOnce() -> T + Send,
) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().spawn_scoped(scope, || {
            unshare(libc::CLONE_FS)?;
            // SAFETY: setns takes plain numbers, and the thread ends without coming back.
            if unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNS) } < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(work())
        })?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the work there panicked")))
    })
}

fn unshare(flags: i32) -> io::Result<()> {
    // SAFETY: plain numbers; the descriptor table is not among the flags this module passes.
    if unsafe { libc::unshare(flags) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
