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
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Folder and name.
type Name = (Key, CString);

/// So long the host has to take away what the guest has unmounted.
const PATIENCE: Duration = Duration::from_secs(5);

/// All of them: few, or none.
#[derive(Debug, Default)]
pub struct Held {
    names: Mutex<HashMap<Name, OwnedFd>>,
    released: Condvar,
    /// Held by who waits for that. One, so that the others can serve what it waits for.
    waiting: Mutex<()>,
}

impl Held {
    fn names(&self) -> MutexGuard<'_, HashMap<Name, OwnedFd>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether `name` in `parent` was held and is so no more. Whoever unmounts something in the guest may
    /// remove its place at once; on the host the mount goes a moment later.
    pub fn wait(&self, parent: &Node, name: &CStr) -> Answer<bool> {
        let name = (key(&parent.stat()?), name.to_owned());
        let names = self.names();
        let Some(_one) = self.waiting.try_lock().ok().filter(|_| names.contains_key(&name)) else {
            return Ok(false);
        };
        let held = |names: &mut HashMap<_, _>| names.contains_key(&name);
        let waited = self.released.wait_timeout_while(names, PATIENCE, held);
        Ok(!waited.unwrap_or_else(PoisonError::into_inner).1.timed_out())
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
            Ok(name) => {
                self.names().remove(&name);
                self.released.notify_all();
            }
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
