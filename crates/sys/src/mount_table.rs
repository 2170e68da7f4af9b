//! The kernel's table of mounts (`/proc/thread-self/mountinfo`), and unmounting exactly what is in it.

use rustix::{
    fd::{AsRawFd, OwnedFd},
    fs::{Mode, OFlags},
    mount::{UnmountFlags, unmount},
};
use std::{
    ffi::OsString,
    fs, io,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

/// One line of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Its number; another mount may have it later.
    pub id: u64,
    /// The mount that it stands on.
    pub parent: u64,
    /// Where it stands, as seen from this process's root.
    pub point: PathBuf,
    /// Nothing can be written through it.
    pub read_only: bool,
    /// Nothing can be executed through it.
    pub no_exec: bool,
    /// It has peers: what is mounted below it is mounted below them.
    pub shared: bool,
    /// Of file system, with its subtype.
    pub kind: String,
    /// What it was mounted from, as the mounter said.
    pub source: String,
}

/// All mounts of the calling thread's namespace, what others stand on before them.
///
/// # Errors
/// The file's.
pub fn read() -> io::Result<Vec<Mount>> {
    let table = fs::read("/proc/thread-self/mountinfo")?;
    Ok(table.split(|byte| *byte == b'\n').filter_map(parse).collect())
}

fn parse(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let text = |field: &[u8]| String::from_utf8_lossy(&unescaped(field)).into_owned();
    let number = |field: &[u8]| std::str::from_utf8(field).ok()?.parse().ok();
    let (id, parent) = (number(fields.next()?)?, number(fields.next()?)?);
    let point = unescaped(fields.nth(2)?);
    let options = fields.next()?;
    let has = |wanted: &[u8]| options.split(|byte| *byte == b',').any(|option| option == wanted);
    // Any number of these, then a dash.
    let optional: Vec<_> = fields.by_ref().take_while(|field| field != b"-").collect();
    Some(Mount {
        id,
        parent,
        point: OsString::from_vec(point).into(),
        read_only: has(b"ro"),
        no_exec: has(b"noexec"),
        shared: optional.iter().any(|field| field.starts_with(b"shared:")),
        kind: text(fields.next()?),
        source: text(fields.next()?),
    })
}

/// The kernel writes white space and backslashes as a backslash and three octal digits.
fn unescaped(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, after @ ..] = rest {
        let digits = after.get(..3).filter(|_| *first == b'\\');
        let code = digits.and_then(|digits| std::str::from_utf8(digits).ok());
        match code.and_then(|code| u8::from_str_radix(code, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[3..];
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    bytes
}

/// Takes away every mount that `wanted` says yes to, with all that stands on it, whoever still uses
/// it. Asks no file system for anything, so one whose server is dead does not hold it up.
///
/// # Errors
/// What is still there afterwards, and why.
pub fn unmount_all(wanted: impl Fn(&Mount) -> bool) -> io::Result<()> {
    unmount_with(UnmountFlags::DETACH, wanted)
}

/// As [`unmount_all`], for file systems that nothing else is mounted of: all who wait for their server
/// get an error now, also those whose wait no signal ends.
///
/// # Errors
/// What is still there afterwards, and why.
pub fn abort_all(wanted: impl Fn(&Mount) -> bool) -> io::Result<()> {
    unmount_with(UnmountFlags::DETACH | UnmountFlags::FORCE, wanted)
}

fn unmount_with(how: UnmountFlags, wanted: impl Fn(&Mount) -> bool) -> io::Result<()> {
    loop {
        let mut failed = None;
        let mut any = false;
        // What stands on another goes with it, and what another hides comes with the next look.
        for mount in read()?.iter().filter(|mount| wanted(mount)) {
            match unmount_one(mount, how) {
                Ok(()) => any = true,
                Err(error) => {
                    let point = mount.point.display();
                    failed =
                        Some(io::Error::new(error.kind(), format!("unmount {point}: {error}")));
                }
            }
        }
        match failed {
            Some(error) if !any => return Err(error),
            None if !any => return Ok(()),
            _ => {}
        }
    }
}

fn unmount_one(mount: &Mount, how: UnmountFlags) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let place = rustix::fs::open(&mount.point, flags, Mode::empty())?;
    if mount_of(&place)? != Some(mount.id) {
        return Err(io::Error::other("another mount hides it"));
    }
    // The path may lead elsewhere by now; the descriptor does not.
    let exactly = format!("/proc/thread-self/fd/{}", place.as_raw_fd());
    Ok(unmount(Path::new(&exactly), how)?)
}

/// The number of the mount that a descriptor is in.
fn mount_of(fd: &OwnedFd) -> io::Result<Option<u64>> {
    let info = fs::read_to_string(format!("/proc/thread-self/fdinfo/{}", fd.as_raw_fd()))?;
    let number = info.lines().find_map(|line| line.strip_prefix("mnt_id:"));
    Ok(number.and_then(|number| number.trim().parse().ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_whatever_its_optional_fields_are() {
        let line =
            b"36 35 98:0 /a /mnt\\0402 ro,noexec,noatime shared:7 master:1 - fuse.x a3s\\134b rw";
        let mount = parse(line).unwrap();
        assert_eq!((mount.id, mount.parent, mount.point.to_str()), (36, 35, Some("/mnt 2")));
        assert!(mount.read_only && mount.no_exec && mount.shared);
        assert_eq!((mount.kind.as_str(), mount.source.as_str()), ("fuse.x", "a3s\\b"));
        let mount = parse(b"36 35 98:0 / / rw,relatime - ext4 /dev/sda rw").unwrap();
        assert!(!mount.read_only && !mount.no_exec && !mount.shared);
        assert_eq!(mount.source, "/dev/sda");
        assert_eq!(parse(b""), None);
        assert_eq!(parse(b"36 35 98:0 / /x rw"), None);
    }

    #[test]
    fn the_table_of_this_process_has_its_root() {
        assert!(read().unwrap().iter().any(|mount| mount.point == Path::new("/")));
    }
}
