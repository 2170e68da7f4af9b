//! Kubelet's updates of ConfigMaps, Secrets and the like, for programs in the guest that wait for them.
//!
//! In such a volume `..data` is a link to the folder of one version. Kubelet writes a new folder, renames
//! a new link over the old one and removes the old folder. The guest sees all of that at once whenever it
//! looks, but its kernel does not notice by itself, so inotify there would be silent. What a program
//! would have been told where kubelet runs, it is told by this:
//!
//! - A folder's watcher: the guest is asked ([`wire::REPLAY`]) to rename a link that does not exist to
//!   `..data`, and the server answers as if it had been done. It was, on the host.
//! - A file's watcher: FUSE_NOTIFY_DELETE for the files of the old version.

use super::message::Answer;
use super::nodes::{Key, Node, Nodes, key, open_beneath, stat};
use crate::wire;
use rustix::fd::{AsRawFd, OwnedFd};
use rustix::fs::inotify::{self, ReadFlags, WatchFlags};
use rustix::fs::{FileType, Mode, OFlags, RawDir};
use rustix::io::Errno;
use rustix::path::DecInt;
use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::mem::MaybeUninit;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Files of a version that are remembered; a ConfigMap has 1 MiB at most.
const MOST_FILES: usize = 4096;
/// Folders in folders.
const DEEPEST: usize = 16;
const FUSE_NOTIFY_DELETE: i32 = 6;

/// The watched volumes.
#[derive(Debug)]
pub struct Updates {
    /// Does not block.
    pub inotify: OwnedFd,
    volumes: Mutex<HashMap<i32, Volume>>,
    /// How many renames the guest was asked for and has not done yet, by the volume's folder.
    expected: Mutex<HashMap<Key, u32>>,
}

#[derive(Debug)]
struct Volume {
    /// In the share.
    path: CString,
    folder: OwnedFd,
    /// The files of the version that is there.
    files: Vec<File>,
}

#[derive(Debug)]
struct File {
    folder: Key,
    name: CString,
    key: Key,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Updates {
    /// None yet. `inotify` is told of them.
    pub fn new(inotify: OwnedFd) -> Self {
        Self { inotify, volumes: Mutex::default(), expected: Mutex::default() }
    }

    /// Begins to watch the volume at `path` below `root`.
    pub fn watch(&self, root: &OwnedFd, path: &CStr) -> Answer {
        let folder = open_beneath(root, path)?;
        let number = DecInt::new(folder.as_raw_fd());
        let wanted = WatchFlags::MOVED_TO | WatchFlags::ONLYDIR;
        // The working directory is /proc/self/fd.
        let watch = inotify::add_watch(&self.inotify, number, wanted)?;
        let files = files(&folder);
        lock(&self.volumes).insert(watch, Volume { path: path.to_owned(), folder, files });
        Ok(())
    }

    /// No longer, for the volume at `prefix` and all below it.
    pub fn unwatch(&self, prefix: &CStr) {
        let mut volumes = lock(&self.volumes);
        volumes.retain(|watch, volume| {
            let rest = volume.path.to_bytes().strip_prefix(prefix.to_bytes());
            let below = rest.is_some_and(|rest| matches!(rest, [] | [b'/', ..]));
            if below {
                // The kernel may have ended it.
                inotify::remove_watch(&self.inotify, *watch).ok();
            }
            !below
        });
    }

    /// What the guest is to be sent now.
    pub fn messages(&self, nodes: &Nodes) -> Answer<Vec<Vec<u8>>> {
        let mut messages = Vec::new();
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(&self.inotify, &mut buffer);
        loop {
            let (watch, told, renamed) = match events.next() {
                Ok(event) => (event.wd(), event.events(), event.file_name() == Some(wire::UPDATED)),
                Err(Errno::AGAIN) => return Ok(messages),
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error),
            };
            let mut volumes = lock(&self.volumes);
            if told.contains(ReadFlags::QUEUE_OVERFLOW) {
                for volume in volumes.values_mut() {
                    self.tell(volume, nodes, &mut messages)?;
                }
            } else if told.contains(ReadFlags::IGNORED) {
                volumes.remove(&watch);
            } else if let Some(volume) = volumes.get_mut(&watch).filter(|_| renamed) {
                self.tell(volume, nodes, &mut messages)?;
            }
        }
    }

