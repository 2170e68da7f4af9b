//! Names that go on standing for what was there before the host mounted something.
//!
//! What a container mounts in a volume of its own is mounted on the host, too, and from there it comes
//! into the volume again. The guest has its mount there already: if the name led elsewhere now, its
//! kernel would take the mount away.

use super::message::Answer;
use super::nodes::{Key, Node, key, open_beneath};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Folder and name.
type Name = (Key, CString);

/// All of them: few, or none.
#[derive(Debug, Default)]
pub struct Held(Mutex<HashMap<Name, OwnedFd>>);

impl Held {
    fn names(&self) -> MutexGuard<'_, HashMap<Name, OwnedFd>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What `name` in `parent` stands for, if it is held.
    pub fn find(&self, parent: &Node, name: &CStr) -> Answer<Option<OwnedFd>> {
        let names = self.names();
        if names.is_empty() {
            return Ok(None);
        }
        let held = names.get(&(key(&parent.stat()?), name.to_owned()));
        held.map(|fd| rustix::io::fcntl_dupfd_cloexec(fd, 0)).transpose()
    }

    /// Holds what is at `path` below `root` now.
    pub fn hold(&self, root: &OwnedFd, path: &CStr) -> Answer {
        let name = name_at(root, path)?;
        let fd = open_beneath(root, path)?;
        self.names().insert(name, fd);
        Ok(())
    }

    /// No longer. A name that has gone, or was not held, is no error.
    pub fn release(&self, root: &OwnedFd, path: &CStr) -> Answer {
        match name_at(root, path) {
            Ok(name) => drop(self.names().remove(&name)),
            Err(Errno::NOENT | Errno::NOTDIR) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

fn name_at(root: &OwnedFd, path: &CStr) -> Answer<Name> {
    let (parent, name) = match path.to_bytes().iter().rposition(|byte| *byte == b'/') {
        Some(at) => (&path.to_bytes()[..at], &path.to_bytes()[at + 1..]),
        None => return Err(Errno::INVAL),
    };
    let owned = |bytes: &[u8]| CString::new(bytes).map_err(|_| Errno::INVAL);
    let parent = open_beneath(root, &owned(parent)?)?;
    let stat = super::nodes::stat(&parent)?;
    Ok((key(&stat), owned(name)?))
}
