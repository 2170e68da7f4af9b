//! What the guest has open.

use super::message::Answer;
use super::nodes::Node;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// An open file or folder.
pub enum Handle {
    /// A regular file. What may be done with it is the kernel's to know: its open mode.
    File(OwnedFd),
    /// A folder.
    Folder {
        node: Arc<Node>,
        fd: OwnedFd,
        /// Where the next getdents64 would go on. Holding it is the right to read.
        position: Mutex<u64>,
    },
}

struct Table {
    open: HashMap<u64, Arc<Handle>>,
    next: u64,
}

/// All of them. Bounded, as [`Nodes`](super::nodes::Nodes) are.
pub struct Handles {
    table: Mutex<Table>,
    limit: usize,
}

impl Handles {
    pub fn new(limit: usize) -> Self {
        Self { table: Mutex::new(Table { open: HashMap::new(), next: 1 }), limit }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// ENFILE when the table is full.
    pub fn check_room(&self) -> Answer {
        if self.table().open.len() < self.limit { Ok(()) } else { Err(Errno::NFILE) }
    }

    pub fn insert(&self, handle: Handle) -> u64 {
        let mut table = self.table();
        let number = table.next;
        table.next += 1;
        table.open.insert(number, Arc::new(handle));
        number
    }

    pub fn get(&self, number: u64) -> Answer<Arc<Handle>> {
        self.table().open.get(&number).cloned().ok_or(Errno::BADF)
    }

    pub fn remove(&self, number: u64) -> Answer {
        let handle = self.table().open.remove(&number);
        handle.map(drop).ok_or(Errno::BADF)
    }
}

impl Handle {
    pub fn file(&self) -> Answer<&OwnedFd> {
        match self {
            Self::File(fd) => Ok(fd),
            Self::Folder { .. } => Err(Errno::ISDIR),
        }
    }

    pub fn fd(&self) -> &OwnedFd {
        match self {
            Self::File(fd) | Self::Folder { fd, .. } => fd,
        }
    }
}
