//! What the guest knows: one entry for each file it has looked up and not forgotten.
//!
//! A node is an O_PATH descriptor. It stands for the file itself, not for a path to it, so nothing
//! that happens to names can make it another file. Identity is (device, inode, mount): a file that
//! two volumes show is two nodes, because the volumes may differ in what they allow.

use super::held::Held;
use super::message::Answer;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Statx, StatxFlags};
use rustix::io::Errno;
use std::collections::HashMap;
use std::ffi::CStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The root's number, by the protocol.
pub const ROOT: u64 = 1;

/// Everything an answer may need, and the mount.
const STAT: StatxFlags = StatxFlags::BASIC_STATS.union(StatxFlags::MNT_ID);

/// Which part of the share a node is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Zone {
    /// The mount points themselves.
    Share,
    /// Below `images`: never changes.
    Image,
    /// Below `volumes`: the host may change it at any time.
    Volume,
}

/// A file the guest may name by number.
#[derive(Debug)]
pub struct Node {
    /// O_PATH.
    pub fd: OwnedFd,
    pub kind: FileType,
    pub zone: Zone,
    /// The mount it is in may be written to.
    pub writable: bool,
    mount: u64,
}

impl Node {
    pub fn stat(&self) -> Answer<Statx> {
        stat(&self.fd)
    }

    /// EROFS unless it may be changed.
    pub fn check_writable(&self) -> Answer {
        if self.writable { Ok(()) } else { Err(Errno::ROFS) }
    }
}

/// Device, inode, mount.
pub type Key = (u32, u32, u64, u64);

struct Entry {
    node: Arc<Node>,
    key: Key,
    lookups: u64,
}

struct Table {
    by_number: HashMap<u64, Entry>,
    by_key: HashMap<Key, u64>,
    next: u64,
}

/// All nodes. Bounded: the guest decides when to forget.
pub struct Nodes {
    table: Mutex<Table>,
    held: Held,
    limit: usize,
    root_mount: u64,
}

impl Nodes {
    /// Begins with `root` (O_PATH), which is in `zone`, alone.
    pub fn new(root: OwnedFd, zone: Zone, limit: usize) -> Answer<Self> {
        let stat = stat(&root)?;
        let writable = zone == Zone::Volume && !is_read_only(&root)?;
        let node =
            Node { fd: root, kind: FileType::Directory, zone, writable, mount: stat.stx_mnt_id };
        let entry = Entry { node: Arc::new(node), key: key(&stat), lookups: 1 };
        Ok(Self {
            table: Mutex::new(Table {
                by_key: HashMap::from([(entry.key, ROOT)]),
                by_number: HashMap::from([(ROOT, entry)]),
                next: ROOT + 1,
            }),
            held: Held::default(),
            limit,
            root_mount: stat.stx_mnt_id,
        })
    }

