//! Descriptors a process was started with.

use std::{
    io,
    os::fd::{FromRawFd, OwnedFd, RawFd},
    sync::atomic::{AtomicU64, Ordering},
};

/// Takes ownership of the inherited descriptor `number`, once in the process's life, and makes it
/// close-on-exec.
///
/// # Errors
/// EBADF when it was not inherited; `InvalidInput` for numbers below 3 or above 63 and for one that
/// was taken already.
pub fn take(number: RawFd) -> io::Result<OwnedFd> {
    static TAKEN: AtomicU64 = AtomicU64::new(0);
    if !(3..64).contains(&number) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: plain numbers; fails with EBADF when nothing is open there.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    if TAKEN.fetch_or(1 << number, Ordering::Relaxed) & (1 << number) != 0 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: it is open, it came from outside, and nobody took it before.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
