//! Descriptors the runtime waits on.

use std::{io, os::fd::OwnedFd};
use tokio::io::{Interest, unix::AsyncFd};

/// Lets tasks wait for `fd`. Must be called within a runtime.
///
/// # Errors
/// When the descriptor cannot be polled (a regular file).
pub fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is open and stays the same descriptor until it is dropped.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}

/// Tells of room in `fd`, apart from whoever reads it. To be had when a write found none and dropped when
/// there is some: while it is there, every read at the other end is an event. Must be called within a
/// runtime.
///
/// # Errors
/// As [`watch`], or when there are no more descriptors.
pub fn room(fd: &OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    watch(fd.try_clone()?, Interest::WRITABLE)
}
