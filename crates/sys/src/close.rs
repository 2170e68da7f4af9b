//! `close` with its result: network file systems tell there that data could not be stored.

use rustix::fd::{IntoRawFd, OwnedFd};
use std::io;

/// Closes `fd`. It is closed whatever the result says.
pub fn close(fd: OwnedFd) -> io::Result<()> {
    // SAFETY: the descriptor was owned and is given up here, so nobody else closes or uses it.
    match unsafe { libc::close(fd.into_raw_fd()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
