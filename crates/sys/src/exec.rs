//! The last steps of a new process: signal dispositions, session keyring, `execve`.

use rustix::fd::{AsRawFd, BorrowedFd};
use std::{convert::Infallible, ffi::CStr, io, ptr};

/// Gives every signal its default action and unblocks all, as a new program expects it (the Rust
/// runtime ignores SIGPIPE, and ignoring is inherited).
pub fn reset_signals() -> io::Result<()> {
    for signal in 1..=libc::SIGRTMAX() {
        if signal == libc::SIGKILL || signal == libc::SIGSTOP {
            continue;
        }
        // The two below SIGRTMIN belong to libc, which refuses them; nothing can have set them.
        // SAFETY: SIG_DFL installs no handler.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    // SAFETY: sigset_t is plain data, initialised by sigemptyset before its use.
    let failed = unsafe {
        let mut none = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut())
    };
    if failed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Ignores SIGCHLD: the kernel reaps every child of the caller at once.
pub fn reap_automatically() {
    // SAFETY: SIG_IGN installs no handler.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
}

/// Sleeps until a signal ends the process.
pub fn pause() {
    // SAFETY: takes nothing, returns after a handler ran.
    unsafe { libc::pause() };
}

/// Leaves the inherited session keyring for a new, anonymous one.
pub fn new_session_keyring() -> io::Result<()> {
    // SAFETY: KEYCTL_JOIN_SESSION_KEYRING with a null name touches no memory.
    let result = unsafe {
        libc::syscall(libc::SYS_keyctl, libc::KEYCTL_JOIN_SESSION_KEYRING, ptr::null::<u8>())
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Marks every descriptor from `first` on to be closed by a successful exec.
pub fn close_on_exec_from(first: u32) -> io::Result<()> {
    // SAFETY: takes integers only and closes nothing now.
    let result =
        unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Makes `fd` known as `number` (0, 1 or 2), open across exec.
pub fn set_stdio(fd: BorrowedFd<'_>, number: i32) -> io::Result<()> {
    if !(0..=2).contains(&number) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: only a standard stream's number is replaced, which no OwnedFd of ours owns.
    match unsafe { libc::dup2(fd.as_raw_fd(), number) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Ends the process at once: no destructors, no exit handlers, which would be the parent's.
pub fn exit(code: i32) -> ! {
    // SAFETY: does not return.
    unsafe { libc::_exit(code) }
}

/// Replaces the program. Returns only when that failed.
pub fn execve(path: &CStr, args: &[&CStr], env: &[&CStr]) -> io::Result<Infallible> {
    let pointers = |list: &[&CStr]| -> Vec<*const libc::c_char> {
        list.iter().map(|text| text.as_ptr()).chain([ptr::null()]).collect()
    };
    let (args, env) = (pointers(args), pointers(env));
    // SAFETY: both arrays end with a null pointer and all strings outlive the call.
    unsafe { libc::execve(path.as_ptr(), args.as_ptr(), env.as_ptr()) };
    Err(io::Error::last_os_error())
}