    fn tell(&self, volume: &mut Volume, nodes: &Nodes, messages: &mut Vec<Vec<u8>>) -> Answer {
        *lock(&self.expected).entry(key(&stat(&volume.folder)?)).or_default() += 1;
        messages.push(notification(wire::REPLAY, volume.path.to_bytes_with_nul()));
        let old = std::mem::replace(&mut volume.files, files(&volume.folder));
        for File { folder, name, key } in old {
            // Only what the guest knows can have a watcher.
            let Some((folder, file)) = nodes.number(&folder).zip(nodes.number(&key)) else {
                continue;
            };
            let mut body = Vec::new();
            body.extend_from_slice(&folder.to_ne_bytes());
            body.extend_from_slice(&file.to_ne_bytes());
            body.extend_from_slice(&(name.count_bytes() as u64).to_ne_bytes()); // and padding
            body.extend_from_slice(name.as_bytes_with_nul());
            messages.push(notification(FUSE_NOTIFY_DELETE, &body));
        }
        Ok(())
    }

    /// Whether `name` in `folder` is the link that the guest was asked to rename; then what it would
    /// have become.
    pub fn stand_in(&self, folder: &Node, name: &CStr) -> Answer<Option<OwnedFd>> {
        if name != wire::REPLAYED || !self.is_expected(folder)? {
            return Ok(None);
        }
        open_beneath(&folder.fd, wire::UPDATED).map(Some)
    }

    fn is_expected(&self, folder: &Node) -> Answer<bool> {
        let folder = key(&folder.stat()?);
        Ok(lock(&self.expected).contains_key(&folder))
    }

    /// Takes note of the guest's rename; false: it was not asked for it.
    pub fn renamed(&self, from: (&Node, &CStr), to: (&Node, &CStr)) -> Answer<bool> {
        if (from.1, to.1) != (wire::REPLAYED, wire::UPDATED) {
            return Ok(false);
        }
        let folder = key(&from.0.stat()?);
        let mut expected = lock(&self.expected);
        let Some(count) = expected.get_mut(&folder) else { return Ok(false) };
        *count -= 1;
        if *count == 0 {
            expected.remove(&folder);
        }
        Ok(true)
    }
}

/// A message that answers nothing.
fn notification(code: i32, body: &[u8]) -> Vec<u8> {
    let header = wire::out_header(wire::OUT_HEADER + body.len(), code, 0);
    [&header, body].concat()
}

/// The files of the version that is there now. What is missing while kubelet is at it is not there.
fn files(volume: &OwnedFd) -> Vec<File> {
    let mut found = Vec::new();
    let version = rustix::fs::readlinkat(volume, wire::UPDATED, Vec::new())
        .and_then(|name| open_beneath(volume, &name));
    if let Ok(folder) = version {
        // The guest learns less then, and later.
        collect(&folder, 0, &mut found).ok();
    }
    found
}

fn collect(folder: &OwnedFd, depth: usize, found: &mut Vec<File>) -> Answer {
    let own = key(&stat(folder)?);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let listed = rustix::fs::openat(folder, ".", flags, Mode::empty())?;
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut entries = RawDir::new(&listed, &mut buffer);
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let fd = open_beneath(folder, name)?;
        let known = stat(&fd)?;
        match FileType::from_raw_mode(u32::from(known.stx_mode)) {
            FileType::Directory if depth < DEEPEST => collect(&fd, depth + 1, found)?,
            FileType::RegularFile if found.len() < MOST_FILES => {
                found.push(File { folder: own, name: name.to_owned(), key: key(&known) });
            }
            _ => {}
        }
    }
    Ok(())
}