    /// Names that stand for what was there before the host mounted something.
    pub fn held(&self) -> &Held {
        &self.held
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn get(&self, number: u64) -> Answer<Arc<Node>> {
        let table = self.table();
        let entry = table.by_number.get(&number).ok_or(Errno::NOENT)?;
        Ok(Arc::clone(&entry.node))
    }

    /// Opens `name` (checked by [`name`](super::message::Arguments::name)) in `parent` and counts
    /// a lookup of what it is. Crosses mounts, never follows a link.
    pub fn lookup(&self, parent: &Node, name: &CStr) -> Answer<(u64, Arc<Node>, Statx)> {
        self.check_room()?;
        let fd = match self.held.find(parent, name)? {
            Some(held) => held,
            None => open_beneath(&parent.fd, name)?,
        };
        let zone = match (parent.zone, name.to_bytes()) {
            (Zone::Share, b"images") => Zone::Image,
            (Zone::Share, _) => Zone::Volume,
            (zone, _) => zone,
        };
        self.insert(parent, zone, fd)
    }

    /// Counts a lookup of `fd` (O_PATH), which was just made in `parent`.
    pub fn insert_child(&self, parent: &Node, fd: OwnedFd) -> Answer<(u64, Arc<Node>, Statx)> {
        self.insert(parent, parent.zone, fd)
    }

    /// ENFILE when the table is full.
    pub fn check_room(&self) -> Answer {
        if self.table().by_number.len() < self.limit { Ok(()) } else { Err(Errno::NFILE) }
    }

    /// Counts a lookup of `fd` (O_PATH), a file of `parent`, as a node of its own: another one than what
    /// the guest knows the file as.
    pub fn insert_double(&self, parent: &Node, fd: OwnedFd) -> Answer<(u64, Arc<Node>, Statx)> {
        self.check_room()?;
        let stat = stat(&fd)?;
        let number = self.table().next;
        // No mount has that number, and no two doubles have the same.
        self.insert_as((u32::MAX, u32::MAX, number, u64::MAX), parent, parent.zone, fd, stat)
    }

    /// The number of what the guest knows.
    pub fn number(&self, key: &Key) -> Option<u64> {
        self.table().by_key.get(key).copied()
    }

    fn insert(&self, parent: &Node, zone: Zone, fd: OwnedFd) -> Answer<(u64, Arc<Node>, Statx)> {
        let stat = stat(&fd)?;
        self.insert_as(key(&stat), parent, zone, fd, stat)
    }

    fn insert_as(
        &self,
        key: Key,
        parent: &Node,
        zone: Zone,
        fd: OwnedFd,
        stat: Statx,
    ) -> Answer<(u64, Arc<Node>, Statx)> {
        let mount = stat.stx_mnt_id;
        let writable = if mount == parent.mount {
            parent.writable
        } else {
            zone == Zone::Volume && !is_read_only(&fd)?
        };
        let mut table = self.table();
        if let Some(number) = table.by_key.get(&key).copied()
            && let Some(entry) = table.by_number.get_mut(&number)
        {
            entry.lookups = entry.lookups.saturating_add(1);
            return Ok((number, Arc::clone(&entry.node), stat));
        }
        let number = table.next;
        table.next += 1;
        let node = Arc::new(Node {
            fd,
            kind: FileType::from_raw_mode(u32::from(stat.stx_mode)),
            zone,
            writable,
            mount,
        });
        table.by_key.insert(key, number);
        let entry = Entry { node: Arc::clone(&node), key, lookups: 1 };
        table.by_number.insert(number, entry);
        Ok((number, node, stat))
    }

    /// Takes back `lookups` of the node's; it is closed when none is left.
    pub fn forget(&self, number: u64, lookups: u64) {
        if number == ROOT {
            return;
        }
        let mut table = self.table();
        let Some(entry) = table.by_number.get_mut(&number) else {
            return;
        };
        entry.lookups = entry.lookups.saturating_sub(lookups);
        if entry.lookups == 0
            && let Some(entry) = table.by_number.remove(&number)
        {
            table.by_key.remove(&entry.key);
            // A descriptor's end may take time: not while others wait for the table.
            drop(table);
            drop(entry);
        }
    }

    /// Names and numbers of attributes that do not change: for how long the guest may keep them.
    pub fn seconds(&self, node: &Node) -> u64 {
        const DAY: u64 = 24 * 60 * 60;
        let fixed = match node.zone {
            Zone::Share => true,
            // A mount point, which is a file, waits for its mount.
            Zone::Image => node.mount != self.root_mount || node.kind == FileType::Directory,
            Zone::Volume => false,
        };
        if fixed { DAY } else { 0 }
    }
}

/// What is to be known of `fd`.
pub fn stat(fd: &OwnedFd) -> Answer<Statx> {
    rustix::fs::statx(fd, "", AtFlags::EMPTY_PATH, STAT)
}

/// Opens a path (O_PATH): crosses mounts, never follows a link.
pub fn open_beneath(folder: &OwnedFd, path: &CStr) -> Answer<OwnedFd> {
    rustix::fs::openat2(
        folder,
        path,
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS,
    )
    .map_err(no_room)
}

pub fn key(stat: &Statx) -> Key {
    (stat.stx_dev_major, stat.stx_dev_minor, stat.stx_ino, stat.stx_mnt_id)
}

fn is_read_only(fd: &impl AsFd) -> Answer<bool> {
    let flags = rustix::fs::fstatvfs(fd)?.f_flag;
    Ok(flags.contains(rustix::fs::StatVfsMountFlags::RDONLY))
}

/// The server's own limit is the share's, as far as the guest is concerned.
pub fn no_room(error: Errno) -> Errno {
    if error == Errno::MFILE { Errno::NFILE } else { error }
}
