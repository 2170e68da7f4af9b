//! Network namespaces named after their sandbox, kept alive by a mount as `ip netns` does, so that
//! `ip netns exec a3s-box-ID` works.

use crate::NetError;
use a3s_box_types::SandboxId;
use rustix::{
    mount::{MountPropagationFlags, UnmountFlags, mount_bind, mount_change, unmount},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};
use std::{
    fs::{self, File},
    io,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

const FOLDER: &str = "/run/netns";
const PREFIX: &str = "a3s-box-";

/// Where the sandbox's namespace is, was or will be.
pub fn path(id: &SandboxId) -> PathBuf {
    Path::new(FOLDER).join(format!("{PREFIX}{id}"))
}

/// Makes the sandbox's namespace, empty but for a loopback interface that is down.
pub fn create(id: &SandboxId) -> Result<PathBuf, NetError> {
    shared_folder().map_err(NetError::io("prepare folder", FOLDER))?;
    let path = path(id);
    File::create_new(&path).map_err(NetError::io("create", &path))?;
    let made = on_own_thread("netns-create", || {
        a3s_box_sys::namespace::unshare_network()?;
        mount_bind("/proc/thread-self/ns/net", &path).map_err(io::Error::from)
    });
    if let Err(source) = made {
        // The error that led here says more than one from removing an empty file.
        fs::remove_file(&path).unwrap_or_default();
        return Err(NetError::Io { step: "make network namespace", path, source });
    }
    Ok(path)
}

/// Removes the sandbox's namespace with everything in it. OK when it is gone already.
pub fn remove(id: &SandboxId) -> Result<(), NetError> {
    let path = path(id);
    loop {
        match unmount(&path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            // There may be several layers: each crash in between leaves one.
            Ok(()) => {}
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => break,
            Err(error) => return Err(NetError::io("unmount", &path)(error.into())),
        }
    }
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(NetError::io("remove", &path)(error))
        }
        _ => Ok(()),
    }
}

/// Every sandbox that has a namespace, or the empty file of one.
pub fn list() -> Result<Vec<SandboxId>, NetError> {
    let entries = match fs::read_dir(FOLDER) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(NetError::io("list", FOLDER)(error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let name = entry.map_err(NetError::io("list", FOLDER))?.file_name();
        let id = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
        found.extend(id.and_then(|id| id.parse::<SandboxId>().ok()));
    }
    Ok(found)
}

/// Does `work` inside a namespace, on a thread of its own that ends with it.
pub(crate) fn inside<T: Send>(
    netns: &Path,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    on_own_thread("netns", || {
        let namespace = File::open(netns)?;
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
        work()
    })
}

fn on_own_thread<T: Send>(
    name: &str,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn_scoped(scope, work)?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
    })
}

/// The folder as a shared mount: a process that copies the mount table (a shim does) sees unmounts
/// here and does not keep namespaces alive.
fn shared_folder() -> io::Result<()> {
    fs::create_dir_all(FOLDER)?;
    let share = || mount_change(FOLDER, MountPropagationFlags::SHARED | MountPropagationFlags::REC);
    match share() {
        Ok(()) => Ok(()),
        // Not a mount yet.
        Err(rustix::io::Errno::INVAL) => {
            rustix::mount::mount_bind_recursive(FOLDER, FOLDER)?;
            Ok(share()?)
        }
        Err(error) => Err(error.into()),
    }
}
