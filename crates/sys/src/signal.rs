//! Signals by number, real-time ones too.

use rustix::{
    fd::{AsRawFd, BorrowedFd},
    process::Pid,
};
use std::io;

/// Sends to the process behind a pidfd. OK when it has ended.
pub fn send(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    let none = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: without a siginfo the call takes integers only.
    let result =
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, none, 0) };
    gone_is_fine(result as i32)
}

/// Sends to a process by its number. OK when it has ended.
pub fn send_to(pid: Pid, signal: i32) -> io::Result<()> {
    // SAFETY: takes integers only; a Pid is positive, so no group is meant.
    gone_is_fine(unsafe { libc::kill(pid.as_raw_nonzero().get(), signal) })
}

fn gone_is_fine(result: i32) -> io::Result<()> {
    if result == 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        error => Err(error),
    }
}
