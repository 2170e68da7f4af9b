//! `setfsuid` and `setfsgid`: whose files the calling thread makes. Other threads keep theirs.
//!
//! Both calls report no failure; the one way to know is to ask again.

use std::io;

/// From now on the calling thread acts on files as `uid` and `gid`. Needs CAP_SETUID and
/// CAP_SETGID. The kernel forgets the thread's parent-death signal when either changes.
pub fn set(uid: u32, gid: u32) -> io::Result<()> {
    const NOBODY: u32 = u32::MAX; // changes nothing, returns the present one
    // SAFETY: takes an integer and changes the caller's credentials only.
    unsafe { libc::setfsgid(gid) };
    // SAFETY: as above.
    unsafe { libc::setfsuid(uid) };
    // SAFETY: as above.
    let now = unsafe { (libc::setfsuid(NOBODY), libc::setfsgid(NOBODY)) };
    if now == (uid as libc::c_int, gid as libc::c_int) {
        Ok(())
    } else {
        Err(io::ErrorKind::PermissionDenied.into())
    }
}
