//! The folder that is a pod's share: a small tmpfs that holds mount points only.
//!
//! It lives in the shim's private mount namespace. The tmpfs is a shared mount, so what is added
//! or removed later reaches the volume server's namespace below. What is bound in is private, or a slave
//! of the host, so that later mounts of the host below a volume appear too; nothing goes back.

use super::{Error, Result};
use a3s_box_sys::mount_attr::{self, Change, flag, propagation};
use a3s_box_sys::mount_table;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{AtFlags, CWD, StatxFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_string, fsmount, fsopen, move_mount, open_tree, unmount,
};
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// A pod's share. Dropping it unmounts nothing: the namespace's end does.
#[derive(Debug)]
pub struct Share {
    root: PathBuf,
}

/// Whether a volume shows what is mounted below it on the host later (CRI: MountPropagation).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Propagation {
    /// It stays as it was.
    Private,
    /// Mounts and unmounts of the host are followed.
    HostToContainer,
}

/// What the guest may change in a volume (CRI: readonly, recursive_read_only).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Access {
    /// Everything.
    ReadWrite,
    /// Nothing in the volume itself. What is mounted below it stays as it is on the host.
    ReadOnly,
    /// Nothing, in what is mounted below it as little.
    ReadOnlyRecursive,
}

impl Share {
    /// Mounts an empty share at `dir`. The caller must be in a mount namespace of its own that
    /// gets the host's mounts and gives none back (unshare, then `/` recursively slave).
    pub fn create(dir: &Path) -> Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed("create", dir))?;
        let share = Self { root: dir.to_owned() };
        share.mount_root().map_err(failed("mount the share at", dir))?;
        for folder in ["images", "volumes"] {
            share.folder(&dir.join(folder))?;
        }
        Ok(share)
    }

    fn mount_root(&self) -> io::Result<()> {
        let tmpfs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        for (key, value) in
            [("source", "a3s-box"), ("mode", "0755"), ("size", "1m"), ("nr_inodes", "16k")]
        {
            fsconfig_set_string(tmpfs.as_fd(), key, value)?;
        }
        fsconfig_create(tmpfs.as_fd())?;
        let mount = fsmount(
            tmpfs.as_fd(),
            FsMountFlags::FSMOUNT_CLOEXEC,
            MountAttrFlags::MOUNT_ATTR_NODEV
                | MountAttrFlags::MOUNT_ATTR_NOSUID
                | MountAttrFlags::MOUNT_ATTR_NOEXEC,
        )?;
        attach(&mount, &self.root)?;
        // Not before it is attached: shared mounts cannot be moved.
        mount_attr::change(
            mount.as_fd(),
            Change { propagation: propagation::SHARED, ..Change::default() },
        )
    }

    /// The folder of the share, for [`serve`](super::serve).
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Shows the file or folder `source`, with everything mounted below it, as `name`
    /// (`images/NAME`, `volumes/CONTAINER/N`). Adding a name a second time is an error.
    pub fn add(
        &self,
        name: &str,
        source: &Path,
        access: Access,
        propagation: Propagation,
    ) -> Result<()> {
        let target = self.path(name)?;
        let tree = open_tree(
            CWD,
            source,
            OpenTreeFlags::OPEN_TREE_CLONE
                | OpenTreeFlags::OPEN_TREE_CLOEXEC
                | OpenTreeFlags::AT_RECURSIVE,
        )
        .map_err(io::Error::from)
        .map_err(failed("open", source))?;
        let is_folder = rustix::fs::statx(&tree, "", AtFlags::EMPTY_PATH, StatxFlags::TYPE)
            .map_err(io::Error::from)
            .map_err(failed("open", source))?
            .stx_mode
            & 0o170_000
            == 0o040_000;
        let read_only = Change {
            set: flag::RDONLY,
            recursive: access == Access::ReadOnlyRecursive,
            ..Change::default()
        };
        if access != Access::ReadWrite {
            mount_attr::change(tree.as_fd(), read_only)
                .map_err(failed("make read-only", source))?;
        }
        let change = Change {
            // Also when the caller's mounts are peers of the host's: nothing may go back.
            propagation: match propagation {
                Propagation::Private => propagation::PRIVATE,
                Propagation::HostToContainer => propagation::SLAVE,
            },
            recursive: true,
            ..Change::default()
        };
        mount_attr::change(tree.as_fd(), change).map_err(failed("set the flags of", source))?;
        if let Some(parent) = target.parent() {
            self.folder(parent)?;
        }
        let point =
            if is_folder { fs::create_dir(&target) } else { File::create_new(&target).map(drop) };
        point.map_err(failed("create", &target))?;
        attach(&tree, &target).map_err(|error| {
            // The first error is the one to tell.
            if is_folder {
                fs::remove_dir(&target).ok();
            } else {
                fs::remove_file(&target).ok();
            }
            failed("bind in", &target)(error)
        })
    }

    /// Whether the host has something mounted below what was added as `name`.
    pub fn has_mounts_below(&self, name: &str) -> Result<bool> {
        Ok(Source::at(&self.path(name)?)?.has_mounts_below)
    }

    /// Takes away what was added as `prefix` or below it. What the guest still holds open ends
    /// when it lets go. Nothing there is no error.
    pub fn remove(&self, prefix: &str) -> Result<()> {
        let path = self.path(prefix)?;
        self.remove_path(&path)
    }

    fn remove_path(&self, path: &Path) -> Result<()> {
        // Ends the mounts that hide the mount point, whatever is stacked there.
        loop {
            match unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
                Ok(()) => {}
                Err(rustix::io::Errno::INVAL) => break,
                Err(rustix::io::Errno::NOENT) => return Ok(()),
                Err(error) => return Err(failed("unmount", path)(error.into())),
            }
        }
        let metadata = fs::symlink_metadata(path).map_err(failed("remove", path))?;
        if metadata.is_dir() {
            for entry in fs::read_dir(path).map_err(failed("remove", path))? {
                self.remove_path(&entry.map_err(failed("remove", path))?.path())?;
            }
            fs::remove_dir(path).map_err(failed("remove", path))
        } else {
            fs::remove_file(path).map_err(failed("remove", path))
        }
    }

    fn path(&self, name: &str) -> Result<PathBuf> {
        let plain = name.split('/').all(|part| !matches!(part, "" | "." | ".."));
        if plain { Ok(self.root.join(name)) } else { Err(Error::Name(name.to_owned())) }
    }

    fn folder(&self, path: &Path) -> Result<()> {
        DirBuilder::new().recursive(true).mode(0o755).create(path).map_err(failed("create", path))
    }
}

/// What is at a path of the host: two that are equal show the same.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Source {
    file: (u32, u32, u64),
    mount: u64,
    /// Something else is mounted below it.
    pub has_mounts_below: bool,
}

impl Source {
    /// Looks at `path`, which has no links in it.
    pub fn at(path: &Path) -> Result<Self> {
        let wanted = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
        let stat = rustix::fs::statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, wanted)
            .map_err(io::Error::from)
            .map_err(failed("look at", path))?;
        let table = mount_table::read().map_err(failed("look for mounts below", path))?;
        let mut below = table.iter().filter(|mount| mount.parent == stat.stx_mnt_id);
        Ok(Self {
            file: (stat.stx_dev_major, stat.stx_dev_minor, stat.stx_ino),
            mount: stat.stx_mnt_id,
            has_mounts_below: below.any(|mount| mount.point.starts_with(path)),
        })
    }
}

fn attach(mount: &OwnedFd, target: &Path) -> io::Result<()> {
    move_mount(mount.as_fd(), "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    Ok(())
}

pub fn failed(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error + use<> {
    let path = path.to_owned();
    move |source| Error::Mount { step, path, source }
}
