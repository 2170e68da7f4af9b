//! A mount that a container made, on the host: the share the other way round.
//!
//! The host's kernel asks, the guest answers, and the guest is not to be believed: set-user-id bits and
//! device nodes of it mean nothing here, and its mount stands below the folder that the container was
//! given, wherever links there lead. Whoever reads the requests ends the mount by closing their
//! descriptor, however it ends; then every user of it gets an error.

use super::{Error, Result};
use a3s_box_sys::{mount_table, namespace};
use rustix::fd::{AsRawFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, StatxFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, move_mount,
};
use std::io;
use std::path::{Path, PathBuf};

/// Type of the file system, as the table of mounts has it.
const KIND: &str = "fuse.a3s-box";

/// A folder of the host in which a container's mounts appear: the same one, however often its path is
/// walked.
#[derive(Debug, Clone)]
pub struct Place {
    path: PathBuf,
    identity: (u32, u32, u64),
}

impl Place {
    /// The folder at `path`, which has no links in it; `None`: it is not a folder, and nothing can be
    /// mounted in it.
    pub fn at(path: &Path) -> Result<Option<Self>> {
        let failed = super::share::failed("look at", path);
        let stat = rustix::fs::statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::BASIC_STATS)
            .map_err(|error| failed(error.into()))?;
        let is_folder = u32::from(stat.stx_mode) & 0o170_000 == 0o040_000;
        let identity = (stat.stx_dev_major, stat.stx_dev_minor, stat.stx_ino);
        Ok(is_folder.then(|| Self { path: path.to_owned(), identity }))
    }

    /// Opens the folder at `below` in it.
    fn open(&self, below: &Path) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let no_links = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let folder = rustix::fs::openat2(CWD, &self.path, flags, Mode::empty(), no_links)?;
        let stat = rustix::fs::statx(&folder, "", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)?;
        if (stat.stx_dev_major, stat.stx_dev_minor, stat.stx_ino) != self.identity {
            return Err(io::Error::other("it is another folder now"));
        }
        if below.as_os_str().is_empty() {
            return Ok(folder);
        }
        let beneath = no_links | ResolveFlags::BENEATH;
        Ok(rustix::fs::openat2(&folder, below, flags, Mode::empty(), beneath)?)
    }
}

/// Mounts at `below` in `place`, in the mount namespace `host`, and returns the descriptor on which the
/// kernel asks (it does not block). `name` is what [`detach`] finds the mount by.
pub fn attach(
    host: BorrowedFd<'_>,
    place: &Place,
    below: &Path,
    name: &str,
    more: MountAttrFlags,
) -> Result<OwnedFd> {
    let failed = super::share::failed("mount what the guest has at", &place.path.join(below));
    namespace::in_mount_namespace(host, || mount(place, below, name, more))
        .and_then(|mounted| mounted)
        .map_err(failed)
}

fn mount(place: &Place, below: &Path, name: &str, more: MountAttrFlags) -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let requests = rustix::fs::open("/dev/fuse", flags, Mode::empty())?;
    let target = place.open(below)?;
    let fuse = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in [
        ("source", name),
        ("subtype", "a3s-box"),
        ("fd", &requests.as_raw_fd().to_string()),
        ("rootmode", "40000"),
        ("user_id", "0"),
        ("group_id", "0"),
    ] {
        fsconfig_set_string(&fuse, key, value)?;
    }
    // Everybody on the host, as the files' modes say.
    for key in ["allow_other", "default_permissions"] {
        fsconfig_set_flag(&fuse, key)?;
    }
    fsconfig_create(&fuse)?;
    let flags = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | more;
    let mount = fsmount(&fuse, FsMountFlags::FSMOUNT_CLOEXEC, flags)?;
    let both = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(&mount, "", &target, "", both)?;
    Ok(requests)
}

/// Unmounts in the mount namespace `host` what was mounted there by that name. Nothing there is no
/// error.
pub fn detach(host: BorrowedFd<'_>, name: &str) -> Result<()> {
    let ours = |mount: &mount_table::Mount| mount.kind == KIND && mount.source == name;
    namespace::in_mount_namespace(host, || mount_table::abort_all(ours))
        .and_then(|unmounted| unmounted)
        .map_err(|source| Error::Order { step: "unmount", name: name.to_owned(), source })
}
