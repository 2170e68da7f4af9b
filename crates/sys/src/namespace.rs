//! Leaving the namespaces one was born into.

use std::io;

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

fn unshare(flags: i32) -> io::Result<()> {
    // SAFETY: plain numbers; the descriptor table is not among the flags this module passes.
    if unsafe { libc::unshare(flags) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
